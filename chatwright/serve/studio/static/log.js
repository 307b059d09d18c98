// The conversation on the page: one view per turn, notices, errors.

import { element } from "./elements.js";
import { following, toEnd } from "./scroll.js";
import { branch } from "./tree.js";
import { TurnView } from "./turn.js";

const log = document.getElementById("log");
const welcome = document.getElementById("welcome");

/** The views of the turns that are shown, by the turns' ids. */
let views = new Map();

/** Show the branch that the tree says. `acts`: what the buttons do (chat.js). */
export function show(acts) {
  views = new Map();
  const turns = branch();
  log.setAttribute("aria-live", "off"); // what was said before is not news
  setTimeout(() => log.setAttribute("aria-live", "polite"), 500);
  for (const turn of turns) views.set(turn.id, new TurnView(turn, acts));
  log.replaceChildren(...[...views.values()].map((view) => view.element));
  welcome.hidden = turns.length > 0;
  log.querySelector(".turn:last-child")?.classList.add("last");
}

export const viewOf = (id) => views.get(id);

export function allViews() {
  return [...views.values()];
}

/** An answer is being written: screen readers wait for the whole, and nothing that would need another answer is offered. */
export function setBusy(busy) {
  if (busy) log.setAttribute("aria-busy", "true");
  else log.removeAttribute("aria-busy");
  document.body.classList.toggle("busy", busy);
}

/** Say that the model did not see the oldest messages; there is at most one such notice, before the answer. */
export function showDropped(turn, tokens) {
  log.querySelector(".notice.dropped")?.remove();
  if (!turn?.dropped) return;
  const count = turn.dropped;
  const what = count === 1 ? "The oldest message no longer fits" : `The ${count} oldest messages no longer fit`;
  const window = tokens ? `the model's window of ${tokens} tokens` : "the model's window";
  const notice = element("p", "notice dropped", `${what} ${window}: it did not see what came before.`);
  following(() => log.insertBefore(notice, viewOf(turn.id)?.element ?? null));
}

export function showError(message, retry, label = "Try again") {
  addBox("alert", message, retry, label).setAttribute("role", "alert");
}

/** A message that has no answer, because something went wrong before a reload. */
export function showUnanswered(retry) {
  addBox("notice box", "This message has no answer yet.", retry, "Answer it");
}

function addBox(kind, message, retry, label) {
  hideBoxes();
  const box = element("div", kind);
  box.append(element("span", "", message));
  if (retry) {
    const button = element("button", "quiet", label);
    button.type = "button";
    button.addEventListener("click", retry);
    box.append(button);
  }
  welcome.hidden = true;
  log.append(box);
  toEnd();
  return box;
}

export function hideBoxes() {
  for (const box of log.querySelectorAll(".alert, .notice.box")) box.remove();
}
