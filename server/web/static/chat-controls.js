/** The sampling parameters that a person can set: one table, from which the panel and requests are made. */

/**
 * Bounds and defaults are those of the API (a test compares them), with two differences: the page
 * begins with a temperature that suits small models, and a seed must be a number that JavaScript
 * holds exactly.
 *
 * `kind`: a slider beside the number, the number alone, or lines of text. `above`: min is excluded.
 */
export const CONTROLS = [
  {
    name: "temperature",
    label: "Temperature",
    kind: "slider",
    min: 0,
    max: 2,
    step: 0.05,
    standard: 1,
    initial: 0.7,
    hint: "0 always takes the likeliest token.",
  },
  {
    name: "top_p",
    label: "Top-p",
    kind: "slider",
    min: 0,
    above: true,
    max: 1,
    step: 0.01,
    standard: 1,
    hint: "Sample among the likeliest tokens that together have this probability.",
  },
  {
    name: "max_tokens",
    label: "Max tokens",
    kind: "integer",
    min: 1,
    standard: null,
    hint: "Most tokens of an answer. Empty: what is left of the context.",
  },
  {
    name: "top_k",
    label: "Top-k",
    kind: "integer",
    min: -1,
    max: 2147483647,
    standard: -1,
    more: true,
    hint: "Sample among so many tokens. -1 and 0 keep them all.",
  },
  {
    name: "min_p",
    label: "Min-p",
    kind: "slider",
    min: 0,
    max: 1,
    step: 0.01,
    standard: 0,
    more: true,
    hint: "Drop tokens below this share of the likeliest one's probability.",
  },
  {
    name: "frequency_penalty",
    label: "Frequency penalty",
    kind: "slider",
    min: -2,
    max: 2,
    step: 0.05,
    standard: 0,
    more: true,
    hint: "Against a token for each time it was generated.",
  },
  {
    name: "presence_penalty",
    label: "Presence penalty",
    kind: "slider",
    min: -2,
    max: 2,
    step: 0.05,
    standard: 0,
    more: true,
    hint: "Against a token that was generated at all.",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    kind: "slider",
    min: 0,
    above: true,
    max: 10,
    step: 0.05,
    most: 2, // the slider's end; the number may be larger
    standard: 1,
    more: true,
    hint: "Above 1: against tokens of the prompt and the answer.",
  },
  {
    name: "seed",
    label: "Seed",
    kind: "integer",
    min: Number.MIN_SAFE_INTEGER,
    max: Number.MAX_SAFE_INTEGER,
    standard: null,
    more: true,
    hint: "The same seed gives the same answer. Empty: a random one.",
  },
  {
    name: "stop",
    label: "Stop strings",
    kind: "lines",
    most: 16,
    standard: [],
    more: true,
    hint: "One a line, up to 16; \\n stands for a line break.",
  },
];

/** What a control is set to in the beginning, and again by its reset. */
export function initialOf(control) {
  return control.initial ?? control.standard;
}

/** What a control's field shows for a value. */
export function shown(control, value) {
  if (control.kind !== "lines") return value === null ? "" : String(value);
  return value.map((line) => line.replaceAll("\\", "\\\\").replaceAll("\n", "\\n")).join("\n");
}

/** The value that a control's field holds. Throws an Error whose message says what it must be. */
export function parse(control, text) {
  if (control.kind === "lines") {
    const lines = text.split("\n").filter((line) => line !== "");
    return check(control, lines.map((line) => line.replace(/\\(n|\\)/g, (_, c) => (c === "n" ? "\n" : c))));
  }
  return check(control, text.trim() === "" ? initialOf(control) : Number(text));
}

/** The value itself, if the API takes it. Throws an Error whose message says what it must be. */
export function check(control, value) {
  const { label, kind, min, max = Infinity, above, most, standard } = control;
  if (kind === "lines") {
    const fine = Array.isArray(value) && value.every((line) => typeof line === "string" && line);
    if (fine && value.length <= most) return value;
    throw new Error(`${label} may be up to ${most} texts.`);
  }
  if (value === null && standard === null) return value;
  const whole = kind !== "integer" || Number.isInteger(value);
  if (typeof value === "number" && whole && (above ? value > min : value >= min) && value <= max) return value;
  const number = kind === "integer" ? "a whole number" : "a number";
  const lower = above ? `above ${min}` : `at least ${min}`;
  throw new Error(`${label} must be ${number}, ${lower}${max === Infinity ? "" : ` and at most ${max}`}.`);
}

/** What a request says of sampling: all that is not the API's own default. */
export function requestFields(sampling) {
  const fields = {};
  for (const control of CONTROLS) {
    const value = sampling[control.name] ?? initialOf(control);
    if (JSON.stringify(value) !== JSON.stringify(control.standard)) fields[control.name] = value;
  }
  return fields;
}

/** What differs from the beginning, in a few words. */
export function summary({ sampling }) {
  const parts = CONTROLS.filter(({ name }) => name in sampling).map((control) => {
    const value = sampling[control.name];
    return `${control.label.toLowerCase()} ${control.kind === "lines" ? value.length : value}`;
  });
  return parts.join(", ");
}
