// How times, bytes and numbers are written: as `rootstockd top` writes them.

/** A latency in seconds, with three digits; "–" for 0. */
export function seconds(value) {
  if (!value) return "–";
  const [scaled, unit] = value >= 1 ? [value, "s"] : value >= 1e-3 ? [value * 1e3, "ms"] : [value * 1e6, "µs"];
  return `${scaled.toFixed(scaled < 10 ? 2 : scaled < 100 ? 1 : 0)} ${unit}`;
}

/** A rate; "–" for 0. */
export function rate(value) {
  return !value ? "–" : value < 100 ? value.toFixed(1) : value.toFixed(0);
}

/** Bytes; "–" where they are not known. */
export function size(value) {
  return !value ? "–" : value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${(value / 1e6).toFixed(0)} MB`;
}

/** A number; large ones in thousands or millions. */
export function count(value) {
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= 1e4 && value >= unit) return `${(value / unit).toFixed(value >= 100 * unit ? 0 : 1)} ${letter}`;
  }
  return String(value);
}

/** A part of a whole; "–" where it is not known. */
export function percent(value) {
  return value === null ? "–" : `${(100 * value).toFixed(0)}%`;
}

/** A time span in seconds, in its two largest units. */
export function duration(value) {
  const [s, min, h, d] = [1, 60, 3600, 86400].map((unit) => Math.floor(value / unit));
  if (d) return `${d} d ${h % 24} h`;
  if (h) return `${h} h ${min % 60} min`;
  return min ? `${min} min ${s % 60} s` : `${s} s`;
}

/** A tick of an axis, which is a round number. */
export function tick(value) {
  return value >= 1000 ? `${+(value / 1000).toPrecision(3)}k` : String(+value.toPrecision(3));
}

/** A tick of an axis of seconds. */
export function secondsTick(value) {
  return value >= 1 ? `${tick(value)} s` : value >= 9e-4 ? `${tick(value * 1e3)} ms` : `${tick(value * 1e6)} µs`;
}
