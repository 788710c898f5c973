// The live page: asks the server what a run's folder says, and draws it.
// Texts are put in as texts, never as markup; nothing is asked of any other place.
import { chart, forget } from "./charts.js";
import { feedbackOf } from "./feedback.js";
import { timelineOf } from "./lanes.js";
import { button, el, fixed, fmt, get, replace, timeOf } from "./parts.js";
import { leave, samples } from "./samples.js";

const POLL_MS = 1500;
const TABS = [
  "outcome", "learning", "throughput", "workers", "samples", "health", "supervised", "feedback",
];
const SOME = ["supervised", "feedback"];  // tabs that not every run has
const now = {
  runs: [], chosen: [0], tab: "outcome", states: new Map(), drawn: "", busy: false, again: false,
  old: false,
};
const at = (id) => document.getElementById(id);

// ------------------------------------------------------------------ the head

function head() {
  const state = now.states.get(now.chosen[0]);
  if (!state) return;
  const { standing } = state;
  at("name").textContent = state.name;
  document.title = `${state.name} · Talipot`;
  const done = standing.steps === null ? `${standing.step}` : `${standing.step} of ${standing.steps}`;
  const unit = standing.stage === "train" ? "iteration" : "step";
  const words = [standing.state, standing.stage && `${unit} ${done} of ${standing.stage}`];
  if (standing.seconds_left !== null) words.push(`about ${span(standing.seconds_left)} left`);
  if (standing.workers.length) words.push(`${standing.workers.length} workers`);
  if (standing.told_seconds_ago > 15) words.push(`silent for ${span(standing.told_seconds_ago)}`);
  const shown = at("standing");
  const text = words.filter(Boolean).join(" · ").replace(" of train", "");
  if (shown.textContent !== text) shown.textContent = text;
  shown.dataset.step = standing.step;
  replace(at("tiles"), state.tiles.map(tile));
  replace(at("warnings"), [
    ...standing.notes.map((note) => el("p", { class: "told" }, note)),
    ...state.health.slice(0, 1).map((verdict) => el("p", { class: verdict.severity },
      el("b", {}, `${verdict.check} `), verdict.evidence)),
  ]);
  for (const tab of TABS) {
    const own = at(`tab-${tab}`);
    own.hidden = SOME.includes(tab) && !state.tabs.includes(tab);
    if (tab === "health") own.textContent = state.health.length ? `health (${state.health.length})` : tab;
  }
}

function tile({ metric, title, value }) {
  return el("div", { class: "card tile" },
    el("b", { "data-metric": metric, "data-value": value }, fmt(value)), el("span", {}, title));
}

function span(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

function choices() {
  at("chosen").hidden = now.runs.length < 2;
  replace(at("runs"), now.runs.map((name, number) => {
    const box = el("input", { type: "checkbox", id: `run-${number}` });
    box.checked = now.chosen.includes(number);
    box.addEventListener("change", () => {
      const others = now.chosen.filter((other) => other !== number);
      now.chosen = box.checked ? [...others, number].sort((a, b) => a - b) : others;
      if (!now.chosen.length) now.chosen = [number], box.checked = true;
      leave();
      now.drawn = "";
      tick();
    });
    return el("label", {}, box, " ", name);
  }));
}

function tabs() {
  const list = TABS.map((tab) => {
    const own = button(tab, () => open(tab));
    own.id = `tab-${tab}`;
    own.setAttribute("role", "tab");
    own.setAttribute("aria-controls", "view");
    own.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const there = TABS.filter((name) => !at(`tab-${name}`).hidden);
      const next = there[(there.indexOf(tab) + step + there.length) % there.length];
      open(next);
      at(`tab-${next}`).focus();
    });
    return own;
  });
  replace(at("tabs"), list);
  mark();
}

function open(tab) {
  leave();
  now.tab = tab;
  now.drawn = "";
  location.hash = tab;
  mark();
  tick();
}

function mark() {
  for (const tab of TABS) {
    const own = at(`tab-${tab}`);
    own.setAttribute("aria-selected", String(tab === now.tab));
    own.tabIndex = tab === now.tab ? 0 : -1;
  }
  at("view").setAttribute("aria-labelledby", `tab-${now.tab}`);
}

// ------------------------------------------------------------------ the tabs

async function panels(tab, chosen) {
  const answers = await Promise.all(chosen.map((run) => get(`api/runs/${run}/panels/${tab}`)));
  const titles = [...new Set(answers.flatMap((answer) => answer.panels.map((panel) => panel.title)))];
  const several = chosen.length > 1;
  const parts = titles.map((title) => ({
    title,
    runs: answers.map((answer, i) => ({
      name: several ? now.runs[chosen[i]] : "",
      panel: answer.panels.find((panel) => panel.title === title),
    })).filter(({ panel }) => panel),
  }));
  return parts.length
    ? el("div", { class: "charts" }, ...parts.map((part) => chart(part, tab)))
    : el("p", { class: "note" }, "Nothing is logged of this yet.");
}

async function workers(chosen) {
  const asked = [panels("workers", chosen), get(`api/runs/${chosen[0]}/workers`)];
  const [curves, { lanes, events, timeline }] = await Promise.all(asked);
  const done = timelineOf(timeline);
  return el("div", {}, ...(done ? [done] : []), lanesOf(lanes), eventsOf(events), curves);
}

// While the run works, what is done now is put in the place of what was done before.
async function renew(run) {
  const { timeline } = await get(`api/runs/${run}/workers`);
  const old = at("timeline");
  const made = timelineOf(timeline);
  // Whoever reads or scrolls there by keyboard is not disturbed.
  if (!old || !made || old.contains(document.activeElement)) return;
  const { scrollTop, scrollLeft } = old.querySelector(".scroll");
  old.replaceWith(made);
  Object.assign(made.querySelector(".scroll"), { scrollTop, scrollLeft });
}

