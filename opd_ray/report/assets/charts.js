"use strict";
// Small multiples: one colour per arm, one dash per series of a chart, one line per run and their mean.

const DASHES = ["solid", "dash", "dot", "dashdot"];
const DASH_ARRAYS = ["", "6 4", "2 3", "6 3 2 3"];
const SYMBOLS = { warn: "triangle-up", act: "star", rollback: "triangle-left", stop: "x" };
const WINDOWS = [1, 5, 11, 25];
const FEW_POINTS = 12;

function smoothed(values, window) {
  const half = (window - 1) / 2;
  return values.map((_, at) => {
    const part = values.slice(Math.max(0, at - half), at + half + 1);
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
}

// A line at steps, straight across steps that it lacks (not every step has repetitive tokens); undefined outside it.
function filled([own, values], steps) {
  let next = 0;
  return steps.map((step) => {
    while (next < own.length && own[next] < step) next += 1;
    if (own[next] === step) return values[next];
    if (next === 0 || next === own.length) return undefined;
    const part = (step - own[next - 1]) / (own[next] - own[next - 1]);
    return values[next - 1] + part * (values[next] - values[next - 1]);
  });
}

// Mean, lowest, highest and deviation over the runs that reach a step.
function combine(lines) {
  const steps = [...new Set(lines.flatMap(([own]) => own))].sort((a, b) => a - b);
  const each = lines.map((line) => filled(line, steps));
  const all = steps.map((_, i) => each.map((values) => values[i]).filter((value) => value !== undefined));
  const mean = all.map((values) => values.reduce((a, b) => a + b, 0) / values.length);
  const deviation = all.map((values, i) =>
    values.length < 2 ? 0 : Math.sqrt(values.reduce((sum, v) => sum + (v - mean[i]) ** 2, 0) / (values.length - 1)),
  );
  return { steps, mean, deviation, low: all.map((v) => Math.min(...v)), high: all.map((v) => Math.max(...v)) };
}

function faded(rgb, opacity) {
  return rgb.replace(/^rgb\((.*)\)$/, `rgba($1, ${opacity})`);
}

class Charts {
  constructor(data) {
    this.data = data;
    this.hidden = new Set();
    this.panels = [];
    const lines = data.groups.flatMap((group) => group.panels).flatMap((panel) => panel.series)
      .flatMap((series) => series.runs).filter(Boolean);
    const last = Math.max(...lines.map(([steps]) => steps.at(-1)), 1);
    this.whole = [-0.02 * last, 1.02 * last];
    this.window = Math.max(...lines.map(([steps]) => steps.length), 0) >= 60 ? 5 : 1;
    this.band = "range";
    this.makeLegend();
    this.makeControls();
    for (const group of data.groups) this.makeGroup(group);
  }

  makeLegend() {
    this.data.arms.forEach((title, arm) => {
      const button = make("button", "", title);
      const swatch = make("i", "swatch");
      swatch.style.setProperty("--arm", armColour(arm));
      button.prepend(swatch);
      button.type = "button";
      button.title = "Show or hide this arm in every chart";
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        if (!this.hidden.delete(arm)) this.hidden.add(arm);
        button.setAttribute("aria-pressed", String(!this.hidden.has(arm)));
        this.drawAll();
      });
      byId("legend").append(button);
    });
  }

  makeControls() {
    for (const window of WINDOWS) {
      const option = make("option", "", window === 1 ? "none" : `mean of ${window} steps`);
      option.value = window;
      option.selected = window === this.window;
      byId("smoothing").append(option);
    }
    byId("smoothing").addEventListener("change", (event) => {
      this.window = Number(event.target.value);
      this.drawAll();
    });
    byId("band").addEventListener("change", (event) => {
      this.band = event.target.value;
      this.drawAll();
    });
    const runsPerArm = this.data.arms.map((_, arm) => this.data.runs.filter((run) => run.arm === arm).length);
    byId("band-label").hidden = Math.max(...runsPerArm) < 2;
  }

  makeGroup(group) {
    const box = make(group.open ? "div" : "details", "group");
    box.append(make(group.open ? "h3" : "summary", "", group.title));
    const grid = make("div", "panels");
    box.append(grid);
    byId("charts").append(box);
    for (const panel of group.panels) {
      const figure = make("figure");
      const caption = make("figcaption");
      caption.append(make("b", "", panel.title), make("span", "", panel.help));
      const keys = make("span", "keys");
      panel.series.forEach((series, i) => series.name && keys.append(this.dashKey(series.name, i)));
      caption.append(keys);
      const plot = make("div", "plot");
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `${panel.title} over steps. ${panel.help}`);
      figure.append(caption, plot);
      grid.append(figure);
      this.panels.push({ panel, plot, visible: () => group.open || box.open });
    }
    if (!group.open) box.addEventListener("toggle", () => this.drawAll());
  }

  dashKey(name, index) {
    const key = make("span", "key");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const attributes = { x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 2, "stroke-dasharray": DASH_ARRAYS[index] };
    for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
    svg.append(line);
    key.append(svg, name);
    return key;
  }

  // One chart after the other with a breath between, so that the page stays usable; a newer call takes over.
  async drawAll() {
    const turn = (this.turn = (this.turn || 0) + 1);
    this.colours = this.data.arms.map((_, arm) => resolved(armColour(arm)));
    this.ink = { soft: resolved("var(--soft)"), grid: resolved("var(--grid)"), card: resolved("var(--card)"), ink: resolved("var(--ink)") };
    for (const { panel, plot, visible } of this.panels) {
      if (!visible()) continue;
      this.draw(panel, plot);
      await new Promise((resume) => setTimeout(resume));
      if (turn !== this.turn) return;
    }
  }

  draw(panel, plot) {
    const traces = [];
    this.data.arms.forEach((_, arm) => {
      if (this.hidden.has(arm)) return;
      panel.series.forEach((series, i) => traces.push(...this.lines(series, arm, i)));
      traces.push(...this.points(panel.points, arm), ...this.events(panel, arm));
    });
    const first = !plot.data;
    Plotly.react(plot, traces, this.layout(panel), { displayModeBar: false, responsive: true, doubleClick: "autosize" });
    if (first) plot.on("plotly_relayout", (change) => this.zoomed(change));
  }

  runsOf(values, arm) {
    return values.filter((line, run) => line && this.data.runs[run].arm === arm);
  }

  lines(series, arm, index) {
    const few = (line) => line[0].length <= FEW_POINTS;
    const lines = this.runsOf(series.runs, arm).map((line) => [line[0], few(line) ? line[1] : smoothed(line[1], this.window)]);
    if (!lines.length) return [];
    const colour = this.colours[arm];
    const dash = DASHES[index];
    const all = combine(lines);
    const traces = [];
    if (lines.length > 1) {
      const [low, high] = this.band === "deviation"
        ? [all.mean.map((m, i) => m - all.deviation[i]), all.mean.map((m, i) => m + all.deviation[i])]
        : [all.low, all.high];
      if (this.band !== "none") {
        traces.push({ x: [...all.steps, ...all.steps.toReversed()], y: [...high, ...low.toReversed()], fill: "toself",
          fillcolor: faded(colour, 0.13), line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
      }
      for (const [x, y] of lines) {
        traces.push({ x, y, mode: "lines", line: { color: faded(colour, 0.4), width: 0.8, dash }, hoverinfo: "skip" });
      }
    }
    const name = this.data.arms[arm] + (series.name ? `, ${series.name}` : "");
    traces.push({ x: all.steps, y: all.mean, name, mode: few([all.steps]) ? "lines+markers" : "lines",
      line: { color: colour, width: 2.2, dash }, marker: { size: 5 }, hovertemplate: "%{y:.3~g}" });
    return traces;
  }

  points(values, arm) {
    const lines = this.runsOf(values, arm);
    if (!lines.length) return [];
    const all = combine(lines);
    const error = { type: "data", symmetric: false, array: all.high.map((v, i) => v - all.mean[i]),
      arrayminus: all.mean.map((v, i) => v - all.low[i]), thickness: 1, width: 3, color: faded(this.colours[arm], 0.45) };
    return [{ x: all.steps, y: all.mean, mode: "markers", name: `${this.data.arms[arm]}, held out`, hovertemplate: "%{y:.3~g}",
      cliponaxis: false, error_y: lines.length > 1 ? error : undefined,
      marker: { symbol: "diamond", size: 9, color: this.ink.card, line: { color: this.colours[arm], width: 1.8 } } }];
  }

  // The guard's events sit on the line of their run.
  events(panel, arm) {
    const x = [], y = [], text = [], symbol = [];
    this.data.runs.forEach((run, index) => {
      const line = panel.series[0]?.runs[index];
      if (run.arm !== arm || !line || line[0].length <= FEW_POINTS) return;
      const values = smoothed(line[1], this.window);
      for (const event of run.events) {
        let at = line[0].findIndex((step) => step >= event.step);
        if (at < 0) at = line[0].length - 1;
        x.push(event.step);
        y.push(values[at]);
        symbol.push(SYMBOLS[event.level] || "circle");
        text.push(eventText(run, event));
      }
    });
    if (!x.length) return [];
    return [{ x, y, text, mode: "markers", name: `${this.data.arms[arm]}, guard`, hovertemplate: "%{text}", cliponaxis: false,
      marker: { symbol, size: 10, color: this.colours[arm], line: { color: this.ink.card, width: 1.2 } } }];
  }

  layout(panel) {
    const axis = { gridcolor: this.ink.grid, zeroline: false, linecolor: this.ink.grid, tickfont: { size: 11 }, nticks: 6 };
    return {
      margin: { l: 44, r: 8, t: 6, b: 26 }, showlegend: false, hovermode: "x unified", dragmode: "zoom",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: this.ink.soft, size: 12 },
      hoverlabel: { bgcolor: this.ink.card, bordercolor: this.ink.grid, font: { color: this.ink.ink, size: 12 } },
      xaxis: { ...axis, range: this.range || this.whole, showgrid: false, ticks: "outside", tickcolor: this.ink.grid, hoverformat: "d", unifiedhovertitle: { text: "step %{x}" } },
      yaxis: { ...axis, fixedrange: true, rangemode: panel.share ? "tozero" : "normal", tickformat: "~g" },
      shapes: panel.lines.map((line) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: line.y, y1: line.y,
        line: { color: this.ink.soft, width: 1.2, dash: "dot" } })),
      annotations: panel.lines.map((line) => ({ xref: "paper", x: 1, xanchor: "right", y: line.y, yanchor: "bottom",
        text: plain(line.text), showarrow: false, font: { size: 11, color: this.ink.soft } })),
    };
  }

  zoomed(change) {
    if (this.zooming) return;
    if ("xaxis.range[0]" in change) this.range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    else if (change["xaxis.autorange"]) this.range = null; // after a double click
    else return;
    this.zooming = true;
    const update = { "xaxis.range": [...(this.range || this.whole)] };
    const drawn = this.panels.filter(({ plot }) => plot.data);
    Promise.all(drawn.map(({ plot }) => Plotly.relayout(plot, update))).finally(() => (this.zooming = false));
  }
}

// Plotly reads a few HTML tags in its texts, so what comes from a run is escaped for it.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function eventText(run, event) {
  const measured = event.value === undefined ? "" : ` ${Number(event.value).toPrecision(3)}`;
  const words = `${run.name}: ${event.level} – ${event.action || ""} (${event.signal}${measured})`;
  return plain(words).replace(/(.{1,60})(\s|$)/g, "$1<br>").replace(/<br>$/, "");
}
