/** One answer as it is generated: what is asked, what comes, and how fast. */

import { ApiError, explain, stream } from "./api.js";
import { requestFields } from "./chat-controls.js";
import { isLoading, waitReady } from "./chat-models.js";

export const ALTERNATIVES = 5;

/** An answer of which nothing is there yet. */
export function newAnswer({ model, system, sampling }) {
  const settings = { model, system, sampling: structuredClone(sampling) };
  return { ...settings, reasoning: "", text: "", finish: null, usage: null, times: null, tokens: [], error: null, warnings: [] };
}

/** The messages that precede the answer of this turn and column, as the page shows them. */
export function messagesBefore(chat, turn, column) {
  const { system } = chat.columns[column];
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const each of chat.turns) {
    messages.push({ role: "user", content: each.user });
    if (each === turn) return messages;
    const text = each.answers[column]?.text;
    if (text) messages.push({ role: "assistant", content: text });
  }
  return messages;
}

/**
 * Generate an answer; `changed` is called whenever there is more of it.
 *
 * Never throws for what the server did: that is `answer.error`, beside what was said till then.
 * `onWait` is told how far the models' loading is, should the server be at that.
 */
export async function run(answer, messages, { probabilities, signal, changed, onWait }) {
  const body = {
    model: answer.model,
    messages,
    ...requestFields(answer.sampling),
    ...(probabilities ? { logprobs: true, top_logprobs: ALTERNATIVES } : {}),
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  try {
    for (;;) {
      try {
        await read(answer, body, signal, changed);
        break;
      } catch (error) {
        if (!isLoading(error)) throw error;
        onWait(explain(error).title);
        await waitReady(onWait, signal);
        onWait("");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      answer.finish = "stopped";
    } else {
      if (!(error instanceof ApiError)) console.error(error);
      answer.finish = "failed";
      answer.error = { title: explain(error).title, message: error.message };
      if (error.requestId) answer.error.requestId = error.requestId;
      return error;
    }
  }
  return null;
}

async function read(answer, body, signal, changed) {
  const begin = performance.now();
  const seconds = () => (performance.now() - begin) / 1000;
  answer.times = { first: null, total: 0 };
  for await (const chunk of stream("v1/chat/completions", body, signal)) {
    if (chunk.warnings) answer.warnings = chunk.warnings;
    if (chunk.usage) answer.usage = toUsage(chunk.usage);
    const choice = chunk.choices[0];
    if (choice) {
      const { content, reasoning_content: reasoning } = choice.delta;
      if (content || reasoning) answer.times.first ??= seconds();
      answer.reasoning += reasoning ?? "";
      answer.text += content ?? "";
      for (const token of choice.logprobs?.content ?? []) answer.tokens.push(toToken(token));
      if (choice.finish_reason) answer.finish = choice.finish_reason;
    }
    answer.times.total = seconds();
    changed();
  }
}

function toUsage({ prompt_tokens, completion_tokens, prompt_tokens_details }) {
  const cached = prompt_tokens_details?.cached_tokens ?? 0;
  return { prompt: prompt_tokens, cached, completion: completion_tokens };
}

/** [text, log probability, alternatives as the same pairs]: small enough to be kept. */
function toToken({ token, logprob, top_logprobs }) {
  return [token, rounded(logprob), top_logprobs.map((other) => [other.token, rounded(other.logprob)])];
}

function rounded(logprob) {
  return Math.round(logprob * 1e4) / 1e4;
}

/** Tokens a second, from the first to the newest; null while that cannot be told. */
export function speedOf({ usage, times }) {
  if (!usage || !times || times.first === null || usage.completion < 2) return null;
  const seconds = times.total - times.first;
  return seconds > 0 ? (usage.completion - 1) / seconds : null;
}

/** The counter's words. */
export function counts({ usage, times }) {
  if (!usage) return [];
  const speed = speedOf({ usage, times });
  const parts = [`${usage.completion} ${usage.completion === 1 ? "token" : "tokens"}`];
  if (speed !== null) parts.push(`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`);
  if (times?.first) parts.push(`first after ${times.first.toFixed(2)} s`);
  const cached = usage.cached ? ` (${usage.cached} cached)` : "";
  parts.push(`prompt ${usage.prompt}${cached}`);
  return parts;
}
