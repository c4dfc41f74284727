/** An answer on the page: text or tokens, the counter, and what went wrong, if anything did. */

import { explain } from "./api.js";
import { counts } from "./chat-run.js";
import { TokenView, legend } from "./chat-tokens.js";
import { copyButton, h, inOrder } from "./dom.js";
import { Markdown } from "./markdown.js";
import { openKeyDialog } from "./shell.js";

const ENDINGS = new Map([
  ["length", "ended by the limit of tokens"],
  ["stopped", "stopped"],
  ["abort", "ended by the server"],
]);

export class AnswerView {
  #answer;
  #body;
  #reasoning;
  #counter;
  #failure;
  #note;
  #actions;
  #draw;
  #drawn = 0;
  #frame = 0;
  #running;
  #after;

  /**
   * `name`: of the column, if there are several. `after` is called when more has been drawn, `again`
   * when the answer is to be generated anew.
   */
  constructor(answer, { name, running, probabilities, card, say, after, again }) {
    this.#answer = answer;
    this.#running = running;
    this.#after = after;
    this.again = again;
    const label = name ? `${name} \u00b7 ${answer.model}` : answer.model;
    this.#body = h("div", { class: "text" });
    const reasoning = h("p", {});
    this.#reasoning = h("details", { class: "reasoning", hidden: true }, h("summary", {}, "Reasoning"), reasoning);
    this.#counter = h("p", { class: "counter" });
    this.#note = h("p", { class: "note hint", hidden: true });
    this.#failure = h("div", {});
    this.#actions = h(
      "div",
      { class: "actions" },
      copyButton(() => answer.text, "Copy", { "aria-label": "Copy the answer" }),
      h("button", { type: "button", class: "small quiet again", onclick: again }, "Regenerate"),
    );
    this.element = h(
      "article",
      { class: "answer", "aria-label": `Answer of ${label}` },
      h("h2", { class: name ? "who" : "unseen" }, label),
      this.#reasoning,
      this.#body,
      this.#note,
      this.#failure,
      h("footer", {}, this.#counter, this.#actions),
    );
    this.#draw = this.#drawer(probabilities, card, say);
    this.#update();
    if (answer.error) this.#showFailure(answer.error);
  }

  /** There is more of the answer, which is drawn with the next frame. */
  changed() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#update();
      this.#after();
    });
  }

  /** There will be no more; `error` is why, if the server or the page failed. */
  end(error) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#running = false;
    this.#update();
    if (error) this.#showFailure(this.#answer.error, error);
    this.#after();
  }

  /** Say what is waited for. */
  wait(text) {
    this.#note.textContent = inOrder(text);
    this.#note.hidden = !text;
  }

  #drawer(probabilities, card, say) {
    const answer = this.#answer;
    if (probabilities && (answer.tokens?.length || (this.#running && !answer.text))) {
      const label = "Tokens; the arrow keys step through their probabilities";
      const root = h("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": label });
      const view = new TokenView(root, card, say);
      this.#body.append(root, legend());
      return () => view.write(answer.tokens);
    }
    if (probabilities && answer.text)
      this.#body.append(h("p", { class: "hint" }, "Made without probabilities; regenerate to see them."));
    const root = h("div", { class: "prose" });
    this.#body.append(root);
    const markdown = new Markdown(root);
    return () => {
      markdown.write(answer.text.slice(this.#drawn));
      this.#drawn = answer.text.length;
      if (!this.#running) markdown.end();
    };
  }

  #update() {
    const { finish, warnings, reasoning } = this.#answer;
    this.#draw();
    this.#reasoning.hidden = !reasoning;
    this.#reasoning.lastChild.textContent = inOrder(reasoning ?? "");
    const ending = this.#running ? null : (ENDINGS.get(finish) ?? (finish ? null : "interrupted"));
    this.#counter.textContent = [...counts(this.#answer), ...(ending ? [ending] : [])].join(" \u00b7 ");
    this.#actions.hidden = this.#running || (finish === "failed" && !this.#answer.text);
    this.element.classList.toggle("running", this.#running);
    this.element.setAttribute("aria-busy", String(this.#running));
    if (warnings?.length) this.wait(warnings.join(" "));
  }

  #showFailure(said, error = null) {
    const { todo, needsKey } = error ? explain(error) : { todo: "", needsKey: false };
    const request = said.requestId ? h("span", { class: "hint" }, ` Request ${said.requestId}`) : null;
    const buttons = h("button", { type: "button", class: "small", onclick: this.again }, "Try again");
    const key = h("button", { type: "button", class: "small", onclick: () => openKeyDialog(said.message) }, "Enter a key");
    const when = h("span", { class: "hint" }, todo);
    const alert = h(
      "div",
      { role: "alert" },
      h("strong", {}, said.title),
      h("p", {}, said.message, request),
    );
    this.#failure.className = "failure";
    this.element.classList.add("failed");
    this.#failure.replaceChildren(
      alert,
      h("div", { class: "actions" }, buttons, needsKey ? key : null, when),
    );
    if (error?.retryAfter) this.#countDown(when, Number(error.retryAfter));
  }

  /** Outside the alert, or every second would be read out. */
  #countDown(element, seconds) {
    const until = Date.now() + seconds * 1000;
    const tell = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      element.textContent = left > 0 ? `possible in ${duration(left)}` : "possible now";
      if (left <= 0 || !element.isConnected) clearInterval(timer);
    };
    const timer = setInterval(tell, 1000);
    element.textContent = `possible in ${duration(seconds)}`;
  }
}

function duration(seconds) {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.ceil(seconds / 60)} min`;
  return `${Math.ceil(seconds / 3600)} h`;
}
