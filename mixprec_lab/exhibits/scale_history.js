// The scale history: how delayed, current and fixed scaling follow a tensor whose amax jumps, and what lags cost.

import { exponentOf, mulberry32, pow2, quantize } from "./float.js";
import { percent, significant } from "./text.js";
import { button, checked, drawing, facts, follow, frame, h, links, live, oneOf, paintFormat, select, slider, svg, whole, write } from "./ui.js";

const KEYS = ["recipe", "history", "algorithm", "margin", "format", "shape", "steps", "level", "drift", "noise", "seed", "jumps",
  "step", "height", "length"];
const INFINITE = 21, HIGHEST = 20, LONGEST = 256, MOST = 12, BOUND = 60, LAST_STEP = 255;
const FACTS = [["now-amax", "amax"], ["now-limit", "Largest that fits"], ["now-scale", "Scale"],
  ["now-clipped", "Clipped"], ["now-flushed", "Flushed to 0"], ["now-sqnr", "SQNR"], ["now-origin", "Scale from"]];
const EXTREMES = [["clipped", "Most clipped"], ["flushed", "Most flushed"], ["sqnr", "Lowest SQNR"]];

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

export const readJumps = (text) => (text ? text.split(",").map((jump) => jump.split(":").map(Number)) : []);
const writeJumps = (jumps) => jumps.sort((a, b) => a[0] - b[0]).map((jump) => jump.join(":")).join(",");

// The text of jumps if Python would take it, or undefined.
export function checkedJumps(text) {
  const one = "\\d{1,3}:(0|-?[1-9]\\d?):\\d{1,3}";
  if (!new RegExp(`^(${one}(,${one})*)?$`).test(text)) return undefined;
  const jumps = readJumps(text);
  const fine = jumps.length <= MOST && jumps.every(([start, height, length], i) => start <= LAST_STEP && height >= -HIGHEST
    && height <= INFINITE && length >= 1 && length <= LONGEST && (i === 0 || jumps[i - 1][0] < start));
  return fine ? text : undefined;
}

// The amax of every step; the twin of ScaleHistory.stream(), to the last bit.
export function streamOf(state) {
  const steps = Number(state.steps), draw = mulberry32(state.seed), stream = new Float32Array(steps), lifts = new Float64Array(steps);
  for (const [start, height, length] of readJumps(state.jumps)) {
    for (let t = start; t < Math.min(start + length, steps); t++) lifts[t] += height === INFINITE ? Infinity : height;
  }
  for (let t = 0; t < steps; t++) {
    const jitter = draw() + draw() + draw() + draw() - 2;
    const wanted = state.level + (state.drift * t) / steps + (state.noise * jitter) / 4 + lifts[t];
    const log2 = Math.min(Math.max(wanted, -BOUND), BOUND), binade = Math.floor(log2);
    stream[t] = lifts[t] === Infinity ? Infinity : pow2(binade) * (1 + (log2 - binade));
  }
  return stream;
}

// The steps whose amax a delayed scale at step t may see: from the one returned to t - 1.
const reach = (t, state) => Math.max(t - (state.algorithm === "max" ? Number(state.history) : 1), 0);

// For each step the scale, the step whose amax made it and the infinity that keeps it; -1 for none.  Float32 arithmetic.
// Twin of mixprec_lab.fp8.delayed_update.
function delayed(stream, state, f) {
  const n = stream.length, scale = new Float32Array(n).fill(1), source = new Int16Array(n).fill(-1), frozen = new Int16Array(n).fill(-1);
  const top = f.largest * pow2(-state.margin);
  for (let t = 1; t < n; t++) {
    let latest = t - 1;
    for (let i = t - 2; i >= reach(t, state); i--) if (stream[i] > stream[latest]) latest = i;
    const keeps = stream[latest] === Infinity;
    scale[t] = keeps ? scale[t - 1] : top / stream[latest];
    source[t] = keeps ? source[t - 1] : latest;
    frozen[t] = keeps ? latest : -1;
  }
  return { scale, source, frozen };
}

