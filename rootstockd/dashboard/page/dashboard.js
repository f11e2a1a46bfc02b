// The page: asks for one look at the daemon after another, and shows it.

import { BATCH, LATENCY, P99, Plot, RATE, TIME, make } from "./plot.js";
import * as q from "./quantities.js";

const COLOURS = 8;
const SHOWN_SESSIONS = 50;
const PATIENCE = 20_000; // ms for an answer

const trends = new Map(); // of models, by name: points, one for each look
const styles = new Map(); // of models, by name: the class that gives them their colour
let latest = null;
let pointed = null;

const $ = (id) => document.getElementById(id);

// --- looking

async function watch() {
  for (;;) {
    let look;
    try {
      const answer = await fetch(`look?after=${latest?.time ?? 0}`, { signal: AbortSignal.timeout(PATIENCE) });
      if (answer.status === 403) {
        say("This dashboard has ended. Open the address that the new one has printed.");
        return;
      }
      look = await answer.json();
    } catch {
      say("The dashboard does not answer. It was ended, or what leads there was: see its terminal, and that of ssh.");
      await new Promise((resume) => setTimeout(resume, 1000));
      continue;
    }
    take(look);
  }
}

function take(look) {
  latest = look;
  for (const { model, points } of look.trends) {
    const known = trends.get(model) ?? [];
    known.push(...points);
    known.sort((a, b) => a[TIME] - b[TIME]); // of a name there may be several, one after the other
    trends.set(model, known);
  }
  for (const [model, points] of trends) {
    const kept = points.filter((point) => point[TIME] >= look.time - look.span);
    kept.length ? trends.set(model, kept) : trends.delete(model);
  }
  show(look);
}

/** Say that what is shown is old, and why; with "" that it is not. */
function say(trouble) {
  if ($("trouble").textContent !== trouble) $("trouble").textContent = trouble; // readers of screens say what changes
  $("trouble").hidden = !trouble;
  document.body.classList.toggle("stale", Boolean(trouble));
  if (trouble) document.title = `away · rootstockd${latest ? ` on ${latest.host}` : ""}`;
}

// --- showing

function show(look) {
  const { daemon, devices, models, users, sessions } = look;
  const rate = models.reduce((sum, model) => sum + model.rate, 0);
  document.title = `${q.rate(rate)}/s · rootstockd on ${look.host}`;
  say(look.trouble ? `Waiting for the daemon: ${look.trouble}` : "");
  $("host").textContent = `on ${look.host}`;
  $("state").textContent = look.trouble ? "away" : daemon.state;
  $("state").className = `badge ${look.trouble ? "failed" : daemon.state}`;
  $("about").textContent = `version ${daemon.version}, pid ${daemon.pid}, ${q.size(daemon.memory)}`;
  $("warnings").replaceChildren(...daemon.warnings.map((warning) => withText("li", warning)));
  $("warnings").hidden = !daemon.warnings.length;
  figures({
    "evaluations/s": q.rate(rate),
    sessions: q.count(sessions.length + look.other_sessions),
    waiting: q.count(models.reduce((sum, model) => sum + model.queue, 0)),
    "evaluations in all": q.count(daemon.evaluations),
    up: q.duration(daemon.up),
  });
  $("devices").replaceChildren(...devices.map(device));
  plots(look);
  tables.models.show(models);
  $("no-models").hidden = models.length > 0;
  remarks(models);
  tables.users.show(users);
  $("users-section").hidden = !users.length;
  tables.sessions.show(sessions, SHOWN_SESSIONS);
  const more = [];
  if (sessions.length > SHOWN_SESSIONS) more.push(`${sessions.length - SHOWN_SESSIONS} more`);
  if (look.other_sessions) more.push(`${look.other_sessions} of others`);
  if (!sessions.length && !more.length) more.push("No job is connected");
  $("more-sessions").textContent = more.join(", and ");
  $("more-sessions").hidden = !more.length;
  for (const id of ["content", "help", "state"]) $(id).hidden = false;
}

function figures(texts) {
  $("figures").replaceChildren(...Object.entries(texts).map(([name, text]) => {
    const group = make("div");
    group.append(withText("dt", name), withText("dd", text));
    return group;
  }));
}

