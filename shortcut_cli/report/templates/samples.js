// Players: a line moves over the panels of a player, and a click on them goes to that time.
for (const tracks of document.querySelectorAll(".tracks")) {
  const audio = tracks.querySelector("audio");
  if (!audio) continue;
  const head = tracks.querySelector(".playhead"), panels = tracks.querySelector(".panels");
  const low = Number(tracks.dataset.low), high = Number(tracks.dataset.high);
  const place = () => { head.hidden = false; head.style.left = `${100 * Math.min(1, (audio.currentTime - low) / (high - low))}%`; };
  const follow = () => { place(); if (!audio.paused) requestAnimationFrame(follow); };
  audio.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
    follow();
  });
  for (const name of ["seeked", "timeupdate", "ended"]) audio.addEventListener(name, place);
  panels.addEventListener("click", (event) => {
    const box = tracks.querySelector(".over").getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    if (share >= 0 && share <= 1) audio.currentTime = low + share * (high - low);
  });
}

// Rows of shares: the values of all rows below the pointer, or, while the rows have the focus, where the keys of page.js lead.
for (const tracks of document.querySelectorAll(".tracks[data-rows]")) {
  const { edges, unit, names, values } = JSON.parse(tracks.dataset.rows);
  const low = Number(tracks.dataset.low), span = Number(tracks.dataset.high) - low;
  const head = tracks.querySelector(".playhead"), rows = [...tracks.querySelectorAll(".draw.flat")];
  let now = -1;
  const told = (bin) => {
    now = bin;
    const [from, to] = [edges[bin], edges[bin + 1]].map((edge) => Number((low + span * edge / 1000).toPrecision(4)));
    return [`${from} to ${to} ${unit}`, ...names.map((name, i) => `${name}: ${values[i][bin]}`)].join("\n");
  };
  const line = (bin) => { head.hidden = false; head.style.left = `${(edges[bin] + edges[bin + 1]) / 20}%`; };
  for (const row of rows) {
    const point = (event) => {
      const box = row.getBoundingClientRect();
      const at = 1000 * (event.clientX - box.left) / box.width;
      const bin = Math.min(edges.length - 2, Math.max(0, edges.findLastIndex((edge) => edge <= at)));
      showTip(event.pageX, event.pageY, told(bin));
      event.stopPropagation();
    };
    for (const name of ["pointermove", "click"]) row.addEventListener(name, point);
    row.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tip.hidden = true; });
  }
  tracks.addEventListener("keydown", (event) => {
    if (event.key === "Escape") head.hidden = true;
    const to = event.target === tracks ? moved(event, now, edges.length - 1) : undefined;
    if (to === undefined) return;
    const box = rows[0].getBoundingClientRect(), words = told(to);
    line(to);
    showTip(box.left + box.width * edges[to] / 1000 + window.scrollX, rows.at(-1).getBoundingClientRect().bottom + window.scrollY, words);
  });
  tracks.addEventListener("focusout", () => { head.hidden = true; });
}