function scalesOf(stream, state, f) {
  if (state.recipe === "delayed") return delayed(stream, state, f);
  return { scale: stream.map((amax) => (state.recipe === "current" && amax < Infinity ? f.largest / amax : 1)) };
}

// One step: shares clipped and flushed, and the SQNR in decibels (NaN with an infinity).
// x and x * scale are rounded to float32, as in the library; everything after that is exact or double precision.
function costOf(shape, amax, level, scale, f) {
  const { largest, overflow_threshold: edge } = f, on_it = f.largest_code % 2 === 1;
  let clipped = 0, flushed = 0, signal = 0, noise = 0;
  for (let i = 0; i < shape.length; i++) {
    const x = amax === Infinity && Math.abs(shape[i]) === 1 ? shape[i] * Infinity : Math.fround(shape[i] * level);
    const scaled = Math.fround(x * scale), q = quantize(scaled, f), magnitude = Math.abs(scaled);
    if (magnitude > edge || (magnitude === edge && on_it)) clipped += 1;
    if (q === 0 && x !== 0) flushed += 1;
    signal += (x / amax) ** 2;
    noise += ((q / scale - x) / amax) ** 2;
  }
  return [clipped / shape.length, flushed / shape.length, amax < Infinity ? 10 * Math.log10(signal / noise) : NaN];
}

// The stream, the scales and what they cost; the twin of mixprec_lab.fp8.simulate_scaling.
export function compute(state, { shapes }, formats) {
  const f = formats[state.format], stream = streamOf(state), n = stream.length, shape = shapes[state.shape];
  const found = { f, stream, ...scalesOf(stream, state, f), clipped: new Float64Array(n), flushed: new Float64Array(n),
    sqnr: new Float64Array(n) };
  for (let t = 0, level = 1; t < n; t++) {
    level = stream[t] < Infinity ? stream[t] : level;
    [found.clipped[t], found.flushed[t], found.sqnr[t]] = costOf(shape, stream[t], level, found.scale[t], f);
  }
  return found;
}

// Rounded to tenths, halves away from zero: log2 and sums in another order differ far behind that.
const tenths = (v) => (v.toFixed(1) === "-0.0" ? "0.0" : v.toFixed(1));
const decibels = (v) => (Number.isFinite(v) ? `${tenths(v)} dB` : "\u2014");

// "2^-8", "448" or, far from 1, "1.048 x 2^-24".
function sizeText(v) {
  const e = exponentOf(v);
  if (e && pow2(e) === v) return `2^${e}`;
  return v >= 1e-4 && v < 1e4 ? significant(v, 4) : `${significant(v / pow2(e), 4)} x 2^${e}`;
}

function fitText(amax, limit) {
  if (amax === Infinity) return "the tensor holds an infinity, which saturates";
  const room = Math.log2(amax / limit), words = tenths(Math.abs(room));
  if (words === "0.0") return "the amax is the largest value that fits";
  const [where, cost] = room > 0 ? ["above", "what is above saturates"] : ["below", "the low end loses as much range"];
  return `the amax is ${words} binades ${where} the largest value that fits: ${cost}`;
}

function ruleText(state, f) {
  const top = `scale = ${significant(f.largest, 5)}`;
  if (state.recipe === "current") return `${top} / amax of this step`;
  if (state.recipe === "fixed") return "scale = 1";
  const many = state.algorithm === "max" && state.history !== "1";
  const margin = state.margin ? ` / 2^${state.margin}` : "";
  return `${top}${margin} / amax, ${many ? `the largest of the ${state.history} steps before` : "of the step before"}`;
}

