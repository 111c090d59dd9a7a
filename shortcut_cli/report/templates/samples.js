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

// Rows of shares: the values of all rows below the pointer.
for (const tracks of document.querySelectorAll(".tracks[data-rows]")) {
  const { edges, names, values } = JSON.parse(tracks.dataset.rows);
  for (const row of tracks.querySelectorAll(".draw.flat")) {
    const point = (event) => {
      const box = row.getBoundingClientRect();
      const at = 1000 * (event.clientX - box.left) / box.width;
      const bin = Math.max(0, edges.findLastIndex((edge) => edge <= at));
      const lines = names.map((name, i) => `${name}: ${values[i][Math.min(bin, values[i].length - 1)]}`);
      showTip(event.pageX, event.pageY, lines.join("\n"));
      event.stopPropagation();
    };
    for (const name of ["pointermove", "click"]) row.addEventListener(name, point);
    row.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tip.hidden = true; });
  }
}
