/** Where messages are written: Enter sends, Shift+Enter breaks the line. */

import { h } from "./dom.js";

export class Composer {
  #field = h("textarea", { id: "message", rows: "1", placeholder: "Write a message", enterkeyhint: "send" });
  #send = h("button", { type: "submit", class: "primary" }, "Send");
  #stop = h("button", { type: "button", hidden: true }, "Stop");
  #possible = false;
  #busy = false;

  /** `send` is called with a text, `stop` without. */
  constructor(form, { send, stop }) {
    const submit = () => {
      const text = this.#field.value.trim();
      if (!text || !this.#possible || this.#busy) return;
      this.#field.value = "";
      this.#fit();
      send(text);
    };
    form.append(h("label", { for: "message", class: "unseen" }, "Message"), this.#field, this.#send, this.#stop);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    this.#stop.addEventListener("click", stop);
    this.#field.addEventListener("input", () => this.#fit());
    this.#field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    });
  }

  focus() {
    this.#field.focus();
  }

  /** `possible`: there is a model to talk to; `busy`: it is answering. */
  set({ possible, busy }) {
    const focused = document.activeElement;
    const moves = focused === this.#send || focused === this.#stop;
    this.#possible = possible;
    this.#busy = busy;
    this.#send.disabled = !possible;
    this.#send.hidden = busy;
    this.#stop.hidden = !busy;
    if (moves) this.focus(); // what had the focus is gone
  }

  #fit() {
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight + 2}px`;
  }
}
