// Regimes side by side: curves, gaps with intervals, memory and speed of a stored set of runs.

import { significant } from "./text.js";
import { button, checked, drawing, follow, frame, h, links, oneOf, paintFormat, select, slider, svg, uid, whole, write } from "./ui.js";

const KEYS = ["task", "baseline", "shown", "interval", "seeds", "at"];
const INTERVALS = [["paired", "paired"], ["unpaired", "as if unpaired"]];
const CAPTION = "Pick regimes: ticked ones are drawn and counted. Gaps have 95 % intervals, bytes are a parameter\u2019s, the speed of FP32 is 1.";
const DASH = "\u2014";
const CURVES = 250, ROW = 20, LINEAR = 1e-5; // pixels, pixels, where the scale of gaps turns logarithmic

// The correctly rounded sum, as math.fsum gives it (Shewchuk 1997).
export function fsum(values) {
  const partials = [];
  for (let x of values) {
    let kept = 0;
    for (let y of partials) {
      if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
      const high = x + y, low = y - (high - x);
      if (low) partials[kept++] = low;
      x = high;
    }
    partials.length = kept;
    partials.push(x);
  }
  let high = partials.pop() ?? 0, low = 0;
  while (partials.length && !low) {
    const x = high, y = partials.pop();
    high = x + y;
    low = y - (high - x);
  }
  const next = partials.at(-1) ?? 0; // a tie is decided by what lies below it
  if ((low < 0 && next < 0) || (low > 0 && next > 0)) {
    const twice = low * 2, moved = high + twice;
    if (twice === moved - high) high = moved;
  }
  return high;
}

const mean = (values) => fsum(values) / values.length;
const squares = (values, middle) => fsum(values.map((x) => (x - middle) * (x - middle)));
const taskOf = (state, data) => data.tasks.find((task) => task.name === state.task);
const pickedOf = (state) => (state.shown ? state.shown.split(",") : []);

export const lossesOf = (regime, state, data) =>
  data.losses[state.task][regime].slice(0, state.seeds).map((curve) => curve[state.at]);

// Mean difference from the baseline and its interval, or null; the twin of RegimeComparison.gap.
export function gapOf(regime, state, data) {
  const first = lossesOf(state.baseline, state, data), second = lossesOf(regime, state, data), n = first.length;
  if (first.includes(null) || second.includes(null)) return null;
  const differences = second.map((x, i) => x - first[i]), middle = mean(differences);
  if (state.interval === "paired") {
    const deviation = Math.sqrt(squares(differences, middle) / (n - 1));
    const half = (data.quantiles[n - 2] * deviation) / Math.sqrt(n);
    return [middle, middle - half, middle + half];
  }
  const means = [mean(first), mean(second)], df = 2 * n - 2;
  const variance = (squares(first, means[0]) + squares(second, means[1])) / df;
  const half = data.quantiles[df - 1] * Math.sqrt(variance * (1 / n + 1 / n));
  return [middle, means[1] - means[0] - half, means[1] - means[0] + half];
}

// 1000 v with its sign; the twin of thousandths() in Python.
export function thousandths(v) {
  const text = Math.abs(v * 1000).toFixed(3);
  return Number(text) === 0 ? text : (v < 0 ? "-" : "+") + text;
}

const gapText = (gap) => (gap === null ? DASH : `${thousandths(gap[0])} [${thousandths(gap[1])}, ${thousandths(gap[2])}]`);
const excludes = (gap) => gap[1] > 0 || gap[2] < 0;

function speedText(regime, state, data) {
  const found = data.speed[state.task]?.[regime];
  return found ? significant(found[0], 2) + (found[1] === "native" ? "" : "*") : DASH;
}

function verdict(gaps, state, data) {
  const title = (name) => data.regimes.find((r) => r.name === name).title, task = taskOf(state, data);
  const others = data.regimes.map((r) => r.name).filter((x) => pickedOf(state).includes(x) && x !== state.baseline);
  if (!others.length) return `Pick at least one regime beside ${title(state.baseline)}.`;
  const told = others.filter((x) => gaps[x] !== null), differ = told.filter((x) => excludes(gaps[x]));
  let words = `${task.title}, step ${task.steps[state.at]}, ${state.seeds} seeds, ${state.interval}: of ${others.length} picked, `
    + `${differ.length} can be told from ${title(state.baseline)}, ${told.length - differ.length} cannot.`;
  if (told.length < others.length) words += ` ${others.length - told.length} cannot be compared: a loss was lost.`;
  if (told.length) {
    const widest = told.reduce((best, x) => (Math.abs(gaps[x][0]) > Math.abs(gaps[best][0]) ? x : best));
    words += ` The widest gap: ${title(widest)}, ${gapText(gaps[widest])} thousandths.`;
  }
  return words;
}

