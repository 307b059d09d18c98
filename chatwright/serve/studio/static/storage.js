// What this browser remembers by itself. Conversations are the server's business.

export function recall(key) {
  try {
    const value = JSON.parse(localStorage.getItem(`chatwright.${key}`));
    return value && typeof value === "object" ? value : {};
  } catch {
    return {};
  }
}

export function remember(key, value) {
  store(key, JSON.stringify(value));
}

/** Plain text, as theme.js reads it. */
export function store(key, text) {
  try {
    localStorage.setItem(`chatwright.${key}`, text);
  } catch {
    // Storage is full or switched off: it only does not outlive the page.
  }
}
