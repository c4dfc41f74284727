/** What each API key uses of its limits, for who has a key of the scope admin. */

import { askJson, getKey } from "./api.js";
import { h, set, svg } from "./dom.js";

const MOST = 50;
const COUNT = new Intl.NumberFormat("en");
const LIMITS = [
  ["requests", "Requests, last minute"],
  ["tokens", "Tokens, last minute"],
  ["day_requests", "Requests, today (UTC)"],
  ["concurrent", "At once"],
];
const NEEDED = "What each key uses of its limits is shown to a key with the scope admin.";
const MAKE = "inferneo keys create NAME --scope admin --scope metrics";

export class Quota {
  constructor() {
    this.refused = false;
    this.body = h("div", {});
    this.element = h("section", { class: "quota", "aria-labelledby": "quota" });
    this.element.append(h("h2", { id: "quota" }, "Limits of API keys"), this.body);
    this.#explain();
  }

  /** Another key is used now, which may be allowed more. */
  reset() {
    this.refused = false;
    this.#explain();
  }

  /** Ask anew; errors other than refusals are the caller's. */
  async refresh(signal) {
    if (!getKey() || this.refused) return;
    try {
      const { data } = await askJson("admin/keys", { signal });
      this.#show(data.filter(({ state }) => state === "active"));
    } catch (error) {
      if (![401, 403].includes(error.status)) throw error;
      this.refused = true;
      this.#explain();
    }
  }

  #explain() {
    this.told = null;
    this.body.replaceChildren(
      h("p", { class: "hint" }, `${NEEDED} Whoever runs the server makes one: `, h("code", {}, MAKE)),
    );
  }

  #show(keys) {
    const told = JSON.stringify(keys);
    if (told === this.told) return; // else whoever reads or copies it would be disturbed
    this.told = told;
    const fullest = keys
      .map((key) => ({ key, fill: Math.max(...LIMITS.map(([name]) => fillOf(key, name))) }))
      .sort((a, b) => b.fill - a.fill || a.key.name.localeCompare(b.key.name));
    const rows = fullest.slice(0, MOST).map(({ key }) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, key.name, h("span", { class: "dim" }, ` ${key.id}`)),
        ...LIMITS.map(([name]) => cell(key, name)),
      ),
    );
    const heads = ["Key", ...LIMITS.map(([, words]) => words)];
    const table = h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ...heads.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, ...rows),
    );
    const region = { class: "scroll", tabindex: 0, role: "region", "aria-label": "Keys and what they use" };
    const more = keys.length - MOST;
    const scrolled = this.body.querySelector(".scroll")?.scrollLeft ?? 0;
    const held = this.body.querySelector(".scroll") === document.activeElement;
    this.body.replaceChildren(
      keys.length ? h("div", region, table) : h("p", { class: "hint" }, "There is no active key."),
      more > 0 ? h("p", { class: "hint" }, `${more} more, of which less is used.`) : "",
    );
    const scroll = this.body.querySelector(".scroll");
    if (scroll) scroll.scrollLeft = scrolled;
    if (held) scroll?.focus();
  }
}

function fillOf({ used, limits }, name) {
  return limits[name] ? used[name] / limits[name] : 0;
}

function cell(key, name) {
  const used = COUNT.format(key.used[name]);
  if (key.limits[name] === null) return h("td", {}, used, h("span", { class: "dim" }, " no limit"));
  const part = Math.min(1, fillOf(key, name));
  const bar = svg("svg", { class: "bar", width: 80, height: 6, "aria-hidden": "true" });
  const filled = svg("rect", { class: part >= 0.9 ? "full" : "part", width: 80 * part, height: 6 });
  bar.append(svg("rect", { class: "whole", width: 80, height: 6, rx: 3 }), filled);
  set(filled, { rx: 3 });
  return h("td", {}, `${used} / ${COUNT.format(key.limits[name])}`, bar);
}