function originText(found, state, at) {
  if (state.recipe === "fixed") return "fixed at 1";
  if (state.recipe === "current") return found.stream[at] < Infinity ? "its own amax" : "none: 1 for an infinite amax";
  const source = found.source[at], frozen = found.frozen[at];
  const kept = frozen < 0 ? "" : `, kept because of the infinity at step ${frozen}`;
  return `${source < 0 ? "1, where it starts" : `amax of step ${source}`}${kept}`;
}

function jumpText(text) {
  const jumps = readJumps(text).map(([start, height, length]) =>
    `step ${start} (x ${height === INFINITE ? "inf" : `2^${height}`}, ${plural(length, "step")})`);
  if (!jumps.length) return "No jump yet.";
  return `Jumps: ${jumps.join(", ")}.${jumps.length === MOST ? " No more fit." : ""}`;
}

function worst(shares) {
  const top = shares.reduce((a, b) => Math.max(a, b));
  return top ? `${percent(top)}, step ${shares.indexOf(top)}` : "0 %";
}

// The first step of the lowest SQNR, to a tenth of a decibel: sums in another order must not choose the step.
function lowest(sqnr) {
  const rounded = Array.from(sqnr, (v) => (v === v ? Number(tenths(v)) : Infinity));
  const low = rounded.reduce((a, b) => Math.min(a, b));
  return low === Infinity ? "\u2014" : `${tenths(low)} dB, step ${rounded.indexOf(low)}`;
}

function verdictOf({ clipped, flushed, sqnr }) {
  const n = sqnr.length, known = sqnr.filter((v) => v === v), some = (shares) => shares.filter((share) => share > 0).length;
  const mean = known.length ? decibels(known.reduce((a, b) => a + b) / known.length) : "\u2014";
  const left = known.length === n ? "" : `, without ${plural(n - known.length, "step")} with an infinity`;
  return `Of ${plural(n, "step")} ${some(clipped)} clip values and ${some(flushed)} flush some to zero. The mean SQNR is ${mean}${left}.`;
}

const marked = (state) => Math.min(state.step, Number(state.steps) - 1);

// Every text, by data-field; the twin of ScaleHistory.result().
export function texts(found, state) {
  const at = marked(state), { stream, scale, clipped, flushed, sqnr, f } = found, amax = stream[at], limit = f.largest / scale[at];
  return {
    jumps: jumpText(state.jumps), rule: ruleText(state, f), verdict: verdictOf(found), at: `Step ${at}: ${fitText(amax, limit)}.`,
    "now-amax": amax < Infinity ? sizeText(amax) : "inf", "now-scale": sizeText(scale[at]), "now-limit": sizeText(limit),
    "now-origin": originText(found, state, at), "now-clipped": percent(clipped[at]), "now-flushed": percent(flushed[at]),
    "now-sqnr": decibels(sqnr[at]), clipped: worst(clipped), flushed: worst(flushed), sqnr: lowest(sqnr),
  };
}

// The last answer again while nothing that it depends on has changed.
function remembered(make) {
  let known = null, answer = null;
  return (state) => {
    const key = JSON.stringify(KEYS.filter((k) => !["step", "height", "length"].includes(k)).map((k) => state[k]));
    if (key !== known) [known, answer] = [key, make(state)];
    return answer;
  };
}

const LEFT = 66, RIGHT = 10, TOP = 16, LANE = 32, DECIBELS = 48, HEIGHT = 448;
const GRID = { amax: 196, clipped: 246, flushed: 296, best: 318, sqnr: 404, ticks: 422 };
const LIMIT = { stroke: "var(--mpl-format)", "stroke-width": 2.5 }, AMAX = { stroke: "var(--mpl-fg)", "stroke-width": 1.5, "stroke-dasharray": "4 2" };
const plotWidth = (width) => width - LEFT - RIGHT;

// The lowest and highest power of two to draw.
function rangeOf({ f, stream, scale }) {
  const logs = [...Array.from(scale, (s) => f.largest / s), ...stream].filter((v) => v < Infinity).map(Math.log2);
  return [Math.floor(Math.min(...logs)) - 1, Math.ceil(Math.max(...logs)) + 1];
}

