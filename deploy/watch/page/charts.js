// Curves, drawn by uPlot.
import { colourOf, el, fmt } from "./parts.js";

const HEIGHT = 190;
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];
let made = [];

// The plots of what is shown no more are given up.
export function forget() {
  const gone = made.filter((plot) => plot.root.isConnected);
  for (const plot of gone) plot.destroy();
  made = made.filter((plot) => !gone.includes(plot));
}

export function chart({ title, runs }, tab) {
  const first = runs[0].panel;
  const curves = runs.flatMap(({ name, panel }) => panel.curves.map((curve, i) => ({
    ...curve, run: name, number: i, label: name ? `${name}: ${curve.label}` : curve.label,
  })));
  const tables = runs.map(({ panel }) => [panel.steps, ...panel.curves.map((curve) => curve.values)]);
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const place = el("div", { class: "plot", role: "img", "aria-label": spoken(title, curves) });
  const every = Math.max(...runs.map(({ panel }) => panel.every));
  const advice = first.note.startsWith("should") ? first.note : first.note && `look for: ${first.note}`;
  const notes = [advice.replaceAll("`", ""), every > 1 && `means of ${every} steps`]
    .filter(Boolean).join("; ");
  const latest = el("ul", { class: "latest" }, ...curves.map((curve) => el("li", { title: curve.meaning },
    key(curve), ` ${curves.length > 1 ? curve.label : ""} `,
    el("b", { "data-curve": curve.label, "data-value": curve.last }, fmt(curve.last)))));
  const figure = el("figure", { class: "card", "data-panel": title },
    el("figcaption", {}, el("b", {}, title), first.unit ? ` ${first.unit}` : "",
      notes ? el("small", {}, notes) : ""), place, latest);
  draw(place, data, curves, tab === "supervised" ? "step" : "iteration");
  return figure;
}

function key(curve) {
  const own = el("span", { class: "key", "aria-hidden": "true" });
  own.style.background = colourOf(curve.run, curve.number);
  return own;
}

function spoken(title, curves) {
  return `${title}: ${curves.slice(0, 6).map((curve) => `${curve.label} ${fmt(curve.last)}`).join(", ")}`;
}

function look(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axes() {
  const line = { stroke: look("--line"), width: 1 };
  const axis = { stroke: look("--soft"), grid: line, ticks: line, font: "11px system-ui, sans-serif" };
  return [axis, { ...axis, size: 56, values: (_, ticks) => ticks.map(fmt) }];
}

// What never changes is in the middle.
function range(_, least, most) {
  if (least === most) return [least - 1, most + 1];
  return uPlot.rangeNum(least, most, 0.1, true);
}

function whenSeen(place, make) {
  // The width is known once it stands in the page; of another width it is drawn anew.
  let plot = null;
  const observer = new ResizeObserver(() => {
    if (!place.clientWidth) return;
    if (plot) return plot.setSize({ width: place.clientWidth, height: HEIGHT });
    plot = make(place.clientWidth);
    made.push(plot);
  });
  observer.observe(place);
}

function draw(place, data, curves, unit) {
  const dots = data[0].length <= 40;
  whenSeen(place, (width) => new uPlot({
    width, height: HEIGHT, legend: { show: false }, axes: axes(),
    cursor: { sync: { key: unit }, y: false },
    scales: { x: { time: false }, y: { range } },
    series: [{ label: unit }, ...curves.map((curve) => ({
      label: curve.label, stroke: colourOf(curve.run, curve.number), width: 1.6, spanGaps: true,
      dash: curve.run ? DASHES[curve.number % DASHES.length] : [],
      points: { show: dots, size: 5 },
    }))],
    hooks: { setCursor: [(plot) => tell(place, plot, curves, unit)] },
  }, data, place));
}

// What is under the pointer, beneath the plot; without one the latest values.
function tell(place, plot, curves, unit) {
  const { idx } = plot.cursor;
  const list = place.parentElement.querySelectorAll(".latest b");
  curves.forEach((curve, i) => {
    const value = idx === null ? curve.last : plot.data[i + 1][idx];
    if (list[i]) list[i].textContent = fmt(value ?? null);
  });
  place.parentElement.classList.toggle("pointed", idx !== null);
  place.dataset.at = idx === null ? "" : `${unit} ${fmt(plot.data[0][idx])}`;
}

export function cloud(lengths, scores) {
  const order = lengths.map((_, i) => i).sort((a, b) => lengths[a] - lengths[b]);
  const data = [order.map((i) => lengths[i]), order.map((i) => scores[i])];
  const place = el("div", { class: "plot", role: "img",
    "aria-label": `Score against length of ${lengths.length} responses` });
  whenSeen(place, (width) => new uPlot({
    width, height: HEIGHT, legend: { show: false }, axes: axes(), cursor: { show: false },
    scales: { x: { time: false }, y: { range } },
    series: [{ label: "tokens" }, { label: "score", stroke: colourOf("", 0), paths: () => null,
      points: { show: true, size: 5, fill: colourOf("", 0) } }],
  }, data, place));
  return el("figure", { class: "card" },
    el("figcaption", {}, el("b", {}, "Score against length"), " tokens"), place);
}
