/**
 * Markdown that streams, as DOM nodes.
 *
 * Lines that are whole are read once and never again; only the line that is still being written is
 * drawn anew. So the work grows with the text's length, and what was drawn stays where it is.
 */

import { copyButton, h, inOrder } from "./dom.js";
import { appendInline } from "./markdown-inline.js";

const LONGEST = 1000; // characters of a line that are drawn anew
const DEEPEST = 6; // quotes within quotes; lists within lists
const FENCE = /^(`{3,}|~{3,})[ \t]*([^`]*)$/;
const MARKER = /^([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;
const RULE = /^(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const TABLE_RULE = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** Draws into `root`, an element without content. */
export class Markdown {
  #shared = { drawn: null };
  #blocks;
  #line = "";
  #before = null;

  constructor(root) {
    this.#blocks = new Blocks(root, this.#shared, 0);
  }

  /** Add text. */
  write(text) {
    this.#undo();
    const lines = inOrder(text).split("\n");
    const last = lines.pop();
    for (const line of lines) {
      this.#take(line);
      this.#blocks.line(this.#line.replace(/\r$/, ""), "\n");
      this.#line = "";
    }
    this.#take(last);
    if (!this.#line) return;
    this.#before = this.#blocks.state();
    this.#shared.drawn = [];
    this.#blocks.line(this.#line, "");
  }

  /** There is no more. */
  end() {
    this.#undo();
    if (this.#line) this.#blocks.line(this.#line, "\n");
    this.#line = "";
    this.#blocks.end();
  }

  /** More of a line; the beginning of one that is long is drawn for good. */
  #take(text) {
    this.#line += text;
    while (this.#line.length > LONGEST) this.#cut();
  }

  #undo() {
    if (!this.#before) return;
    for (const node of this.#shared.drawn.reverse()) node.remove();
    this.#shared.drawn = null;
    this.#blocks.restore(this.#before);
    this.#before = null;
  }

  #cut() {
    const space = this.#line.lastIndexOf(" ", LONGEST);
    const end = space > LONGEST / 2 ? space + 1 : LONGEST;
    this.#blocks.line(this.#line.slice(0, end), "");
    this.#blocks.goOn();
    this.#line = this.#line.slice(end);
  }
}

/** Blocks of a document or a quote. What `state` gives is never changed, only replaced. */
class Blocks {
  #root;
  #shared;
  #depth;
  #now = { lists: [], text: null, code: null, table: null, held: null, quote: null, cut: false, level: 2 };

  constructor(root, shared, depth) {
    this.#root = root;
    this.#shared = shared;
    this.#depth = depth;
  }

  state() {
    return { ...this.#now, inner: this.#now.quote?.state() };
  }

  restore({ inner, ...state }) {
    this.#now = state;
    state.quote?.restore(inner);
  }

  /** A line that ends in `end`: a newline, or nothing yet. */
  line(source, end) {
    const now = this.#now;
    if (now.cut) return this.#more(source, end);
    if (now.code) return this.#codeLine(source, end);
    const line = source.trimStart();
    const indent = source.slice(0, source.length - line.length).replaceAll("\t", "    ").length;
    if (now.held !== null && this.#tableBegins(line, end)) return undefined;
    if (!line) return this.#set({ text: null, table: null, quote: null });
    if (now.table && line.startsWith("|")) return this.#row(now.table, "td", line);
    if (RULE.test(line)) {
      this.#leave(indent);
      return this.#block(h("hr"));
    }
    const marker = MARKER.exec(line);
    if (marker) return this.#item(marker, indent, end);
    return this.#leaf(line, indent, end);
  }

  /** What comes next goes on with the line that was drawn last. */
  goOn() {
    if (this.#now.quote) this.#now.quote.goOn();
    this.#set({ cut: true });
  }

  end() {
    if (this.#now.held !== null) this.#release();
    this.#now.quote?.end();
  }

  #set(changes) {
    if (changes.quote === null) this.#now.quote?.end();
    this.#now = { ...this.#now, ...changes };
  }

  #add(parent, node) {
    parent.append(node);
    this.#shared.drawn?.push(node);
    return node;
  }

  #place() {
    return this.#now.lists.at(-1)?.item ?? this.#root;
  }

  /** A block by itself: what was open is not gone on with. */
  #block(node) {
    this.#set({ text: null, table: null, quote: null });
    return this.#add(this.#place(), node);
  }

  /** Leave the lists that a line of this indent is no part of. */
  #leave(indent) {
    const lists = this.#now.lists.filter((list) => indent >= list.indent + 2);
    this.#set({ lists });
  }

  #leaf(line, indent, end) {
    const fence = FENCE.exec(line);
    if (fence) {
      if (!this.#now.text) this.#leave(indent);
      return this.#openCode(fence);
    }
    const level = /^#{1,6}(?=[ \t]|$)/.exec(line)?.[0].length;
    if (level) {
      this.#leave(indent);
      return this.#heading(level, line.slice(level).trim(), end);
    }
    if (line[0] === ">" && this.#depth < DEEPEST) {
      if (!this.#now.quote) {
        this.#leave(indent);
        const quote = new Blocks(h("blockquote"), this.#shared, this.#depth + 1);
        this.#block(quote.#root);
        this.#set({ quote });
      }
      return this.#now.quote.line(line.slice(1).replace(/^ /, ""), end);
    }
    if (!this.#now.text) this.#leave(indent);
    if (line[0] === "|" && !this.#now.text) return this.#set({ held: line });
    this.#set({ table: null, quote: null });
    return this.#text(line, end);
  }

  /** A line of a paragraph. Models mean the line breaks that they write. */
  #text(line, end) {
    const text = this.#now.text;
    const into = text?.into ?? this.#add(this.#place(), h("p"));
    const holder = h("span");
    if (text && !text.fresh) holder.append(h("br"));
    appendInline(holder, line, { partial: !end });
    this.#add(into, holder);
    this.#set({ text: { into, fresh: false } });
  }

  #heading(level, line, end) {
    let last = line.length;
    while (line[last - 1] === "#") last -= 1;
    // No level is left out, whatever a model writes: the page's own headings are of level 2.
    const shown = Math.min(level + 2, this.#now.level + 1, 6);
    const heading = this.#block(h(`h${shown}`));
    appendInline(heading, line.slice(0, last).trim(), { partial: !end });
    this.#set({ level: shown });
  }

  #item([, mark, line = ""], indent, end) {
    const ordered = mark.length > 1;
    let lists = this.#now.lists.filter((list) => indent >= list.indent);
    let list = lists.at(-1);
    if (!list || (indent >= list.indent + 2 && lists.length < DEEPEST)) {
      list = null;
    } else if (list.ordered !== ordered) {
      lists = lists.slice(0, -1);
      list = null;
    }
    if (!list) {
      const element = h(ordered ? "ol" : "ul", { start: ordered ? parseInt(mark, 10) : null });
      this.#set({ lists });
      this.#block(element);
      list = { ordered, indent, element };
      lists = [...lists, list];
    }
    const item = this.#add(list.element, h("li"));
    lists = [...lists.slice(0, -1), { ...list, item }];
    this.#set({ lists, text: { into: item, fresh: true }, table: null, quote: null });
    const fence = FENCE.exec(line);
    if (fence) this.#openCode(fence);
    else if (line) this.#text(line, end);
  }

  #openCode([, fence, language]) {
    const code = h("code");
    const name = language.trim().split(/\s/, 1)[0];
    const copy = copyButton(() => code.textContent, "Copy", { "aria-label": "Copy the code" });
    const head = h("div", { class: "code-head" }, h("span", {}, name || "text"), copy);
    this.#block(h("div", { class: "code" }, head, h("pre", { tabindex: "0" }, code)));
    this.#set({ code: { fence, element: code } });
  }

  #codeLine(line, end) {
    const { fence, element } = this.#now.code;
    const bare = line.trim();
    const closes = bare.length >= fence.length && bare === fence[0].repeat(bare.length);
    if (closes) return this.#set({ code: null, text: null });
    if (!end && fence.startsWith(bare)) return undefined; // perhaps the beginning of the end
    return this.#add(element, document.createTextNode(line + end));
  }

  /** Decide about a line that looked like the head of a table; true if `line` is part of that. */
  #tableBegins(line, end) {
    const head = this.#now.held;
    if (!end && /^[-|: \t]*$/.test(line)) return true; // not to be told yet
    if (!TABLE_RULE.test(line) || !line.includes("-")) {
      this.#release();
      return false;
    }
    const table = h("table");
    this.#block(h("div", { class: "table", tabindex: "0" }, table));
    this.#set({ held: null, table });
    this.#row(table, "th", head);
    return true;
  }

  #release() {
    const line = this.#now.held;
    this.#set({ held: null });
    this.#text(line, "\n");
  }

  #row(table, tag, line) {
    const row = h("tr");
    for (const cell of line.replace(/^\|/, "").replace(/\|[ \t]*$/, "").split("|")) {
      const element = h(tag);
      appendInline(element, cell.trim());
      row.append(element);
    }
    this.#add(table, row);
  }

  /** The rest of a line whose beginning was drawn already. */
  #more(line, end) {
    const { quote, code } = this.#now;
    if (quote) {
      quote.line(line, end);
    } else if (code) {
      this.#add(code.element, document.createTextNode(line + end));
    } else {
      if (this.#now.held !== null) this.#release();
      this.#set({ text: this.#now.text ? { ...this.#now.text, fresh: true } : null });
      this.#text(line, end);
    }
    if (end) this.#set({ cut: false });
  }
}