// A staircase of one value a step; steps that have none (undefined) interrupt it.
function staircase(values, x, y) {
  let pen = "", last;
  values.forEach((v, t) => {
    if (v !== undefined) pen += `${last === undefined ? `M${x(t).toFixed(1)} ` : "V"}${y(v).toFixed(1)}H${x(t + 1).toFixed(1)}`;
    last = v;
  });
  return pen;
}

const words = (x, y, text, more = {}) => svg("text", { x, y, class: "mpl-quiet", ...more }, text);
const rule = (x1, x2, y) => svg("line", { x1, x2, y1: y, y2: y, stroke: "var(--mpl-line)" });

// The amax of every step and the largest value that fits.
function ranges(found, state, x) {
  const { f, stream, scale } = found, n = stream.length, [low, high] = rangeOf(found), parts = [];
  const y = (v) => GRID.amax - ((Math.log2(v) - low) / (high - low)) * (GRID.amax - TOP);
  const every = [2, 4, 8, 16, 32, 64].find((step) => (high - low) / step <= 7);
  for (let e = Math.ceil(low / every) * every; e <= high; e += every) {
    parts.push(rule(x(0), x(n), y(2 ** e)), words(LEFT - 8, y(2 ** e) + 4, String(e), { "text-anchor": "end" }));
  }
  for (const [start, , length] of readJumps(state.jumps).filter((jump) => jump[0] < n)) {
    parts.push(svg("rect", { x: x(start), width: Math.max(x(Math.min(start + length, n)) - x(start), 3), y: TOP,
      height: GRID.amax - TOP, fill: "var(--mpl-over)", "fill-opacity": 0.14 }));
  }
  const finite = Array.from(stream, (v) => (v < Infinity ? v : undefined));
  parts.push(svg("path", { d: staircase(Array.from(scale, (s) => f.largest / s), x, y), fill: "none", ...LIMIT }),
    svg("path", { d: staircase(finite, x, y), fill: "none", ...AMAX }), words(2, TOP - 4, "log2"));
  stream.forEach((v, t) => {
    if (v === Infinity && stream[t - 1] !== v) parts.push(words(x(t), TOP - 4, "inf", { "text-anchor": "middle" }));
  });
  return parts;
}

// A band of shares: one bar a step, as high as the share, at least two pixels where there is one.
function band(name, shares, base, fill, x) {
  const parts = [rule(x(0), x(shares.length), base), rule(x(0), x(shares.length), base - LANE),
    words(LEFT - 8, base + 4, name, { "text-anchor": "end" }), words(LEFT - 8, base - LANE + 4, "100 %", { "text-anchor": "end" })];
  const wide = Math.max(x(1) - x(0), 1.5);
  shares.forEach((share, t) => {
    const tall = Math.max(share * LANE, 2);
    if (share) parts.push(svg("rect", { x: x(t).toFixed(1), width: wide.toFixed(1), y: (base - tall).toFixed(1),
      height: tall.toFixed(1), fill, "shape-rendering": "crispEdges" }));
  });
  return parts;
}

function ratios(sqnr, x) {
  const y = (v) => GRID.sqnr - (Math.min(v, DECIBELS) / DECIBELS) * (GRID.sqnr - GRID.best), parts = [];
  for (const v of [0, 24, DECIBELS]) {
    parts.push(rule(x(0), x(sqnr.length), y(v)), words(LEFT - 8, y(v) + 4, `${v} dB`, { "text-anchor": "end" }));
  }
  const known = Array.from(sqnr, (v) => (v === v ? v : undefined));
  return [...parts, svg("path", { d: staircase(known, x, y), fill: "none", stroke: "var(--mpl-norm)", "stroke-width": 2 })];
}

