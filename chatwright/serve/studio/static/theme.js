// Light or dark, before the page is drawn: a module would come too late and let the other colours flash.

(() => {
  let theme = "system";
  try {
    theme = localStorage.getItem("chatwright.theme") ?? "system";
  } catch {
    // Storage is switched off: the system decides.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
