"use strict";
// Hover values: an element with data-tip shows it; a plot with data-series shows the nearest point of each series, also
// by keys while it has the focus: arrows, PageUp and PageDown for ten, Home and End.
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
const HELD = "[data-tip], svg[data-series]";
const NEARBY_PX = 12; // what a series has further away is no value of the place that is pointed at
let held = null;

function showTip(x, y, words) {
  tip.textContent = words;
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(0, Math.min(x + 12, room))}px`;
  tip.style.top = `${y + 12}px`;
}

function hideTip() {
  tip.hidden = true;
  held?.querySelector?.(".cursor")?.setAttribute("visibility", "hidden");
  held = null;
}

function point(event) {
  const over = event.target.closest?.(HELD);
  if (over !== held) hideTip();
  if (!over) return;
  held = over;
  const words = over.dataset.tip ?? nearest(over, viewX(over, event.clientX));
  if (words) showTip(event.pageX, event.pageY, words);
}

// A tap on a touch screen moves no pointer; its click comes after the focus has gone to what was tapped.
for (const name of ["pointermove", "click"]) document.addEventListener(name, point);

function viewX(svg, clientX) {
  const box = svg.getBoundingClientRect();
  return 100 * (clientX - box.left) / box.width;
}

function series(svg) {
  svg.read ??= JSON.parse(svg.dataset.series).map((one) => ({ ...one, at: one.at.split("\n"), words: one.words.split("\n") }));
  return svg.read;
}

// The values at the place that is nearest to x (percent): of each series the nearest point, unless that is far away.
function nearest(svg, x) {
  let first = null;
  const found = series(svg).map(({ label, places, at, words }) => {
    let best = 0;
    places.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = i; });
    const one = { label, place: places[best], at: at[best], words: words[best] };
    if (first === null || Math.abs(one.place - x) < Math.abs(first.place - x)) first = one;
    return one;
  });
  if (first === null) return "";
  const nearby = 100 * NEARBY_PX / svg.getBoundingClientRect().width;
  const lines = found.filter(({ place }) => Math.abs(place - first.place) <= nearby)
    .map(({ label, at, words }) => `${label}: ${words}${at === first.at ? "" : ` (at ${at})`}`);
  const cursor = svg.querySelector(".cursor");
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, `${first.place}%`);
  cursor.setAttribute("visibility", "visible");
  svg.at = first.place;
  return [`at ${first.at} ${svg.dataset.x}`, ...lines].join("\n");
}

// Where a key leads among `count` places, from `now`, -1 if it is at none yet; undefined if the key leads nowhere.
const STEPS = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
function moved(event, now, count) {
  const step = event.altKey || event.ctrlKey || event.metaKey ? undefined : STEPS[event.key];
  if (!step || !count) return undefined;
  event.preventDefault();
  if (now < 0) return step === -1 || step === Infinity ? count - 1 : 0;
  return Math.max(0, Math.min(count - 1, now + step));
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { hideTip(); return; }
  const svg = event.target.closest?.("svg[data-series]");
  if (!svg) return;
  const places = [...new Set(series(svg).flatMap((one) => one.places))].sort((a, b) => a - b);
  const to = moved(event, svg.at === undefined ? -1 : places.indexOf(svg.at), places.length);
  if (to === undefined) return;
  if (held !== svg) hideTip();
  held = svg;
  const words = nearest(svg, places[to]);
  const box = svg.getBoundingClientRect();
  showTip(box.left + places[to] * box.width / 100 + window.scrollX, box.top + box.height / 3 + window.scrollY, words);
});

// Marks with values inside of an element with data-walk: while it has the focus, the same keys go from one to the next.
document.addEventListener("keydown", (event) => {
  const box = event.target;
  if (!box.matches?.("[data-walk]")) return;
  const marks = [...box.querySelectorAll("[data-tip]")];
  const now = marks.findIndex((mark) => mark.classList.contains("pointed"));
  const to = moved(event, now, marks.length);
  if (to === undefined) return;
  marks[now]?.classList.remove("pointed");
  marks[to].classList.add("pointed");
  marks[to].scrollIntoView({ block: "nearest" });
  const at = marks[to].getBoundingClientRect();
  showTip(at.left + window.scrollX, at.bottom + window.scrollY, marks[to].dataset.tip);
});

document.addEventListener("focusout", (event) => {
  event.target.querySelector?.(".pointed")?.classList.remove("pointed");
  hideTip();
});

// Paper can't be opened: what is closed is printed open, and closed again.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const one of closed) one.open = true;
});
addEventListener("afterprint", () => { for (const one of closed) one.open = false; });

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("button[data-copy]");
  if (!button) return;
  const words = document.getElementById(button.dataset.copy).textContent;
  try { await navigator.clipboard.writeText(words); } catch {
    const area = document.createElement("textarea");
    area.value = words;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
});