function picture(found, state, width) {
  const n = found.stream.length, x = (t) => LEFT + (t / n) * plotWidth(width), at = marked(state);
  const ticks = [0, 0.5, 1].map((share) => words(x(share * n), GRID.ticks, String(share * n),
    { "text-anchor": share === 1 ? "end" : "middle" }));
  return [...ranges(found, state, x), ...band("clipped", found.clipped, GRID.clipped, "var(--mpl-over)", x),
    ...band("flushed", found.flushed, GRID.flushed, "var(--mpl-lost)", x), ...ratios(found.sqnr, x),
    svg("line", { x1: x(at + 0.5), x2: x(at + 0.5), y1: TOP, y2: GRID.sqnr + 4, stroke: "var(--mpl-fg)" }), ...ticks,
    words(x(n / 2), HEIGHT - 8, "step", { "text-anchor": "middle" })];
}

// What the lines mean, beside their colours.
function legend() {
  const line = (attributes) => svg("svg", { class: "mpl-line", width: 34, height: 10, viewBox: "0 0 34 10", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 34, y1: 5, y2: 5, ...attributes }));
  const ratio = { stroke: "var(--mpl-norm)", "stroke-width": 2 };
  return h("div", { class: "mpl-row mpl-legend" }, h("span", {}, line(AMAX), "amax of the tensor"),
    h("span", {}, line(LIMIT), "largest value that fits at the scale"), h("span", {}, line(ratio), "SQNR"));
}

function controlsOf(model, data, formats, set) {
  const pairs = (names, text = String) => names.map((name) => [name, text(name)]);
  const list = (key, label, options) => select(label, options, (v) => set({ [key]: v }));
  const range = (key, label, min, max, text = String) => slider(label, { min, max, name: key }, text, (v) => set({ [key]: v }));
  const used = { fp8_e4m3: "E4M3 (inputs)", fp8_e5m2: "E5M2 (gradients)" };
  return {
    recipe: list("recipe", "Scaling", pairs(data.recipes, (name) => (name === "fixed" ? "fixed at 1" : name))),
    history: list("history", "History, steps", pairs(data.histories)),
    algorithm: list("algorithm", "Takes", pairs(data.algorithms)),
    margin: range("margin", "Margin, binades", -2, 6),
    format: list("format", "Format", pairs(Object.keys(used), (name) => used[name])),
    shape: list("shape", "Values", [...pairs(["normal", "log-normal"]), ...(data.shapes.own ? [["own", "your tensor"]] : [])]),
    steps: select("Steps", pairs(data.steps), (v) => set({ steps: v, step: Math.min(model.get("step"), Number(v) - 1) })),
    level: range("level", "Level of the amax", -20, 8, (v) => `2^${v}`), drift: range("drift", "Drift, binades", -16, 16),
    noise: range("noise", "Noise, binades", 0, 8, (v) => String(v / 4)), seed: range("seed", "Seed", 0, 20),
    step: range("step", "Step", 0, LAST_STEP), length: range("length", "Length, steps", 1, LONGEST),
    height: range("height", "Height of a jump", -HIGHEST, INFINITE, (v) => (v === INFINITE ? "inf" : `2^${v}`)),
  };
}

