// Shortcuts for the whole page. Fields and dialogs have their own keys and see them first.

const keys = document.getElementById("keys");

function isField(target) {
  return Boolean(target.closest?.("input, textarea, select"));
}

/** `acts`: newChat, toMessage, escape. */
export function connectKeyboard(acts) {
  document.getElementById("open-keys").addEventListener("click", () => keys.showModal());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close("cancel"); // the backdrop
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    if (command && event.shiftKey && event.key.toLowerCase() === "o") acts.newChat();
    else if (event.key === "Escape") acts.escape();
    else if (command || event.altKey || isField(event.target)) return;
    else if (event.key === "/") acts.toMessage();
    else if (event.key === "?") keys.showModal();
    else return;
    event.preventDefault();
  });
}
