// The tab of samples: responses of an iteration, and one of them token by token.
import { cloud } from "./charts.js";
import { button, el, fmt, get } from "./parts.js";

const asked = { iteration: "", order: "random", seed: 0 };
let open = "";

// Another tab or run is looked at: no sample is being read any more.
export function leave() {
  open = "";
}

// `put` shows what was made, unless another tab has been opened meanwhile.
export async function samples(run, put) {
  if (open) return null;  // what is being read stays
  const query = new URLSearchParams(asked);
  let found;
  try {
    found = await get(`api/runs/${run}/samples?${query}`);
  } catch (error) {
    if (asked.iteration === "") return el("p", { class: "note" }, error.message);
    return el("div", {}, controls(run, put, { iteration: asked.iteration, orders: [asked.order] }),
      el("p", { class: "note" }, error.message));
  }
  const rows = found.samples.map((sample) => el("tr", {},
    el("th", { scope: "row" }, button(sample.rollout_id, () => show(run, sample.rollout_id, put))),
    el("td", {}, fmt(sample.score)), el("td", {}, fmt(sample.kl)), el("td", {}, String(sample.length)),
    el("td", {}, sample.finish_reason), el("td", { class: "text" }, el("code", {}, short(sample.response)))));
  return el("div", {}, controls(run, put, found), cloud(found.lengths, found.scores),
    el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Responses" },
      el("table", { id: "samples" }, el("thead", {}, el("tr", {}, ...["response", "score", "KL", "tokens",
        "ended by", "text"].map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, ...rows))));
}

function short(text) {
  return text.length > 240 ? `${text.slice(0, 240)} …` : text;
}

async function again(run, put) {
  leave();
  const made = await samples(run, put);
  if (made) put(made);
}

function controls(run, put, found) {
  const iteration = el("input", { type: "number", min: 0, id: "iteration", value: found.iteration });
  iteration.addEventListener("change", () => { asked.iteration = iteration.value; again(run, put); });
  const order = el("select", { id: "order" }, ...found.orders.map((name) => el("option", {}, name)));
  order.value = asked.order;
  order.addEventListener("change", () => { asked.order = order.value; again(run, put); });
  const newest = button("newest", () => { asked.iteration = ""; again(run, put); });
  const draw = button("draw again", () => { asked.order = "random"; asked.seed += 1; again(run, put); });
  return el("p", { class: "controls" },
    el("label", { for: "iteration" }, "iteration "), iteration, newest,
    el("label", { for: "order" }, "first "), order, draw);
}

async function show(run, rollout, put) {
  open = rollout;
  const sample = await get(`api/runs/${run}/samples/${rollout}`);
  if (open !== rollout) return;
  const made = one(run, sample, put);
  put(made);
  made.querySelector("button").focus();
}

function one(run, sample, put) {
  const facts = [`score ${fmt(sample.score)}`, `KL ${fmt(sample.kl)} nats`,
    `${sample.length} tokens`, `ended by ${sample.finish_reason}`,
    `version ${sample.policy_version}`, sample.source, sample.reason,
    ...Object.entries(sample.components).map(([name, value]) => `${name} ${fmt(value)}`)];
  const largest = Math.max(1e-9, ...sample.tokens.map((token) => Math.abs(token.advantage ?? 0)));
  const columns = ["token", "engine", "learner", "reference", "reward", "KL penalty", "value", "advantage"];
  return el("div", {},
    button("back to all", () => again(run, put)),
    el("h2", {}, sample.rollout_id),
    el("p", { class: "note" }, facts.filter(Boolean).join(" · ")),
    el("div", { class: "card text" }, el("p", {}, el("code", { class: "soft" }, el("bdi", {}, sample.prompt))),
      el("p", { id: "tokens" }, ...sample.tokens.map((token) => piece(token, largest)))),
    el("p", { class: "note" }, "A token is marked by its advantage: green was better than expected, "
      + "red worse. Engine, learner and reference are log-probabilities."),
    el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Tokens" },
      el("table", {}, el("thead", {}, el("tr", {},
        ...columns.map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, ...sample.tokens.map((token) => el("tr", {},
        el("th", { scope: "row" }, el("code", {}, el("bdi", {}, JSON.stringify(token.text)))),
        ...[token.behavior_logprob, token.learner_logprob, token.ref_logprob, token.reward,
          token.kl_penalty, token.value, token.advantage].map((value) => el("td", {}, fmt(value)))))))));
}

function piece(token, largest) {
  const own = el("code", { class: (token.advantage ?? 0) < 0 ? "worse" : "better",
    title: `advantage ${fmt(token.advantage)}` }, token.text);
  own.style.setProperty("--much", String(Math.abs(token.advantage ?? 0) / largest));
  return own;
}
