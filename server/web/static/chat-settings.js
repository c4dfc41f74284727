/** The panel with a column's system prompt and sampling parameters, made from the table of controls. */

import { CONTROLS, initialOf, parse, shown } from "./chat-controls.js";
import { h } from "./dom.js";

/** Draw the settings of a column into `root`; `changed` is called after each change. */
export function showSettings(root, chat, column, { changed, choose, close }) {
  const settings = chat.columns[column];
  const which = chat.compare ? ` of ${"AB"[column]}` : "";
  const system = h("textarea", { id: "system", rows: "4", placeholder: "None" });
  system.value = settings.system;
  system.addEventListener("input", () => {
    settings.system = system.value;
    changed();
  });
  const fields = (more) =>
    CONTROLS.filter((control) => Boolean(control.more) === more).map((control) => field(control, settings.sampling, changed));
  const reset = h("button", { type: "button", class: "small" }, "Reset all");
  reset.addEventListener("click", () => {
    settings.sampling = {};
    changed();
    showSettings(root, chat, column, { changed, choose, close });
    root.querySelector(".reset-all").focus();
  });
  reset.classList.add("reset-all");
  const isMore = CONTROLS.some(({ name, more }) => more && name in settings.sampling);
  root.replaceChildren(
    h(
      "div",
      { class: "panel-head" },
      h("h2", {}, `Settings${which}`),
      h("button", { type: "button", class: "small quiet close", onclick: close }, "Close"),
    ),
    ...(chat.compare ? [switcher(column, choose)] : []),
    h("div", { class: "field" }, h("label", { for: "system" }, "System prompt"), system),
    ...fields(false),
    h("details", { open: isMore }, h("summary", {}, "More sampling"), ...fields(true)),
    h("p", {}, reset),
  );
}

function switcher(column, choose) {
  const choices = [0, 1].map((each) => {
    const id = `settings-of-${"ab"[each]}`;
    const radio = h("input", { type: "radio", name: "settings-of", id, checked: each === column });
    radio.addEventListener("change", () => choose(each));
    return h("span", {}, radio, h("label", { for: id }, ` Column ${"AB"[each]}`));
  });
  return h("fieldset", { class: "switcher" }, h("legend", { class: "unseen" }, "Settings of"), ...choices);
}

/** A control: label, number or text, a slider if it has one, a reset, and what is wrong with it. */
function field(control, sampling, changed) {
  const { name, label, kind, step, min, max, most, hint } = control;
  const lines = kind === "lines";
  const describedBy = `${name}-hint ${name}-wrong`;
  const input = h(lines ? "textarea" : "input", {
    id: name,
    "aria-describedby": describedBy,
    ...(lines ? { rows: "2" } : { type: "text", inputmode: "decimal", autocomplete: "off" }),
    placeholder: lines || control.standard === null ? "None" : null,
  });
  const wrong = h("p", { class: "wrong", id: `${name}-wrong`, role: "alert" });
  const reset = h("button", { type: "button", class: "small quiet", "aria-label": `Reset ${label}` }, "Reset");
  const slider =
    kind === "slider"
      ? h("input", { type: "range", min: control.above ? step : min, max: most ?? max, step, "aria-label": label })
      : null;
  const value = () => sampling[name] ?? initialOf(control);
  const show = () => {
    if (slider) slider.value = value();
    reset.hidden = !(name in sampling);
    wrong.textContent = "";
    input.removeAttribute("aria-invalid");
  };
  const take = (text) => {
    try {
      const taken = parse(control, text);
      if (JSON.stringify(taken) === JSON.stringify(initialOf(control))) delete sampling[name];
      else sampling[name] = taken;
      show();
      changed();
      return true;
    } catch (error) {
      wrong.textContent = `${error.message} ${shown(control, value()) || "The default"} is in use.`;
      input.setAttribute("aria-invalid", "true");
      return false;
    }
  };
  input.addEventListener("change", () => take(input.value) && (input.value = shown(control, value())));
  slider?.addEventListener("input", () => take(slider.value) && (input.value = shown(control, value())));
  reset.addEventListener("click", () => {
    delete sampling[name];
    input.value = shown(control, value());
    show();
    changed();
    input.focus();
  });
  input.value = shown(control, value());
  show();
  return h(
    "div",
    { class: `field ${kind}` },
    h("div", { class: "field-head" }, h("label", { for: name }, label), reset, lines ? null : input),
    lines ? input : slider,
    h("p", { class: "hint", id: `${name}-hint` }, hint),
    wrong,
  );
}
