/** The dashboard: reads `/metrics` every two seconds, keeps an hour of it, and plots it. */

import { ApiError, ask, askReady } from "./api.js";
import { Controls } from "./dashboard-controls.js";
import { FIGURES } from "./dashboard-figures.js";
import { duration } from "./dashboard-format.js";
import { History } from "./dashboard-history.js";
import { parse } from "./dashboard-metrics.js";
import { modelCards, readyCards } from "./dashboard-models.js";
import { Plot } from "./dashboard-plot.js";
import { Quota } from "./dashboard-quota.js";
import { Rounds } from "./dashboard-rounds.js";
import { Series } from "./dashboard-series.js";
import { Status } from "./dashboard-status.js";
import { byId, h } from "./dom.js";
import { mountShell } from "./shell.js";

const KEPT_SECONDS = 3600 + 900; // the longest plot, and the longest window before its first value
const READY_ROUNDS = 3; // of which one asks /ready, while all is well
const QUOTA_ROUNDS = 3;

const view = { model: "", window: 60, span: 300 };
view.match = ({ model_name }) => !view.model || model_name === view.model;

const history = new History(KEPT_SECONDS);
const state = { round: 0, phase: "connecting", models: [], moment: null, paused: false };
const rounds = new Rounds(interval(), readAll, rest);
const status = new Status();
const quota = new Quota();
const controls = new Controls(view, { onView, onMoment, onPause: (paused) => pause(paused) });
const plots = FIGURES.map((figure) => ({ plot: new Plot(figure, onMoment), series: new Series(figure) }));
const grid = h(
  "section",
  { class: "plots", "aria-labelledby": "figures" },
  h("h2", { id: "figures", class: "unseen" }, "Figures"),
  ...plots.map(({ plot }) => plot.element),
);
const cards = h("div", { class: "models" });
const served = h("section", { "aria-labelledby": "served" }, h("h2", { id: "served" }, "Models"), cards);
const kept = h("p", { class: "hint" }, "What is plotted is kept in this page alone, for an hour.");

mountShell("Dashboard", { onKey });
byId("main").append(status.element, status.notices, controls.element, grid, served, quota.element, kept);
draw();
rounds.start();

/** Seconds between two rounds: 2, or what `?every=` asks for. */
function interval() {
  const asked = Number(new URLSearchParams(location.search).get("every"));
  return asked ? Math.min(60, Math.max(0.1, asked)) : 2;
}

/** One round; whether an answer came. What comes after another has begun is not wanted. */
async function readAll(signal, isLate) {
  state.round += 1;
  try {
    if (!state.refusal) await readMetrics(signal);
    if (state.phase !== "ready" || state.refusal || state.round % READY_ROUNDS === 0)
      await readReady(signal);
    if (state.round % QUOTA_ROUNDS === 1) await quota.refresh(signal);
    state.trouble = null;
  } catch (error) {
    if (isLate()) return true;
    history.gap();
    state.trouble = error;
  }
  draw();
  return !state.trouble;
}

async function readMetrics(signal) {
  let response;
  try {
    response = await ask("metrics", { signal });
  } catch (error) {
    if (![401, 403].includes(error.status)) throw error;
    state.refusal = error;
    history.gap();
    return;
  }
  const text = await response.text().catch(() => Promise.reject(new ApiError(0, "No answer came.")));
  signal.throwIfAborted();
  const samples = parse(text);
  const valueOf = (name) => samples.find((sample) => sample.name === name);
  const start = valueOf("process_start_time_seconds")?.value;
  state.several ||= start < state.start;
  state.start = start;
  // The server's clock, as it is the server's start.
  state.uptime = Date.parse(response.headers.get("Date")) / 1000 - start;
  state.version = valueOf("inferneo_build_info")?.labels.version;
  state.updated = Date.now() / 1000;
  history.add(state.updated, samples);
  const ready = samples.filter(({ name }) => name === "inferneo_engine_ready");
  if (ready.some(({ value }) => value === 0)) state.phase = "connecting"; // ask /ready why
}

/** `/ready` answers also while models are loading or the server ends. */
async function readReady(signal) {
  const { status, models, error } = await askReady(signal);
  Object.assign(state, { phase: status, models, message: error?.message });
}

function rest() {
  history.gap();
  draw();
}

function pause(paused) {
  state.paused = paused;
  rounds.setPaused(paused);
  draw();
}

function onKey() {
  state.refusal = null;
  quota.reset();
  state.round = 0;
  if (!state.paused) rounds.start();
}

function onView(name) {
  if (name !== "span") plots.forEach(({ series }) => series.reset());
  draw();
}

/** Show the numbers of another time in all plots; null: the newest. */
function onMoment(time) {
  state.moment = time;
  state.frame ??= requestAnimationFrame(() => {
    state.frame = null;
    if (history.length) drawPlots();
  });
}

function draw() {
  const { trouble, refusal, paused, phase } = state;
  status.show({
    ...state,
    state: paused ? "paused" : trouble ? "gone" : phase,
    wait: duration(Math.max(1, Math.min(30, rounds.wait * 2))),
  });
  const loading = phase === "loading" && !trouble;
  const known = history.length > 0 && !loading;
  grid.hidden = controls.element.hidden = kept.hidden = !known;
  byId("main").classList.toggle("stale", Boolean(trouble || refusal));
  const infos = history.series("inferneo_model_info").map(({ labels }) => labels.model_name);
  controls.setModels([...new Set(infos)]);
  const shownCards = loading || refusal || !history.length ? [] : modelCards(history);
  showCards(shownCards.length ? shownCards : readyCards(state.models));
  if (known) drawPlots();
}

/** Cards that say the same are left alone, with what somebody has selected in them. */
function showCards(fresh) {
  const words = fresh.map((card) => card.textContent).join();
  if (words === state.cards) return;
  state.cards = words;
  cards.replaceChildren(...fresh);
}

function drawPlots() {
  const { times, stretches } = history;
  // While the server is gone, time goes on.
  const to = state.trouble && !state.paused ? Date.now() / 1000 : times.at(-1);
  const from = to - view.span;
  const moment = state.moment === null ? null : Math.max(from, state.moment);
  const index = moment === null ? times.length - 1 : nearest(times, moment);
  controls.setMoment(moment === null ? null : times[index], to);
  for (const { plot, series } of plots) {
    const values = series.update(history, view);
    plot.draw({ times, stretches, values, from, to, moment: index, pointed: moment !== null });
  }
}

function nearest(times, time) {
  let found = times.length - 1;
  while (found > 0 && Math.abs(times[found - 1] - time) <= Math.abs(times[found] - time)) found -= 1;
  return found;
}
