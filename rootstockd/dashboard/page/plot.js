// A plot over the last minutes: a line for each model, and what they were at a time that is pointed at.

const SVG = "http://www.w3.org/2000/svg";
const GAP = 5; // seconds without a look that a line does not bridge
const LEFT = 46, RIGHT = 8, TOP = 10, BOTTOM = 20, HEIGHT = 180;

/** What a point has: the time of a look, and how a model went then. */
export const [TIME, RATE, LATENCY, P99, BATCH] = [0, 1, 2, 3, 4];

/**
 * @typedef {object} Series
 * @property {string} model
 * @property {string} style the class that gives it its colour
 * @property {number[][]} points
 */

export class Plot {
  /**
   * @param {string} title
   * @param {{line: number, dashed?: number, logarithmic?: boolean}} what which of a point's values, and the axis
   * @param {(value: number) => string} text how values are written
   * @param {(value: number) => string} tick how the axis' are
   * @param {(time: number | null) => void} point told what time is pointed at
   */
  constructor(title, what, text, tick, point) {
    Object.assign(this, { title, what, text, tick, point });
    this.series = [];
    this.at = null;
    this.element = make("figure", { tabindex: "0", role: "group" });
    this.caption = make("figcaption");
    this.caption.textContent = title;
    this.svg = make("svg", { role: "img", height: HEIGHT }, SVG);
    this.tip = make("div", { class: "tip", hidden: "" });
    this.element.append(this.caption, this.svg, this.tip);
    this.element.addEventListener("pointermove", (event) => this.#hover(event));
    this.element.addEventListener("pointerleave", () => point(null));
    this.element.addEventListener("blur", () => point(null));
    this.element.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  /**
   * Show something else.
   *
   * @param {Series[]} series
   * @param {number} end Unix time at the right
   * @param {number} span seconds from there to the left
   * @param {number | null} at what time is pointed at
   */
  show(series, end, span, at) {
    Object.assign(this, { series, end, span, at });
    this.#draw();
  }

  #draw() {
    const width = this.svg.clientWidth;
    if (!width || !this.span) return;
    this.right = width - RIGHT;
    const ticks = this.#scale();
    const parts = ticks.map(([value, y]) => {
      const label = text(this.tick(value), LEFT - 6, y + 4, "end");
      return [line(LEFT, y, this.right, y, "grid"), label];
    }).flat();
    for (let minute = 0; minute * 60 <= this.span; minute++) {
      const x = this.#x(this.end - minute * 60);
      parts.push(text(minute ? `−${minute} min` : "now", x, HEIGHT - 4, minute ? "middle" : "end"));
    }
    for (const { style, points } of this.series) {
      const { line: column, dashed } = this.what;
      if (dashed) parts.push(make("path", { d: this.#path(points, dashed), class: `${style} dashed` }, SVG));
      parts.push(make("path", { d: this.#path(points, column), class: style }, SVG));
    }
    if (this.at !== null) parts.push(line(this.#x(this.at), TOP, this.#x(this.at), HEIGHT - BOTTOM, "cursor"));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...parts);
    this.svg.setAttribute("aria-label", this.#said());
    this.#tell();
  }

  /** Choose the axis; return its ticks, and where they are. */
  #scale() {
    const { line: column, dashed, logarithmic } = this.what;
    const values = this.series.flatMap(({ points }) => points.flatMap((p) => (dashed ? [p[column], p[dashed]] : p[column])));
    const known = values.filter((value) => value > 0);
    const bottom = HEIGHT - BOTTOM, height = bottom - TOP;
    if (logarithmic) {
      const low = Math.floor(Math.log10(smallest(known, 1e-3)) + 1e-9);
      const high = Math.max(low + 1, Math.ceil(Math.log10(largest(known, 1e-1)) - 1e-9));
      this.y = (value) => bottom - height * ((Math.log10(value) - low) / (high - low));
      return Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i)).map((value) => [value, this.y(value)]);
    }
    const step = roundStep(largest(known, 1) / 4);
    const top = step * Math.max(1, Math.ceil(largest(known, 1) / step - 1e-9));
    this.y = (value) => bottom - height * (value / top);
    return Array.from({ length: Math.round(top / step) + 1 }, (_, i) => i * step).map((value) => [value, this.y(value)]);
  }

  #x(time) {
    return this.right - ((this.end - time) / this.span) * (this.right - LEFT);
  }

  /** A line through points, with gaps where nobody looked and where there was no value. */
  #path(points, column) {
    let path = "", last = -Infinity;
    for (const point of points) {
      const [time, value] = [point[TIME], point[column]];
      if (!value && column !== RATE) {
        last = -Infinity;
        continue;
      }
      path += `${time - last > GAP ? "M" : "L"}${this.#x(time).toFixed(1)} ${this.y(value).toFixed(1)}`;
      last = time;
    }
    return path;
  }

  /** The values of all models at a time, the highest first. */
  #values(time) {
    const found = [];
    for (const { model, style, points } of this.series) {
      const point = nearest(points, time);
      if (!point || Math.abs(point[TIME] - time) > GAP || !point[this.what.line]) continue;
      found.push({ model, style, value: point[this.what.line], beside: this.what.dashed && point[this.what.dashed] });
    }
    return found.sort((a, b) => b.value - a.value);
  }

  #said() {
    const now = this.#values(this.end).map(({ model, value }) => `${model} ${this.text(value)}`);
    return `${this.title}, now: ${now.join("; ") || "nothing"}`;
  }

  /** What stands beside the cursor. */
  #tell() {
    this.tip.hidden = this.at === null;
    if (this.tip.hidden) return;
    const when = make("div", { class: "quiet" });
    when.textContent = new Date(this.at * 1000).toLocaleTimeString();
    const rows = this.#values(this.at).map(({ model, style, value, beside }) => {
      const row = make("div"), name = make("span");
      name.textContent = model;
      row.append(make("i", { class: `swatch ${style}` }), name, this.text(value) + (beside ? ` / ${this.text(beside)}` : ""));
      return row;
    });
    this.tip.replaceChildren(when, ...rows);
    const [outer, inner] = [this.element, this.svg].map((element) => element.getBoundingClientRect());
    const x = inner.left - outer.left + this.#x(this.at), beyond = x > outer.width / 2;
    this.tip.style.left = beyond ? "auto" : `${x + 10}px`;
    this.tip.style.right = beyond ? `${outer.width - x + 10}px` : "auto";
  }

