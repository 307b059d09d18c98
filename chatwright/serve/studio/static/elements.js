// Making elements. Text enters as text, whoever wrote it.

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the page's symbols (templates/icons.svg). */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that is only an icon; `label` is its name for everybody who does not see it. */
export function iconButton(name, label, onclick) {
  const button = element("button", "quiet icon");
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.append(icon(name));
  button.addEventListener("click", onclick);
  return button;
}

const status = document.getElementById("status");

/** Tell it to people who listen to the page. */
export function announce(text) {
  status.textContent = text;
}
