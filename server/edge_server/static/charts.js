// Draws the charts of a page with plotly, from numbers that the page holds or fetches.
"use strict";

(() => {
  const iso = (seconds) => new Date(seconds * 1000).toISOString();
  const SYMBOLS = { release: "diamond", rollback: "triangle-left", gate: "square", adaptation: "circle", drift: "x" };
  const LANE_COLOURS = { release: "--busy", rollback: "--offline", gate: "--good", adaptation: "--quiet", drift: "--drift" };

  function look() {
    const style = getComputedStyle(document.body);
    const colour = (name) => style.getPropertyValue(name).trim();
    return {
      colour,
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: colour("--text"), family: style.fontFamily, size: 13 },
        margin: { l: 8, r: 8, t: 8, b: 8 },
        colorway: ["--busy", "--good", "--drift", "--offline", "--quiet"].map(colour),
        xaxis: { automargin: true, gridcolor: colour("--line"), zerolinecolor: colour("--line") },
        yaxis: { automargin: true, gridcolor: colour("--line"), zerolinecolor: colour("--line") },
        legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
        showlegend: true,
      },
    };
  }

  const lines = (data, extra = {}) =>
    Object.entries(data).map(([name, line]) => ({
      type: "scatter", mode: "lines+markers", name, x: line.x.map(iso), y: line.y, ...extra,
    }));

  const kinds = {
    timeline(data, { colour, layout }) {
      const lanes = [...data.lanes].reverse();
      const traces = data.lanes.map((lane) => {
        const own = data.events.filter((event) => event.lane === lane);
        return {
          type: "scatter", mode: "markers", name: lane, x: own.map((event) => iso(event.time)), y: own.map(() => lane),
          text: own.map((event) => event.name), hovertemplate: "%{text}<br>%{x}<extra></extra>",
          marker: { size: 10, symbol: SYMBOLS[lane] || "circle-open", color: colour(LANE_COLOURS[lane] || "--quiet") },
        };
      });
      layout.showlegend = false;
      layout.yaxis.categoryorder = "array";
      layout.yaxis.categoryarray = lanes;
      layout.xaxis.type = "date";
      return traces;
    },
    monitors(data, { colour, layout }) {
      layout.yaxis.rangemode = "tozero";
      layout.xaxis.type = "date";
      layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: colour("--offline"), dash: "dash" } }];
      return lines(data.monitors);
    },
    accuracy(data, { layout }) {
      layout.yaxis.range = [0, 1];
      layout.yaxis.tickformat = ".0%";
      layout.xaxis.type = "date";
      const hours = new Set(Object.values(data.accuracy).flatMap((line) => line.x));
      if (hours.size === 1) { // plotly would show a millisecond of it
        const [hour] = hours;
        layout.xaxis.range = [iso(hour - 3600), iso(hour + 3600)];
      }
      return lines(data.accuracy);
    },
    heat(data, { colour, layout }) {
      layout.showlegend = false;
      layout.xaxis.type = "category";
      layout.yaxis.type = "category";
      return [{
        type: "heatmap", x: data.x, y: data.y, z: data.z, zmin: 0, zmax: 0.5, colorbar: { title: { text: "PSI" }, thickness: 12 },
        colorscale: [[0, colour("--line")], [0.4, colour("--drift")], [1, colour("--offline")]],
        hovertemplate: "%{y}, %{x}<br>PSI %{z:.3f}<extra></extra>", xgap: 1, ygap: 1,
      }];
    },
  };

  async function numbers(box) {
    if (box.dataset.from) return JSON.parse(document.getElementById(box.dataset.from).textContent);
    const answer = await fetch(box.dataset.url);
    if (!answer.ok) throw new Error(`${answer.status}`);
    return answer.json();
  }

  function tell(box, text) {
    box.textContent = text;
    box.classList.add("empty");
  }

  function asTable(box, data) {
    // the same for who cannot see the chart
    const details = document.createElement("details");
    const summary = details.appendChild(document.createElement("summary"));
    summary.textContent = "As a table";
    const scroll = details.appendChild(document.createElement("div"));
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    const table = scroll.appendChild(document.createElement("table"));
    const cell = (row, kind, text, scope) => {
      const made = row.appendChild(document.createElement(kind));
      made.textContent = text;
      if (scope) made.scope = scope;
    };
    const head = table.createTHead().insertRow();
    ["Feature", ...data.x].forEach((name) => cell(head, "th", name, "col"));
    const body = table.createTBody();
    [...data.y].reverse().forEach((feature, i) => {
      const row = body.insertRow();
      cell(row, "th", feature, "row");
      data.z[data.z.length - 1 - i].forEach((value) => cell(row, "td", value === null ? "–" : value.toFixed(3)));
    });
    const old = box.parentElement.querySelector("details");
    if (old) old.remove();
    box.after(details);
  }

  async function draw(box) {
    const kind = box.dataset.chart;
    try {
      const data = await numbers(box);
      const empty = kind === "heat" ? !data.y.length : kind === "timeline" ? !data.events.length : !Object.keys(data[kind]).length;
      if (empty) {
        tell(box, "Nothing was reported yet.");
        return;
      }
      const style = look();
      const traces = kinds[kind](data, style);
      if (box.classList.contains("empty")) { box.textContent = ""; box.classList.remove("empty"); }
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", box.parentElement.querySelector("figcaption").textContent);
      await Plotly.react(box, traces, style.layout, { displayModeBar: false, responsive: true });
      if (kind === "heat") asTable(box, data);
    } catch (error) {
      tell(box, `This could not be read (${error.message}).`);
    } finally {
      box.removeAttribute("aria-busy");
    }
  }

  async function fill(box) {
    try {
      const answer = await fetch(box.dataset.textUrl);
      const data = await answer.json();
      box.textContent = answer.ok ? data[box.dataset.key] : "This could not be read.";
    } catch {
      box.textContent = "This could not be read.";
    } finally {
      box.removeAttribute("aria-busy");
    }
  }

  const all = () => document.querySelectorAll("[data-chart]").forEach(draw);
  all();
  document.querySelectorAll("[data-text-url]").forEach(fill);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  document.addEventListener("updated", () => document.querySelectorAll("[data-from]").forEach(draw));
})();
