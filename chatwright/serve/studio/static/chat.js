// The chat page: what happens on send, stop, reload and new chat. An answer is a job on the server; this page only
// follows it, so a reload or a lost connection costs nothing.

import { chat, clearChat, forModel, saveChat } from "./conversation.js";
import { Answer, clear, hideError, showDropped, showError, showUser, toEnd } from "./log.js";
import { follow, post, Refused } from "./server.js";
import { connectSettings, maxTokens, temperature } from "./settings.js";

const prompt = document.getElementById("prompt");
const send = document.getElementById("send");
const stop = document.getElementById("stop");
const status = document.getElementById("status");
const modelWindow = Number(document.body.dataset.window);

/** The answer under way: {controller, stopped}; null when there is none. */
let current = null;

function setCurrent(value) {
  current = value;
  send.hidden = Boolean(value);
  stop.hidden = !value;
  stop.disabled = false;
}

/** Ask the server for the next answer and follow it. */
async function ask() {
  hideError();
  const run = { controller: new AbortController(), stopped: false };
  setCurrent(run);
  status.textContent = "The model is writing.";
  try {
    const body = { messages: forModel(), temperature: temperature(), max_tokens: maxTokens() };
    const { id, dropped } = await post("/chat/jobs", body);
    if (run.controller.signal.aborted) {
      await post(`/chat/jobs/${id}/stop`); // a new chat was begun meanwhile
      return;
    }
    Object.assign(chat, { job: id, dropped });
    saveChat();
    if (run.stopped) await post(`/chat/jobs/${id}/stop`);
    await watch(run);
  } catch (error) {
    fail(run, error);
  }
}

/** Show the events of the job that `chat.job` names. */
async function watch(run) {
  showDropped(chat.dropped, modelWindow);
  const answer = new Answer();
  try {
    for await (const event of follow(chat.job, run.controller.signal)) {
      if (event.type === "text") {
        answer.push(event.text);
      } else if (event.type === "error") {
        throw new Refused(event.message);
      } else {
        const note = smallPrint(event);
        answer.finish({ html: event.html, note });
        const { dropped } = chat;
        chat.messages.push({ role: "assistant", content: answer.text, note, dropped });
        Object.assign(chat, { job: null, dropped: 0 });
        saveChat();
        setCurrent(null);
        status.textContent = "The answer is complete.";
      }
    }
  } catch (error) {
    if (answer.text) answer.settle();
    else answer.remove();
    throw error;
  }
}

function fail(run, error) {
  if (run.controller.signal.aborted) return;
  chat.job = null;
  saveChat();
  setCurrent(null);
  status.textContent = "";
  if (!(error instanceof Refused)) console.error(error);
  showError(error instanceof Refused ? error.message : "Something in this page failed.", ask);
}

function smallPrint({ finish_reason: reason, tokens, seconds }) {
  const rate = seconds > 0 ? ` · ${(tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} tokens/s` : "";
  const end = { length: " · cut off at the longest answer", cancelled: " · stopped" }[reason] ?? "";
  return `${tokens} ${tokens === 1 ? "token" : "tokens"}${rate}${end}`;
}

async function stopCurrent() {
  if (!current || current.stopped) return;
  current.stopped = true;
  stop.disabled = true;
  try {
    if (chat.job) await post(`/chat/jobs/${chat.job}/stop`);
  } catch {
    // The job is gone or the server is; whoever follows the job finds out and says so.
  }
}

function submit() {
  const text = prompt.value.trim();
  if (!text || current) return;
  prompt.value = "";
  fitPrompt();
  chat.messages.push({ role: "user", content: text });
  saveChat();
  showUser(text);
  ask();
}

function newChat() {
  if (current) {
    current.controller.abort();
    if (chat.job) post(`/chat/jobs/${chat.job}/stop`).catch(() => {});
    setCurrent(null);
  }
  clearChat();
  clear();
  status.textContent = "A new chat.";
  prompt.focus();
}

/** As high as its text, up to what the stylesheet allows. */
function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

/** Show the conversation of before a reload and go on with an answer that was being written. */
async function restore() {
  const answers = [];
  for (const message of chat.messages) {
    if (message.role === "user") {
      showUser(message.content);
      continue;
    }
    if (message.dropped) showDropped(message.dropped, modelWindow);
    const answer = new Answer();
    answer.push(message.content);
    answer.finish({ note: message.note });
    answers.push(answer);
  }
  toEnd();
  if (chat.job) {
    const run = { controller: new AbortController(), stopped: false };
    setCurrent(run);
    watch(run).catch((error) => fail(run, error));
  }
  if (!answers.length) return;
  try {
    const { html } = await post("/chat/render", { texts: answers.map((answer) => answer.text) });
    answers.forEach((answer, index) => answer.setHtml(html[index]));
    toEnd();
  } catch {
    // Without the server's HTML the answers stay plain text.
  }
}

document.getElementById("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stopCurrent();
});
stop.addEventListener("click", () => {
  stopCurrent();
  prompt.focus();
});
document.getElementById("new-chat").addEventListener("click", newChat);
connectSettings();
restore();
