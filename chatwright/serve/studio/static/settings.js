// The settings dialog: system prompt, temperature, longest answer.

import { chat, saveChat, saveSettings, settings } from "./conversation.js";

const dialog = document.getElementById("settings");
const systemField = document.getElementById("system");
const temperatureField = document.getElementById("temperature");
const maxTokensField = document.getElementById("max-tokens");

export function temperature() {
  return Number(temperatureField.value);
}

/** The number in the field, or what the server proposed where the field holds none. */
export function maxTokens() {
  return maxTokensField.validity.valid ? Number(maxTokensField.value) : Number(maxTokensField.defaultValue);
}

function showTemperature() {
  document.getElementById("temperature-value").textContent = temperature().toFixed(2);
}

export function connectSettings() {
  systemField.value = chat.system;
  if (settings.temperature !== undefined) temperatureField.value = settings.temperature;
  if (settings.maxTokens !== undefined) maxTokensField.value = settings.maxTokens;
  if (!maxTokensField.validity.valid) maxTokensField.value = maxTokensField.defaultValue; // from a larger model
  showTemperature();
  document.getElementById("open-settings").addEventListener("click", () => dialog.showModal());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  systemField.addEventListener("input", () => {
    chat.system = systemField.value;
    saveChat();
  });
  temperatureField.addEventListener("input", () => {
    showTemperature();
    settings.temperature = temperature();
    saveSettings();
  });
  maxTokensField.addEventListener("change", () => {
    settings.maxTokens = maxTokens();
    saveSettings();
  });
}