  #hover(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const part = (this.right - x) / (this.right - LEFT);
    this.point(part >= 0 && part <= 1 ? this.end - part * this.span : null);
  }

  #key(event) {
    const step = { ArrowLeft: -5, ArrowRight: 5, Escape: 0 }[event.key];
    if (step === undefined || !this.span) return;
    event.preventDefault();
    const at = (this.at ?? this.end) + step;
    this.point(step ? Math.min(this.end, Math.max(this.end - this.span, at)) : null);
  }
}

/** An element with attributes. */
export function make(name, attributes = {}, space = "http://www.w3.org/1999/xhtml") {
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function line(x1, y1, x2, y2, style) {
  return make("line", { x1, y1, x2, y2, class: style }, SVG);
}

function text(content, x, y, anchor) {
  const element = make("text", { x, y, "text-anchor": anchor }, SVG);
  element.textContent = content;
  return element;
}

function largest(values, otherwise) {
  return values.reduce((a, b) => Math.max(a, b), 0) || otherwise;
}

function smallest(values, otherwise) {
  return values.length ? values.reduce((a, b) => Math.min(a, b)) : otherwise;
}

/** The next of …, 0.5, 1, 2, 5, 10, … */
function roundStep(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= value * (1 - 1e-9));
}

function nearest(points, time) {
  let best = null;
  for (const point of points) if (!best || Math.abs(point[TIME] - time) < Math.abs(best[TIME] - time)) best = point;
  return best;
}
