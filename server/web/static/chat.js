/** The chat page: what a person does, and what follows from it. */

import { ApiError, explain } from "./api.js";
import { showBar } from "./chat-bar.js";
import { Composer } from "./chat-composer.js";
import { showHistory, confirmed } from "./chat-history.js";
import { findModels, isLoading, waitReady } from "./chat-models.js";
import { Panels } from "./chat-panels.js";
import { counts, messagesBefore, newAnswer, run } from "./chat-run.js";
import { showSettings } from "./chat-settings.js";
import { clearAll, currentChat, keepChat, keepCurrent, newChat, readChat, removeChat, shownColumns } from "./chat-store.js";
import { Thread } from "./chat-thread.js";
import { welcome } from "./chat-welcome.js";
import { byId, h } from "./dom.js";
import { mountShell, openKeyDialog } from "./shell.js";

const PROBABILITIES = "inferneo.probabilities";
const KEEP_MS = 1000; // between two times that a growing answer is kept

let chat = currentChat();
let models = [];
let probabilities = localStorage.getItem(PROBABILITIES) === "on";
let panelColumn = 0;
let settingsShown = "";
let lastKept = 0;
let unauthorized = []; // [turn, column] of answers to be asked for again with another key
const running = new Map(); // answer: its AbortController

mountShell("Chat", { onKey });
const composer = new Composer(byId("composer"), { send, stop });
const thread = new Thread(byId("thread"), byId("to-end"), {
  actions: { again, resend, remove },
  card: byId("card"),
  say,
});
const panels = new Panels(
  { history: { root: byId("history"), draw: drawHistory }, settings: { root: byId("settings"), draw: drawSettings } },
  byId("main"),
);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (byId("card").hidden) stop();
  byId("card").hidden = true;
});
addEventListener("pagehide", () => running.size && keep());
draw();
composer.focus();
await start();

/** Find the models, however long their loading takes. */
async function start() {
  for (;;) {
    try {
      models = await findModels();
      tell("");
      if (!models.length) tell("No model here generates text, or the key permits none.");
      break;
    } catch (error) {
      if (!isLoading(error)) return notStarted(error);
      tell("The models are being loaded.");
      await waitReady((progress) => tell(`The models are being loaded. ${progress}`));
    }
  }
  for (const column of chat.columns) {
    if (!column.model || !chat.turns.length) {
      const known = models.some(({ id }) => id === column.model);
      if (!known) column.model = models[0]?.id ?? "";
    }
  }
  draw();
}

function notStarted(error) {
  if (!(error instanceof ApiError)) throw error;
  const { title, todo, needsKey } = explain(error);
  const button = needsKey
    ? h("button", { type: "button", class: "small", onclick: () => openKeyDialog(error.message) }, "Enter a key")
    : h("button", { type: "button", class: "small", onclick: start }, "Try again");
  tell(`${title}. ${error.message} ${needsKey ? "" : todo}`, button);
  if (needsKey) openKeyDialog(`${title}. ${error.message}`);
}

async function onKey() {
  await start();
  const asked = unauthorized.splice(0);
  for (const [turn, column] of asked) if (chat.turns.includes(turn)) again(turn, column);
}

/** A sentence above the conversation; none takes it away. */
function tell(sentence, ...more) {
  const notice = byId("notice");
  notice.hidden = !sentence;
  if (notice.firstChild?.textContent === sentence) return;
  notice.replaceChildren(h("span", { role: "alert" }, sentence), ...more);
}

/** For screen readers. */
function say(text) {
  byId("status").textContent = text;
}

function draw() {
  const isRunning = (answer) => running.has(answer);
  drawBar();
  thread.show(chat, { probabilities, isRunning });
  byId("thread").querySelector(".welcome")?.remove();
  if (!chat.turns.length) {
    const model = models.find(({ id }) => id === chat.columns[0].model) ?? null;
    byId("thread").append(welcome(model, send));
  }
  composer.set({ possible: models.length > 0, busy: running.size > 0 });
  panels.draw();
}

function drawBar() {
  showBar(byId("bar"), chat, models, probabilities, {
    toggle: (panel) => panels.toggle(panel),
    isOpen: (panel) => !byId(panel).hidden,
    create: () => open(newChat()),
    compare,
    probabilities: switchProbabilities,
    choose: (column, model) => {
      chat.columns[column].model = model;
      keep();
      draw();
    },
  });
}

