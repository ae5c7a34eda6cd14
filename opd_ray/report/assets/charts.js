"use strict";
// Small multiples: a colour and a mark per arm, a dash per series of a chart, a thin line per run and their mean.

const DASHES = ["solid", "dash", "dot", "dashdot"];
const DASH_ARRAYS = ["", "6 4", "2 3", "6 3 2 3"];
const SYMBOLS = { warn: "triangle-up", act: "star", rollback: "triangle-left", stop: "x" };
const AXES = ["steps", "tokens", "minutes"];
const AXIS_TITLES = { steps: "steps", tokens: "tokens trained on", minutes: "minutes" };
const WINDOWS = [1, 5, 11, 25];
const FEW_POINTS = 12;
const FEW_ARMS = 4; // with more, thin lines of single seeds would hide the means
const MARKED_POINTS = 7;

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

function inks() {
  return Object.fromEntries(["soft", "grid", "card", "ink"].map((name) => [name, resolved(`var(--${name})`)]));
}

class Charts {
  constructor(data) {
    this.data = data;
    this.hidden = new Set(data.arms.keys().filter((arm) => arm >= data.shown));
    this.panels = [];
    const series = data.groups.flatMap((group) => group.panels).flatMap((panel) => panel.series);
    const lines = series.flatMap(({ runs }) => runs).filter(Boolean);
    this.last = data.runs.map((_, run) => Math.max(...series.map(({ runs }) => runs[run]?.[0].at(-1) ?? 1), 1));
    this.overAxis("steps");
    this.window = Math.max(...lines.map(([steps]) => steps.length), 0) >= 60 ? 5 : 1;
    this.band = "range";
    this.makeLegend();
    this.makeControls();
    for (const group of data.groups) this.makeGroup(group);
  }

  makeLegend() {
    this.buttons = this.data.arms.map((title, arm) => {
      const button = dress(make("button", "", title), arm);
      button.prepend(make("i", "swatch"));
      button.type = "button";
      button.title = "Show or hide this arm in every chart; double-click to see it alone";
      button.addEventListener("click", () => this.show((other) => this.hidden.has(other) === (other === arm)));
      button.addEventListener("dblclick", () => this.show((other) => other === arm));
      byId("legend").append(button);
      return button;
    });
    byId("legend").classList.toggle("compact", this.data.arms.length > this.data.shown);
    const all = byId("show-all");
    all.hidden = this.data.arms.length < 3;
    all.addEventListener("click", () => {
      const first = this.hidden.size === 0 ? this.data.shown : this.data.arms.length;
      this.show((arm) => arm < first);
    });
    this.sayShown();
  }

  show(wanted) {
    this.hidden = new Set(this.data.arms.keys().filter((arm) => !wanted(arm)));
    this.sayShown();
    this.drawAll();
  }

  sayShown() {
    this.buttons.forEach((button, arm) => button.setAttribute("aria-pressed", String(!this.hidden.has(arm))));
    const { arms, shown } = this.data;
    byId("show-all").disabled = this.hidden.size === 0 && shown === arms.length;
    byId("show-all").textContent = this.hidden.size || shown === arms.length ? `Show all ${arms.length}` : `The first ${shown} only`;
  }

  // Steps, or what all runs have measured besides.
  overAxis(name) {
    this.axis = name;
    const ends = this.last.map((step, run) => this.at(run, [step])[0]);
    const end = Math.max(...ends);
    this.whole = [-0.02 * end, 1.02 * end];
    this.range = null;
  }

  // Where the steps of a run are on the axis; beyond its ends (an abandoned attempt was longer) it goes on as it began.
  at(run, steps) {
    const known = this.axis === "steps" ? null : this.data.runs[run].axes[this.axis];
    if (!known) return steps;
    const [own, sums] = known;
    const slope = sums.at(-1) / own.at(-1);
    return filled(known, steps).map((value, i) => value ?? steps[i] * slope);
  }

  // Of several runs the mean: at a step each had taken another number of tokens.
  meanAt(runs, steps) {
    const all = runs.map((run) => this.at(run, steps));
    return steps.map((_, i) => all.reduce((sum, each) => sum + each[i], 0) / all.length);
  }

