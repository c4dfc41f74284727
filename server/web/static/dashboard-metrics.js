/** Prometheus' text form, as `GET /metrics` has it, and the quantiles of its histograms. */

// With the flag s a dot takes U+2028 too, which a name may hold.
const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/s;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/gs;
const ESCAPED = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };
const NUMBERS = { "+Inf": Infinity, "-Inf": -Infinity };

/**
 * Every sample of a page: its name, labels, value, and whether it only ever grows.
 *
 * See https://prometheus.io/docs/instrumenting/exposition_formats/.
 */
export function parse(text) {
  const samples = [];
  let grows = false;
  for (const line of text.split("\n")) {
    if (line.startsWith("# TYPE ")) grows = / (counter|histogram)$/.test(line);
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!found) continue;
    const [, name, written, number] = found;
    const labels = {};
    for (const [, label, value] of (written ?? "").matchAll(LABEL))
      labels[label] = value.replace(/\\["\\n]/g, (pair) => ESCAPED[pair]);
    samples.push({ name, key: `${name}{${written ?? ""}}`, labels, value: read(number), grows });
  }
  return samples;
}

function read(number) {
  return NUMBERS[number] ?? Number(number);
}

/**
 * The q-quantile of what a histogram counted, as Prometheus' histogram_quantile has it: within a
 * bucket values are taken to be spread evenly; beyond the last bound it is that bound.
 *
 * `buckets` are `[bound, count of all up to it]`, rising, the last of them without bound.
 * NaN if it counted nothing.
 */
export function quantile(q, buckets) {
  const total = buckets.at(-1)?.[1];
  if (!(total > 0) || buckets.length < 2) return NaN;
  const rank = q * total;
  const index = buckets.findIndex(([, count]) => count >= rank);
  if (index === buckets.length - 1) return buckets[index - 1][0];
  const [bound, count] = buckets[index];
  if (index === 0 && bound <= 0) return bound;
  const [low, before] = index > 0 ? buckets[index - 1] : [0, 0];
  return low + ((bound - low) * (rank - before)) / (count - before);
}
