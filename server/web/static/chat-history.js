/** The panel with the chats that this browser keeps: open, delete, export, import, clear. */

import { download, fromFile, toJson, toMarkdown } from "./chat-file.js";
import { listChats, titleOf } from "./chat-store.js";
import { h, inOrder } from "./dom.js";

/** Draw the panel; `actions`: {open(id), remove(id), clear, add(chat), close}. */
export function showHistory(root, chat, actions) {
  const chats = listChats();
  const rows = chats.map(({ id, title }) => {
    const name = title || "Untitled";
    const current = id === chat.id ? "true" : null;
    return h(
      "li",
      {},
      h("button", { type: "button", class: "quiet open", "aria-current": current, onclick: () => actions.open(id) }, name),
      h("button", { type: "button", class: "small quiet", "aria-label": `Delete the chat ${name}`, onclick: () => actions.remove(id) }, "\u00d7"),
    );
  });
  const wrong = h("p", { class: "wrong", role: "alert" });
  const button = (label, onclick, attributes = {}) =>
    h("button", { type: "button", class: "small", onclick, ...attributes }, label);
  const empty = !chat.turns.length;
  root.replaceChildren(
    h(
      "div",
      { class: "panel-head" },
      h("h2", {}, "Chats"),
      h("button", { type: "button", class: "small quiet close", onclick: actions.close }, "Close"),
    ),
    rows.length ? h("ul", { class: "chats" }, ...rows) : h("p", { class: "hint" }, "None yet."),
    h(
      "div",
      { class: "panel-foot" },
      h(
        "div",
        { class: "actions" },
        button("Export JSON", () => download(`${fileName(chat)}.json`, "application/json", toJson(chat)), { disabled: empty }),
        button("Export Markdown", () => download(`${fileName(chat)}.md`, "text/markdown", toMarkdown(chat)), { disabled: empty }),
        button("Import", () => choose(wrong, actions.add)),
        button("Clear all", () => confirmed(`Delete all chats (${chats.length}) and the settings of this page?`, actions.clear)),
      ),
      wrong,
      h("p", { class: "hint" }, "Chats are kept in this browser, at this address, and nowhere else."),
    ),
  );
}

function fileName(chat) {
  return titleOf(chat).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "chat";
}

function choose(wrong, add) {
  const field = h("input", { type: "file", accept: "application/json,.json" });
  field.addEventListener("change", async () => {
    wrong.textContent = "";
    try {
      add(await fromFile(field.files[0]));
    } catch (error) {
      wrong.textContent = inOrder(error.message);
    }
  });
  field.click();
}

/** Ask before something that cannot be undone. */
export function confirmed(question, act) {
  const dialog = h(
    "dialog",
    { "aria-labelledby": "question" },
    h(
      "form",
      { method: "dialog" },
      h("h2", { id: "question" }, question),
      h("p", { class: "hint" }, "This cannot be undone."),
      h(
        "menu",
        {},
        h("button", { value: "no", class: "quiet" }, "Cancel"),
        h("button", { value: "yes", class: "primary" }, "Delete"),
      ),
    ),
  );
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (dialog.returnValue === "yes") act();
  });
  document.body.append(dialog);
  dialog.showModal();
}
