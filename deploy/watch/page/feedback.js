// How the newest round of feedback is: how far, how far people agree, and each of them.
import { el, fmt } from "./parts.js";

const NAMES = {
  labeler: "labeler", answers: "answers", skipped: "skipped", seconds: "seconds an answer", ties: "ties",
  left: "left side preferred", gold: "right on known pairs", others: "as others say", again: "as before",
};

export function feedbackOf(facts) {
  const { alpha, model } = facts;
  const tiles = [
    [`${facts.answered} of ${facts.pairs}`, "pairs answered"],
    [String(facts.left), "answers to go"],
    [facts.closed ? "closed" : facts.seconds_left === null ? "" : `${Math.ceil(facts.seconds_left / 60)} min`,
      facts.closed ? "this round" : "left at this pace"],
    [facts.per_hour === null ? "" : fmt(facts.per_hour), "answers an hour"],
    [alpha ? `${alpha.mean.toFixed(2)} (${alpha.low.toFixed(2)} to ${alpha.high.toFixed(2)})` : "",
      `alpha over ${facts.shared} shared pairs`],
    [model.of ? `${Math.round(100 * model.hits / model.of)} % of ${model.of}` : "",
      "pairs that the reward model judges as people do (random ones)"],
  ].filter(([value]) => value !== "");
  return el("div", {},
    el("h2", {}, `Round ${facts.round}`),
    ...facts.concerns.map((text) => el("p", { class: "concern", role: "alert" }, text)),
    el("div", { class: "tiles" }, ...tiles.map(([value, title]) => el("div", { class: "card tile" },
      el("b", {}, value), el("span", {}, title)))),
    facts.rows.length ? people(facts) : el("p", { class: "note" }, "Nobody has answered yet."));
}

function people({ columns, rows }) {
  const head = columns.map((name) => el("th", { scope: "col" }, NAMES[name] ?? name));
  const body = rows.map(([name, ...cells]) => el("tr", {}, el("th", { scope: "row" }, name),
    ...cells.map((cell) => el("td", {}, cell))));
  return el("section", {}, el("h2", {}, "Who labels"),
    el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Labelers" },
      el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body))));
}
