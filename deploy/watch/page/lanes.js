// What each worker did in the last iterations.
import { el, timeOf } from "./parts.js";

export function timelineOf(timeline) {
  if (!timeline) return null;
  const { begin, end, lanes, legend, more, roles, iterations } = timeline;
  const place = (moment) => 100 * (moment - begin) / (end - begin);
  const rows = lanes.map((lane) => el("tr", {}, el("th", { scope: "row" }, lane.name),
    el("td", { class: "lane" }, bar(lane, place, iterations), el("small", {}, lane.words))));
  return el("section", { id: "timeline" }, el("h2", {}, "What workers do"),
    el("ul", { class: "legend" }, ...legend.map((what) => el("li", {},
      el("i", { class: `key ${what}`, "aria-hidden": "true" }), what))),
    el("p", { class: "note" }, ...Object.entries(roles).flatMap(([role, words], i) => [
      i ? "; " : "", el("b", {}, role), ` ${words}`]), more ? `; ${more} more workers` : ""),
    el("div", { class: "card scroll tall", tabindex: "0", role: "region",
      "aria-label": "What workers do" },
    el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "worker"),
      el("th", { scope: "col" }, `${timeOf(begin)} to ${timeOf(end)}; each vertical line is the end of an iteration`))),
    el("tbody", {}, ...rows))));
}

function bar(lane, place, iterations) {
  const parts = lane.spans.map(([what, from, to]) => {
    const own = el("i", { class: `span ${what}` });
    own.style.left = `${place(from)}%`;
    own.style.width = `${Math.max(0.1, place(to) - place(from))}%`;
    return own;
  });
  const marks = iterations.map((moment) => {
    const own = el("i", { class: "end" });
    own.style.left = `${place(moment)}%`;
    return own;
  });
  return el("div", { class: "bar doing", "aria-hidden": "true" }, ...parts, ...marks);
}
