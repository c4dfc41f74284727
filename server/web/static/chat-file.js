/** Chats as files: JSON that can be read again, and Markdown for people. */

import { CONTROLS, check } from "./chat-controls.js";
import { newChat, shownColumns, titleOf } from "./chat-store.js";
import { h } from "./dom.js";

const FORMAT = "inferneo-chat";
const VERSION = 1;
const LARGEST = 50_000_000; // bytes of a file
// Drawing takes time: beyond these bounds the page would not respond for minutes.
const MOST_CHARACTERS = 1_000_000; // of all messages and answers
const MOST_TOKENS = 100_000; // with probabilities, of all answers
const MOST_TURNS = 2000;

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
    throw new Error(`${file.name} is of version ${JSON.stringify(data.version)?.slice(0, 20)}; this page reads version ${VERSION}.`);
  try {
    const { id } = newChat();
    const { title, updated, compare, columns, turns } = shape(data, CHAT_FILE, "");
    checkSize(turns);
    return { id, title, updated, compare, columns, turns };
  } catch (error) {
    throw new Error(`${file.name} is damaged: ${error.message}`);
  }
}

/** A text of a name's length; `long` texts are those that people and models write. */
const text = (value) => typeof value === "string" && value.length <= 10_000;
const long = (value) => typeof value === "string";
const number = Number.isFinite; // JSON's 1e999 is Infinity, which JSON cannot write
const list = (of, least = 0, most = Infinity) => ({ of, least, most });
const may = (rule) => ({ may: rule }); // the value, null or nothing
const optional = (rule) => ({ optional: rule }); // the value or nothing
const SAMPLING = Object.fromEntries(
  CONTROLS.map((control) => [control.name, optional((value) => (check(control, value), true))]),
);
const ALTERNATIVE = (value) => Array.isArray(value) && text(value[0]) && number(value[1]) && value.length === 2;
const ALTERNATIVES = (value) => Array.isArray(value) && value.length <= 20 && value.every(ALTERNATIVE);
const TOKEN = (value) =>
  Array.isArray(value) && text(value[0]) && number(value[1]) && ALTERNATIVES(value[2]) && value.length === 3;
const COLUMN = { model: text, system: long, sampling: SAMPLING };
const USAGE = { prompt: number, cached: number, completion: number };
const ANSWER = {
  ...COLUMN,
  reasoning: may(long),
  text: long,
  finish: may(text),
  usage: may(USAGE),
  times: may({ first: may(number), total: number }),
  tokens: may(list(TOKEN, 0, MOST_TOKENS)),
  error: may({ title: text, message: text, requestId: may(text) }),
  warnings: may(list(text, 0, 100)),
};
const TURN = { user: long, answers: list(ANSWER, 0, 2) };
const CHAT_FILE = {
  title: text,
  updated: number,
  compare: (value) => typeof value === "boolean",
  columns: list(COLUMN, 2, 2),
  turns: list(TURN, 0, MOST_TURNS),
};

/** Throws an Error if these turns hold more than the page can draw. */
function checkSize(turns) {
  const answers = turns.flatMap((turn) => turn.answers);
  const sum = (sizes) => sizes.reduce((a, b) => a + b, 0);
  const characters = sum([...turns.map(({ user }) => user.length), ...answers.map(({ text, reasoning }) => text.length + (reasoning?.length ?? 0))]);
  const tokens = sum(answers.map((answer) => answer.tokens?.length ?? 0));
  for (const [what, count, most] of [
    ["characters in messages and answers", characters, MOST_CHARACTERS],
    ["tokens with probabilities", tokens, MOST_TOKENS],
  ])
    if (count > most)
      throw new Error(`it has ${count.toLocaleString("en")} ${what}, and at most ${most.toLocaleString("en")} can be shown.`);
}

/** The parts of a value that a rule names, and no others. */
function shape(value, rule, path) {
  const wrong = () => new Error(`${path || "the file"} is not as it should be.`);
  if (rule.may) return value === undefined || value === null ? null : shape(value, rule.may, path);
  if (rule.optional) return shape(value, rule.optional, path);
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
    if (!Array.isArray(value) || value.length < rule.least) throw wrong();
    if (value.length > rule.most)
      throw new Error(`${path} has ${value.length.toLocaleString("en")} entries; at most ${rule.most.toLocaleString("en")} are read.`);
    return value.map((each, i) => shape(each, rule.of, `${path}[${i}]`));
  }
  if (typeof value !== "object" || value === null) throw wrong();
  const found = {};
  for (const [name, of] of Object.entries(rule)) {
    const given = Object.hasOwn(value, name) ? value[name] : undefined;
    if (given === undefined && (of.may || of.optional)) continue;
    found[name] = shape(given, of, path ? `${path}.${name}` : name);
  }
  return found;
}