// Every gap, and every text by data-field; the twin of RegimeComparison.result().
export function compute(state, data) {
  const gaps = {}, texts = { source: data.source }, task = taskOf(state, data);
  for (const { name } of data.regimes) {
    const losses = lossesOf(name, state, data), lost = losses.filter((x) => x === null).length;
    gaps[name] = gapOf(name, state, data);
    texts[`${name}-loss`] = lost ? `lost in ${lost}` : significant(mean(losses), 4);
    texts[`${name}-gap`] = name === state.baseline ? "baseline" : gapText(gaps[name]);
    texts[`${name}-bytes`] = significant(data.bytes[state.task][name].reduce((a, b) => a + b) / task.parameters, 3);
    texts[`${name}-speed`] = speedText(name, state, data);
  }
  texts.verdict = verdict(gaps, state, data);
  return { gaps, texts };
}

const line = (regime, attributes, width = 2.5) => paintFormat(svg("path", { fill: "none", stroke: "var(--mpl-format)", "stroke-width": width,
  "stroke-dasharray": regime.dashes.join(" ") || null, ...attributes }), regime);
const label = (x, y, text, attributes = {}) => svg("text", { x, y, class: "mpl-quiet", ...attributes }, text);

// Round numbers inside of the range: 1, 2 and 5 times powers of ten, and more of them where the range is short.
function ticksWithin(low, high) {
  const ticks = [], digits = high / low < 10 ? [1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9] : [1, 2, 5];
  for (let e = Math.floor(Math.log10(low)) - 1; e <= Math.log10(high) + 1; e++) for (const m of digits) ticks.push(Number(`${m}e${e}`));
  return ticks.filter((v) => v >= low && v <= high);
}

// The mean held-out loss of the seeds against the step, on a logarithmic scale, with the chosen step marked.
function curvePicture(state, data, width) {
  const task = taskOf(state, data), left = 46, right = width - 10, top = 24, base = CURVES - 38;
  const shown = data.regimes.filter((r) => r.name === state.baseline || pickedOf(state).includes(r.name));
  const every = data.regimes.flatMap((r) => data.losses[state.task][r.name].flat()).filter((v) => v !== null && v > 0);
  const low = Math.log(Math.min(...every) * 0.93), high = Math.log(Math.max(...every) * 1.05);
  const x = (step) => left + (step / task.steps.at(-1)) * (right - left), y = (v) => base - ((Math.log(v) - low) / (high - low)) * (base - top);
  const parts = [label(4, 12, task.metric), label((left + right) / 2, CURVES - 4, "training steps", { "text-anchor": "middle" })];
  let last = Infinity;
  for (const tick of ticksWithin(Math.exp(low), Math.exp(high))) {
    if (last - y(tick) < 16) continue;
    last = y(tick);
    parts.push(svg("line", { x1: left, x2: right, y1: last, y2: last, stroke: "var(--mpl-line)" }),
      label(left - 6, last + 4, significant(tick, 2), { "text-anchor": "end" }));
  }
  const steps = task.steps.filter((_, i) => i % (width < 480 ? 5 : 2) === 0);
  for (const step of steps) parts.push(label(x(step), base + 16, String(step), { "text-anchor": step === task.steps.at(-1) ? "end" : "middle" }));
  const at = x(task.steps[state.at]);
  parts.push(svg("line", { x1: at, x2: at, y1: top - 6, y2: base, stroke: "var(--mpl-accent)", "stroke-width": 1.5 }));
  for (const regime of shown) {
    let path = "";
    task.steps.forEach((step, i) => {
      const values = data.losses[state.task][regime.name].slice(0, state.seeds).map((curve) => curve[i]);
      if (!values.includes(null)) path += `${path ? "L" : "M"}${x(step).toFixed(1)} ${y(Math.max(mean(values), 1e-300)).toFixed(1)}`;
    });
    if (path) parts.push(line(regime, { d: path }));
  }
  return parts;
}

