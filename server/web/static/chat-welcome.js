/** What a chat without messages shows: whom one talks to, what to try, and where the API is. */

import { getKey } from "./api.js";
import { copyButton, h } from "./dom.js";

const PROMPTS = [
  "What is the capital of France, and what is it known for?",
  "Write three short tips for a good night's sleep.",
  "Explain gravity to a child in two sentences.",
];

/** `model`: {id, context} or null while that is not known; `send` is called with a prompt. */
export function welcome(model, send) {
  const prompts = PROMPTS.map((prompt) =>
    h("button", { type: "button", class: "prompt", disabled: !model, onclick: () => send(prompt) }, prompt),
  );
  const context = model?.context ? `, with a context of ${model.context.toLocaleString("en")} tokens` : "";
  return h(
    "div",
    { class: "welcome" },
    h("h2", {}, model ? `Talk to ${model.id}` : "Welcome"),
    h("p", { class: "dim" }, model ? `It runs on this server${context}.` : "Looking for a model\u2026"),
    h("div", { class: "prompts" }, ...prompts),
    model ? snippet(model) : null,
  );
}

function snippet(model) {
  const url = new URL("v1/chat/completions", location.href).href;
  const lines = [
    `curl ${url} \\`,
    "  -H 'Content-Type: application/json' \\",
    ...(getKey() ? ['  -H "Authorization: Bearer $INFERNEO_KEY" \\'] : []),
    `  -d '${JSON.stringify({ model: model.id, messages: [{ role: "user", content: "Hello!" }] })}'`,
  ];
  const text = lines.join("\n");
  return h(
    "details",
    { class: "curl" },
    h("summary", {}, "The same from a program"),
    h("div", { class: "code" },
      h("div", { class: "code-head" }, h("span", {}, "An OpenAI-compatible API"), copyButton(() => text, "Copy", { "aria-label": "Copy the command" })),
      h("pre", { tabindex: "0" }, h("code", {}, text)),
    ),
  );
}