function lanesOf(lanes) {
  const spans = lanes.flatMap((lane) => lane.spans);
  if (!lanes.length) return el("p", { class: "note" }, "No worker has started yet.");
  const here = Date.now() / 1000;  // they may all be starting yet
  const begin = Math.min(here, ...spans.map((part) => part.from));
  const end = Math.max(begin + 1, ...spans.map((part) => part.to ?? here));
  const rows = lanes.map((lane) => el("tr", {},
    el("th", { scope: "row" }, lane.name), el("td", {}, lane.state),
    el("td", {}, lane.state === "gone" ? "" : String(lane.calls)),
    el("td", {}, lane.node ? `${lane.node} / ${lane.pid}` : ""),
    el("td", { class: "lane" }, bar(lane, begin, end), el("small", {}, lifeOf(lane)))));
  return el("section", {}, el("h2", {}, "Who works"),
    el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Workers" },
      el("table", {}, el("thead", {}, el("tr", {}, ...["worker", "state", "calls", "node / process",
        `${timeOf(begin)} to ${timeOf(end)}`].map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, ...rows))));
}

function bar(lane, begin, end) {
  const parts = lane.spans.map((part) => {
    const own = el("i", { class: `span ${part.state}` });
    const until = part.to ?? end;
    own.style.left = `${100 * (part.from - begin) / (end - begin)}%`;
    own.style.width = `${Math.max(0.4, 100 * (until - part.from) / (end - begin))}%`;
    return own;
  });
  return el("div", { class: "bar", "aria-hidden": "true" }, ...parts);
}

function lifeOf(lane) {
  const last = lane.spans.at(-1);
  if (!last) return "starting";
  if (last.to === null) return `since ${timeOf(lane.spans[0].from)}`;
  return `${timeOf(lane.spans[0].from)} to ${timeOf(last.to)} ${last.end}`;
}

function eventsOf(events) {
  const own = events.filter((event) => event.what !== "started" && event.what !== "stopped");
  if (!own.length) return el("p", { class: "note" }, "No worker was lost, and nothing failed.");
  return el("section", {}, el("h2", {}, "What has happened"),
    el("ul", { class: "card events" }, ...own.map((event) => el("li", {},
      el("time", {}, timeOf(event.time)), " ", el("b", {}, `${event.worker} ${event.what}`.trim()),
      event.detail ? ` ${event.detail}` : ""))));
}

function health(state) {
  const found = state.health.map((verdict) => el("li", { class: verdict.severity },
    el("b", {}, verdict.check), ` ${verdict.evidence}. `,
    el("span", { class: "soft" }, `${verdict.advice} (${verdict.section})`)));
  if (found.length) return el("ul", { class: "card health" }, ...found);
  return el("p", { class: "note" }, state.checks
    ? `None of ${state.checks} checks finds anything wrong.`
    : "The checks begin with the first iteration.");
}

async function view(tab, chosen, state) {
  if (tab === "workers") return workers(chosen);
  if (tab === "health") return health(state);
  if (tab === "samples") return samples(chosen[0], put);
  if (tab === "feedback") {
    const facts = await get(`api/runs/${chosen[0]}/feedback`);
    // A round is not read anew for each answer: what is not the newest is asked for once more.
    now.old = facts.told.join() !== state.feedback.join();
    return feedbackOf(facts);
  }
  return panels(tab, chosen);
}

// Shows a tab's contents, unless another tab has been opened meanwhile.
function put(made, tab = "samples") {
  if (tab !== now.tab) return;
  forget();
  replace(at("view"), [made]);
  at("view").dataset.tab = tab;
}

// ------------------------------------------------------------------ again and again

// What is chosen may change while answers are waited for: it is asked once more then.
async function tick() {
  if (now.busy) {
    now.again = true;
    return;
  }
  now.busy = true;
  const { tab } = now;
  const chosen = [...now.chosen];
  try {
    const states = await Promise.all(chosen.map((run) => get(`api/runs/${run}/state`)));
    chosen.forEach((run, i) => now.states.set(run, states[i]));
    document.body.classList.remove("gone");
    head();
    const lives = states[0].standing.workers.map((worker) => [worker.name, worker.state]);
    const live = { workers: lives, health: states[0].health, feedback: states[0].feedback }[tab] ?? "";
    const wanted = JSON.stringify([chosen, tab, states.map((state) => state.version), live]);
    if (wanted !== now.drawn) {
      const made = await view(tab, chosen, states[0]);
      if (made) put(made, tab);
      if (tab === now.tab) now.drawn = now.old ? "" : wanted;
      now.old = false;
    } else if (tab === "workers" && states[0].standing.state === "running") {
      await renew(chosen[0]);
    }
  } catch (error) {
    document.body.classList.add("gone");
    at("standing").textContent = `talipot watch does not answer: ${error.message}`;
  } finally {
    now.busy = false;
  }
  if (now.again || tab !== now.tab) {
    now.again = false;
    tick();
  }
}

async function begin() {
  const wanted = location.hash.slice(1);
  if (TABS.includes(wanted)) now.tab = wanted;
  try {
    now.runs = await get("api/runs");
  } catch (error) {
    at("standing").textContent = `talipot watch does not answer: ${error.message}; load the page again`;
    return;
  }
  fixed(now.runs);
  choices();
  tabs();
  await tick();
  setInterval(() => { if (!document.hidden) tick(); }, POLL_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(); });
}

begin();
