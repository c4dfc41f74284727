/** An answer as its tokens, tinted by how likely each was, and a card with the alternatives. */

import { h, inOrder } from "./dom.js";

const STEPS = [0.1, 0.3, 0.6, 0.9];
const PART = /^bytes:(?:\\x[0-9a-f]{2})+$/; // of a character, as the API spells it
const CONTROL = /^(?:<\|.*\|>|<\/?s>|<(?:pad|unk|bos|eos)>)$/;
const MARKS = { " ": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d" };

/** The key to the tints. */
export function legend() {
  const bounds = ["under 10%", "10 to 30%", "30 to 60%", "60 to 90%", "over 90%"];
  const keys = bounds.map((bound, i) => h("span", { class: `token p${i}` }, bound));
  return h("p", { class: "legend hint" }, "Probability: ", ...keys);
}

/**
 * Draws tokens into `root`; the alternatives of the one that is pointed at go into `card`, those of
 * one that is reached by keys are also said by `say`.
 */
export class TokenView {
  #root;
  #card;
  #say;
  #tokens = [];
  #spans = [];
  #line = null; // an element of its own for each line, so that what is drawn stays laid out
  #part = [];
  #at = -1;
  #leaving = 0;

  constructor(root, card, say) {
    this.#root = root;
    this.#card = card;
    this.#say = say;
    root.addEventListener("pointerover", (event) => this.#point(event));
    root.addEventListener("click", (event) => this.#point(event));
    root.addEventListener("pointerleave", () => this.#leave());
    root.addEventListener("keydown", (event) => this.#key(event));
    root.addEventListener("focus", () => root.matches(":focus-visible") && this.#go(Math.max(this.#at, 0)));
    root.addEventListener("blur", () => this.hide());
    card.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    card.addEventListener("pointerleave", () => this.#leave());
  }

  /** Draw those of these tokens that are not there yet. */
  write(tokens) {
    for (const token of tokens.slice(this.#tokens.length)) {
      this.#tokens.push(token);
      const step = STEPS.filter((bound) => Math.exp(token[1]) >= bound).length;
      const span = h("span", { class: `token p${step}` });
      span.append(...this.#appearance(token[0], span));
      this.#spans.push(span);
      if (!this.#line) this.#root.append((this.#line = h("div")));
      this.#line.append(span);
      if (token[0].includes("\n")) this.#line = null;
    }
  }

  hide() {
    this.#spans[this.#at]?.classList.remove("here");
    this.#card.hidden = true;
  }

  /** A token in the text: a character's last part shows the character, those before their bytes. */
  #appearance(name, span) {
    if (PART.test(name)) {
      const bytes = bytesOf(name);
      this.#part.push(...bytes);
      const whole = decode(this.#part);
      if (whole === null) {
        span.classList.add("part");
        return [hex(bytes)];
      }
      this.#part = [];
      return [inOrder(whole)];
    }
    this.#part = [];
    if (CONTROL.test(name) || name === "") {
      span.classList.add("control");
      return [inOrder(name) || "\u2205"];
    }
    return inOrder(name).split(/(\n)/).flatMap((part) => (part === "\n" ? [h("i", { class: "mark" }, MARKS[part]), part] : [part]));
  }

  #point(event) {
    const span = event.target.closest(".token");
    clearTimeout(this.#leaving);
    if (span) this.#show(this.#spans.indexOf(span));
  }

  #leave() {
    clearTimeout(this.#leaving);
    this.#leaving = setTimeout(() => this.hide(), 200); // time enough to get onto the card
  }

  #key(event) {
    const last = this.#spans.length - 1;
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -last, End: last };
    if (event.key === "Escape" && !this.#card.hidden) {
      event.stopPropagation(); // it closes the card, and stops nothing
      this.hide();
    } else if (event.key in moves && last >= 0) {
      event.preventDefault();
      this.#go(Math.min(Math.max(this.#at + moves[event.key], 0), last));
    }
  }

  #go(at) {
    this.#show(at);
    if (this.#tokens[at]) this.#say(this.#card.textContent);
  }

  #show(at) {
    if (!this.#tokens[at]) return;
    this.hide();
    this.#at = at;
    this.#spans[at].classList.add("here");
    this.#card.replaceChildren(...describe(this.#tokens[at]));
    this.#card.hidden = false;
    this.#place(this.#spans[at]);
  }

  /** Below the token, or above it where there is no room. */
  #place(span) {
    span.scrollIntoView({ block: "nearest" });
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#card;
    const left = Math.min(Math.max(8, box.left), innerWidth - width - 8);
    const below = box.bottom + 6;
    const top = below + height > innerHeight ? Math.max(8, box.top - height - 6) : below;
    this.#card.style.left = `${left}px`;
    this.#card.style.top = `${top}px`;
  }
}

/** The card of a token: itself and its alternatives, likeliest first, and what is left for others. */
function describe([name, logprob, top]) {
  const rows = top.map(([other, value]) => ({ name: other, value, chosen: other === name }));
  if (!rows.some((row) => row.chosen)) rows.push({ name, value: logprob, chosen: true });
  const rest = 1 - rows.reduce((sum, row) => sum + Math.exp(row.value), 0);
  const list = rows.map((row) => {
    const bar = h("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", `${100 * Math.exp(row.value)}%`);
    return h(
      "li",
      { class: row.chosen ? "chosen" : null },
      bar,
      h("code", {}, spell(row.name)),
      h("span", { class: "share" }, percent(Math.exp(row.value))),
      h("span", { class: "unseen" }, row.chosen ? " chosen;" : ";"),
    );
  });
  const others = rest > 0.0005 ? [h("p", { class: "hint" }, `all others ${percent(rest)}`)] : [];
  return [h("ol", {}, ...list), ...others];
}

/** A token's name with what cannot be seen made visible. */
export function spell(name) {
  if (PART.test(name)) return `bytes ${hex(bytesOf(name))}`;
  if (name === "") return "\u2205 (a control token)";
  return inOrder(name).replace(/[ \n\t\r]/g, (character) => MARKS[character]);
}

export function percent(share) {
  if (share > 0.9995 && share < 1) return ">99.9%";
  if (share < 0.0005) return "<0.1%";
  return `${(100 * Math.min(share, 1)).toFixed(1)}%`;
}

function bytesOf(name) {
  return name.slice("bytes:".length).split("\\x").slice(1).map((digits) => parseInt(digits, 16));
}

function hex(bytes) {
  return bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
}

/** The characters of these bytes, or null if they are not whole. */
function decode(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes));
  } catch {
    return null;
  }
}
