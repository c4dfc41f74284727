/** A plot of a figure over time: its numbers, its lines with labels, and the same as a table. */

import { ceiling as roundUp, clock, split, text } from "./dashboard-format.js";
import { h, set, svg } from "./dom.js";

const HEIGHT = 132;
const EDGE = { top: 8, bottom: 20, left: 54 };
const NAMES_WIDTH = 68; // right of the lines, where there are several
const SCALED = new Set(["s", "bytes", "%"]); // units that numbers carry along
const LABEL_HEIGHT = 13;
const ROWS = 12;
const NOTHING = "Nothing to show yet";

export class Plot {
  /** `onMoment` is told the time that is pointed at; null: none. */
  constructor(figure, onMoment) {
    this.figure = figure;
    this.onMoment = onMoment;
    this.right = figure.lines.length > 1 ? NAMES_WIDTH : 8;
    this.unit = SCALED.has(figure.unit) ? figure.unit : "";
    this.width = 0;
    this.now = figure.lines.map((line) => h("dd", {}, "\u2013"));
    this.svg = svg("svg", { class: "plot", role: "img", height: HEIGHT });
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => onMoment(null));
    this.table = h("div", { class: "scroll", tabindex: 0, role: "region" });
    set(this.table, { "aria-label": `${figure.title}, table` });
    this.details = h(
      "details",
      { ontoggle: () => this.#fillTable() },
      h("summary", {}, "Table", h("span", { class: "unseen" }, ` of ${figure.title}`)),
      this.table,
    );
    const unit = this.unit ? null : figure.unit;
    const about = [unit, figure.about, figure.ofServer ? "whole server" : null].filter(Boolean);
    this.element = h(
      "section",
      { class: "tile", "aria-label": figure.title },
      h("h3", {}, figure.title, h("span", { class: "dim" }, ` ${about.join(", ")}`)),
      h("dl", { class: "now" }, ...figure.lines.map((line, i) => this.#legend(line, i))),
      this.svg,
      this.details,
    );
    new ResizeObserver(([{ contentRect }]) => {
      if (contentRect.width === this.width) return;
      this.width = contentRect.width;
      if (this.shown) this.draw(this.shown);
    }).observe(this.svg);
  }

  #legend({ name }, index) {
    const stroke = svg("path", { class: `line line-${index}`, d: "M1 5H21" });
    const swatch = svg("svg", { class: "swatch", width: 22, height: 10, "aria-hidden": "true" }, stroke);
    const alone = this.figure.lines.length === 1;
    const term = h("dt", { class: alone ? "unseen" : null }, swatch, name);
    return h("div", {}, term, this.now[index]);
  }

  /**
   * Show what is known between two times.
   *
   * `shown` has `times` and `stretches` of all samples, `values` by line, `from` and `to` in
   * seconds, and `moment`, the index of the sample whose numbers are told.
   */
  draw(shown) {
    this.shown = shown;
    const { times, values, from, moment } = shown;
    const begin = times.findIndex((time) => time >= from);
    this.begin = begin < 0 ? times.length : begin;
    values.forEach((line, i) => this.#tell(this.now[i], line[moment]));
    this.element.hidden = Boolean(this.figure.optional) && !values.some((line) => line.some(Number.isFinite));
    if (!this.width) return;
    const top = this.#top();
    const y = (value) => EDGE.top + (1 - value / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    const paths = values.map((line, i) =>
      svg("path", { class: `line line-${i}`, d: this.#path(line, y) }),
    );
    set(this.svg, { viewBox: `0 0 ${this.width} ${HEIGHT}`, "aria-label": this.#summary(top) });
    this.svg.replaceChildren(...this.#axes(top, y), ...paths, ...this.#labels(y), ...this.#cursor(y));
    if (this.details.open) this.#fillTable();
  }

  #tell(element, value) {
    const [number, unit] = split(value, this.unit);
    element.classList.toggle("unknown", !Number.isFinite(value));
    element.replaceChildren(number, h("small", {}, unit && ` ${unit}`));
  }

  #top() {
    let most = 0;
    for (const line of this.shown.values)
      for (let i = this.begin; i < line.length; i += 1) if (line[i] > most) most = line[i];
    return roundUp(most, this.figure.unit);
  }

  #x(time) {
    const { from, to } = this.shown;
    return EDGE.left + ((time - from) / (to - from)) * (this.width - EDGE.left - this.right);
  }

  /** Samples that share a pixel are drawn as the least and the most of them. */
  #path(line, y) {
    const { times, stretches } = this.shown;
    let path = "";
    let group = null;
    let down = false;
    const flush = () => {
      if (!group) return;
      const { x, low, high, last } = group;
      path += `${down ? "L" : "M"}${x.toFixed(1)} ${y(low).toFixed(1)}`;
      path += `L${x.toFixed(1)} ${y(high).toFixed(1)}L${x.toFixed(1)} ${y(last).toFixed(1)}`;
      down = true;
      group = null;
    };
    for (let i = this.begin; i < line.length; i += 1) {
      const value = line[i];
      if (!Number.isFinite(value) || stretches[i] === i) {
        flush();
        down = false;
        if (!Number.isFinite(value)) continue;
      }
      const x = this.#x(times[i]);
      if (group && Math.round(x) === Math.round(group.x)) {
        group.low = Math.min(group.low, value);
        group.high = Math.max(group.high, value);
        group.last = value;
      } else {
        flush();
        group = { x, low: value, high: value, last: value };
      }
    }
    flush();
    return path;
  }

  #axes(top, y) {
    const { from, to } = this.shown;
    const right = this.width - this.right;
    const levels = [0, top / 2, top].flatMap((level) => [
      svg("path", { class: "grid", d: `M${EDGE.left} ${y(level)}H${right}` }),
      svg("text", { x: EDGE.left - 6, y: y(level) + 4, "text-anchor": "end" },
        text(level, this.unit)),
    ]);
    const minutes = (to - from) / 60;
    const marks = [
      [from, `\u2212${minutes} min`, "start"],
      [(from + to) / 2, `\u2212${minutes / 2}`, "middle"],
      [to, "now", "end"],
    ].map(([time, words, anchor]) =>
      svg("text", { x: this.#x(time), y: HEIGHT - 5, "text-anchor": anchor }, words),
    );
    return [...levels, ...marks];
  }

  /** Names where the lines end, moved apart where they would cover each other. */
  #labels(y) {
    const { times, values, moment } = this.shown;
    if (values.length < 2) return [];
    const ends = values
      .map((line, i) => ({ i, value: line[moment] }))
      .filter(({ value }) => Number.isFinite(value) && times.length)
      .map(({ i, value }) => ({ i, at: y(value) + 4 }))
      .sort((a, b) => b.at - a.at);
    let floor = HEIGHT - EDGE.bottom + 4;
    for (const end of ends) {
      end.at = Math.min(end.at, floor);
      floor = end.at - LABEL_HEIGHT;
    }
    let ceiling = EDGE.top + 4;
    for (const end of ends.reverse()) {
      end.at = Math.max(end.at, ceiling);
      ceiling = end.at + LABEL_HEIGHT;
    }
    const x = this.width - this.right + 5;
    return ends.map(({ i, at }) =>
      svg("text", { class: `label label-${i}`, x, y: at }, this.figure.lines[i].name),
    );
  }

  #cursor(y) {
    const { times, values, moment, pointed } = this.shown;
    const hasAny = values.some((line) => line.slice(this.begin).some(Number.isFinite));
    if (!hasAny) {
      const x = (EDGE.left + this.width - this.right) / 2;
      return [svg("text", { class: "nothing", x, y: HEIGHT * 0.3, "text-anchor": "middle" }, NOTHING)];
    }
    if (!pointed) return [];
    const x = this.#x(times[moment]);
    const dots = values.flatMap((line, i) =>
      Number.isFinite(line[moment])
        ? [svg("circle", { class: `dot dot-${i}`, cx: x, cy: y(line[moment]), r: 3.5 })]
        : [],
    );
    const rule = svg("path", { class: "cursor", d: `M${x} ${EDGE.top}V${HEIGHT - EDGE.bottom}` });
    return [rule, ...dots];
  }

  #summary(top) {
    const { values, moment, from, to } = this.shown;
    const parts = values.map((line, i) => {
      const known = line.slice(this.begin).filter(Number.isFinite);
      const name = this.figure.lines[i].name;
      if (!known.length) return `${name} nothing`;
      const [least, most] = [Math.min(...known), Math.max(...known)];
      const range = `from ${text(least, this.figure.unit)} to ${text(most, this.figure.unit)}`;
      return `${name} ${text(line[moment], this.figure.unit)}, ${range}`;
    });
    const scale = `scale to ${text(top, this.figure.unit)}`;
    return `${this.figure.title}, ${(to - from) / 60} minutes, ${scale}: ${parts.join("; ")}`;
  }

  #fillTable() {
    if (!this.details.open || !this.shown) return;
    const { times, values } = this.shown;
    const count = times.length - this.begin;
    const rows = Array.from({ length: Math.min(ROWS, count) }, (_, row) => {
      const index = times.length - 1 - Math.floor((row * count) / Math.min(ROWS, count));
      const cells = values.map((line) => h("td", {}, text(line[index], this.figure.unit)));
      return h("tr", {}, h("th", { scope: "row" }, clock(times[index])), ...cells);
    });
    const heads = ["time", ...this.figure.lines.map(({ name }) => name)];
    this.table.replaceChildren(
      h(
        "table",
        {},
        h("caption", { class: "unseen" }, `${this.figure.title}, newest first`),
        h("thead", {}, h("tr", {}, ...heads.map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, ...rows),
      ),
    );
  }

  #point(event) {
    if (!this.shown) return;
    const { left } = this.svg.getBoundingClientRect();
    const { from, to } = this.shown;
    const part = (event.clientX - left - EDGE.left) / (this.width - EDGE.left - this.right);
    this.onMoment(Math.min(to, Math.max(from, from + part * (to - from))));
  }
}
