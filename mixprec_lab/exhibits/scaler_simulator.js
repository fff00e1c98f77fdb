// The scaler simulator: the rules of torch, DeepSpeed and Megatron on one stream of gradients with spikes.

import { exponentOf, mulberry32, pow2 } from "./float.js";
import { percent, significant } from "./text.js";
import { button, checked, drawing, follow, frame, h, links, oneOf, select, slider, svg, table, whole, write } from "./ui.js";

const OVERRIDES = ["init_scale", "window", "backoff_factor", "hysteresis", "min_scale"];
const KEYS = ["steps", "seed", "drift", "noise", "spikes", ...OVERRIDES, "batch_size", "step", "height", "length"];
const LEVEL = -2, INFINITE = 41, LONGEST = 50, MOST = 24;
const LAST_STEP = 5999;
const ROWS = [["now", "At the step marked"], ["skipped", "Skipped steps"], ["lost", "Samples lost"], ["end", "Run ends"], ["room", "Unused head-room, median"],
  ["last", "Last scale"], ["lowest", "Lowest scale"], ["below", "Steps at a scale below 1"], ["start", "First scale"],
  ["window", "Window"], ["hysteresis", "Hysteresis"], ["floor", "Floor"]];

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

export const readSpikes = (text) => (text ? text.split(",").map((spike) => spike.split(":").map(Number)) : []);
const writeSpikes = (spikes) => spikes.sort((a, b) => a[0] - b[0]).map((spike) => spike.join(":")).join(",");

// The text of spikes if Python would take it, or undefined.
export function checkedSpikes(text) {
  if (!/^(\d{1,5}:\d{1,2}:\d{1,2}(,\d{1,5}:\d{1,2}:\d{1,2})*)?$/.test(text)) return undefined;
  const spikes = readSpikes(text);
  const fine = spikes.length <= MOST && spikes.every(([start, height, length], i) => start <= LAST_STEP && height >= 1
    && height <= INFINITE && length >= 1 && length <= LONGEST && (i === 0 || spikes[i - 1][0] < start));
  return fine ? text : undefined;
}

// The largest |gradient| of every step; the twin of ScalerSimulator.stream(), to the last bit.
export function streamOf(state) {
  const steps = Number(state.steps), draw = mulberry32(state.seed), stream = new Float64Array(steps);
  for (const [start, height, length] of readSpikes(state.spikes)) {
    for (let t = start; t < Math.min(start + length, steps); t++) stream[t] += height === INFINITE ? Infinity : height;
  }
  for (let t = 0; t < steps; t++) {
    const jitter = draw() + draw() + draw() + draw() - 2;
    if (stream[t] === Infinity) continue;
    const log2 = LEVEL + (state.drift * t) / steps + state.noise * jitter + stream[t], binade = Math.floor(log2);
    stream[t] = pow2(binade) * (1 + (log2 - binade));
  }
  return stream;
}

// A preset with the present replacements.
export function ruleOf(preset, state, overrides) {
  const rule = { ...preset };
  for (const key of OVERRIDES) {
    const found = overrides[key].find(([text]) => text === state[key]);
    if (found) rule[key] = found[1];
  }
  return rule;
}

// Change the state by one step; false where the rule ends the run.  Twin of mixprec_lab.loss_scaling.ScalerRule.update.
function update(rule, state, overflow) {
  if (!overflow) {
    state.clean += 1;
    const counted = state.clean - rule.grace, grows = counted > 0 && counted % rule.window === 0;
    const grown = grows ? Math.fround(state.scale * rule.growth_factor) : state.scale;
    if (grown <= rule.max_scale) state.scale = grown;
    if (grows || rule.refill === "clean_step") state.left = rule.hysteresis;
  } else if (state.left > 1) {
    state.clean = 0;
    state.left -= 1;
  } else if (rule.raises_at_minimum && state.scale <= rule.min_scale) {
    return false;
  } else {
    state.clean = 0;
    state.scale = Math.max(Math.fround(state.scale * rule.backoff_factor), rule.min_scale);
  }
  return true;
}

