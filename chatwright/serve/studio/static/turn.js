// One turn on the page: its text, as Markdown or as tokens, and what can be done with it. Text of people and models
// enters as text; the only HTML is what the server rendered and sanitised.

import { announce, element, iconButton, icon } from "./elements.js";
import { following } from "./scroll.js";
import { severalModels, wantsTokens } from "./settings.js";
import { appendTokens, hide } from "./tokens.js";
import { versions } from "./tree.js";

const CAN_GO_ON = ["length", "cancelled", "interrupted", "error"];

export class TurnView {
  /** `acts`: regenerate, goOn, edit, switchTo, tokensOf (chat.js), each given the turn. */
  constructor(turn, acts) {
    this.turn = turn;
    this.acts = acts;
    this.fromUser = turn.role === "user";
    this.element = element("article", `turn ${this.fromUser ? "user" : "answer"}`);
    this.element.dataset.turn = turn.id;
    this.body = element("div", "text");
    this.body.dir = "auto";
    this.foot = element("div", "foot");
    this.element.append(element("span", "unseen", this.fromUser ? "You:" : "Model:"), this.body, this.foot);
    this.waiting = []; // {text, tokens?} that came since the last frame
    this.frame = 0;
    this.asTokens = false;
    this.body.textContent = turn.content;
    this.showFoot();
  }

  // ---- while it is being written ----

  startWriting() {
    this.turn = { ...this.turn, finish_reason: null };
    this.element.classList.add("writing");
    this.foot.replaceChildren();
    this.body.classList.remove("rendered");
    this.showPlain();
  }

  /** Say below what the answer waits for; nothing, when it waits for nothing any more. */
  waitFor(text) {
    this.foot.replaceChildren(...(text ? [element("p", "note waiting", text)] : []));
  }

  push({ text, tokens }) {
    if (tokens && wantsTokens() && !this.turn.content) this.asTokens = true;
    this.turn.content += text;
    this.waiting.push({ text, tokens });
    this.frame ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    this.frame = 0;
    following(() => {
      if (this.asTokens) {
        this.frameTokens();
        appendTokens(this.body, this.waiting.flatMap(({ tokens }) => tokens));
      } else {
        this.body.append(this.waiting.map(({ text }) => text).join(""));
        this.body.normalize();
      }
    });
    this.waiting = [];
  }

  /** The answer is at its end; `turn` is what the server kept. */
  finish(turn) {
    cancelAnimationFrame(this.frame);
    this.flush();
    this.turn = turn;
    this.element.classList.remove("writing");
    following(() => {
      if (!this.asTokens) this.showText();
      this.showFoot();
    });
  }

  // ---- what it shows ----

  /** As the server's HTML, or as plain text where there is none (yet). */
  showText() {
    this.showPlain();
    if (this.turn.html === undefined || this.fromUser) return;
    this.body.innerHTML = this.turn.html;
    this.body.classList.add("rendered");
    // What can be scrolled must be reachable by keyboard.
    for (const block of this.body.querySelectorAll("pre, table")) block.tabIndex = 0;
  }

  showPlain() {
    hide();
    this.asTokens = false;
    this.body.classList.remove("tokens", "rendered");
    this.body.removeAttribute("role");
    this.body.removeAttribute("aria-label");
    this.body.textContent = this.turn.content;
  }

  showTokens(tokens) {
    this.asTokens = true;
    this.frameTokens();
    this.body.replaceChildren();
    appendTokens(this.body, tokens);
  }

  frameTokens() {
    this.body.classList.remove("rendered");
    this.body.classList.add("tokens");
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", "The answer's tokens with their probabilities");
  }

  async toggleTokens(wanted = !this.asTokens) {
    if (wanted === this.asTokens || this.element.classList.contains("writing")) return;
    if (wanted) {
      const tokens = await this.acts.tokensOf(this.turn);
      if (tokens) this.showTokens(tokens);
    } else {
      this.showText();
    }
    this.tokensButton?.setAttribute("aria-pressed", String(this.asTokens));
  }

