/**
 * The figures that the dashboard plots, each from counters, gauges or histograms of `/metrics`.
 *
 * A line's `at(history, index, view)` is its value at a sample. `view.match` accepts the labels of
 * the models that are chosen, and `view.window` is how many seconds percentiles, means and shares
 * are of; rates are of the last ten. What is `ofServer` does not tell models apart; what is
 * `optional` is shown where there is something to show.
 */

const RATE_SECONDS = 10;
const API = ({ handler }) => handler.startsWith("/v1/");

const rate = (name, metric) => ({
  name,
  metrics: [metric],
  at: (history, index, view) => history.rate(index, RATE_SECONDS, metric, view.match),
});

const gauge = (name, metric) => ({
  name,
  metrics: [metric],
  at: (history, index, view) => history.sum(index, metric, view.match),
});

const percentiles = (metric) =>
  [50, 95, 99].map((percent) => ({
    name: `p${percent}`,
    metrics: [metric],
    at: (history, index, view) =>
      history.quantile(index, view.window, metric, view.match, percent / 100),
  }));

const mean = (name, metric) => ({
  name,
  metrics: [metric],
  at: (history, index, view) => history.mean(index, view.window, metric, view.match),
});

/** In percent, of what grew in the window; not known while the whole does not grow. */
const share = (name, part, whole) => ({
  name,
  metrics: [part, whole],
  at: (history, index, view) => {
    const all = history.increase(index, view.window, whole, view.match);
    return all > 0 ? (100 * history.increase(index, view.window, part, view.match)) / all : NaN;
  },
});

const fill = (name, used, all) => ({
  name,
  metrics: [used, all],
  at: (history, index, view) =>
    (100 * history.sum(index, used, view.match)) / history.sum(index, all, view.match),
});

/** The usage of each model's cache, weighted by its pages. */
const pagesHeld = {
  name: "held",
  metrics: ["vllm:kv_cache_usage_perc", "inferneo_kv_cache_pages"],
  at: (history, index, view) => {
    const usage = history.series("vllm:kv_cache_usage_perc", view.match);
    const held = usage.reduce((sum, { labels, values }) => {
      const same = ({ model_name }) => model_name === labels.model_name;
      return sum + values[index] * history.sum(index, "inferneo_kv_cache_pages", same);
    }, 0);
    return (100 * held) / history.sum(index, "inferneo_kv_cache_pages", view.match);
  },
};

const answers = (name, ...classes) => ({
  name,
  metrics: ["http_requests_total"],
  at: (history, index) =>
    history.rate(index, RATE_SECONDS, "http_requests_total", (labels) =>
      API(labels) && classes.includes(labels.status),
    ),
});

const ended = (name, reason) => ({
  name,
  metrics: ["vllm:request_success_total"],
  at: (history, index, view) =>
    history.rate(index, RATE_SECONDS, "vllm:request_success_total", (labels) =>
      view.match(labels) && labels.finished_reason === reason,
    ),
});

const perMinute = (name, metric) => ({
  name,
  metrics: [metric],
  at: (history, index, view) => 60 * history.rate(index, 60, metric, view.match),
});

/** Of the whole server: `match` is not asked. */
const process = (name, metric) => ({
  name,
  metrics: [metric],
  at: (history, index) => history.sum(index, metric),
});

export const FIGURES = [
  {
    title: "Output",
    unit: "tokens/s",
    lines: [rate("generated", "vllm:generation_tokens_total")],
  },
  {
    title: "Prompts",
    unit: "tokens/s",
    lines: [
      rate("received", "vllm:prompt_tokens_total"),
      rate("computed", "inferneo_prefill_tokens_total"),
      rate("embedded", "inferneo_embedding_tokens_total"),
    ],
  },
  {
    title: "Requests",
    unit: "",
    lines: [
      gauge("running", "vllm:num_requests_running"),
      gauge("waiting", "vllm:num_requests_waiting"),
      gauge("slots", "inferneo_slots"),
    ],
  },
  { title: "Time to first token", unit: "s", lines: percentiles("vllm:time_to_first_token_seconds") },
  { title: "Inter-token latency", unit: "s", lines: percentiles("vllm:inter_token_latency_seconds") },
  { title: "Request latency", unit: "s", lines: percentiles("vllm:e2e_request_latency_seconds") },
  {
    title: "Queue, prefill, decode",
    unit: "s",
    about: "mean",
    lines: [
      mean("queue", "vllm:request_queue_time_seconds"),
      mean("prefill", "vllm:request_prefill_time_seconds"),
      mean("decode", "vllm:request_decode_time_seconds"),
    ],
  },
  {
    title: "KV cache",
    unit: "%",
    about: "pages",
    lines: [pagesHeld, fill("cached", "inferneo_kv_cache_pages_cached", "inferneo_kv_cache_pages")],
  },
  {
    title: "Slots and places",
    unit: "%",
    lines: [
      fill("slots", "vllm:num_requests_running", "inferneo_slots"),
      {
        ...fill("places", "inferneo_request_places_used", "inferneo_request_places"),
        at: (history, index) =>
          (100 * history.sum(index, "inferneo_request_places_used")) /
          history.sum(index, "inferneo_request_places"),
      },
    ],
  },
  {
    title: "Responses",
    unit: "/s",
    about: "/v1",
    ofServer: true,
    lines: [answers("2xx", "2xx"), answers("4xx", "4xx"), answers("5xx", "5xx")],
  },
  {
    title: "Finished sequences",
    unit: "/s",
    lines: [
      ended("stop", "stop"),
      ended("length", "length"),
      ended("abort", "abort"),
      ended("error", "error"),
    ],
  },
  {
    title: "Cache hits and drafts",
    unit: "%",
    about: "of tokens",
    lines: [
      share("cache hits", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
      share(
        "drafts",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:spec_decode_num_draft_tokens_total",
      ),
    ],
  },
  {
    title: "Preemptions and compiles",
    unit: "/min",
    lines: [
      perMinute("preempted", "vllm:num_preemptions_total"),
      perMinute("compiled", "inferneo_compiles_after_ready_total"),
    ],
  },
  {
    title: "Memory",
    unit: "bytes",
    ofServer: true,
    lines: [
      process("process", "process_resident_memory_bytes"),
      process("weights", "inferneo_model_weights_bytes"),
      process("KV cache", "inferneo_kv_cache_bytes"),
    ],
  },
  {
    title: "Accelerators' memory",
    unit: "bytes",
    ofServer: true,
    optional: true, // a CPU has none
    lines: [
      process("used", "inferneo_device_memory_used_bytes"),
      process("limit", "inferneo_device_memory_limit_bytes"),
    ],
  },
  {
    title: "CPU",
    unit: "cores",
    ofServer: true,
    lines: [
      {
        name: "used",
        metrics: ["process_cpu_seconds_total"],
        at: (history, index) => history.rate(index, RATE_SECONDS, "process_cpu_seconds_total"),
      },
    ],
  },
];
