/** The conversation: turns of a message and its answers, one under the other. */

import { AnswerView } from "./chat-answer.js";
import { shownColumns } from "./chat-store.js";
import { copyButton, h } from "./dom.js";

const NEAR = 48; // pixels from the end that count as being there

export class Thread {
  #root;
  #list = h("div", { class: "turns" });
  #toEnd;
  #actions;
  #card;
  #say;
  #views = new Map(); // answer: its view
  #turns = new Map(); // turn: its element
  #mode = "";
  #follows = true;

  /** `actions`: {again(turn, column), resend(turn, text), remove(turn)}. */
  constructor(root, toEnd, { actions, card, say }) {
    this.#root = root;
    this.#toEnd = toEnd;
    this.#actions = actions;
    this.#card = card;
    this.#say = say;
    root.append(this.#list);
    root.addEventListener("scroll", () => this.#notice());
    toEnd.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#after()).observe(root);
  }

  /** Draw a chat; turns that are there already stay as they are. */
  show(chat, { probabilities, isRunning }) {
    const mode = JSON.stringify([chat.id, chat.compare, probabilities]);
    if (mode !== this.#mode) this.#turns.clear();
    this.#mode = mode;
    const fresh = new Map();
    for (const turn of chat.turns) {
      fresh.set(turn, this.#turns.get(turn) ?? this.#turn(chat, turn, probabilities, isRunning));
    }
    this.#turns = fresh;
    this.#list.replaceChildren(...fresh.values());
    this.#card.hidden = true;
    this.#after();
  }

  /** A turn has other answers now: draw it anew. */
  forget(turn) {
    this.#turns.delete(turn);
  }

  viewOf(answer) {
    return this.#views.get(answer);
  }

  /** Show the end, and go on showing it. */
  follow() {
    this.#follows = true;
    this.#after();
  }

  #after() {
    if (this.#follows) this.#root.scrollTop = this.#root.scrollHeight;
    this.#toEnd.hidden = this.#follows;
  }

  /** Whoever scrolls up reads, and is left alone. */
  #notice() {
    const { scrollTop, scrollHeight, clientHeight } = this.#root;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR;
    this.#toEnd.hidden = this.#follows;
    this.#card.hidden = true;
  }

  #turn(chat, turn, probabilities, isRunning) {
    const columns = shownColumns(chat).filter((column) => turn.answers[column]);
    const answers = columns.map((column) => {
      const answer = turn.answers[column];
      const view = new AnswerView(answer, {
        name: chat.compare ? "AB"[column] : "",
        running: isRunning(answer),
        probabilities,
        card: this.#card,
        say: this.#say,
        after: () => this.#after(),
        again: () => this.#actions.again(turn, column),
      });
      this.#views.set(answer, view);
      return view.element;
    });
    const side = chat.compare ? "answers two" : "answers";
    return h("div", { class: "turn" }, this.#message(turn), h("div", { class: side }, ...answers));
  }

  #message(turn) {
    const text = h("div", { class: "said" }, turn.user);
    const message = h("div", { class: "message" });
    const read = () => {
      const edit = h("button", { type: "button", class: "small quiet", onclick: () => write() }, "Edit");
      const remove = h("button", { type: "button", class: "small quiet" }, "Delete");
      remove.addEventListener("click", () => this.#actions.remove(turn));
      const copy = copyButton(() => turn.user, "Copy", { "aria-label": "Copy the message" });
      const actions = h("div", { class: "actions" }, copy, edit, remove);
      message.replaceChildren(h("h2", { class: "unseen" }, "You"), text, actions);
      return edit;
    };
    const write = () => {
      const field = h("textarea", { "aria-label": "Edit the message", rows: "3" });
      field.value = turn.user;
      const send = () => field.value.trim() && this.#actions.resend(turn, field.value.trim());
      const cancel = () => read().focus();
      field.addEventListener("keydown", (event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          cancel();
        } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          send();
        }
      });
      const actions = h(
        "div",
        { class: "actions" },
        h("span", { class: "hint" }, "The messages after it are removed."),
        h("button", { type: "button", class: "small quiet", onclick: cancel }, "Cancel"),
        h("button", { type: "button", class: "small primary", onclick: send }, "Send again"),
      );
      message.replaceChildren(field, actions);
      field.focus();
    };
    read();
    return message;
  }
}