function device({ name, load, memory_used: used, memory_total: total }) {
  const row = make("div", { class: "device" });
  row.append(withText("h2", name), meter("load", load, q.percent(load)));
  if (total) row.append(meter("memory", used / total, `${q.size(used)} of ${q.size(total)}`));
  return row;
}

function meter(name, part, text) {
  const whole = Math.min(1, Math.max(0, part));
  const bar = make("div", {
    class: "meter", role: "meter", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-valuenow": Math.round(100 * whole), "aria-valuetext": text,
  });
  const full = make("div", { class: whole > 0.9 && name === "memory" ? "full" : "" });
  full.style.width = `${100 * whole}%`;
  bar.append(full);
  const group = make("div", { class: "measure" });
  group.append(withText("span", name), bar, withText("span", text));
  return group;
}

function withText(name, text, attributes = {}) {
  const element = make(name, attributes);
  element.textContent = text;
  return element;
}

// --- plots

const drawn = [
  new Plot("Evaluations a second", { line: RATE }, q.rate, q.tick, point),
  new Plot("Latency, p50 and p99", { line: LATENCY, dashed: P99, logarithmic: true }, q.seconds, q.secondsTick, point),
  new Plot("Structures in a batch", { line: BATCH }, q.rate, q.tick, point),
];
$("plots").append(...drawn.map((plot) => plot.element));

function point(time) {
  pointed = time;
  if (latest) plots(latest);
}

/** Draw the busiest models of the last minutes; a model keeps its colour as long as it is drawn. */
function plots({ time, span, models }) {
  const work = (points) => points.reduce((sum, point) => sum + point[RATE], 0);
  const known = [...trends].map(([model, points]) => ({ model, points, work: work(points) }));
  const busy = known.filter((one) => one.work > 0).sort((a, b) => b.work - a.work);
  const series = busy.slice(0, COLOURS);
  for (const model of styles.keys()) if (!series.some((one) => one.model === model)) styles.delete(model);
  for (const one of series) {
    if (!styles.has(one.model)) {
      const used = new Set(styles.values());
      styles.set(one.model, Array.from({ length: COLOURS }, (_, i) => `c${i}`).find((style) => !used.has(style)));
    }
    one.style = styles.get(one.model);
  }
  series.sort((a, b) => a.model.localeCompare(b.model));
  const items = series.map(({ model, style }) => {
    const item = make("li");
    item.append(make("i", { class: `swatch ${style}` }), model);
    return item;
  });
  const others = busy.length - series.length;
  if (others) items.push(withText("li", `and ${others} that did less`, { class: "quiet" }));
  if (!items.length) items.push(withText("li", "Nothing was evaluated.", { class: "quiet" }));
  $("legend").replaceChildren(...items);
  $("minutes").textContent = span / 60;
  for (const plot of drawn) plot.show(series, time, span, pointed);
}

// --- tables

/** A table that is sorted by the column whose heading was pressed last. */
class SortedTable {
  /**
   * @param {string} id
   * @param {string} by the key of the column to sort by at first, highest first
   * @param {{key: string, name: string, text?: Function, fill?: Function, words?: boolean,
   *   long?: boolean, rank?: number}[]} columns
   *   `fill` puts more than a text into a cell; words stand at the left and are sorted from A; what is long may be
   *   broken; with a rank of 1 or 2 a column goes where there is little room
   */
  constructor(id, by, columns) {
    Object.assign(this, { by, columns, reverse: false, rows: [], most: Infinity });
    this.headings = columns.map((column) => {
      const heading = make("th", { scope: "col", class: this.#style(column) });
      const button = withText("button", column.name, { type: "button" });
      button.addEventListener("click", () => this.#sort(column.key));
      heading.append(button);
      return heading;
    });
    const [head, row] = [make("thead"), make("tr")];
    this.body = make("tbody");
    row.append(...this.headings);
    head.append(row);
    $(id).append(head, this.body);
  }

  show(rows, most = Infinity) {
    Object.assign(this, { rows, most });
    const column = this.columns.find(({ key }) => key === this.by);
    const sign = (column.words ? 1 : -1) * (this.reverse ? -1 : 1);
    const order = (a, b) => compare(a[this.by], b[this.by]) * sign || compare(a.name, b.name);
    const shown = [...rows].sort(order).slice(0, most);
    while (this.body.rows.length > shown.length) this.body.deleteRow(-1);
    shown.forEach((row, i) => this.#fill(this.body.rows[i] ?? this.#insert(), row));
    this.headings.forEach((heading, i) => {
      const sorts = this.columns[i] === column;
      sorts ? heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending") : heading.removeAttribute("aria-sort");
    });
  }

  #insert() {
    const row = this.body.insertRow();
    for (const column of this.columns) row.insertCell().className = this.#style(column);
    return row;
  }

  /** Change what has changed: what somebody has selected stays so. */
  #fill(element, row) {
    this.columns.forEach(({ key, text = String, fill }, i) => {
      const cell = element.cells[i];
      if (fill) return fill(cell, row);
      const content = text(row[key]);
      if (cell.textContent !== content) cell.textContent = content;
    });
  }

  #style({ words, long, rank = 0 }) {
    return `${words ? "words" : "number"} ${long ? "long" : ""} rank${rank}`;
  }

  #sort(key) {
    this.reverse = this.by === key && !this.reverse;
    this.by = key;
    this.show(this.rows, this.most);
  }
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}