// What a rule does on a stream, step by step.  Twin of mixprec_lab.loss_scaling.simulate_scaler.
export function simulate(rule, stream, { edge, on_it }) {
  const n = stream.length, before = new Float64Array(n), after = new Float64Array(n), left = new Uint8Array(n);
  const overflow = new Uint8Array(n);
  const state = { scale: Math.fround(rule.init_scale), clean: 0, left: rule.hysteresis };
  let skipped = 0, ran = 0, endedAt = null;
  for (; ran < n && endedAt === null; ran++) {
    const scaled = stream[ran] * state.scale;
    overflow[ran] = scaled < edge || (scaled === edge && !on_it) ? 0 : 1; // NaN is neither
    before[ran] = state.scale;
    skipped += overflow[ran];
    if (!update(rule, state, overflow[ran])) endedAt = ran;
    after[ran] = state.scale;
    left[ran] = state.left;
  }
  const kept = (list) => list.subarray(0, ran);
  return { rule, before: kept(before), after: kept(after), left: kept(left), overflow: kept(overflow), skipped, endedAt };
}

export function scaleText(scale) {
  const e = exponentOf(scale);
  return scale > 0 && pow2(e) === scale ? `2^${e}` : significant(scale, 4);
}

// The lower median of the whole binades between the scaled gradient and overflow, over the steps taken; null for none.
function medianRoom(run, stream, edge) {
  const counts = new Int32Array(2048); // of the exponents of doubles, from -1023 on
  let total = 0, seen = 0;
  for (let t = 0; t < run.before.length; t++) {
    const scaled = stream[t] * run.before[t];
    if (run.overflow[t] || !(scaled > 0)) continue;
    counts[exponentOf(edge / scaled) + 1023] += 1;
    total += 1;
  }
  for (let i = 0; i < counts.length && total; i++) if ((seen += counts[i]) * 2 >= total) return i - 1023;
  return null;
}

function eventAt(run, at) {
  if (at >= run.before.length) return "the run has ended";
  const before = run.before[at], after = run.after[at], scale = scaleText(before);
  if (run.endedAt === at) return `${scale}: overflow at the floor, the run ends`;
  if (!run.overflow[at]) return after > before ? `${scale}: taken, grows to ${scaleText(after)}` : `${scale}: taken`;
  if (after < before) return `${scale}: skipped, falls to ${scaleText(after)}`;
  const patient = run.left[at] < (at ? run.left[at - 1] : run.rule.hysteresis);
  return `${scale}: skipped, ${patient ? "hysteresis holds it" : "can fall no further"}`;
}

function column(run, stream, batch, at, edge) {
  const { rule, before, after } = run, ran = before.length, room = medianRoom(run, stream, edge);
  const last = after[ran - 1], below = before.reduce((n, s) => n + (s < 1 ? 1 : 0), 0);
  return {
    start: scaleText(rule.init_scale), window: String(rule.window), hysteresis: String(rule.hysteresis),
    floor: rule.min_scale ? scaleText(rule.min_scale) : "none",
    skipped: `${run.skipped} (${percent(run.skipped / ran)})`, lost: String(run.skipped * batch), last: scaleText(last),
    lowest: scaleText(before.reduce((a, b) => Math.min(a, b), last)), below: String(below),
    room: room === null ? "\u2014" : plural(room, "binade"),
    end: run.endedAt === null ? `after ${plural(ran, "step")}` : `error at step ${run.endedAt}`, now: eventAt(run, at),
  };
}

function verdictOf(runs, steps, batch) {
  const skips = runs.map((run) => `${run.rule.title} skips ${run.skipped}`), lost = runs.map((run) => run.skipped * batch);
  const ends = runs.filter((run) => run.endedAt !== null).map((run) =>
    ` ${run.rule.title} ends at step ${run.endedAt}: \u201cCurrent loss scale already at minimum\u201d.`);
  return `Of ${steps} steps ${skips.slice(0, -1).join(", ")} and ${skips.at(-1)}; samples lost: ${lost.join(", ")}.${ends.join("")}`;
}

function spikeText(text) {
  const spikes = readSpikes(text).map(([start, height, length]) =>
    `step ${start} (x ${height === INFINITE ? "inf" : `2^${height}`}, ${plural(length, "step")})`);
  if (!spikes.length) return "No spike yet.";
  return `Spikes: ${spikes.join(", ")}.${spikes.length === MOST ? " No more fit." : ""}`;
}

// The stream and the runs for a state.
export function compute(state, { presets, overrides, edge, on_it }) {
  const stream = streamOf(state);
  return { stream, runs: presets.map((preset) => simulate(ruleOf(preset, state, overrides), stream, { edge, on_it })) };
}

