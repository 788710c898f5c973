// Keys for the labelling page, and the time that an answer took without breaks.
// The page works without this: every key presses a button that is there.
const BREAK_MS = 60000;
const form = document.getElementById("answer");
const at = (id) => document.getElementById(id);

let worked = 0;
let since = performance.now();
let last = since;

function stir() {
  const now = performance.now();
  if (since === null) since = now;
  else if (now - last > BREAK_MS) {
    worked += last - since + BREAK_MS;
    since = now;
  }
  last = now;
}

function rest() {
  if (since === null) return;
  worked += Math.min(performance.now() - since, last - since + BREAK_MS);
  since = null;
}

for (const kind of ["keydown", "pointermove", "pointerdown", "scroll"]) {
  document.addEventListener(kind, stir, { passive: true, capture: true });
}
document.addEventListener("visibilitychange", () => (document.hidden ? rest() : stir()));

let sent = false;
if (form) {
  form.addEventListener("submit", (event) => {
    if (sent) {
      event.preventDefault();
      return;
    }
    sent = true;
    rest();
    form.elements.seconds.value = (worked / 1000).toFixed(2);
  });
}

function differ() {
  at("sides")?.classList.toggle("differ");
}

const shows = at("show-differences");
if (shows) {
  shows.hidden = false;
  shows.addEventListener("click", differ);
}

function keys(event) {
  // A key that is held down is pressed once, whatever page it was pressed on.
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const writing = event.target instanceof HTMLTextAreaElement || event.target instanceof HTMLSelectElement;
  if (event.key === "Escape" && writing) event.target.blur();
  if (writing) return;
  const key = event.key.toLowerCase();
  const pressed = {
    u: () => at("undo")?.click(),
    s: () => at("do-skip")?.click(),
    d: differ,
    "?": () => { if (at("keys")) at("keys").hidden = !at("keys").hidden; },
  }[key];
  if (pressed) {
    event.preventDefault();
    pressed();
  } else if (form && /^[1-7]$/.test(key)) {
    event.preventDefault();
    form.querySelector(`button[name="step"][value="${key - 1}"]`).click();
  }
}

document.addEventListener("keydown", keys);

// A page that the browser kept, and shows again, can be answered again.
window.addEventListener("pageshow", () => { sent = false; });
