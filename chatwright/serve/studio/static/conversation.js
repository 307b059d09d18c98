// What the page remembers: the conversation for this tab (over reloads), the settings for this browser.

const CHAT = "chatwright.chat";
const SETTINGS = "chatwright.settings";

/**
 * messages: {role, content, note?, dropped?} - note is the small print under an answer, dropped the number of
 * messages that the model did not see; job: id of the answer under way, or null.
 */
export const chat = { messages: [], system: "", job: null, dropped: 0, ...read(sessionStorage, CHAT) };

export const settings = { ...read(localStorage, SETTINGS) };

export function saveChat() {
  write(sessionStorage, CHAT, chat);
}

export function saveSettings() {
  write(localStorage, SETTINGS, settings);
}

export function clearChat() {
  Object.assign(chat, { messages: [], job: null, dropped: 0 });
  saveChat();
}

/** The messages as the model is to see them. */
export function forModel() {
  const head = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  return [...head, ...chat.messages.map(({ role, content }) => ({ role, content }))];
}

function read(storage, key) {
  try {
    const value = JSON.parse(storage.getItem(key));
    return value && typeof value === "object" ? value : {};
  } catch {
    return {};
  }
}

function write(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
  } catch {
    // Storage is full or switched off: the conversation goes on, it only does not outlive the page.
  }
}