  makeControls() {
    const axes = AXES.filter((name) => name === "steps" || this.data.runs.every((run) => run.axes[name]));
    for (const name of axes) byId("axis").append(make("option", "", name));
    byId("axis").addEventListener("change", (event) => {
      this.overAxis(event.target.value);
      this.drawAll();
    });
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
      panel.series.forEach((series, i) => series.name && keys.append(this.dashKey(series.name, DASH_ARRAYS[i])));
      for (const line of panel.lines) keys.append(this.dashKey(`${line.text} ${Number(line.y.toPrecision(3))}`, "1 3"));
      caption.append(keys);
      const plot = make("div", "plot");
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `${panel.title}. ${panel.help}`);
      figure.append(caption, plot);
      grid.append(figure);
      this.panels.push({ panel, plot, visible: () => group.open || box.open });
    }
    if (!group.open) box.addEventListener("toggle", () => this.drawAll());
  }

  dashKey(name, dashes) {
    const key = make("span", "key");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const attributes = { x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 2, "stroke-dasharray": dashes };
    for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
    svg.append(line);
    key.append(svg, name);
    return key;
  }

  // One chart after the other with a breath between, so that the page stays usable; a newer call takes over.
  async drawAll() {
    const turn = (this.turn = (this.turn || 0) + 1);
    this.colours = this.data.arms.map((_, arm) => resolved(armColour(arm)));
    this.ink = inks();
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
      traces.push(...this.abandoned(panel, arm), ...this.points(panel, arm), ...this.events(panel, arm));
    });
    const first = !plot.data;
    Plotly.react(plot, traces, this.layout(panel, traces), { displayModeBar: false, responsive: true, doubleClick: "autosize" });
    if (first) plot.on("plotly_relayout", (change) => this.zoomed(change));
  }

  // Numbers of the arm's runs that have values.
  runsOf(values, arm) {
    return [...values.keys()].filter((run) => values[run] && this.data.runs[run].arm === arm);
  }

  // The standard errors of one run's values; of several the range is drawn.
  bars(errors, runs, line, arm) {
    const own = runs.length === 1 && errors?.[runs[0]];
    if (!own) return undefined;
    const known = new Map(own[0].map((step, i) => [step, own[1][i]]));
    return { type: "data", array: line[0].map((step) => known.get(step) ?? 0), ...this.barStyle(arm) };
  }

  barStyle(arm) {
    return { thickness: 1, width: 3, color: faded(this.colours[arm], 0.45) };
  }

  lines(series, arm, index) {
    const few = (line) => line[0].length <= FEW_POINTS;
    const runs = this.runsOf(series.runs, arm);
    const lines = runs.map((run) => series.runs[run]).map((line) => [line[0], few(line) ? line[1] : smoothed(line[1], this.window)]);
    if (!lines.length) return [];
    const colour = this.colours[arm];
    const dash = DASHES[index];
    const all = combine(lines);
    const places = this.meanAt(runs, all.steps);
    const traces = [];
    if (lines.length > 1) {
      const [low, high] = this.band === "deviation"
        ? [all.mean.map((m, i) => m - all.deviation[i]), all.mean.map((m, i) => m + all.deviation[i])]
        : [all.low, all.high];
      const crowded = this.numShown() > FEW_ARMS;
      if (this.band !== "none" && this.band !== "seeds") {
        traces.push({ x: [...places, ...places.toReversed()], y: [...high, ...low.toReversed()], fill: "toself",
          fillcolor: faded(colour, crowded ? 0.1 : 0.13), line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
      }
      if (this.band === "seeds" || !crowded) {
        const x = lines.flatMap(([steps], i) => [...this.at(runs[i], steps), null]); // one path with gaps is drawn faster than many
        const y = lines.flatMap(([, values]) => [...values, null]);
        traces.push({ x, y, mode: "lines", line: { color: faded(colour, 0.4), width: 0.8, dash }, hoverinfo: "skip" });
      }
    }
    const mark = armMark(arm);
    const name = plain(this.data.arms[arm] + (series.name ? `, ${series.name}` : ""));
    traces.push({ x: places, y: all.mean, name, error_y: this.bars(series.errors, runs, lines[0], arm), mode: mark || few([all.steps]) ? "lines+markers" : "lines",
      line: { color: colour, width: 2.2, dash }, hovertemplate: this.hover(),
      marker: { size: mark ? 7 : 5, symbol: mark || "circle", maxdisplayed: few([all.steps]) ? 0 : MARKED_POINTS } });
    return traces;
  }

  numShown() {
    return this.data.arms.length - this.hidden.size;
  }

  // With many lines, a box that names them all would cover the chart.
  hover() {
    return this.numShown() > FEW_ARMS ? `%{fullData.name}<br>${this.axis} %{x:,.6~g}: %{y:.3~g}<extra></extra>` : "%{y:.3~g}";
  }

  // What runs took back is beside the curves, not in them; ◁ is where a run went back without the guard saying so.
  abandoned(panel, arm) {
    return panel.series.flatMap((series) => {
      const parts = series.abandoned.filter(([run]) => this.data.runs[run].arm === arm)
        .map(([run, attempt, steps, values]) => [run, attempt, this.at(run, steps), smoothed(values, this.window)]);
      if (!parts.length) return [];
      const line = { color: faded(this.colours[arm], 0.55), width: 1.2, dash: "dot" };
      const x = parts.flatMap(([, , steps]) => [...steps, null]);
      const y = parts.flatMap(([, , , values]) => [...values, null]);
      const ends = parts.filter(([run, attempt]) => !this.data.runs[run].abandoned[attempt][2]);
      const text = ends.map(([run, attempt]) => {
        const [first, last] = this.data.runs[run].abandoned[attempt];
        return plain(`${this.data.runs[run].name}: cut off at step ${last}, resumed at ${first}`);
      });
      return [
        { x, y, mode: "lines", line, hoverinfo: "skip", name: plain(`${this.data.arms[arm]}, abandoned`) },
        { x: ends.map(([, , steps]) => steps.at(-1)), y: ends.map(([, , , values]) => values.at(-1)), text, mode: "markers",
          hovertemplate: "%{text}<extra></extra>", name: plain(`${this.data.arms[arm]}, cut off`), cliponaxis: false,
          marker: { symbol: "triangle-left-open", size: 8, color: this.colours[arm] } },
      ];
    });
  }

  points(panel, arm) {
    const runs = this.runsOf(panel.points, arm);
    const lines = runs.map((run) => panel.points[run]);
    if (!lines.length) return [];
    const all = combine(lines);
    const range = { type: "data", symmetric: false, array: all.high.map((v, i) => v - all.mean[i]),
      arrayminus: all.mean.map((v, i) => v - all.low[i]), ...this.barStyle(arm) };
    return [{ x: this.meanAt(runs, all.steps), y: all.mean, mode: "markers", name: plain(`${this.data.arms[arm]}, held out`),
      hovertemplate: this.hover(), cliponaxis: false,
      error_y: lines.length > 1 ? range : this.bars(panel.errors, runs, lines[0], arm),
      marker: { symbol: "diamond", size: 9, color: this.ink.card, line: { color: this.colours[arm], width: 1.8 } } }];
  }

  // The guard's events sit on the line of their run.
  events(panel, arm) {
    const x = [], y = [], text = [], symbol = [];
    const series = panel.series[0];
    this.data.runs.forEach((run, index) => {
      const line = series?.runs[index];
      if (run.arm !== arm || !line || line[0].length <= FEW_POINTS) return;
      const whole = [line[0], smoothed(line[1], this.window)];
      for (const event of run.events) {
        const part = series.abandoned.find(([of, attempt]) => of === index && attempt === event.attempt);
        const [steps, values] = part ? [part[2], smoothed(part[3], this.window)] : whole;
        if (event.step < steps[0]) continue; // a loss that began later has no place for it
        const at = steps.findIndex((step) => step >= event.step);
        x.push(this.at(index, [event.step])[0]);
        y.push(values.at(at));
        symbol.push(SYMBOLS[event.level] || "circle");
        text.push(eventText(run, event));
      }
    });
    if (!x.length) return [];
    return [{ x, y, text, mode: "markers", name: plain(`${this.data.arms[arm]}, guard`), hovertemplate: "%{text}<extra></extra>",
      cliponaxis: false, marker: { symbol, size: 10, color: this.colours[arm], line: { color: this.ink.card, width: 1.2 } } }];
  }

  // Down to 0 and up to the panel's least and its lines at least; plotly alone would draw noise, and zeros up to 1.
  height(panel, traces) {
    if (panel.least === null) return {};
    const least = Math.max(panel.least, ...panel.lines.map((line) => line.y));
    const most = traces.flatMap(({ y }) => y).reduce((a, b) => Math.max(a, b ?? 0), 0);
    return least > 0 && most <= least ? { range: [-0.03 * least, 1.06 * least] } : { autorange: true, rangemode: "tozero" };
  }

  layout(panel, traces) {
    const axis = { gridcolor: this.ink.grid, zeroline: false, linecolor: this.ink.grid, tickfont: { size: 11 }, nticks: 6 };
    return {
      margin: { l: panel.unit ? 56 : 44, r: 8, t: 6, b: 42 }, showlegend: false, hovermode: this.numShown() > FEW_ARMS ? "closest" : "x unified", dragmode: "zoom",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: this.ink.soft, size: 12 },
      hoverlabel: { bgcolor: this.ink.card, bordercolor: this.ink.grid, namelength: -1, font: { color: this.ink.ink, size: 12 } },
      xaxis: { ...axis, range: this.range || this.whole, showgrid: false, ticks: "outside", tickcolor: this.ink.grid,
        title: { text: AXIS_TITLES[this.axis], standoff: 4, font: { size: 11 } }, hoverformat: this.axis === "minutes" ? ".2~f" : ",d",
        unifiedhovertitle: { text: `${this.axis === "steps" ? "step" : this.axis} %{x}` } },
      yaxis: { ...axis, fixedrange: true, tickformat: "~g", title: { text: panel.unit, standoff: 4, font: { size: 11 } },
        ...this.height(panel, traces) },
      shapes: panel.lines.map((line) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: line.y, y1: line.y,
        line: { color: this.ink.soft, width: 1.2, dash: "dot" } })),
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