// The last answer again while nothing that it depends on has changed.
function remembered(make) {
  let known = null, answer = null;
  return (state) => {
    const key = JSON.stringify(KEYS.filter((k) => !["step", "height", "length", "batch_size"].includes(k)).map((k) => state[k]));
    if (key !== known) [known, answer] = [key, make(state)];
    return answer;
  };
}

const marked = (state) => Math.min(state.step, Number(state.steps) - 1);

// Every text, by data-field; the twin of ScalerSimulator.result().
export function texts({ stream, runs }, state, { edge }) {
  const at = marked(state), batch = Number(state.batch_size);
  const out = { spikes: spikeText(state.spikes), verdict: verdictOf(runs, stream.length, batch),
    at: `At step ${at} the largest |gradient| is ${significant(stream[at], 4)}.` };
  for (const run of runs) {
    const said = column(run, stream, batch, at, edge);
    for (const [key, text] of Object.entries(said)) out[`${run.rule.name}-${key}`] = text;
  }
  return out;
}

const LINES = [{ stroke: "var(--mpl-norm)", "stroke-width": 2.5 },
  { stroke: "var(--mpl-sub)", "stroke-width": 2.5, "stroke-dasharray": "7 4" },
  { stroke: "var(--mpl-sign)", "stroke-width": 2.5, "stroke-dasharray": "2 3" }];
const LEFT = 80, RIGHT = 10, TOP = 14, LANE = 16;
const plotWidth = (width) => width - LEFT - RIGHT;

// The smallest and largest positive, finite value of a list.
function ends(list) {
  let low = Infinity, high = 0;
  for (const v of list) {
    if (v < low && v > 0) low = v;
    if (v > high && v < Infinity) high = v;
  }
  return [low, high];
}

// The lowest and highest power of two to draw.
function range(stream, runs, edge) {
  const limits = runs.flatMap(({ before }) => ends(before).map((scale) => edge / scale));
  const logs = [...ends(stream), ...limits].filter((v) => v > 0 && v < Infinity).map(Math.log2);
  return [Math.floor(Math.min(...logs)) - 1, Math.ceil(Math.max(...logs)) + 1];
}

// For each column of pixels the lowest and the highest value of its steps, as one path.
function envelope(stream, x, y, columns) {
  const n = stream.length, count = Math.min(columns, n), path = [];
  for (let c = 0; c < count; c++) {
    const first = Math.floor((c * n) / count), last = Math.floor(((c + 1) * n) / count);
    let low = Infinity, high = 0;
    for (let t = first; t < last; t++) {
      low = Math.min(low, stream[t]);
      high = Math.max(high, stream[t]);
    }
    const at = x(first).toFixed(1);
    path.push(`${c ? "L" : "M"}${at} ${y(low).toFixed(1)}L${at} ${y(high).toFixed(1)}`);
  }
  return path.join("");
}

function staircase(run, edge, x, y) {
  const path = [`M${x(0).toFixed(1)} ${y(edge / run.before[0]).toFixed(1)}`];
  for (let t = 1; t < run.before.length; t++) {
    if (run.before[t] !== run.before[t - 1]) path.push(`H${x(t).toFixed(1)}V${y(edge / run.before[t]).toFixed(1)}`);
  }
  path.push(`H${x(run.before.length).toFixed(1)}`);
  return path.join("");
}