const bent = (v) => Math.sign(v) * Math.log10(1 + Math.abs(v) / LINEAR);

// A row for each regime picked: every seed's difference, and the interval of their mean.
function gapPicture(gaps, state, data, width, height) {
  const names = width < 480 ? 146 : 168, left = names + 8, right = width - 8, top = 6, base = height - 38;
  const shown = data.regimes.filter((r) => r.name !== state.baseline && pickedOf(state).includes(r.name));
  const reach = Math.max(bent(1e-3), ...shown.flatMap((r) => (gaps[r.name] ? gaps[r.name].map((v) => Math.abs(bent(v))) : []))) * 1.05;
  const x = (v) => (left + right) / 2 + (bent(v) / reach) * ((right - left) / 2), parts = [];
  const marks = [];
  for (let e = Math.ceil(Math.log10(LINEAR * 10 ** reach)), last = Infinity; e >= Math.log10(LINEAR); e--) {
    const v = Number(`1e${e}`), at = x(v) - x(0);
    if (bent(v) > reach || last - at < 36 || at < 28) continue;
    last = at;
    marks.push(v);
  }
  for (const v of [...marks.map((m) => -m), 0, ...marks]) {
    parts.push(svg("line", { x1: x(v), x2: x(v), y1: top, y2: base, stroke: v ? "var(--mpl-line)" : "var(--mpl-muted)" }),
      label(x(v), base + 15, significant(v * 1000, 1), { "text-anchor": "middle" }));
  }
  parts.push(label(right, height - 4, "loss minus the baseline\u2019s, thousandths", { "text-anchor": "end" }));
  const apart = Math.min(2 * ROW, (base - top - 12) / Math.max(shown.length - 0.5, 1));
  shown.forEach((regime, i) => {
    const y = top + 12 + i * apart, gap = gaps[regime.name];
    parts.push(svg("text", { x: names, y: y + 4, "text-anchor": "end" }, regime.title));
    if (gap === null) { parts.push(label(left, y + 4, "lost")); return; }
    const told = excludes(gap), first = lossesOf(state.baseline, state, data);
    parts.push(paintFormat(svg("line", { x1: x(gap[1]), x2: x(gap[2]), y1: y, y2: y, "stroke-width": told ? 6 : 3,
      stroke: told ? "var(--mpl-format)" : "var(--mpl-edge)" }), regime));
    lossesOf(regime.name, state, data).forEach((v, s) => parts.push(svg("circle", { cx: x(v - first[s]), cy: y, r: 2.5, fill: "var(--mpl-fg)" })));
  });
  return parts;
}

function regimeTable(data, toggle) {
  const found = {}, boxes = {}, bars = {}, rows = {}, body = h("tbody", {});
  for (const regime of data.regimes) {
    const { name, title } = regime, id = uid("regime");
    boxes[name] = h("input", { id, type: "checkbox", class: "mpl-tick", "data-regime": name, onchange: () => toggle(name) });
    const sample = svg("svg", { class: "mpl-line", width: 34, height: 10, viewBox: "0 0 34 10", "aria-hidden": "true" }, line(regime, { d: "M0 5H34" }, 3));
    const row = rows[name] = h("tr", {}, h("th", { scope: "row" }, h("span", { class: "mpl-regime" }, boxes[name], h("label", { for: id }, title), sample)));
    for (const key of ["loss", "gap", "bytes", "speed"]) row.append(found[`${name}-${key}`] = h("td", { "data-field": `${name}-${key}` }));
    bars[name] = data.kinds.map((kind) => paintFormat(h("span", { class: "mpl-share mpl-kind" }), kind));
    const cell = found[`${name}-bytes`], told = h("span", { "data-field": `${name}-bytes` });
    cell.removeAttribute("data-field");
    cell.append(told, h("span", { class: "mpl-bar", "aria-hidden": "true" }, ...bars[name]));
    found[`${name}-bytes`] = told;
    body.append(row);
  }
  const heads = ["Regime", "Loss", "Gap, thousandths", "Bytes", "Speed"].map((text) => h("th", { scope: "col" }, text));
  return { found, boxes, bars, rows, node: h("div", { class: "mpl-scroll", role: "group", tabindex: 0, "aria-label": "The regimes" }, h("table", { class: "mpl-regimes" }, h("caption", {}, CAPTION),
    h("thead", {}, h("tr", {}, ...heads)), body)) };
}

