// The list of conversations: search, rename, delete; a column on wide screens, a drawer on phones.

import { announce, element, iconButton } from "./elements.js";
import { at, get, patch, Refused, remove } from "./server.js";
import { recall, remember } from "./storage.js";

const list = document.getElementById("list");
const note = document.getElementById("list-note");
const search = document.getElementById("search");
const sidebar = document.getElementById("sidebar");
const stage = document.getElementById("stage");
const shade = document.getElementById("shade");
const toggle = document.getElementById("toggle-sidebar");
const confirmation = document.getElementById("confirm");
const phone = matchMedia("(max-width: 48rem)");
const DAY = 24 * 3600;

let conversations = [];
let more = false;
let current = null;
let latest = 0; // number of the last request: an answer that an newer one has overtaken is thrown away
let acts = { open() {}, renamed() {}, deleted() {} };

// ---- what is in it ----

/** Ask the server for the list anew. */
export async function refresh() {
  const number = ++latest;
  const words = search.value.trim();
  try {
    const found = await get(`/chat/conversations?search=${encodeURIComponent(words)}`);
    if (number !== latest) return;
    ({ conversations, more } = found);
    draw();
    if (words) announce(conversations.length ? `${conversations.length} found.` : "Nothing found.");
  } catch (error) {
    if (number === latest) say(error instanceof Refused ? error.message : "The list could not be loaded.");
  }
}

async function loadMore() {
  const last = conversations.at(-1);
  const words = encodeURIComponent(search.value.trim());
  const after = `before=${last.updated}&before_id=${encodeURIComponent(last.id)}`;
  try {
    const found = await get(`/chat/conversations?search=${words}&${after}`);
    const known = new Set(conversations.map(({ id }) => id));
    const first = found.conversations.find(({ id }) => !known.has(id));
    conversations = [...conversations, ...found.conversations.filter(({ id }) => !known.has(id))];
    ({ more } = found);
    draw();
    if (first) rowOf(first.id)?.querySelector("a").focus();
  } catch (error) {
    say(error.message);
  }
}

function say(text) {
  note.textContent = text;
  note.hidden = !text;
}

/** Mark the conversation that is open. */
export function setCurrent(id) {
  current = id;
  for (const link of list.querySelectorAll("a")) mark(link);
}

function mark(link) {
  if (link.dataset.id === current) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}

function draw() {
  list.replaceChildren();
  let group = "";
  let rows = null;
  for (const one of conversations) {
    const name = age(one.updated);
    if (name !== group) {
      group = name;
      rows = element("ul");
      list.append(element("h2", "", name), rows);
    }
    rows.append(row(one));
  }
  if (more) {
    const button = element("button", "quiet", "Show more");
    button.type = "button";
    button.addEventListener("click", loadMore);
    list.append(button);
  }
  const nothing = search.value.trim() ? "No title has these words." : "Your conversations will be here.";
  say(conversations.length ? "" : nothing);
}

function age(updated) {
  const midnight = new Date().setHours(0, 0, 0, 0) / 1000;
  if (updated >= midnight) return "Today";
  if (updated >= midnight - DAY) return "Yesterday";
  return updated >= midnight - 7 * DAY ? "Last 7 days" : "Older";
}

function rowOf(id) {
  return list.querySelector(`a[data-id="${CSS.escape(id)}"]`)?.closest("li");
}

function row(one) {
  const item = element("li");
  const link = element("a", "", one.title || "Untitled");
  link.href = `/c/${encodeURIComponent(one.id)}`;
  link.dataset.id = one.id;
  link.title = one.title;
  link.dir = "auto";
  mark(link);
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab, as everywhere
    event.preventDefault();
    closeDrawer();
    acts.open(one.id);
  });
  const title = one.title || "Untitled";
  const buttons = element("span", "row-actions");
  buttons.append(
    iconButton("edit", `Rename ${title}`, () => rename(item, one)),
    iconButton("delete", `Delete ${title}`, () => askToDelete(one)),
  );
  item.append(link, buttons);
  return item;
}

// ---- rename, delete ----

function rename(item, one) {
  const field = element("input");
  field.value = one.title;
  field.maxLength = 200;
  field.setAttribute("aria-label", "New title");
  let over = false;
  const finish = async (keep, refocus) => {
    if (over) return;
    over = true;
    const title = field.value.trim();
    if (keep && title && title !== one.title) {
      try {
        await patch(at(one.id), { title });
        one.title = title;
        acts.renamed(one.id, title);
      } catch (error) {
        announce(error.message);
      }
    }
    const fresh = row(one);
    item.replaceWith(fresh);
    if (refocus) fresh.querySelector("a").focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    finish(event.key === "Enter", true);
  });
  field.addEventListener("blur", () => finish(true, false));
  item.replaceChildren(field);
  field.select();
  field.focus();
}

function askToDelete(one) {
  document.getElementById("confirm-text").textContent = `“${one.title}” and all of its messages will be gone for good.`;
  confirmation.returnValue = "cancel";
  confirmation.addEventListener("close", () => confirmation.returnValue === "delete" && erase(one), { once: true });
  confirmation.showModal();
}

async function erase(one) {
  try {
    await remove(at(one.id));
  } catch (error) {
    if (error.status !== 404) {
      announce(error.message);
      say(error.message);
      return;
    }
  }
  const place = conversations.findIndex(({ id }) => id === one.id);
  conversations = conversations.filter(({ id }) => id !== one.id);
  draw();
  const next = conversations[Math.min(place, conversations.length - 1)];
  announce("Deleted.");
  acts.deleted(one.id);
  if (next) rowOf(next.id).querySelector("a").focus();
  else search.focus();
}

// ---- column and drawer ----

function isOpen() {
  return phone.matches ? document.body.classList.contains("drawer") : !document.body.classList.contains("folded");
}

function showState() {
  toggle.setAttribute("aria-expanded", String(isOpen()));
  const covered = phone.matches && isOpen();
  stage.inert = covered; // what lies under the drawer is not for the keyboard either
  shade.hidden = !covered;
}

/** Close the drawer; false when it was not open. */
export function closeDrawer() {
  if (!phone.matches || !isOpen()) return false;
  document.body.classList.remove("drawer");
  showState();
  toggle.focus();
  return true;
}

export function connectSidebar(handlers) {
  acts = handlers;
  document.body.classList.toggle("folded", recall("view").folded === true);
  showState();
  phone.addEventListener("change", () => {
    document.body.classList.remove("drawer");
    showState();
  });
  toggle.addEventListener("click", () => {
    if (phone.matches) {
      document.body.classList.add("drawer");
      showState();
      sidebar.focus({ preventScroll: true });
    } else {
      remember("view", { ...recall("view"), folded: document.body.classList.toggle("folded") });
      showState();
    }
  });
  shade.addEventListener("click", closeDrawer);
  document.getElementById("close-sidebar").addEventListener("click", closeDrawer);
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 150);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !search.value) return;
    event.stopPropagation();
    search.value = "";
    refresh();
  });
  addEventListener("focus", refresh); // another tab may have said something
}
