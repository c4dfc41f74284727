/** What is served, and how far the loading of what will be is. */

import { text } from "./dashboard-format.js";
import { h } from "./dom.js";

const COUNT = new Intl.NumberFormat("en");

/** Cards of the models, from `/metrics`; empty if nothing is known. */
export function modelCards(history) {
  const newest = history.length - 1;
  const models = history.series("inferneo_model_info").filter(({ values }) => values[newest] === 1);
  return models.map(({ labels }) => {
    const same = ({ model_name }) => model_name === labels.model_name;
    const figure = (name) => history.sum(newest, name, same);
    const weights = figure("inferneo_model_weights_bytes");
    const facts = [
      ["Weights", `${quantized(labels)}, ${text(weights, "bytes")}`],
      ["Kernels", `${labels.kernels} on ${labels.device}`],
      ["Mesh", labels.mesh.replaceAll(",", ", ")],
      ["Context", `${COUNT.format(figure("inferneo_max_model_len_tokens"))} tokens`],
    ];
    if (labels.kind === "decoder") {
      const tokens = figure("inferneo_kv_cache_pages") * figure("inferneo_kv_cache_page_tokens");
      const bytes = text(figure("inferneo_kv_cache_bytes"), "bytes");
      facts.push(["KV cache", `${COUNT.format(tokens)} tokens, ${labels.kv_dtype}, ${bytes}`]);
      facts.push(["Slots", COUNT.format(figure("inferneo_slots"))]);
    }
    return card(labels.model_name, kindOf(labels.kind), facts);
  });
}

/** Cards of the models from `/ready`, which says less and needs no key. */
export function readyCards(models) {
  return models.map((model) => {
    if ("stage" in model) return progressCard(model);
    const facts = Object.entries({
      Context: model.max_len ?? model.max_tokens,
      Slots: model.slots,
      Running: model.running,
      Waiting: model.waiting,
    }).filter(([, count]) => count !== undefined);
    const counted = facts.map(([name, count]) => [name, COUNT.format(count)]);
    return card(model.id, kindOf(model.kind), counted);
  });
}

function progressCard({ id, stage, done, total }) {
  const known = total > 0;
  const bar = h("progress", { max: known ? total : null, value: known ? done : null });
  bar.setAttribute("aria-label", `${id}: ${stage}`);
  const words = known ? `${stage}, ${COUNT.format(done)} of ${COUNT.format(total)}` : stage;
  return h("article", { class: "model" }, h("h3", {}, id), h("p", { class: "dim" }, words), bar);
}

function card(name, kind, facts) {
  const rows = facts.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value)));
  return h(
    "article",
    { class: "model" },
    h("h3", {}, name, h("span", { class: "dim" }, ` ${kind}`)),
    h("dl", { class: "facts" }, ...rows),
  );
}

function quantized({ quantization, dtype }) {
  return quantization === "none" ? dtype : `${quantization}, products of ${dtype}`;
}

function kindOf(kind) {
  return kind === "encoder" ? "embeds" : "generates";
}
