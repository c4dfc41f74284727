/** What every page has around it: where to go, light or dark, and the API key. */

import { getKey, keyIsRemembered, setKey } from "./api.js";
import { h } from "./dom.js";

const THEME = "inferneo.theme";
const PAGES = [
  ["Chat", "./"],
  ["Dashboard", "dashboard"],
  ["API", "docs"],
];

/** Put the header into the page; `onKey` is called when another key is to be used. */
export function mountShell(current, { onKey }) {
  const dialog = keyDialog(onKey);
  const links = PAGES.map(([name, href]) =>
    h("a", { href, "aria-current": name === current ? "page" : null }, name),
  );
  const header = h(
    "header",
    { class: "shell" },
    h("a", { href: "#main", class: "skip" }, "Skip to content"),
    h("span", { class: "brand" }, "Inferneo-JAX"),
    h("nav", { "aria-label": "Pages" }, ...links),
    h("button", { type: "button", class: "quiet", onclick: () => openKeyDialog() }, "API key"),
    themeButton(),
  );
  document.body.prepend(header);
  document.body.append(dialog);
}

/** Ask for a key, and say why. */
export function openKeyDialog(why = "") {
  const dialog = document.querySelector("dialog.key");
  dialog.querySelector(".why").textContent = why;
  dialog.querySelector("input[type=password]").value = getKey();
  dialog.querySelector("input[type=checkbox]").checked = keyIsRemembered();
  if (!dialog.open) dialog.showModal();
}

function keyDialog(onKey) {
  const key = h("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false" });
  const remember = h("input", { id: "remember", type: "checkbox" });
  const form = h(
    "form",
    { method: "dialog" },
    h("h2", { id: "key-title" }, "API key"),
    h("p", { class: "why", role: "alert" }),
    h("label", { for: "key" }, "Key"),
    key,
    h("p", { class: "hint" }, "Whoever runs the server makes one: inferneo keys create NAME"),
    h("p", {}, remember, h("label", { for: "remember" }, " Remember it in this browser")),
    h(
      "menu",
      {},
      h("button", { value: "cancel", formnovalidate: true, class: "quiet" }, "Cancel"),
      h("button", { value: "use", class: "primary" }, "Use this key"),
    ),
  );
  const dialog = h("dialog", { class: "key", "aria-labelledby": "key-title" }, form);
  // Enter in the field would press the first button, which is not the one that is meant.
  key.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    dialog.close("use");
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "use") {
      setKey(key.value.trim(), remember.checked);
      onKey();
    }
    dialog.returnValue = "";
    key.value = "";
  });
  return dialog;
}

function themeButton() {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? system()) === "dark";
  const system = () => (prefersDark.matches ? "dark" : "light");
  const saved = localStorage.getItem(THEME);
  if (saved === "dark" || saved === "light") document.documentElement.dataset.theme = saved;
  const button = h("button", { type: "button", class: "quiet" });
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    document.dispatchEvent(new Event("theme"));
  };
  button.addEventListener("click", () => {
    const chosen = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    localStorage.setItem(THEME, chosen);
    show();
  });
  prefersDark.addEventListener("change", show);
  show();
  return button;
}
