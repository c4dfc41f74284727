/** Chats as files: JSON that can be read again, and Markdown for people. */

import { CONTROLS, check } from "./chat-controls.js";
import { newChat, shownColumns, titleOf } from "./chat-store.js";
import { h } from "./dom.js";

const FORMAT = "inferneo-chat";
const VERSION = 1;
const LARGEST = 50_000_000; // bytes

export function toJson(chat) {
  const { title, updated, compare, columns, turns } = chat;
  const file = { format: FORMAT, version: VERSION, title, updated, compare, columns, turns };
  return JSON.stringify(file, null, 1);
}

export function toMarkdown(chat) {
  const parts = [`# ${titleOf(chat) || "Chat"}`];
  for (const column of shownColumns(chat)) {
    const { system } = chat.columns[column];
    if (system) parts.push(`**System${chat.compare ? ` ${"AB"[column]}` : ""}**\n\n${system}`);
  }
  for (const turn of chat.turns) {
    parts.push(`## You\n\n${turn.user}`);
    for (const column of shownColumns(chat)) {
      const answer = turn.answers[column];
      if (answer) parts.push(`## ${answer.model}${chat.compare ? ` (${"AB"[column]})` : ""}\n\n${answer.text}`);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

/** Hand a text to the browser as a file of this name. */
export function download(name, type, text) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** A chat, with an id of its own, from a File. Throws an Error whose message says what is wrong. */
export async function fromFile(file) {
  if (file.size > LARGEST) throw new Error(`${file.name} is too large to be a chat.`);
  let data;
  try {
    data = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is not JSON. Choose a file that "Export JSON" made.`);
  }
  if (data?.format !== FORMAT)
    throw new Error(`${file.name} is JSON, but no chat of this page. Choose a file that "Export JSON" made.`);
  if (data.version !== VERSION)
    throw new Error(`${file.name} is of version ${data.version}; this page reads version ${VERSION}.`);
  try {
    const { id } = newChat();
    const { title, updated, compare, columns, turns } = shape(data, CHAT_FILE, "");
    return { id, title, updated, compare, columns, turns };
  } catch (error) {
    throw new Error(`${file.name} is damaged: ${error.message}`);
  }
}

const text = (value) => typeof value === "string";
const number = (value) => typeof value === "number";
const list = (of, least = 0, most = Infinity) => ({ of, least, most });
const may = (rule) => ({ may: rule });
const SAMPLING = Object.fromEntries(
  CONTROLS.map((control) => [control.name, may((value) => (check(control, value), true))]),
);
const ALTERNATIVE = (value) => Array.isArray(value) && text(value[0]) && number(value[1]) && value.length === 2;
const TOKEN = (value) =>
  Array.isArray(value) && text(value[0]) && number(value[1]) && value[2].every(ALTERNATIVE) && value.length === 3;
const COLUMN = { model: text, system: text, sampling: SAMPLING };
const USAGE = { prompt: number, cached: number, completion: number };
const ANSWER = {
  ...COLUMN,
  text,
  finish: may(text),
  usage: may(USAGE),
  times: may({ first: may(number), total: number }),
  tokens: may(list(TOKEN)),
  error: may({ title: text, message: text, requestId: may(text) }),
  warnings: may(list(text)),
};
const TURN = { user: text, answers: list(ANSWER, 0, 2) };
const CHAT_FILE = {
  title: text,
  updated: number,
  compare: (value) => typeof value === "boolean",
  columns: list(COLUMN, 2, 2),
  turns: list(TURN),
};

/** The parts of a value that a rule names, and no others. */
function shape(value, rule, path) {
  const wrong = () => new Error(`${path || "the file"} is not as it should be.`);
  if (rule.may) return value === undefined || value === null ? null : shape(value, rule.may, path);
  if (typeof rule === "function") {
    let fine = false;
    try {
      fine = rule(value);
    } catch {
      // something within it is missing
    }
    if (!fine) throw wrong();
    return value;
  }
  if (rule.of) {
    if (!Array.isArray(value) || value.length < rule.least || value.length > rule.most) throw wrong();
    return value.map((each, i) => shape(each, rule.of, `${path}[${i}]`));
  }
  if (typeof value !== "object" || value === null) throw wrong();
  const found = {};
  for (const [name, of] of Object.entries(rule)) {
    const given = Object.hasOwn(value, name) ? value[name] : undefined;
    if (given === undefined && of.may) continue;
    found[name] = shape(given, of, path ? `${path}.${name}` : name);
  }
  return found;
}