// Place and remove jumps: three buttons at the marked step, and clicks on the drawing.
function jumpsOf(model, set, state) {
  const covering = (at) => readJumps(model.get("jumps")).findIndex(([start, , length]) => start <= at && at < start + length);
  const place = (at) => {
    const kept = readJumps(model.get("jumps")).filter(([start]) => start !== at);
    if (kept.length < MOST) set({ jumps: writeJumps([...kept, [at, model.get("height"), model.get("length")]]), step: at });
  };
  const remove = (index) => set({ jumps: writeJumps(readJumps(model.get("jumps")).toSpliced(index, 1)) });
  const put = button("Place a jump", () => place(marked(state())), { "data-action": "place" });
  const take = button("Remove it", () => remove(covering(marked(state()))), { "data-action": "remove" });
  const clear = button("Remove all", () => set({ jumps: "" }), { "data-action": "clear" });
  return {
    node: h("div", { class: "mpl-row" }, put, take, clear),
    clicked(event, node) {
      const box = node.getBoundingClientRect(), n = Number(model.get("steps")), one = n / plotWidth(box.width);
      const exact = (event.clientX - box.left - LEFT) * one, near = 5 * one;
      if (exact < 0 || exact >= n) return;
      const hit = readJumps(model.get("jumps")).findIndex(([start, , length]) => exact > start - near && exact < start + length + near);
      if (hit < 0) place(Math.floor(exact));
      else remove(hit);
    },
    show(now) {
      const jumps = readJumps(now.jumps), at = marked(now);
      put.disabled = jumps.length === MOST && !jumps.some(([start]) => start === at);
      take.disabled = covering(at) < 0;
      clear.disabled = !jumps.length;
    },
  };
}

const CHECKS = (data, formats) => ({ recipe: oneOf(data.recipes), history: oneOf(data.histories), algorithm: oneOf(data.algorithms),
  margin: whole(-2, 6), format: oneOf(Object.keys(formats)), shape: oneOf(Object.keys(data.shapes)), steps: oneOf(data.steps),
  level: whole(-20, 8), drift: whole(-16, 16), noise: whole(0, 8), seed: whole(0, 20), jumps: checkedJumps,
  step: whole(0, LAST_STEP), height: whole(-HIGHEST, INFINITE), length: whole(1, LONGEST) });

function render({ model, el }) {
  const data = model.get("data"), formats = model.get("formats");
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const paint = () => {
    const now = state(), found = computed(now), said = texts(found, now);
    controls.step.field.max = Number(now.steps) - 1;
    for (const [key, control] of Object.entries(controls)) control.show(key === "step" ? marked(now) : now[key]);
    jumps.show(now);
    tell(said);
    paintFormat(root, found.f);
    picked.show(`The amax of every step, the largest value that fits, shares clipped and flushed, and the SQNR. ${said.verdict}`,
      (width) => picture(found, now, width));
    kernel.changed();
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  const controls = controlsOf(model, data, formats, set), jumps = jumpsOf(model, set, state);
  const computed = remembered((now) => compute(now, data, formats)), picked = drawing(HEIGHT, () => paint());
  const spoken = (field) => h("output", { class: "mpl-say", "data-field": field, "aria-live": "polite" });
  const now = facts(FACTS), extremes = facts(EXTREMES);
  const fields = { ...now.values, ...extremes.values, verdict: spoken("verdict"), at: spoken("at"),
    rule: h("p", { class: "mpl-muted", "data-field": "rule" }), jumps: h("p", { class: "mpl-muted", "data-field": "jumps" }) };
  const nodes = (...keys) => h("div", { class: "mpl-controls" }, ...keys.map((key) => controls[key].node));
  const root = frame({ model, el, kind: "scale-history", title: "Scale history",
    hint: "Click the drawing to place a jump of the amax, and a jump to remove it. Values clip where the amax is above the line." },
  nodes("recipe", "history", "algorithm", "margin"), fields.rule, nodes("format", "shape", "steps", "level", "drift", "noise", "seed"),
  legend(), picked.node, controls.step.node, nodes("height", "length"), jumps.node, fields.verdict, extremes.node, fields.at,
  now.node, fields.jumps);
  const tell = (words) => { for (const [key, text] of Object.entries(words)) write(fields[key], text); };
  const kernel = live({ model, after: fields.at, keys: KEYS, show: tell });
  picked.node.classList.add("mpl-place");
  picked.node.addEventListener("click", (event) => jumps.clicked(event, picked.node));
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, CHECKS(data, formats))) });
  link.read();
  return () => { stop(); kernel.stop(); picked.stop(); link.stop(); };
}

export default { render };