  showFoot() {
    const { turn } = this;
    this.foot.replaceChildren();
    const buttons = element("div", "actions");
    buttons.append(this.switcher(), ...this.buttons());
    this.foot.append(buttons);
    const note = smallPrint(turn);
    if (note && !this.fromUser) this.foot.append(element("p", "note", note));
  }

  buttons() {
    const { turn, acts } = this;
    const copy = iconButton("copy", "Copy", () => this.copy(copy));
    if (this.fromUser) return [copy, idle(iconButton("edit", "Edit", () => this.edit()))];
    const made = [copy, idle(iconButton("again", "Regenerate", () => acts.regenerate(turn)))];
    if (turn.has_probabilities) {
      this.tokensButton = iconButton("tokens", "Token probabilities", () => this.toggleTokens());
      this.tokensButton.setAttribute("aria-pressed", String(this.asTokens));
      made.push(this.tokensButton);
    }
    if (CAN_GO_ON.includes(turn.finish_reason)) {
      const button = element("button", "quiet go-on", "Continue");
      button.type = "button";
      button.prepend(icon("on"));
      button.addEventListener("click", () => acts.goOn(turn));
      made.push(idle(button));
    }
    return made;
  }

  /** Previous and next version, "2 / 3" between them; nothing where there is only one. */
  switcher() {
    const all = versions(this.turn);
    const at = all.findIndex(({ id }) => id === this.turn.id);
    const box = element("span", "versions");
    if (all.length < 2) return box;
    const step = (name, label, to) => {
      const button = idle(iconButton(name, label, () => this.acts.switchTo(all[to], name)));
      button.disabled = !all[to];
      return button;
    };
    const count = element("span", "count", `${at + 1} / ${all.length}`);
    box.append(step("left", "Previous version", at - 1), count, step("right", "Next version", at + 1));
    return box;
  }

  async copy(button) {
    if (!(await copyText(this.turn.content))) {
      announce("This browser does not let the page copy.");
      return;
    }
    button.replaceChildren(icon("check"));
    announce("Copied.");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  }

  // ---- editing ----

  edit() {
    if (this.element.classList.contains("editing") || document.body.classList.contains("busy")) return;
    const form = element("form", "editor");
    const field = element("textarea");
    field.value = this.turn.content;
    field.setAttribute("aria-label", "Edit the message");
    const cancel = element("button", "plain", "Cancel");
    cancel.type = "button";
    const send = element("button", "primary", "Send");
    const buttons = element("div", "buttons");
    buttons.append(cancel, send);
    form.append(field, buttons);
    const close = () => {
      form.remove();
      this.element.classList.remove("editing");
      this.foot.querySelector('[aria-label="Edit"]')?.focus();
    };
    cancel.addEventListener("click", close);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text && !document.body.classList.contains("busy")) this.acts.edit(this.turn, text);
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const fit = () => {
      field.style.setProperty("height", "auto");
      field.style.setProperty("height", `${field.scrollHeight + 2}px`);
    };
    field.addEventListener("input", fit);
    this.element.classList.add("editing");
    this.element.append(form);
    fit();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** A button that has to wait while an answer is being written (style.css). */
function idle(button) {
  button.classList.add("idle");
  return button;
}

function smallPrint({ finish_reason: reason, tokens, seconds, model }) {
  if (!reason || tokens === null) return reason === "interrupted" ? "interrupted" : "";
  const speed = tokens / seconds;
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (seconds > 0) parts.push(`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`);
  if (severalModels() && model) parts.push(model);
  const ends = { length: "cut off at the longest answer", cancelled: "stopped", interrupted: "interrupted", error: "failed" };
  if (ends[reason]) parts.push(ends[reason]);
  return parts.join(" · ");
}

/** Copy; false when the browser does not let us. Pages without TLS from other machines have only the old way. */
async function copyText(text) {
  try {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text);
      return true;
    }
  } catch {
    return false;
  }
  const field = element("textarea", "unseen");
  field.value = text;
  const before = document.activeElement;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}
