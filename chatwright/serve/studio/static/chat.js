// The chat page: what happens on send, stop, edit, regenerate, on a reload and with the address. Conversations live on
// the server, and an answer is a job there: this page shows them and follows it, so a reload or a lost connection costs
// nothing.

import { announce } from "./elements.js";
import { connectKeyboard } from "./keyboard.js";
import { allViews, hideBoxes, setBusy, show, showDropped, showError, showUnanswered, viewOf } from "./log.js";
import { toEnd } from "./scroll.js";
import { at, follow, get, patch, post, Refused } from "./server.js";
import { connectSettings, fill, fillRemembered, model, sampling, system, wantsTokens } from "./settings.js";
import { closeDrawer, connectSidebar, refresh, setCurrent as markCurrent } from "./sidebar.js";
import { connectTokens, hide as hideCard } from "./tokens.js";
import { branch, chat, clearChat, load, newestLeaf, put } from "./tree.js";

const prompt = document.getElementById("prompt");
const send = document.getElementById("send");
const stop = document.getElementById("stop");
const heading = document.getElementById("heading");

/** The answer under way, {controller, job, stopped}; null when there is none. */
let current = null;
/** Model -> its window in tokens, of those in memory. */
const windows = new Map();
/** Whether the page knows who it is for and what it shows, and whether somebody has pressed Enter before that. */
const start = { done: false, wanted: false };

const settings = () => ({ model: model(), system: system(), settings: sampling() });

// ---- an answer ----

function begin() {
  const run = { controller: new AbortController(), job: null, stopped: false };
  setCurrent(run);
  return run;
}

function setCurrent(run) {
  current = run;
  setBusy(Boolean(run));
  showStop(Boolean(run));
}

function showStop(shown) {
  const focusWasOnStop = document.activeElement === stop;
  send.hidden = shown;
  stop.hidden = !shown;
  stop.classList.remove("pressed");
  if (!shown && focusWasOnStop) focusPrompt();
}

/** Have the message `parent` answered, or let the answer `continues` go on. */
async function ask(body, run = begin()) {
  hideBoxes();
  announce("The model is writing.");
  try {
    const { id, turn } = await post(at(chat.id, "/answers"), { ...body, ...settings(), probabilities: wantsTokens() });
    if (run.controller.signal.aborted) return; // somebody has gone elsewhere; the answer is kept for when they come back
    run.job = id;
    if (run.stopped) await post(`/chat/jobs/${id}/stop`);
    put(turn);
    chat.leaf = turn.id;
    if (!viewOf(turn.id)) showBranch();
    await watch(run, turn.id);
  } catch (error) {
    await fail(run, error, () => ask(body));
  }
}

/** Show the events of the run's job, which writes the answer `number`. Throws Refused. */
async function watch(run, number) {
  const view = viewOf(number);
  view.startWriting();
  toEnd();
  if (document.activeElement === document.body) stop.focus({ preventScroll: true }); // the button pressed is gone
  for await (const event of follow(run.job, run.controller.signal)) {
    if (event.type === "loading") {
      view.waitFor(`loading ${event.model} …`);
      announce(`Loading ${event.model}.`);
    } else if (event.type === "begin") {
      view.waitFor("");
      windows.set(event.model, event.window);
      showDropped(put({ id: number, dropped: event.dropped }), event.window);
    } else if (event.type === "text") {
      view.push(event);
    } else if (event.type === "error") {
      throw new Refused(event.message);
    } else {
      const { asTokens } = view;
      view.finish(put({ ...event.turn, html: event.html, tokenTexts: undefined }));
      if (wantsTokens() && !asTokens) view.toggleTokens(true);
      setCurrent(null);
      announce("The answer is complete.");
      refresh();
    }
  }
}

/** Show what the server has, and what went wrong. */
async function fail(run, error, retry) {
  if (run.controller.signal.aborted) return;
  if (!(error instanceof Refused)) console.error(error);
  try {
    const found = await get(at(chat.id));
    if (run.controller.signal.aborted) return;
    load(found);
    showBranch();
  } catch {
    // The server is gone, too; the message says so.
  }
  setCurrent(null);
  announce("");
  showError(error instanceof Refused ? error.message : "Something in this page failed.", retry);
}

