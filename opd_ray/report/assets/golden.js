"use strict";
// Accuracy over the size of the golden set, on a logarithmic axis whose ticks are the sizes there are.

function drawGolden(kinds, plot) {
  const ink = inks();
  const sizes = [...new Set(kinds.flatMap((kind) => kind.points.map(([size]) => size)))].sort((a, b) => a - b);
  const traces = kinds.flatMap((kind) => {
    const colour = resolved(armColour(kind.arm));
    const own = sizes.filter((size) => kind.points.some(([used]) => used === size));
    const mean = own.map((size) => {
      const values = kind.points.filter(([used]) => used === size).map(([, accuracy]) => accuracy);
      return values.reduce((a, b) => a + b, 0) / values.length;
    });
    return [
      { x: kind.points.map(([size]) => size), y: kind.points.map(([, accuracy]) => accuracy), mode: "markers", name: `${kind.name}, a seed`,
        hovertemplate: "%{y:.3~g}<extra></extra>", marker: { size: 7, color: faded(colour, 0.45) }, cliponaxis: false },
      { x: own, y: mean, mode: "lines+markers", name: plain(kind.name), hovertemplate: "%{fullData.name}, mean at %{x}: %{y:.3~g}<extra></extra>",
        line: { color: colour, width: 2.2 }, marker: { size: 8, symbol: "line-ew-open", line: { width: 2.2, color: colour } }, cliponaxis: false },
    ];
  });
  const axis = { gridcolor: ink.grid, zeroline: false, linecolor: ink.grid, tickfont: { size: 12 }, fixedrange: true };
  const around = [Math.log10(sizes[0]) - 0.12, Math.log10(sizes.at(-1)) + 0.12];
  const layout = {
    margin: { l: 44, r: 14, t: 10, b: 44 }, showlegend: false, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: ink.soft, size: 12 },
    hoverlabel: { bgcolor: ink.card, bordercolor: ink.grid, namelength: -1, font: { color: ink.ink, size: 12 } },
    xaxis: { ...axis, type: "log", range: around, tickvals: sizes, ticktext: sizes.map((size) => size.toLocaleString("en")),
      title: { text: "golden rollouts", standoff: 6 } },
    yaxis: { ...axis, rangemode: "tozero", tickformat: "~g" },
  };
  Plotly.react(plot, traces, layout, { displayModeBar: false, responsive: true });
}
