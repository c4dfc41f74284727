/**
 * One line of Markdown as DOM nodes: emphasis, code and links to http and https; all else is text.
 *
 * Nothing is ever parsed as HTML. The work grows with the line's length, whatever it holds.
 */

import { h } from "./dom.js";

const SPECIAL = /\\[!-/:-@[-`{-~]|`+|\*+|_+|~~|!?\[|https?:\/\//g;
// Bounded repeats, so that no line of brackets costs more than its length times a constant.
const LINK =
  /!?\[((?:[^[\]\\]|\\.){0,500})\]\(\s{0,9}<?(https?:\/\/[^\s<>()]{0,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,500}){0,4})>?(?:\s{1,9}"[^"]{0,200}")?\s{0,9}\)/y;
const ADDRESS = /https?:\/\/[^\s<>"`|[\]]{1,2000}/y;
const TAGS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };
const WORD = /[\p{L}\p{N}]/u;

/**
 * Append a line to an element.
 *
 * With `partial` more of the line is to come, and emphasis that was opened stays open till then.
 */
export function appendInline(parent, text, { partial = false, links = true } = {}) {
  const open = []; // emphasis that has begun: {mark, element}, outermost first
  const top = () => open.at(-1)?.element ?? parent;
  let at = 0;
  SPECIAL.lastIndex = 0;
  for (;;) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    const [mark] = found;
    if (found.index > at) top().append(text.slice(at, found.index));
    at = found.index;
    if (mark[0] === "\\") {
      top().append(mark[1]);
      at += 2;
    } else if (mark[0] === "`") {
      at = appendCode(top(), text, at, mark, partial);
    } else if (mark.endsWith("[") || mark.startsWith("http")) {
      at = links ? appendLink(top(), text, at, mark) : appendText(top(), mark, at);
    } else {
      at = emphasize(open, top, text, at, mark);
    }
  }
  if (at < text.length) top().append(text.slice(at));
  if (!partial) while (open.length) unwrap(open.pop());
}

/** The address if it is one of http or https; null otherwise. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

function appendText(parent, text, at) {
  parent.append(text);
  return at + text.length;
}

function appendCode(parent, text, at, mark, partial) {
  const runs = /`+/g;
  runs.lastIndex = at + mark.length;
  for (let run = runs.exec(text); run; run = runs.exec(text)) {
    if (run[0].length !== mark.length) continue;
    parent.append(h("code", {}, text.slice(at + mark.length, run.index).trim()));
    return runs.lastIndex;
  }
  if (!partial || at + mark.length === text.length) return appendText(parent, mark, at);
  parent.append(h("code", {}, text.slice(at + mark.length)));
  return text.length;
}

function appendLink(parent, text, at, mark) {
  if (mark.endsWith("[")) {
    LINK.lastIndex = at;
    const found = LINK.exec(text);
    const href = found && safeAddress(found[2]);
    if (!href) return appendText(parent, mark, at);
    const link = anchor(href);
    appendInline(link, found[1] || found[2], { links: false });
    parent.append(link);
    return LINK.lastIndex;
  }
  ADDRESS.lastIndex = at;
  const found = ADDRESS.exec(text);
  if (!found || WORD.test(text[at - 1] ?? "")) return appendText(parent, mark, at);
  let end = found[0].length;
  while (end && (".,;:!?'*_~".includes(found[0][end - 1]) || closesMore(found[0], end))) end -= 1;
  const address = found[0].slice(0, end);
  const href = safeAddress(address);
  if (!href) return appendText(parent, mark, at);
  const link = anchor(href);
  link.append(address);
  parent.append(link);
  return at + end;
}

/** Whether an address ends in a bracket that the sentence around it opened. */
function closesMore(address, end) {
  return address[end - 1] === ")" && !address.slice(0, end).includes("(");
}

function anchor(href) {
  return h("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" });
}

/** Open or close emphasis by what stands around a run of marks; else the run is text. */
function emphasize(open, top, text, at, run) {
  const before = text[at - 1] ?? " ";
  const after = text[at + run.length] ?? " ";
  let rest = run;
  if (run.length > 3 && run[0] !== "~") return appendText(top(), run, at);
  while (rest) {
    const innermost = open.at(-1)?.mark;
    const size = rest.length >= 2 && !(rest.length === 3 && innermost === rest[0]) ? 2 : 1;
    const mark = rest.slice(0, size);
    rest = rest.slice(size);
    const begun = open.findIndex((each) => each.mark === mark);
    const mayClose = !/\s/.test(before) && (mark[0] !== "_" || !WORD.test(after));
    const mayOpen = !/\s/.test(after) && (mark === "**" || mark === "~~" || !WORD.test(before));
    if (begun >= 0 && mayClose) {
      while (open.length > begun + 1) unwrap(open.pop());
      open.pop();
    } else if (begun < 0 && mayOpen) {
      const element = document.createElement(TAGS[mark]);
      top().append(element);
      open.push({ mark, element });
    } else {
      top().append(mark);
    }
  }
  return at + run.length;
}

/** Emphasis that nothing closed is text with marks in it. */
function unwrap({ mark, element }) {
  element.before(mark);
  while (element.firstChild) element.before(element.firstChild);
  element.remove();
}
