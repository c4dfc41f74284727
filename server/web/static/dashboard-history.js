/**
 * What `/metrics` said over time, kept in the page's memory: a column of numbers for each series.
 *
 * Counters are kept as they would be had the server never restarted: what they have grown since
 * the first sample. So what they grew between two samples is a difference, restarts or not. Where
 * nobody asked, or no answer came, is a gap, and nothing is computed across it.
 */

import { quantile } from "./dashboard-metrics.js";

const START = "process_start_time_seconds";

export class History {
  /** Forgets what is older than so many seconds. */
  constructor(keepSeconds) {
    this.keepSeconds = keepSeconds;
    this.times = []; // of samples, in seconds since 1970 by the page's clock
    this.stretches = []; // of each sample the first one after the gap before it
    this.byKey = new Map();
    this.byName = new Map();
    this.broken = true;
    this.dropped = 0; // samples, so that index + dropped stays
  }

  get length() {
    return this.times.length;
  }

  /** Nothing is known between the newest sample and the next. */
  gap() {
    this.broken = true;
  }

  /** Keep an answer that came at `time`. Returns whether the server has restarted before it. */
  add(time, samples) {
    const index = this.length;
    const restarted = this.#restarted(samples);
    for (const sample of samples) {
      const series = this.byKey.get(sample.key) ?? this.#addSeries(sample, index);
      if (series.values.length > index) continue; // twice in one answer
      if (!sample.grows) {
        series.values.push(sample.value);
        continue;
      }
      const began = index === 0 ? sample.value : restarted ? 0 : series.raw;
      const grown = sample.value >= began ? sample.value - began : sample.value;
      series.values.push((series.values.at(-1) ?? 0) + grown);
      series.raw = sample.value;
    }
    for (const series of this.byKey.values())
      if (series.values.length === index) {
        series.values.push(series.grows ? (series.values.at(-1) ?? 0) : NaN);
        if (restarted) series.raw = 0;
      }
    this.times.push(time);
    this.stretches.push(this.broken ? index : this.stretches[index - 1]);
    this.broken = false;
    this.#forget(time - this.keepSeconds);
    return restarted;
  }

  #restarted(samples) {
    const before = this.byName.get(START)?.[0].values.at(-1);
    const now = samples.find((sample) => sample.name === START)?.value;
    return before !== undefined && now !== undefined && now > before;
  }

  /** A counter that appears has counted from 0: it did not before because nothing had happened. */
  #addSeries({ key, name, labels, grows }, index) {
    const values = new Array(index).fill(grows ? 0 : NaN);
    const series = { name, labels, grows, values, raw: 0 };
    this.byKey.set(key, series);
    if (!this.byName.has(name)) this.byName.set(name, []);
    this.byName.get(name).push(series);
    return series;
  }

  #forget(before) {
    const old = this.times.findIndex((time) => time >= before);
    if (old < this.length / 16) return; // now and then: to move the rest costs time
    for (const series of this.byKey.values()) series.values.splice(0, old);
    this.times.splice(0, old);
    this.stretches.splice(0, old);
    this.stretches = this.stretches.map((first) => Math.max(0, first - old));
    this.dropped += old;
  }

  /** The series of this name whose labels `match` accepts. */
  series(name, match = () => true) {
    return (this.byName.get(name) ?? []).filter(({ labels }) => match(labels));
  }

  /** Of a sample: the sum of these series; NaN if there are none. */
  sum(index, name, match) {
    const found = this.series(name, match).map(({ values }) => values[index]);
    const known = found.filter((value) => !Number.isNaN(value));
    return known.length ? known.reduce((a, b) => a + b, 0) : NaN;
  }

  /** The sample that a window of so many seconds before `index` begins with; `index`: none. */
  first(index, seconds) {
    let first = index;
    while (first > this.stretches[index] && this.times[index] - this.times[first - 1] <= seconds)
      first -= 1;
    if (first === index && index > this.stretches[index]) first -= 1; // at least one step
    return first;
  }

  /** What counters grew in the seconds before a sample; NaN if that is not known. */
  increase(index, seconds, name, match) {
    const first = this.first(index, seconds);
    if (first === index) return NaN;
    return this.series(name, match).reduce(
      (sum, { values }) => sum + values[index] - values[first],
      0,
    );
  }

  /** The same by the second. */
  rate(index, seconds, name, match) {
    const spent = this.times[index] - this.times[this.first(index, seconds)];
    return this.increase(index, seconds, name, match) / spent;
  }

  /** The mean of what a histogram was told in the seconds before a sample. */
  mean(index, seconds, name, match) {
    const count = this.increase(index, seconds, `${name}_count`, match);
    return count > 0 ? this.increase(index, seconds, `${name}_sum`, match) / count : NaN;
  }

  /** The q-quantile of what a histogram was told in the seconds before a sample. */
  quantile(index, seconds, name, match, q) {
    const first = this.first(index, seconds);
    if (first === index) return NaN;
    const counts = new Map();
    for (const { labels, values } of this.series(`${name}_bucket`, match)) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + values[index] - values[first]);
    }
    return quantile(
      q,
      [...counts].sort(([a], [b]) => a - b),
    );
  }
}