async function stopCurrent() {
  if (!current || current.stopped) return;
  current.stopped = true;
  stop.classList.add("pressed"); // not disabled: that would lose the focus
  try {
    if (current.job) await post(`/chat/jobs/${current.job}/stop`);
  } catch {
    // The job is gone or the server is; whoever follows the job finds out and says so.
  }
}

// ---- what a person says ----

function submit() {
  const text = prompt.value.trim();
  start.wanted = true;
  if (!text || current || !start.done) return;
  prompt.value = "";
  fitPrompt();
  say(text, chat.leaf);
}

/** Say `text` below the turn `parent`, and have it answered. */
async function say(text, parent) {
  const run = begin();
  hideBoxes();
  try {
    if (chat.id === null) {
      const made = await post("/chat/conversations", { content: text, ...settings() });
      if (run.controller.signal.aborted) return;
      load(made);
      history.pushState(null, "", `/c/${made.id}`);
      showTitle();
      refresh();
    } else {
      const turn = await post(at(chat.id, "/messages"), { parent, content: text });
      if (run.controller.signal.aborted) return;
      put(turn);
      chat.leaf = turn.id;
    }
  } catch (error) {
    if (run.controller.signal.aborted) return;
    setCurrent(null);
    prompt.value ||= text;
    fitPrompt();
    showError(error.message);
    return;
  }
  showBranch();
  toEnd();
  await ask({ parent: chat.leaf }, run);
}

const acts = {
  regenerate: (turn) => current || ask({ parent: turn.parent }),
  goOn: (turn) => current || ask({ continues: turn.id }),
  edit(turn, text) {
    if (current) return;
    say(text, turn.parent);
    focusPrompt();
  },
  async switchTo(turn, direction) {
    if (current) return;
    chat.leaf = newestLeaf(turn).id;
    showBranch();
    const view = viewOf(turn.id).element;
    const buttons = [...view.querySelectorAll(".versions button")];
    const [same, other] = direction === "left" ? buttons : buttons.reverse();
    (same.disabled ? other : same).focus({ preventScroll: true });
    view.scrollIntoView({ block: "nearest" });
    announce(`Version ${view.querySelector(".count").textContent}`);
    await quietly(patch(at(chat.id), { leaf: chat.leaf }));
  },
  async tokensOf(turn) {
    if (!turn.tokenTexts) {
      const found = await quietly(get(at(chat.id, `/messages/${turn.id}/tokens`)));
      turn.tokenTexts = found?.tokens;
    }
    return turn.tokenTexts;
  },
};

/** What a request gives; undefined, and a message, when it fails. */
async function quietly(request) {
  try {
    return await request;
  } catch (error) {
    announce(error.message);
    return undefined;
  }
}

function editLast() {
  const last = branch().findLast(({ role }) => role === "user");
  if (last) viewOf(last.id).edit();
}

// ---- which conversation ----

/** Show the tree's branch: at once as text, then as the server's HTML. */
function showBranch() {
  hideCard();
  show(acts);
  const answers = branch().filter(({ role }) => role === "assistant");
  const last = answers.at(-1);
  showDropped(last, windows.get(last?.model));
  renderMarkdown(answers.filter(({ finish_reason: reason }) => reason));
  applyTokens();
}

async function renderMarkdown(answers) {
  const without = answers.filter(({ html }) => html === undefined);
  if (without.length) {
    const found = await quietly(post("/chat/render", { texts: without.map(({ content }) => content) }));
    without.forEach((turn, index) => (turn.html = found?.html[index]));
  }
  for (const { id } of answers) {
    const view = viewOf(id);
    if (view && !view.asTokens && !view.element.classList.contains("writing")) view.showText();
  }
}

function applyTokens() {
  for (const view of allViews()) if (view.turn.has_probabilities) view.toggleTokens(wantsTokens());
}

