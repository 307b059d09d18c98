// An answer as its tokens: each has a colour by its probability, and one card, shared by all, shows what else might have
// stood there: on hover, on focus, on a tap.

import { element } from "./elements.js";

const card = document.getElementById("card");
const UNLIKELY = 0.1;
const HIDE_AFTER = 120; // milliseconds in which the pointer may go from a token to the card

const known = new WeakMap();
let shownFor = null;
let hiding = 0;

/** Add tokens at the end of `body`. One of them is reached by Tab, the others by the arrow keys. */
export function appendTokens(body, tokens) {
  for (const token of tokens) {
    const span = element("span", "token", token.text);
    known.set(span, token);
    if (token.p === null) {
      span.classList.add("unknown");
    } else {
      span.style.setProperty("--p", token.p);
      span.classList.toggle("unlikely", token.p < UNLIKELY);
      span.setAttribute("role", "button");
      span.setAttribute("aria-label", `${visible(token.text)}, ${percent(token.p)}`);
      span.tabIndex = body.querySelector('[tabindex="0"]') ? -1 : 0;
    }
    body.append(span);
  }
}

/** White space by name, everything else as it is. */
function visible(text) {
  if (text.trim()) return text;
  const names = { " ": "space", "\n": "new line", "\t": "tab" };
  return [...text].map((character) => names[character] ?? "white space").join(", ") || "nothing";
}

function percent(p) {
  const share = 100 * p;
  if (share >= 99.95) return "100 %";
  if (share < 0.1) return "less than 0.1 %";
  return `${share.toFixed(share < 10 ? 1 : 0)} %`;
}

function show(span) {
  clearTimeout(hiding);
  if (shownFor === span) return;
  hide();
  const token = known.get(span);
  shownFor = span;
  span.setAttribute("aria-describedby", "card");
  span.classList.add("looked-at");
  card.replaceChildren(heading(token), alternatives(token));
  card.hidden = false;
  place(span);
}

function heading({ text, p }) {
  const line = element("p", "card-head");
  line.append(element("span", "card-text", spelled(text)), element("span", "card-p", percent(p)));
  return line;
}

function alternatives({ text, alternatives: others }) {
  const list = element("ul", "card-list");
  for (const other of others) {
    const row = element("li", other.text === text ? "chosen" : "");
    row.style.setProperty("--p", other.p);
    row.append(element("span", "card-text", spelled(other.text)), element("span", "card-p", percent(other.p)));
    if (other.text === text) row.append(element("span", "unseen", " (chosen)"));
    list.append(row);
  }
  return list;
}

/** With signs for what would be invisible. */
function spelled(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

/** Below the token's first line, or above where there is no room; never outside of the window. */
function place(span) {
  const [box] = span.getClientRects();
  if (!box) return;
  const { width, height } = card.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const below = box.bottom + 6;
  const top = below + height > innerHeight - 8 ? Math.max(8, box.top - height - 6) : below;
  card.style.setProperty("left", `${left}px`);
  card.style.setProperty("top", `${top}px`);
}

/** Hide the card; false when it was not there. */
export function hide() {
  clearTimeout(hiding);
  if (!shownFor) return false;
  shownFor.removeAttribute("aria-describedby");
  shownFor.classList.remove("looked-at");
  shownFor = null;
  card.hidden = true;
  return true;
}

function hideSoon() {
  clearTimeout(hiding);
  hiding = setTimeout(() => {
    if (shownFor !== document.activeElement) hide();
  }, HIDE_AFTER);
}

/** To another token of the same answer. */
function move(event, span) {
  const all = [...span.parentElement.querySelectorAll(".token[tabindex]")];
  const at = all.indexOf(span);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const next = all[Math.max(0, Math.min(to, all.length - 1))];
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

export function connectTokens(log, scroller) {
  const on = (type, act) =>
    log.addEventListener(type, (event) => {
      const span = event.target.closest?.(".token[tabindex]");
      if (span) act(event, span);
    });
  on("pointerover", (event, span) => event.pointerType === "mouse" && show(span));
  on("pointerout", hideSoon);
  on("focusin", (_, span) => show(span));
  on("focusout", hide);
  on("click", (_, span) => {
    span.focus();
    show(span);
  });
  on("keydown", move);
  card.addEventListener("pointerenter", () => clearTimeout(hiding));
  card.addEventListener("pointerleave", hideSoon);
  scroller.addEventListener("scroll", () => shownFor && place(shownFor), { passive: true });
}
