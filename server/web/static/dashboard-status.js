/** How the server is, in a word, and what is to be done about it if that is not well. */

import { explain } from "./api.js";
import { clock, duration } from "./dashboard-format.js";
import { h } from "./dom.js";
import { openKeyDialog } from "./shell.js";

const WORDS = {
  connecting: "Connecting",
  ready: "Ready",
  loading: "Loading models",
  draining: "Shutting down",
  failed: "An engine has failed",
  gone: "No answer",
  paused: "Paused",
};

export class Status {
  constructor() {
    this.word = h("span", { role: "status", class: "state" });
    this.facts = h("span", { class: "dim" });
    this.notices = h("div", { class: "notices", role: "status" });
    this.element = h("div", { class: "standing" }, h("h1", {}, "Dashboard"), this.word, this.facts);
    this.shown = "";
  }

  /** `state` is a word above; what is not known is left out. */
  show({ state, message, uptime, version, updated, wait, trouble, refusal, several }) {
    replaceText(this.word, WORDS[state]);
    this.word.dataset.state = state;
    this.facts.textContent = [
      uptime > 0 ? `up ${duration(uptime)}` : null,
      version ? `version ${version}` : null,
      updated ? `as of ${clock(updated)}` : null,
    ]
      .filter(Boolean)
      .join(" \u00b7 ");
    const notices = [
      trouble && [explain(trouble).title, `${trouble.message} Trying again every ${wait}.`],
      message && ["draining", "failed"].includes(state) && [WORDS[state], message],
      several && [
        "Several servers answer at this address",
        "Their figures are their own and cannot be shown as one. Open the dashboard of each.",
      ],
      refusal && ofRefusal(refusal),
    ].filter(Boolean);
    const written = JSON.stringify(notices);
    if (written === this.shown) return; // else it would be read out again
    this.shown = written;
    this.notices.replaceChildren(...notices.map(notice));
  }
}

function ofRefusal(refusal) {
  const { title, todo, needsKey } = explain(refusal);
  return [title, refusal.status === 401 ? todo : refusal.message, needsKey];
}

function notice([title, message, needsKey]) {
  if (!needsKey) return h("p", { class: "notice" }, h("strong", {}, title), ` ${message}`);
  return h(
    "div",
    { class: "notice calm" },
    h("p", {}, h("strong", {}, title), ` ${message}`),
    h(
      "p",
      {},
      "Figures need a key with the scope metrics: ",
      h("code", {}, "inferneo keys create screen --scope metrics"),
    ),
    h("button", { type: "button", class: "primary", onclick: () => openKeyDialog() }, "Enter a key"),
  );
}

function replaceText(element, words) {
  if (element.textContent !== words) element.textContent = words;
}
