/** Which models can be talked to, and waiting till they can. */

import { ApiError, askJson, askReady } from "./api.js";

const AGAIN_MS = 1000;

/**
 * The models that the key permits and that generate text: {id, context}, context in tokens.
 *
 * `/v1/models` knows what is permitted, `/ready` what kind a model is; where a proxy hides that, a
 * model is taken to generate.
 */
export async function findModels() {
  const [{ data }, ready] = await Promise.all([askJson("v1/models"), askReady().catch(() => null)]);
  const known = new Map((ready?.models ?? []).map((state) => [state.id, state]));
  return data
    .filter(({ id }) => known.get(id)?.kind !== "encoder")
    .map(({ id }) => ({ id, context: known.get(id)?.max_len ?? null }));
}

/** Return once the models are loaded; `onProgress` is told in words how far that is. */
export async function waitReady(onProgress, signal) {
  for (;;) {
    const state = await askReady().catch(() => null);
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