function picks(data) {
  const known = data.regimes.map((r) => r.name);
  return (text) => {
    const names = text ? text.split(",") : [];
    return new Set(names).size === names.length && names.every((name) => known.includes(name)) ? text : undefined;
  };
}

function render({ model, el }) {
  const data = model.get("data"), names = data.regimes.map((r) => r.name), state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const pick = (wanted) => set({ shown: names.filter((name) => wanted.includes(name)).join(",") });
  const toggle = (name) => {
    const picked = pickedOf(state());
    pick(picked.includes(name) ? picked.filter((x) => x !== name) : [...picked, name]);
  };
  const stepText = (i) => String(taskOf(state(), data).steps[i]), lastStep = data.tasks[0].steps.length - 1;
  const controls = {
    task: select("Task", data.tasks.map((x) => [x.name, x.title]), (v) => set({ task: v })),
    baseline: select("Baseline", data.regimes.map((r) => [r.name, r.title]), (v) => set({ baseline: v })),
    interval: select("Interval", INTERVALS, (v) => set({ interval: v })),
    seeds: slider("Seeds used", { min: 2, max: data.seeds.length, name: "seeds" }, String, (v) => set({ seeds: v })),
    at: slider("At step", { min: 0, max: lastStep, name: "at" }, stepText, (v) => set({ at: v })),
  };
  const said = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const source = h("p", { class: "mpl-muted mpl-source", "data-field": "source" });
  const results = regimeTable(data, toggle), curves = drawing(CURVES, () => paint()), gapsDrawn = drawing(48 + ROW * (names.length - 1), () => paint());
  const legend = h("div", { class: "mpl-row mpl-legend" }, ...data.kinds.map((kind) => paintFormat(h("span", { class: "mpl-name" }, kind.name), kind)));
  const root = frame({ model, el, kind: "regimes", title: "Every regime, seed by seed",
    hint: "Dots are seeds, bars 95 % intervals; a thin grey bar includes 0. The scale of gaps is linear up to 0.01 thousandths and logarithmic beyond." },
  h("div", { class: "mpl-controls" }, ...Object.values(controls).map((control) => control.node)), said, curves.node, gapsDrawn.node,
  h("div", { class: "mpl-row" }, button("Pick all", () => pick(names), { "data-action": "all" }), button("Pick none", () => pick([]), { "data-action": "none" })),
  legend, results.node, source);
  const paint = () => {
    const now = state(), { gaps, texts } = compute(now, data), picked = pickedOf(now);
    for (const [key, control] of Object.entries(controls)) control.show(now[key]);
    const most = Math.max(...names.map((name) => data.bytes[now.task][name].reduce((a, b) => a + b)), 1);
    for (const name of names) {
      results.boxes[name].checked = picked.includes(name) || name === now.baseline;
      results.boxes[name].disabled = name === now.baseline;
      results.rows[name].classList.toggle("mpl-current", name === now.baseline);
      results.bars[name].forEach((bar, i) => { bar.style.width = `${(100 * data.bytes[now.task][name][i]) / most}%`; });
    }
    curves.show(`Mean held-out loss against training steps. ${texts.verdict}`, (width) => curvePicture(now, data, width));
    gapsDrawn.show(`Gaps to the baseline with their intervals. ${texts.verdict}`, (width, height) => gapPicture(gaps, now, data, width, height));
    for (const [key, text] of Object.entries(texts)) write(results.found[key] ?? { verdict: said, source }[key], text);
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { task: oneOf(data.tasks.map((x) => x.name)),
    baseline: oneOf(names), shown: picks(data), interval: oneOf(INTERVALS.map((x) => x[0])), seeds: whole(2, data.seeds.length), at: whole(0, lastStep) })) });
  link.read();
  return () => { stop(); curves.stop(); gapsDrawn.stop(); link.stop(); };
}

export default { render };
