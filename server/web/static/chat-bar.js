/** The bar above the conversation: panels, models, and the two switches. */

import { summary } from "./chat-controls.js";
import { shownColumns } from "./chat-store.js";
import { h } from "./dom.js";

/** Draw it into `root`; `actions`: {toggle(panel), isOpen(panel), create, compare, probabilities, choose(column, model)}. */
export function showBar(root, chat, models, probabilities, actions) {
  const focused = root.contains(document.activeElement) ? document.activeElement.id : "";
  const opener = (panel, label) =>
    h(
      "button",
      {
        type: "button",
        id: `open-${panel}`,
        class: "quiet",
        "aria-controls": panel,
        "aria-expanded": String(actions.isOpen(panel)),
        onclick: () => actions.toggle(panel),
      },
      label,
    );
  const toggle = (id, label, on, onclick) =>
    h("button", { type: "button", id, class: "toggle", "aria-pressed": String(on), onclick }, label);
  root.replaceChildren(
    opener("history", "Chats"),
    h("div", { class: "columns" }, ...shownColumns(chat).map((column) => head(chat, column, models, actions))),
    h("button", { type: "button", id: "new-chat", class: "quiet", onclick: actions.create }, "New chat"),
    toggle("compare", "Compare", chat.compare, actions.compare),
    toggle("probabilities", "Probabilities", probabilities, actions.probabilities),
    opener("settings", "Settings"),
  );
  if (focused) document.getElementById(focused)?.focus();
}

/** A column's model, and what of its settings is not as in the beginning. */
function head(chat, column, models, { choose }) {
  const { model, system } = chat.columns[column];
  const id = `model-${"ab"[column]}`;
  const label = chat.compare ? `Model of ${"AB"[column]}` : "Model";
  const select = h("select", { id, "aria-label": label, disabled: !models.length });
  const known = models.some((each) => each.id === model);
  if (!known) select.append(h("option", { value: model }, model ? `${model} (not served here)` : "No model"));
  for (const each of models) select.append(h("option", { value: each.id }, each.id));
  select.value = model;
  select.addEventListener("change", () => choose(column, select.value));
  const said = [system.trim() ? "system prompt" : "", summary(chat.columns[column])].filter(Boolean).join(", ");
  const letter = chat.compare ? h("b", { "aria-hidden": "true" }, "AB"[column]) : null;
  return h("div", { class: "column" }, letter, select, h("span", { class: "hint summary" }, said));
}