/** Drawn anew for other settings only: what a person is typing stays. */
function drawSettings() {
  if (!chat.compare) panelColumn = 0;
  const shown = JSON.stringify([chat.id, chat.compare, panelColumn]);
  if (shown === settingsShown) return;
  settingsShown = shown;
  showSettings(byId("settings"), chat, panelColumn, {
    changed: () => {
      keep();
      drawBar();
    },
    choose: (column) => {
      panelColumn = column;
      drawSettings();
      byId(`settings-of-${"ab"[column]}`).focus();
    },
    close: () => panels.close("settings"),
  });
}

function drawHistory() {
  const root = byId("history");
  const focused = root.contains(document.activeElement) ? document.activeElement.textContent : "";
  showHistory(root, chat, {
    open: (id) => open(readChat(id) ?? newChat()),
    add: (added) => {
      keepChat(added);
      open(added);
    },
    remove: (id) =>
      confirmed("Delete this chat?", () => {
        removeChat(id);
        if (id === chat.id) open(newChat());
        else drawHistory();
      }),
    clear: () => {
      stop();
      clearAll();
      open(newChat());
    },
    close: () => panels.close("history"),
  });
  if (focused) [...root.querySelectorAll("button")].find((each) => each.textContent === focused)?.focus();
}

function keep() {
  lastKept = performance.now();
  keepCurrent(chat);
  const lost = keepChat(chat);
  if (lost === "all") tell("This browser's storage is full: this chat is not kept. Export it, or clear others.");
  if (lost === "tokens") tell("This browser's storage is full: the probabilities of this chat are not kept.");
}

function open(other) {
  stop();
  chat = other;
  unauthorized = [];
  for (const column of chat.columns) column.model ||= models[0]?.id ?? "";
  keep();
  draw();
  thread.follow();
  composer.focus();
}

function send(text) {
  if (!models.length || running.size) return;
  const turn = { user: text, answers: [] };
  chat.turns.push(turn);
  for (const column of shownColumns(chat)) generate(turn, column);
  draw();
  thread.follow();
  composer.focus();
}

/** Say a message anew; what came after it is gone. */
function resend(turn, text) {
  stop();
  chat.turns.length = chat.turns.indexOf(turn);
  send(text);
}

/** Generate an answer anew; what came after it is gone. */
function again(turn, column) {
  if (running.has(turn.answers[column])) return;
  chat.turns.length = chat.turns.indexOf(turn) + 1;
  generate(turn, column);
  draw();
  thread.follow();
  composer.focus();
}

function remove(turn) {
  turn.answers.forEach(stopOne);
  chat.turns.splice(chat.turns.indexOf(turn), 1);
  keep();
  draw();
  composer.focus();
}

function stop() {
  [...running.keys()].forEach(stopOne);
}

/** At once it does not count as running any more; its end comes by itself. */
function stopOne(answer) {
  running.get(answer)?.abort();
  running.delete(answer);
}

/** Begin an answer. Each runs by itself: the two of a comparison stream side by side. */
async function generate(turn, column) {
  const answer = newAnswer(chat.columns[column]);
  const controller = new AbortController();
  const messages = messagesBefore(chat, turn, column);
  const mine = chat;
  chat.updated = Date.now();
  turn.answers[column] = answer;
  thread.forget(turn);
  running.set(answer, controller);
  const name = mine.compare ? ` ${"AB"[column]}` : "";
  say(`Answer${name} begins.`);
  const error = await run(answer, messages, {
    probabilities,
    signal: controller.signal,
    changed: () => {
      thread.viewOf(answer)?.changed();
      if (performance.now() - lastKept > KEEP_MS && mine === chat) keep();
    },
    onWait: (progress) => thread.viewOf(answer)?.wait(progress && `Waiting for the model. ${progress}`),
  });
  running.delete(answer);
  thread.viewOf(answer)?.end(error);
  if (mine === chat) keep();
  else if (readChat(mine.id)) keepChat(mine); // it was left while it was answering
  composer.set({ possible: models.length > 0, busy: running.size > 0 });
  panels.draw();
  say(error ? "" : `Answer${name} ${answer.finish === "stopped" ? "stopped" : "complete"}: ${counts(answer)[0] ?? ""}.`);
  if (error?.status === 401) {
    unauthorized.push([turn, column]);
    openKeyDialog(`${explain(error).title}. ${error.message}`);
  }
}

/** Show two columns or one. A second column begins with what the first one said. */
function compare() {
  stop();
  chat.compare = !chat.compare;
  if (chat.compare) {
    chat.columns[1].model ||= chat.columns[0].model;
    for (const { answers } of chat.turns) if (answers[0]) answers[1] ??= structuredClone(answers[0]);
  }
  keep();
  draw();
}

function switchProbabilities() {
  probabilities = !probabilities;
  localStorage.setItem(PROBABILITIES, probabilities ? "on" : "off");
  draw();
}
