// What the next answer is made with: the model in the header, and the fields of the settings dialog. The fields hold the
// values; what a person changes is remembered for new chats, and goes to the conversation that is open.

import { announce } from "./elements.js";
import { recall, remember, store } from "./storage.js";

const NUMBERS = [
  "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
];
const dialog = document.getElementById("settings");
const modelField = document.getElementById("model");
const tokensButton = document.getElementById("show-tokens");
const fields = Object.fromEntries(
  [...NUMBERS, "system", "temperature", "seed", "stop-texts"].map((id) => [id, document.getElementById(id)]),
);

/** The settings as the server takes them. A field that holds no usable number counts as its default. */
export function sampling() {
  const values = { temperature: Number(fields.temperature.value), stop: stopTexts(), seed: seed() };
  for (const name of NUMBERS) values[name] = number(fields[name]);
  return values;
}

export const system = () => fields.system.value;
export const model = () => modelField.value;
export const severalModels = () => modelField.options.length > 1;
export const wantsTokens = () => tokensButton.getAttribute("aria-pressed") === "true";

function number(field) {
  return field.validity.valid ? Number(field.value) : Number(field.defaultValue);
}

function seed() {
  const { value, validity } = fields.seed;
  return value !== "" && validity.valid ? Number(value) : null;
}

function stopTexts() {
  const lines = fields["stop-texts"].value.split("\n").filter(Boolean).slice(0, 16);
  return lines.map((line) => line.replaceAll("\\n", "\n"));
}

/** Show other settings: those of a conversation, or those that this browser remembers. */
export function fill({ system: text = "", model: name, settings = {} }) {
  fields.system.value = text;
  if ([...modelField.options].some((option) => option.value === name)) modelField.value = name;
  for (const id of [...NUMBERS, "temperature"]) {
    fields[id].value = settings[id] ?? fields[id].defaultValue;
    if (!fields[id].validity.valid) fields[id].value = fields[id].defaultValue;
  }
  fields.seed.value = settings.seed ?? "";
  fields["stop-texts"].value = (settings.stop ?? []).map((line) => line.replaceAll("\n", "\\n")).join("\n");
  showTemperature();
}

export function fillRemembered() {
  const { system: text, model: name, ...settings } = recall("settings");
  fill({ system: text, model: name, settings: { ...settings, stop: Array.isArray(settings.stop) ? settings.stop : [] } });
}

function showTemperature() {
  document.getElementById("temperature-value").textContent = Number(fields.temperature.value).toFixed(2);
}

function reset() {
  fill({ system: fields.system.value, model: model() });
  announce("The sampling settings are back at their defaults.");
}

function connectTheme() {
  const current = document.documentElement.dataset.theme ?? "system";
  for (const choice of dialog.querySelectorAll("input[name=theme]")) {
    choice.checked = choice.value === current;
    choice.addEventListener("change", () => {
      store("theme", choice.value);
      if (choice.value === "system") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = choice.value;
    });
  }
}

/** `changed` is called when somebody has chosen something else, `tokensChanged` when the token view is switched. */
export function connectSettings(changed, tokensChanged) {
  const keep = () => {
    remember("settings", { ...sampling(), system: system(), model: model() });
    changed();
  };
  fillRemembered();
  connectTheme();
  document.getElementById("open-settings").addEventListener("click", () => dialog.showModal());
  document.getElementById("reset").addEventListener("click", reset);
  fields.temperature.addEventListener("input", showTemperature);
  for (const name of NUMBERS) {
    fields[name].addEventListener("change", () => {
      if (!fields[name].validity.valid) fields[name].value = fields[name].defaultValue;
    });
  }
  dialog.addEventListener("close", keep);
  modelField.addEventListener("change", () => {
    keep();
    announce(`Answers from now on come from ${model()}.`);
  });
  tokensButton.setAttribute("aria-pressed", String(recall("view").tokens === true));
  tokensButton.addEventListener("click", () => {
    tokensButton.setAttribute("aria-pressed", String(!wantsTokens()));
    remember("view", { ...recall("view"), tokens: wantsTokens() });
    tokensChanged();
  });
}
