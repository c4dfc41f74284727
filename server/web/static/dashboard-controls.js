/** What can be chosen: models, the window of percentiles, the time that is shown, and a moment. */

import { clock, duration } from "./dashboard-format.js";
import { h, set } from "./dom.js";

const WINDOWS = [
  [30, "30 s"],
  [60, "1 min"],
  [300, "5 min"],
  [900, "15 min"],
];
const SPANS = [
  [60, "1 min"],
  [300, "5 min"],
  [900, "15 min"],
  [3600, "60 min"],
];
const STEPS = 150;

export class Controls {
  /** `view` is what is chosen; `onView` is called when it has changed, `onMoment` with a time. */
  constructor(view, { onView, onMoment, onPause }) {
    Object.assign(this, { view, onMoment, models: [] });
    const number = (name) => (event) => {
      view[name] = Number(event.target.value);
      onView(name);
    };
    this.model = h("select", {
      id: "model",
      onchange: (event) => {
        view.model = event.target.value;
        onView("model");
      },
    });
    this.moment = h("input", { id: "moment", type: "range", min: -STEPS, max: 0, value: 0 });
    this.moment.addEventListener("input", () => this.#move());
    this.pause = h("button", { type: "button" }, "Pause");
    this.pause.addEventListener("click", () => {
      const paused = this.pause.textContent === "Pause";
      this.pause.textContent = paused ? "Resume" : "Pause";
      onPause(paused);
    });
    this.element = h(
      "form",
      { class: "controls", "aria-label": "What is shown", onsubmit: (event) => event.preventDefault() },
      this.#choice("model", "Model", this.model),
      this.#choice("window", "Percentiles over", select("window", WINDOWS, view.window, number("window"))),
      this.#choice("span", "Show", select("span", SPANS, view.span, number("span"))),
      this.#choice("moment", "Moment", this.moment),
      this.pause,
    );
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") onMoment(null);
    });
    this.setModels([]);
  }

  #choice(id, words, control) {
    return h("div", {}, h("label", { for: id }, words), control);
  }

  #move() {
    const ago = (-Number(this.moment.value) / STEPS) * this.view.span;
    this.onMoment(ago === 0 ? null : this.to - ago);
  }

  /** The models there are, by name. */
  setModels(models) {
    if (this.model.options.length && String(models) === String(this.models)) return;
    this.models = models;
    if (!models.includes(this.view.model)) this.view.model = "";
    this.model.replaceChildren(
      h("option", { value: "" }, "All"),
      ...models.map((name) => h("option", { value: name }, name)),
    );
    this.model.value = this.view.model;
  }

  /** The moment that is told: a time, or null for the newest; `to` is where the plots end. */
  setMoment(time, to) {
    this.to = to;
    const ago = time === null ? 0 : Math.max(0, to - time);
    this.moment.value = -Math.round((ago / this.view.span) * STEPS);
    const words = time === null ? "now" : `${clock(time)}, ${duration(ago)} ago`;
    set(this.moment, { "aria-valuetext": words });
  }
}

function select(id, choices, chosen, onchange) {
  const options = choices.map(([value, words]) =>
    h("option", { value, selected: value === chosen }, words),
  );
  return h("select", { id, onchange }, ...options);
}
