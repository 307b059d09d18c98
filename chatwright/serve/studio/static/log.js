// The conversation on the page. Text of people and models enters as text; the only HTML is what the server rendered
// and sanitised.

const log = document.getElementById("log");
const scroller = document.getElementById("scroller");
const welcome = document.getElementById("welcome");

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function append(node) {
  const follow = atEnd();
  welcome.hidden = true;
  log.append(node);
  if (follow) toEnd();
  return node;
}

function atEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
}

export function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

export function clear() {
  log.replaceChildren();
  welcome.hidden = false;
}

export function showUser(text) {
  const turn = element("article", "turn user");
  const body = element("div", "text", text);
  body.dir = "auto";
  turn.append(element("span", "unseen", "You:"), body);
  append(turn);
  toEnd();
}

/** An answer that is still being written: text is collected and put on the page once per frame. */
export class Answer {
  constructor() {
    this.text = "";
    this.turn = element("article", "turn answer writing");
    this.body = element("div", "text");
    this.body.dir = "auto";
    this.shown = document.createTextNode("");
    this.body.append(this.shown);
    this.turn.append(element("span", "unseen", "Model:"), this.body);
    this.waiting = "";
    this.frame = 0;
    log.setAttribute("aria-busy", "true"); // screen readers wait for the whole answer
    append(this.turn);
  }

  push(text) {
    this.text += text;
    this.waiting += text;
    this.frame ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    const follow = atEnd();
    this.shown.appendData(this.waiting);
    this.waiting = "";
    this.frame = 0;
    if (follow) toEnd();
  }

  /** Replace the plain text by the server's HTML (or leave it, without) and add the small print. */
  finish({ html, note }) {
    this.settle();
    const follow = atEnd();
    if (html !== undefined) this.setHtml(html);
    if (note) this.turn.append(element("p", "note", note));
    if (follow) toEnd();
  }

  setHtml(html) {
    this.body.innerHTML = html;
    this.body.classList.add("rendered");
    // What can be scrolled must be reachable by keyboard.
    for (const block of this.body.querySelectorAll("pre")) block.tabIndex = 0;
  }

  settle() {
    cancelAnimationFrame(this.frame);
    this.flush();
    this.turn.classList.remove("writing");
    log.removeAttribute("aria-busy");
  }

  remove() {
    this.settle();
    this.turn.remove();
  }
}

/** Say that the model did not see the oldest messages; there is at most one such notice. */
export function showDropped(count, tokens) {
  log.querySelector(".notice")?.remove();
  if (!count) return;
  const what = count === 1 ? "The oldest message no longer fits" : `The ${count} oldest messages no longer fit`;
  append(element("p", "notice", `${what} the model's window of ${tokens} tokens: it did not see what came before.`));
}

export function showError(message, retry) {
  hideError();
  const box = element("div", "alert");
  box.setAttribute("role", "alert");
  box.append(element("span", "", message));
  const button = element("button", "quiet", "Try again");
  button.type = "button";
  button.addEventListener("click", retry);
  box.append(button);
  append(box);
  toEnd();
}

export function hideError() {
  log.querySelector(".alert")?.remove();
}
