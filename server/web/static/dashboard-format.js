/** Numbers as people read them: `[number, unit]`, with three digits that count. */

const DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const BYTES = ["B", "KiB", "MiB", "GiB", "TiB"];

export function split(value, unit) {
  if (!Number.isFinite(value)) return ["\u2013", ""];
  if (unit === "bytes") {
    const power = powerOf(value);
    return [plain(value / 1024 ** power), BYTES[power]];
  }
  if (unit === "s") {
    if (value !== 0 && value < 0.001) return [plain(value * 1e6), "\u00b5s"];
    return value < 1 ? [plain(value * 1e3), "ms"] : [plain(value), "s"];
  }
  if (unit === "%") return [value > 0 && value < 10 ? DIGITS.format(value) : WHOLE.format(value), "%"];
  return [plain(value), unit];
}

export function text(value, unit) {
  const [number, shown] = split(value, unit);
  return shown === "%" ? `${number}%` : `${number} ${shown}`.trim();
}

function plain(value) {
  return Math.abs(value) >= 1000 ? WHOLE.format(value) : DIGITS.format(value);
}

function powerOf(bytes) {
  return Math.min(BYTES.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, bytes)) / 10)));
}

/** The least round number, half of which is round too, that is not below `value`. */
export function ceiling(value, unit) {
  if (unit === "%") return 100;
  if (!(value > 0)) return unit === "s" ? 0.01 : unit === "bytes" ? 1024 ** 2 : 1;
  const base = unit === "bytes" ? 1024 ** powerOf(value) : 1;
  const scale = 10 ** Math.floor(Math.log10(value / base));
  return [1, 2, 4, 5, 10].map((step) => step * scale * base).find((round) => round >= value * 0.9999);
}

/** A length of time, in its two largest units. */
export function duration(seconds) {
  const parts = [
    [Math.floor(seconds / 86_400), "d"],
    [Math.floor(seconds / 3600) % 24, "h"],
    [Math.floor(seconds / 60) % 60, "min"],
    [Math.floor(seconds) % 60, "s"],
  ];
  const first = parts.findIndex(([count]) => count > 0);
  if (first < 0) return "0 s";
  const shown = parts.slice(first, first + 2).filter(([count], i) => count > 0 || i === 0);
  return shown.map(([count, unit]) => `${count} ${unit}`).join(" ");
}

/** The time of day at so many seconds since 1970. */
export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}
