/**
 * Requests to the server that this page came from, with the API key that the person gave.
 *
 * The key is kept for the tab, or in this browser if that was asked for. Nothing else can read it:
 * the pages' policy allows no script but the server's own.
 */

const KEY = "inferneo.key";

export function getKey() {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
}

/** Keep a key for this tab, or with `remember` for as long as the browser keeps anything. */
export function setKey(key, remember = false) {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (key) (remember ? localStorage : sessionStorage).setItem(KEY, key);
}

export function keyIsRemembered() {
  return localStorage.getItem(KEY) !== null;
}

/** What the server refused, with its status, or 0 if it could not be reached or went away. */
export class ApiError extends Error {
  constructor(status, message, { code = null, param = null, retryAfter = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter, requestId });
  }
}

/** A title for an error, and what to do about it; the server's own sentence is `error.message`. */
export function explain(error) {
  const retry = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  if (!(error instanceof ApiError)) return { title: "This page failed", todo: "Reload it." };
  if (error.status === 0)
    return { title: "The server cannot be reached", todo: "Is it running? Then try again." };
  if (error.status === 401)
    return getKey()
      ? { title: "The key is not valid", todo: "Enter another one.", needsKey: true }
      : { title: "A key is needed", todo: "Enter your API key.", needsKey: true };
  if (error.code === "insufficient_scope")
    return { title: "The key may not do this", todo: "Enter one that may.", needsKey: true };
  if (error.status === 403) return { title: "Not allowed", todo: "" };
  if (error.status === 429) return { title: "Too many requests", todo: retry.trim() };
  if (error.code === "model_loading")
    return { title: "The model is still being loaded", todo: "It will be there soon." };
  if (error.status === 503) return { title: "The server is busy", todo: retry.trim() };
  if (error.status >= 500) return { title: "The server failed", todo: "Try again." };
  return { title: "The server refused this", todo: "" };
}

/** A response that is fine. `path` is relative, so that a proxy may put the server under a prefix. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = getKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "No answer came.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

/** What `/ready` says, whatever its status; it needs no key. */
export async function askReady(signal) {
  let response;
  try {
    response = await fetch("ready", { cache: "no-store", signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "No answer came.");
  }
  const body = await response.json().catch(() => ({}));
  if (!body.status) throw new ApiError(response.status, `The server answered ${response.status}.`);
  return body;
}

/** POST a JSON body, and yield the events of the answer as they come. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const requestId = response.headers.get("X-Request-Id");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        part = { done: true };
      }
      if (part.done) {
        const message = "The connection was lost before the answer was whole.";
        throw new ApiError(0, message, { requestId });
      }
      pending += part.value;
      const events = pending.split("\n\n");
      pending = events.pop(); // perhaps not whole yet
      for (const event of events) {
        if (event === "data: [DONE]") return;
        if (!event.startsWith("data: ")) continue; // a sign of life
        const payload = JSON.parse(event.slice("data: ".length));
        if (payload.error) throw new ApiError(500, payload.error.message, { ...payload.error, requestId });
        yield payload;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function failure(response) {
  const retryAfter = response.headers.get("Retry-After");
  const requestId = response.headers.get("X-Request-Id");
  let error = {};
  try {
    ({ error = {} } = await response.json());
  } catch {
    // a proxy's page, not the server's envelope
  }
  const message = error.message ?? `The server answered ${response.status}.`;
  return new ApiError(response.status, message, { ...error, retryAfter, requestId });
}
