"use strict";
// Data and plotly.js travel as gzip in base64: a third of their size, and no text of a run is ever parsed as HTML.

const byId = (id) => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function unpack(id) {
  const packed = atob(byId(id).textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// An arm has a colour and a mark on its lines: sixteen colours in two eights, each eight told apart by any eye, and
// a mark that tells the eights apart.
const NUM_COLOURS = 16;
const MARKS = ["", "circle", "square", "cross"];

function armColour(arm) {
  return `var(--arm${arm % NUM_COLOURS})`;
}

function armMark(arm) {
  return MARKS[Math.floor(arm / 8) % MARKS.length];
}

function dress(element, arm) {
  element.style.setProperty("--arm", armColour(arm));
  element.dataset.mark = armMark(arm);
  return element;
}

// Browsers resolve light-dark() only where a colour is used, so a colour for plotly is read off an element.
function resolved(colour) {
  const probe = byId("theme");
  const before = probe.style.color;
  probe.style.color = colour;
  const value = getComputedStyle(probe).color;
  probe.style.color = before;
  return value;
}

function themeButton(changed) {
  const names = ["auto", "light", "dark"];
  let current = 0;
  byId("theme").addEventListener("click", () => {
    current = (current + 1) % names.length;
    document.documentElement.dataset.theme = names[current];
    byId("theme").querySelector("span").textContent = names[current];
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
}

async function start() {
  for (const element of document.querySelectorAll("[data-arm]")) {
    dress(element, Number(element.dataset.arm));
  }
  try {
    const data = JSON.parse(await unpack("data"));
    if (byId("arm-table")) makeSortable(byId("arm-table"));
    if (byId("list")) startViewer(data);
    const library = make("script");
    library.textContent = await unpack("plotly-js");
    document.head.append(library);
    const charts = new Charts(data);
    const draw = () => {
      if (data.golden.length) drawGolden(data.golden, byId("golden-plot"));
      data.lanes.forEach((chart, at) => drawLanes(chart, byId(`lanes-${at}`)));
      return charts.drawAll();
    };
    themeButton(draw);
    await draw();
    byId(location.hash.slice(1).split("?")[0])?.scrollIntoView(); // what stands above it has its height now
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    byId("failure").hidden = false;
    byId("failure").textContent = `This browser cannot draw the charts (${error}); one from 2023 or later can.`;
    throw error;
  }
}

document.addEventListener("DOMContentLoaded", start);