function lane(run, i, x, top, columns) {
  const n = run.before.length, y = top + i * LANE, path = [];
  for (let t = 0, drawn = -1; t < n; t++) {
    const at = run.overflow[t] ? Math.round(2 * x(t + 0.5)) / 2 : drawn;
    if (at !== drawn) path.push(`M${at} ${y - 5}v10`);
    drawn = at;
  }
  const parts = [svg("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, run.rule.title),
    svg("line", { x1: x(0), x2: x(n), y1: y, y2: y, stroke: "var(--mpl-line)" }),
    svg("path", { d: path.join(""), stroke: LINES[i].stroke, "stroke-width": 2, fill: "none" })];
  if (run.endedAt !== null) {
    parts.push(svg("text", { x: Math.min(x(n) + 4, x(0) + columns - 24), y: y + 4, class: "mpl-quiet" }, "error"));
  }
  return parts;
}

function picture({ stream, runs }, state, { edge }, width, height) {
  const n = stream.length, columns = plotWidth(width), bottom = height - 96, [low, high] = range(stream, runs, edge);
  const x = (t) => LEFT + (t / n) * columns, at = marked(state);
  const y = (v) => bottom - ((Math.min(Math.max(Math.log2(v), low), high) - low) / (high - low)) * (bottom - TOP);
  const every = [2, 4, 8, 16, 32, 64, 128].find((step) => (high - low) / step <= 7), parts = [];
  for (let e = Math.ceil(low / every) * every; e <= high; e += every) {
    parts.push(svg("line", { x1: LEFT, x2: width - RIGHT, y1: y(2 ** e), y2: y(2 ** e), stroke: "var(--mpl-line)" }),
      svg("text", { x: LEFT - 8, y: y(2 ** e) + 4, "text-anchor": "end", class: "mpl-quiet" }, String(e)));
  }
  for (const [start, , length] of readSpikes(state.spikes).filter((spike) => spike[0] < n)) {
    parts.push(svg("rect", { x: x(start), width: Math.max(x(Math.min(start + length, n)) - x(start), 3), y: TOP,
      height: bottom - TOP, fill: "var(--mpl-over)", "fill-opacity": 0.18 }));
  }
  parts.push(svg("path", { d: envelope(stream, x, y, Math.floor(columns)), fill: "none", stroke: "var(--mpl-muted)" }));
  runs.forEach((run, i) => parts.push(svg("path", { d: staircase(run, edge, x, y), fill: "none", ...LINES[i] })));
  parts.push(svg("line", { x1: x(at + 0.5), x2: x(at + 0.5), y1: TOP - 6, y2: bottom + 8 + 3 * LANE, stroke: "var(--mpl-fg)" }));
  runs.forEach((run, i) => parts.push(...lane(run, i, x, bottom + 18, columns)));
  const ticks = bottom + 18 + 3 * LANE;
  [0, 0.5, 1].forEach((share) => parts.push(svg("text", { x: x(share * n), y: ticks + 4, class: "mpl-quiet",
    "text-anchor": share === 1 ? "end" : "middle" }, String(share * n))));
  parts.push(svg("text", { x: LEFT + columns / 4, y: ticks + 4, "text-anchor": "middle", class: "mpl-quiet" }, "step"),
    svg("text", { x: LEFT - 62, y: TOP - 2, class: "mpl-quiet" }, "log2"));
  return parts;
}

// What the lines mean, beside their colours.
function legend(presets) {
  const line = (attributes) => svg("svg", { class: "mpl-line", width: 34, height: 10, viewBox: "0 0 34 10", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 34, y1: 5, y2: 5, ...attributes }));
  return h("div", { class: "mpl-row mpl-legend" },
    h("span", {}, line({ stroke: "var(--mpl-muted)", "stroke-width": 1.5 }), "largest |gradient| of a step"), h("span", {}, "Overflow above 65504 / S:"),
    ...presets.map((rule, i) => h("span", {}, line(LINES[i]), rule.title)), h("span", {}, "Below: skipped steps"));
}

function resultTable(presets) {
  const found = {}, rows = ROWS.map(([key, title]) => {
    const row = h("tr", {}, h("th", { scope: "row" }, title));
    for (const { name } of presets) row.append(found[`${name}-${key}`] = h("td", { "data-field": `${name}-${key}` }));
    return row;
  });
  return { node: table("The three rules on this stream", ["Rule", ...presets.map((rule) => rule.title)], rows), found };
}

