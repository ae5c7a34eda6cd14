"use strict";
// One bar for each thing that an actor was at, a lane for each actor; lanes keep their height however many there are.

const LANE_COLOURS = { generate: 0, score: 2, wait: 7, train: 1, broadcast: 5, gather: 12, snapshot: 4, fetch: 6, record: 13, write: 13, evaluating: 10, load: 9 };
const LANE_PIXELS = 34;
const SPAN_PIXELS = 20; // of the driver's phases at first

function laneColour(kind, at) {
  const colour = resolved(armColour(LANE_COLOURS[kind] ?? 8 + (at % 8)));
  return kind === "wait" ? faded(colour, 0.3) : colour; // what is seen first is work
}

// From where on the newest are wide enough to be told apart.
function readable(chart, pixels) {
  const phases = Object.values(chart.kinds).flatMap(([lane, began]) => began.filter((_, i) => lane[i] === 0)).sort((a, b) => a - b);
  return phases.at(-Math.floor(pixels / SPAN_PIXELS)) ?? chart.since;
}

function drawLanes(chart, figure) {
  const ink = inks();
  const known = Object.keys(LANE_COLOURS);
  const place = (kind) => (known.includes(kind) ? known.indexOf(kind) : known.length);
  const kinds = Object.keys(chart.kinds).sort((a, b) => place(a) - place(b) || a.localeCompare(b));
  const keys = figure.querySelector(".keys");
  keys.replaceChildren();
  const traces = kinds.map((kind, at) => {
    const [lane, began, lasted, step] = chart.kinds[kind];
    const colour = laneColour(kind, at);
    const key = make("span", "key", kind);
    const mark = make("i", "swatch");
    mark.style.setProperty("--arm", colour);
    key.prepend(mark);
    keys.append(key);
    const text = lasted.map((seconds, i) => plain(`${chart.lanes[lane[i]].name}: ${kind}${step[i] === null ? "" : `, step ${step[i]}`}, ${seconds.toPrecision(3)} s`));
    return { type: "bar", orientation: "h", name: kind, base: began, x: lasted, y: lane, width: 0.5, offset: 0, text, textposition: "none",
      hovertemplate: "%{text}<br>from %{base:.2f} s<extra></extra>", marker: { color: colour, line: { width: 0 } } };
  });
  const plot = figure.querySelector(".plot");
  const wide = plot.clientWidth > 600;
  const labels = chart.lanes.map((lane, at) => {
    const shares = lane.shares.filter(([, share]) => share >= 0.005).slice(0, wide ? 5 : 2).map(([kind, share]) => `${kind} ${(100 * share).toFixed(share < 0.095 ? 1 : 0)} %`);
    return { xref: "paper", x: 0, y: at, yshift: 1, xanchor: "left", yanchor: "bottom", showarrow: false,
      text: `<b>${plain(lane.name)}</b>  ${plain(shares.join(", "))}`, font: { size: 11, color: ink.ink } };
  });
  plot.style.height = `${LANE_PIXELS * chart.lanes.length + 52}px`;
  const layout = {
    barmode: "overlay", margin: { l: 8, r: 8, t: 4, b: 40 }, showlegend: false, hovermode: "closest", dragmode: "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", annotations: labels,
    font: { family: getComputedStyle(document.body).fontFamily, color: ink.soft, size: 12 },
    hoverlabel: { bgcolor: ink.card, bordercolor: ink.grid, namelength: -1, font: { color: ink.ink, size: 12 } },
    xaxis: { range: [readable(chart, plot.clientWidth), chart.whole], gridcolor: ink.grid, zeroline: false, linecolor: ink.grid, tickfont: { size: 11 }, nticks: 8,
      title: { text: "seconds since the trace began", standoff: 6 } },
    yaxis: { range: [chart.lanes.length - 0.4, -0.6], fixedrange: true, showticklabels: false, showgrid: false, zeroline: false },
  };
  Plotly.react(plot, traces, layout, { displayModeBar: false, responsive: true, doubleClick: "reset+autosize" });
}
