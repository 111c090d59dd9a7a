"use strict";
// Hover values: an element with data-tip shows it; a plot with data-series shows the nearest point of each series, also
// by the arrow keys while it has the focus.
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
const HELD = "[data-tip], svg[data-series]";
const NEARBY = 12; // of the width of a plot
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
  return (clientX - box.left) * svg.viewBox.baseVal.width / box.width;
}

function series(svg) {
  svg.read ??= JSON.parse(svg.dataset.series).map((one) => ({ ...one, words: one.words.split("\n") }));
  return svg.read;
}

function nearest(svg, x) {
  let at = null;
  const found = series(svg).map(({ label, places, words }) => {
    let best = 0;
    places.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = i; });
    if (at === null || Math.abs(places[best] - x) < Math.abs(at - x)) at = places[best];
    return { place: places[best], line: `${label}: ${words[best]}` };
  });
  // A series without a point nearby has no value here.
  const lines = found.filter(({ place }) => Math.abs(place - at) <= NEARBY).map(({ line }) => line);
  if (at !== null) {
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
  }
  svg.at = at;
  return lines.join("\n");
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { hideTip(); return; }
  const svg = event.target.closest?.("svg[data-series]");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!svg || !step) return;
  event.preventDefault();
  const places = [...new Set(series(svg).flatMap((one) => one.places))].sort((a, b) => a - b);
  if (!places.length) return;
  const now = svg.at === undefined ? -1 : places.indexOf(svg.at);
  const to = now < 0 && step < 0 ? places.length - 1 : Math.max(0, Math.min(places.length - 1, now + step));
  if (held !== svg) hideTip();
  held = svg;
  const words = nearest(svg, places[to]);
  const box = svg.getBoundingClientRect();
  const x = box.left + places[to] * box.width / svg.viewBox.baseVal.width;
  showTip(x + window.scrollX, box.top + box.height / 3 + window.scrollY, words);
});

document.addEventListener("focusout", hideTip);

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