/** A model's name, with its colour in plots. */
function nameCell(cell, { name }) {
  if (!cell.firstChild) cell.append(make("i"), make("span"));
  const [swatch, text] = cell.children;
  swatch.className = `swatch ${styles.get(name) ?? "none"}`;
  if (text.textContent !== name) text.textContent = name;
}

/** A model's state, and how far it has come while it loads. */
function stateCell(cell, { state, progress }) {
  if (!cell.firstChild) cell.append(make("span"), make("progress", { max: 1, "aria-label": "loading" }));
  const [badge, bar] = cell.children;
  if (badge.textContent !== state) badge.textContent = state;
  badge.className = `badge ${state}`;
  bar.hidden = progress === null;
  bar.value = progress ?? 0;
}

/** What there is to say of models beside numbers. */
function remarks(models) {
  const items = models.flatMap(({ name, error, loading, restarts }) => {
    const times = restarts === 1 ? "once" : `${restarts} times`;
    if (error) return withText("li", `${name}: ${error}`, { class: "error" });
    if (loading) return withText("li", `${name} ${loading}`);
    return restarts ? withText("li", `${name}: its worker was replaced ${times}`) : [];
  });
  $("remarks").replaceChildren(...items);
}

const tables = {
  models: new SortedTable("models", "rate", [
    { key: "name", name: "model", fill: nameCell, words: true, long: true },
    { key: "dtype", name: "dtype", words: true, rank: 2 },
    { key: "state", name: "state", fill: stateCell, words: true },
    { key: "device", name: "device", words: true, rank: 2 },
    { key: "sessions", name: "sessions", text: q.count, rank: 1 },
    { key: "queue", name: "queue", text: q.count, rank: 1 },
    { key: "rate", name: "eval/s", text: q.rate },
    { key: "latency", name: "p50", text: q.seconds },
    { key: "p99", name: "p99", text: q.seconds, rank: 1 },
    { key: "batch", name: "batch", text: q.rate, rank: 1 },
    { key: "load", name: "load", text: q.percent, rank: 2 },
    { key: "memory", name: "memory", text: q.size, rank: 2 },
    { key: "evaluations", name: "evaluations", text: q.count, rank: 2 },
  ]),
  users: new SortedTable("users", "rate", [
    { key: "name", name: "user", words: true, long: true },
    { key: "sessions", name: "sessions", text: q.count },
    { key: "busy", name: "busy", text: q.count, rank: 1 },
    { key: "rate", name: "eval/s", text: q.rate },
    { key: "share", name: "part", text: q.percent },
  ]),
  sessions: new SortedTable("sessions", "rate", [
    { key: "name", name: "session", words: true },
    { key: "user", name: "user", words: true, long: true },
    { key: "pid", name: "pid", rank: 2 },
    { key: "model", name: "model", words: true, long: true },
    { key: "dtype", name: "dtype", words: true, rank: 2 },
    { key: "atoms", name: "atoms", rank: 1 },
    { key: "state", name: "state", words: true, rank: 1 },
    { key: "rate", name: "eval/s", text: q.rate },
    { key: "evaluations", name: "evaluations", text: q.count, rank: 2 },
    { key: "age", name: "age", text: q.duration, rank: 2 },
  ]),
};

watch();
