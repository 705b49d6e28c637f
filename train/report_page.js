"use strict";
// Reads numbers out of charts and maps: at the pointer, or with the arrow keys once a plot has the focus.
const data = JSON.parse(document.getElementById("data").textContent);

function cursorIn(plot) {
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  cursor.hidden = true;
  plot.append(cursor);
  return cursor;
}

// Makes a plot a slider from 0 to last: show(place) draws the cursor and gives the text.
function slide(plot, last, keys, show, placeAt) {
  const out = plot.closest("figure").querySelector("output");
  let place = last;
  const go = (to) => {
    place = Math.max(0, Math.min(last, to));
    const text = show(place);
    out.textContent = text;
    plot.setAttribute("aria-valuenow", place);
    plot.setAttribute("aria-valuetext", text);
  };
  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-label", plot.querySelector("svg").getAttribute("aria-label"));
  plot.setAttribute("aria-valuemin", 0);
  plot.setAttribute("aria-valuemax", last);
  plot.setAttribute("aria-valuenow", place);
  plot.addEventListener("focus", () => go(place));
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    go(placeAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height));
  });
  plot.addEventListener("pointerdown", () => plot.focus({ preventScroll: true }));
  plot.addEventListener("keydown", (event) => {
    const to = event.key === "Home" ? 0 : event.key === "End" ? last : place + (keys[event.key] ?? NaN);
    if (Number.isNaN(to)) return;
    event.preventDefault();
    go(to);
  });
}

for (const plot of document.querySelectorAll("[data-plot]")) {
  const chart = data.charts[plot.dataset.plot];
  const cursor = cursorIn(plot);
  const share = (i) => (chart.x[i] - chart.first) / (chart.last - chart.first);
  const show = (i) => {
    cursor.hidden = false;
    cursor.style.left = `${100 * share(i)}%`;
    const values = chart.lines.map((line) => `${line.name} ${line.y[i] ?? "–"}`);
    return `step ${chart.x[i]}: ${values.join(", ")}`;
  };
  const nearest = (across) => {
    let best = 0;
    chart.x.forEach((_, i) => {
      if (Math.abs(share(i) - across) < Math.abs(share(best) - across)) best = i;
    });
    return best;
  };
  const page = Math.max(1, Math.round(chart.x.length / 10));
  const keys = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: page, PageDown: -page };
  slide(plot, chart.x.length - 1, keys, show, nearest);
}

for (const plot of document.querySelectorAll("[data-map]")) {
  const map = data.maps[plot.dataset.map];
  const [rows, columns] = [map.rows.length, map.columns.length];
  const cursor = cursorIn(plot);
  const show = (i) => {
    const [row, column] = [Math.floor(i / columns), i % columns];
    cursor.hidden = false;
    cursor.style.cssText =
      `left:${(100 * column) / columns}%;top:${(100 * row) / rows}%;` +
      `width:${100 / columns}%;height:${100 / rows}%`;
    const value = map.values[row][column] ?? "none";
    return `${map.axes[0]} ${map.rows[row]}, ${map.axes[1]} ${map.columns[column]}: ${value}`;
  };
  const at = (across, down) =>
    Math.min(rows - 1, Math.max(0, Math.floor(down * rows))) * columns +
    Math.min(columns - 1, Math.max(0, Math.floor(across * columns)));
  const keys = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  slide(plot, rows * columns - 1, keys, show, at);
}
