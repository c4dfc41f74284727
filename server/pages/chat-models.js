/** Which models can be talked to, and waiting till they can. */

import { ApiError, askJson } from "./api.js";

const AGAIN_MS = 1000;

/**
 * The models that the key permits and that generate text: {id, context}, context in tokens.
 *
 * `/v1/models` knows what is permitted, `/ready` what kind a model is; where a proxy hides that, a
 * model is taken to generate.
 */
export async function findModels() {
  const [{ data }, states] = await Promise.all([askJson("v1/models"), readStates()]);
  const known = new Map(states.map((state) => [state.id, state]));
  return data
    .filter(({ id }) => known.get(id)?.kind !== "encoder")
    .map(({ id }) => ({ id, context: known.get(id)?.max_len ?? null }));
}

/** Return once the models are loaded; `onProgress` is told in words how far that is. */
export async function waitReady(onProgress, signal) {
  for (;;) {
    const state = await readReady();
    if (state?.status !== "loading") return;
    onProgress(describe(state.models));
    await pause(AGAIN_MS, signal);
  }
}

/** Resolves after a while, or rejects as an aborted request does. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("Stopped.", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
  });
}

async function readStates() {
  return (await readReady())?.models ?? [];
}

/** What `/ready` says, whatever its status; null if it says nothing. */
async function readReady() {
  try {
    return await (await fetch("ready", { cache: "no-store" })).json();
  } catch {
    return null;
  }
}

function describe(models) {
  const parts = models.map(({ id, stage, done, total }) => {
    const share = total > 1 ? ` ${Math.floor((100 * done) / total)} %` : "";
    return `${id}: ${stage}${share}`;
  });
  return parts.join(", ");
}

export function isLoading(error) {
  return error instanceof ApiError && error.code === "model_loading";
}
