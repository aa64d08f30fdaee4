// The map of health: a square for each device, by group. Drawn on a canvas, as ten thousand elements would be slow.
"use strict";

(() => {
  const canvas = document.getElementById("map");
  const label = document.getElementById("map-name");
  const usual = label.innerHTML;
  const WIDEST = 22;
  const TITLE = 18;
  const MOST_TITLES = 40;
  let cells = [];

  const read = () => JSON.parse(document.getElementById("map-data").textContent);

  // by shape as well as by colour, for who cannot tell the colours
  const shapes = {
    ok: (g, x, y, s) => g.fillRect(x, y, s, s),
    drift: (g, x, y, s) => { g.beginPath(); g.moveTo(x, y + s); g.lineTo(x + s / 2, y); g.lineTo(x + s, y + s); g.fill(); },
    degraded: (g, x, y, s) => {
      g.lineWidth = Math.max(1.5, s / 4); g.beginPath(); g.moveTo(x, y); g.lineTo(x + s, y + s);
      g.moveTo(x + s, y); g.lineTo(x, y + s); g.stroke();
    },
    offline: (g, x, y, s) => { g.lineWidth = Math.max(1, s / 6); g.strokeRect(x + 0.5, y + 0.5, s - 1, s - 1); },
    new: (g, x, y, s) => { g.beginPath(); g.arc(x + s / 2, y + s / 2, Math.max(1, s / 4), 0, 7); g.fill(); },
  };

  function layout(groups, width) {
    const total = groups.reduce((sum, group) => sum + group.devices.length, 0);
    const pitch = Math.max(6, Math.min(WIDEST, Math.floor(Math.sqrt((width * 420) / Math.max(1, total)))));
    const columns = Math.max(1, Math.floor(width / pitch));
    const titled = groups.length > 1 && groups.length <= MOST_TITLES;
    const places = [];
    let y = 0;
    let column = 0;
    for (const group of groups) {
      if (titled) {
        if (column) y += pitch;
        column = 0;
        places.push({ title: `${group.name}: ${group.devices.length}`, x: 0, y: y + 13 });
        y += TITLE;
      }
      for (let i = 0; i < group.devices.length; i += 1) {
        places.push({ name: group.devices[i], group: group.name, code: +group.health[i], x: column * pitch, y });
        column += 1;
        if (column === columns) { column = 0; y += pitch; }
      }
    }
    return { places, pitch, height: y + (column ? pitch : 0) };
  }

  function draw() {
    const data = read();
    const style = getComputedStyle(document.body);
    const width = canvas.parentElement.clientWidth - 32;
    const { places, pitch, height } = layout(data.groups, width);
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = Math.max(1, height) * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const g = canvas.getContext("2d");
    g.scale(ratio, ratio);
    g.font = `13px ${style.fontFamily}`;
    const colours = data.health.map((word) => style.getPropertyValue(`--${word}`));
    const size = pitch - Math.max(1, Math.round(pitch / 6));
    cells = [];
    for (const place of places) {
      if (place.title) {
        g.fillStyle = style.color;
        g.fillText(place.title, place.x, place.y);
      } else {
        g.fillStyle = colours[place.code];
        g.strokeStyle = colours[place.code];
        shapes[data.health[place.code]](g, place.x, place.y, size);
        cells.push({ ...place, size: pitch, health: data.health[place.code] });
      }
    }
  }

  function at(event) {
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left;
    const y = event.clientY - box.top;
    return cells.find((cell) => x >= cell.x && x < cell.x + cell.size && y >= cell.y && y < cell.y + cell.size);
  }

  canvas.addEventListener("pointermove", (event) => {
    const cell = at(event);
    canvas.style.cursor = cell ? "pointer" : "";
    if (cell) label.textContent = `${cell.name}: ${cell.health}, group ${cell.group}`;
    else label.innerHTML = usual;
  });
  canvas.addEventListener("click", (event) => {
    const cell = at(event);
    if (cell) location.href = `/devices/${encodeURIComponent(cell.name)}`;
  });
  new ResizeObserver(draw).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.addEventListener("updated", draw);
})();
