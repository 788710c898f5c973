// Elements, numbers and answers: what the parts of the page share.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

export function button(text, act) {
  const made = el("button", { type: "button" }, text);
  made.addEventListener("click", act);
  return made;
}

export function replace(parent, children) {
  parent.replaceChildren(...children);
}

export function fmt(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export function timeOf(seconds) {
  return new Date(1000 * seconds).toLocaleTimeString([], { hour12: false });
}

const PATIENCE_MS = 20000;

export async function get(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(PATIENCE_MS) });
  const facts = await answer.json().catch(() => ({ error: answer.statusText }));
  if (!answer.ok) throw new Error(facts.error || answer.statusText);
  return facts;
}

let names = [];
export function fixed(runs) {
  names = runs;
}

// A run keeps its colour, whichever others are shown beside it.
export function colourOf(run, curve) {
  const number = run ? names.indexOf(run) : curve;
  return getComputedStyle(document.documentElement)
    .getPropertyValue(`--line-${1 + (number % 6)}`).trim();
}
