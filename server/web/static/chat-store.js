/**
 * Conversations, and where they are kept: in this browser's storage and nowhere else.
 *
 * A chat is {id, title, updated, compare, columns, turns}. Of two columns each has {model, system,
 * sampling}; a turn is {user, answers}, with an answer for each column that was there. An answer is
 * {text, model, system, sampling, finish, usage, times, tokens, error}.
 */

const CHAT = "inferneo.chat.";
const SETTINGS = "inferneo.chat-settings";
const CURRENT = "inferneo.current-chat";

export function newColumn() {
  return { model: "", system: "", sampling: {} };
}

/** A chat without messages, set as the last one was. */
export function newChat() {
  const { compare, columns } = readJson(SETTINGS) ?? { compare: false, columns: [newColumn(), newColumn()] };
  const chat = { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", updated: 0 };
  return { ...chat, compare, columns, turns: [] };
}

/** The columns that a chat shows: one, or two if they are compared. */
export function shownColumns(chat) {
  return chat.compare ? [0, 1] : [0];
}

export function titleOf(chat) {
  const first = chat.turns[0]?.user.trim().replace(/\s+/g, " ") ?? "";
  return first.length > 60 ? `${first.slice(0, 59)}\u2026` : first;
}

/** Chats that are kept, newest first: {id, title, updated}. */
export function listChats() {
  const chats = [];
  for (const key of Object.keys(localStorage)) {
    if (!key.startsWith(CHAT)) continue;
    const chat = readJson(key);
    if (chat) chats.push({ id: chat.id, title: chat.title, updated: chat.updated });
  }
  return chats.sort((a, b) => b.updated - a.updated);
}

/** The chat of this tab, else the newest, else a new one. */
export function currentChat() {
  const id = sessionStorage.getItem(CURRENT);
  return (id && readChat(id)) ?? readChat(listChats()[0]?.id) ?? newChat();
}

export function readChat(id) {
  return id ? readJson(CHAT + id) : null;
}

/**
 * Keep a chat, once it has messages. Returns what had to be left out: "" for nothing, "tokens" for
 * the probabilities, "all" if the storage is full without them.
 */
export function keepChat(chat) {
  if (!chat.turns.length) {
    localStorage.removeItem(CHAT + chat.id);
    return "";
  }
  chat.title = titleOf(chat);
  if (writeJson(CHAT + chat.id, chat)) return "";
  const turns = chat.turns.map(({ user, answers }) => ({
    user,
    answers: answers.map(({ tokens, ...answer }) => answer),
  }));
  return writeJson(CHAT + chat.id, { ...chat, turns }) ? "tokens" : "all";
}

/** This is the chat of this tab, and how the next one is to be set. */
export function keepCurrent({ id, compare, columns }) {
  writeJson(SETTINGS, { compare, columns });
  sessionStorage.setItem(CURRENT, id);
}

export function removeChat(id) {
  localStorage.removeItem(CHAT + id);
}

/** Everything that this page keeps, but for the key and the colours. */
export function clearAll() {
  for (const key of Object.keys(localStorage)) if (key.startsWith(CHAT)) localStorage.removeItem(key);
  localStorage.removeItem(SETTINGS);
  sessionStorage.removeItem(CURRENT);
}

function readJson(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function writeJson(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or not allowed
  }
}
