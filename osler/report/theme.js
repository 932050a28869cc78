// The switch between light and dark. The reader's system decides until the button is pressed.
"use strict";

const root = document.documentElement;
const button = document.getElementById("theme");

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setTheme(name) {
  if (name) root.dataset.theme = name;
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", "Switch to " + button.textContent.toLowerCase() + " colours");
}

function remembered() {
  try {
    return localStorage.getItem("osler-theme");
  } catch (error) {
    return null; // pages opened from a file may be denied storage
  }
}

button.hidden = false;
setTheme(remembered());
button.addEventListener("click", () => {
  setTheme(isDark() ? "light" : "dark");
  try {
    localStorage.setItem("osler-theme", root.dataset.theme);
  } catch (error) {
    // not remembered, but switched
  }
});
