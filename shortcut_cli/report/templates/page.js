"use strict";
// Hover values: an element with data-tip shows it; a plot with data-series shows the nearest point of each series.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

function showTip(event, words) {
  tip.textContent = words;
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(0, Math.min(event.pageX + 12, room))}px`;
  tip.style.top = `${event.pageY + 12}px`;
}

document.addEventListener("pointermove", (event) => {
  const held = event.target.closest?.("[data-tip], svg[data-series]");
  if (!held) { tip.hidden = true; return; }
  showTip(event, held.dataset.tip ?? nearest(held, event));
});

function nearest(svg, event) {
  const box = svg.getBoundingClientRect();
  const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
  return JSON.parse(svg.dataset.series).map(({ label, places, words }) => {
    let best = 0;
    places.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = i; });
    return `${label}: ${words[best]}`;
  }).join("\n");
}

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
  button.textContent = "copied";
});