function showTitle() {
  heading.textContent = chat.title || "New chat";
  document.title = chat.title ? `${chat.title} · chatwright` : "chatwright";
  markCurrent(chat.id);
}

/** Stop following, without stopping the answer: it is kept for when somebody comes back. */
function leave() {
  current?.controller.abort();
  setCurrent(null);
  hideCard();
  hideBoxes();
}

async function open(id, { push = true } = {}) {
  leave();
  const run = begin();
  showStop(false); // there is nothing to stop yet
  let found;
  try {
    found = await get(at(id));
  } catch (error) {
    if (run.controller.signal.aborted) return;
    newChat({ push: false });
    showError(error.message);
    return;
  }
  if (run.controller.signal.aborted) return;
  load(found);
  fill(found);
  if (push) history.pushState(null, "", `/c/${id}`);
  showTitle();
  showBranch();
  toEnd();
  const { job } = found;
  if (!job) {
    setCurrent(null);
    if (chat.turns.get(chat.leaf)?.role === "user") showUnanswered(() => ask({ parent: chat.leaf }));
    return;
  }
  run.job = job.id;
  showStop(true);
  const { parent } = chat.turns.get(job.turn);
  try {
    if (!viewOf(job.turn)) chat.leaf = job.turn;
    showBranch();
    await watch(run, job.turn);
  } catch (error) {
    await fail(run, error, () => ask({ parent }));
  }
}

function newChat({ push = true } = {}) {
  leave();
  clearChat();
  fillRemembered();
  if (push && location.pathname !== "/") history.pushState(null, "", "/");
  showTitle();
  showBranch();
  showWelcome();
  announce("A new chat.");
  closeDrawer();
  focusPrompt();
}

async function showWelcome() {
  const name = model();
  document.getElementById("welcome-model").textContent = name;
  const found = await quietly(get("/chat/models"));
  for (const { name: one, window: size } of found?.models ?? []) if (size) windows.set(one, size);
  if (name !== model()) return;
  const size = windows.get(name);
  document.getElementById("welcome-window").textContent = size
    ? `It sees the last ${size} tokens of a conversation.`
    : "It is loaded when you first write to it.";
}

function route() {
  const [, id] = /^\/c\/([^/]+)$/.exec(location.pathname) ?? [];
  if (id) open(decodeURIComponent(id), { push: false });
  else newChat({ push: false });
}

// ---- the page ----

/** As high as its text, up to what the stylesheet allows. */
function fitPrompt() {
  prompt.style.setProperty("height", "auto");
  prompt.style.setProperty("height", `${prompt.scrollHeight}px`);
}

/** Not where it would bring up a keyboard over half of the screen. */
function focusPrompt() {
  if (matchMedia("(hover: hover)").matches) prompt.focus({ preventScroll: true });
}

async function settingsChanged() {
  if (chat.id === null) showWelcome();
  else await quietly(patch(at(chat.id), settings()));
}

function connect() {
  document.getElementById("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  prompt.addEventListener("input", fitPrompt);
  prompt.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) submit();
    else if (event.key === "ArrowUp" && !prompt.value && !current) editLast();
    else return;
    event.preventDefault();
  });
  stop.addEventListener("click", stopCurrent);
  document.getElementById("new-chat").addEventListener("click", () => newChat());
  addEventListener("popstate", route);
  connectSettings(settingsChanged, applyTokens);
  connectTokens(document.getElementById("log"), document.getElementById("scroller"));
  connectSidebar({
    open,
    renamed(id, title) {
      if (id !== chat.id) return;
      chat.title = title;
      showTitle();
    },
    deleted(id) {
      if (id === chat.id) newChat();
    },
  });
  connectKeyboard({
    newChat,
    toMessage: () => prompt.focus(),
    escape: () => hideCard() || closeDrawer() || stopCurrent(),
  });
}

connect();
try {
  await post("/chat/owner"); // the cookie that says whose conversations these are
  refresh();
  route();
  start.done = true;
  if (start.wanted) submit();
} catch (error) {
  showError(error.message, () => location.reload());
}