function render({ model, el }) {
  const data = model.get("rules"), { presets, overrides } = data;
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const named = (names) => names.map((name) => [name, name]);
  const choices = (key, label) => select(label, named(["preset", ...overrides[key].map(([text]) => text)]), (v) => set({ [key]: v }));
  const heightText = (v) => (v === INFINITE ? "inf" : `2^${v}`);
  const range_ = (key, label, min, max, text) => slider(label, { min, max, name: key }, text, (v) => set({ [key]: v }));
  const controls = {
    steps: select("Steps", named(data.steps), (v) => set({ steps: v, step: Math.min(model.get("step"), Number(v) - 1) })),
    batch_size: select("Batch size", named(data.batch_sizes), (v) => set({ batch_size: v })),
    init_scale: choices("init_scale", "First scale"), window: choices("window", "Window"),
    backoff_factor: choices("backoff_factor", "Backoff"), hysteresis: choices("hysteresis", "Hysteresis"),
    min_scale: choices("min_scale", "Floor"),
    drift: range_("drift", "Drift, binades", -24, 24, String), noise: range_("noise", "Noise, binades", 0, 4, String),
    seed: range_("seed", "Seed", 0, 20, String),
    step: range_("step", "Step", 0, 599, String), height: range_("height", "Height of a spike", 1, INFINITE, heightText),
    length: range_("length", "Length, steps", 1, LONGEST, String),
  };
  const covering = (spikes, at) => spikes.findIndex(([start, , length]) => start <= at && at < start + length);
  const place = (at) => {
    const kept = readSpikes(model.get("spikes")).filter(([start]) => start !== at);
    if (kept.length < MOST) set({ spikes: writeSpikes([...kept, [at, model.get("height"), model.get("length")]]), step: at });
  };
  const remove = (index) => set({ spikes: writeSpikes(readSpikes(model.get("spikes")).toSpliced(index, 1)) });
  const put = button("Place a spike", () => place(marked(state())), { "data-action": "place" });
  const take = button("Remove it", () => remove(covering(readSpikes(model.get("spikes")), marked(state()))), { "data-action": "remove" });
  const clear = button("Remove all", () => set({ spikes: "" }), { "data-action": "clear" });
  const verdict = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const said = { verdict, spikes: h("p", { class: "mpl-muted", "data-field": "spikes" }),
    at: h("output", { class: "mpl-say", "data-field": "at", "aria-live": "polite" }) };
  const results = resultTable(presets), picked = drawing(320, () => paint());
  const nodes = (...keys) => h("div", { class: "mpl-controls" }, ...keys.map((key) => controls[key].node));
  const root = frame({ model, el, kind: "scaler-simulator", title: "Scaler simulator",
    hint: "Click the stream to place a spike, and a spike to remove it. A step overflows where the stream crosses a rule\u2019s line." },
  nodes("steps", "drift", "noise", "seed"), nodes(...OVERRIDES, "batch_size"), legend(presets), picked.node, controls.step.node,
  nodes("height", "length"), h("div", { class: "mpl-row" }, put, take, clear), said.spikes, verdict, said.at, results.node);
  picked.node.classList.add("mpl-place");
  picked.node.addEventListener("click", (event) => {
    const box = picked.node.getBoundingClientRect(), now = state(), n = Number(now.steps);
    const exact = ((event.clientX - box.left - LEFT) / plotWidth(box.width)) * n;
    if (exact < 0 || exact >= n) return;
    const at = Math.floor(exact), spikes = readSpikes(now.spikes), near = (5 / plotWidth(box.width)) * n;
    const hit = spikes.findIndex(([start, , length]) => exact > start - near && exact < start + length + near);
    if (hit < 0) place(at);
    else remove(hit);
  });
  const computed = remembered((now) => compute(now, data));
  const paint = () => {
    const now = state(), found = computed(now), words = texts(found, now, data), spikes = readSpikes(now.spikes);
    controls.step.field.max = Number(now.steps) - 1;
    for (const [key, control] of Object.entries(controls)) control.show(key === "step" ? marked(now) : now[key]);
    put.disabled = spikes.length === MOST && !spikes.some(([start]) => start === marked(now));
    take.disabled = covering(spikes, marked(now)) < 0;
    clear.disabled = !spikes.length;
    for (const [key, text] of Object.entries(words)) write(said[key] ?? results.found[key], text);
    picked.show(`The largest gradient of every step and the largest that each rule's scale allows. ${words.verdict}`,
      (width, height) => picture(found, now, data, width, height));
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, {
    steps: oneOf(data.steps), batch_size: oneOf(data.batch_sizes), spikes: checkedSpikes,
    ...Object.fromEntries(OVERRIDES.map((key) => [key, oneOf(["preset", ...overrides[key].map(([text]) => text)])])),
    seed: whole(0, 20), drift: whole(-24, 24), noise: whole(0, 4), step: whole(0, LAST_STEP), height: whole(1, INFINITE),
    length: whole(1, LONGEST) })) });
  link.read();
  return () => { stop(); picked.stop(); link.stop(); };
}

export default { render };
