// Same tensor, two formats: a distribution with outliers, rounded to both; errors against magnitude, and what is lost.

import { exponentOf, pow2, quantize, relativeError } from "./float.js";
import { errorText, percent, significant } from "./text.js";
import { cells, checked, drawing, follow, formatsOf, frame, h, links, oneOf, paintFormat, select, slider, svg, table, whole, write } from "./ui.js";

const KEYS = ["tensor", "scale", "outliers", "size"];
const PARTS = ["flushed", "subnormal", "normal", "overflowed"];
const NAMES = [["median", "Median relative error"], ["rms", "RMS error over RMS value"], ["worst", "Largest relative error"],
  ["flushed", "Flushed to 0"], ["subnormal", "Subnormal"], ["normal", "Normal"], ["overflowed", "Overflowed"]];
const LOW = -42, HIGH = 30, FLOOR = -15;

const recordOf = (state, tensors) => Object.values(tensors).find((record) => record.name === state.tensor);

function fateOf(x, rounded, f) {
  if (!Number.isFinite(rounded)) return "overflowed";
  if (rounded === 0) return x === 0 ? "zero" : "flushed";
  return rounded < f.smallest_normal ? "subnormal" : "normal";
}

// One format: errors of all values that do not overflow, in their order, and how many have each fate.
function roundedTo(values, f) {
  const counts = { zero: 0, flushed: 0, subnormal: 0, normal: 0, overflowed: 0 }, errors = [], relative = [];
  let squares = 0, errs = 0, kept = 0;
  for (const x of values) {
    const rounded = quantize(x, f, "nearest_even", "native"), fate = fateOf(x, rounded, f);
    counts[fate] += 1;
    const error = fate === "overflowed" ? Infinity : relativeError(x, rounded);
    errors.push(error);
    if (fate === "overflowed") continue;
    kept += 1;
    squares += x * x;
    errs += (rounded - x) ** 2;
    if (x !== 0) relative.push(error);
  }
  relative.sort((a, b) => a - b);
  const some = relative.length > 0;
  return { f, counts, errors, total: values.length, rms: some ? Math.sqrt(errs / kept) / Math.sqrt(squares / kept) : 0,
    median: some ? relative[(relative.length - 1) >> 1] : 0, worst: some ? relative.at(-1) : 0 };
}

// The values, outliers last, and what both formats make of them.
export function compute(state, { tensors, formats }) {
  const { magnitudes } = recordOf(state, tensors), values = magnitudes.map((m) => m * pow2(state.scale));
  for (let i = 0; i < state.outliers; i++) {
    values.push(pow2(state.size) * (1 + (i + 0.5) / state.outliers) * pow2(state.scale));
  }
  return { values, plain: magnitudes.length, both: Object.values(formats).map((f) => roundedTo(values, f)) };
}

const share = (one, part) => one.counts[part] / one.total;
const lostOf = (one) => share(one, "flushed") + share(one, "overflowed");

function ratioOf(both) {
  const [fine, coarse] = both[0].median <= both[1].median ? both : [both[1], both[0]];
  if (fine.median === coarse.median) return "Their median errors are equal.";
  if (fine.median === 0) return `${fine.f.title} holds most of the others exactly.`;
  return `The median error of ${fine.f.title} is ${significant(coarse.median / fine.median, 2)} times smaller.`;
}

// What the largest power of two that does not overflow would save.
function cureOf({ f }, values) {
  const largest = values.reduce((a, b) => Math.max(a, b), 0), aligned = f.max_exponent - exponentOf(largest);
  const fits = (k) => Number.isFinite(quantize(largest * pow2(k), f, "nearest_even", "native"));
  const k = fits(aligned) ? aligned : aligned - 1, scaled = roundedTo(values.map((x) => x * pow2(k)), f);
  return `Multiplied by 2^${k} first, ${f.title} would lose ${percent(lostOf(scaled))}.`;
}

// Every text, by data-field; the twin of SameTensorTwoFormats.result().
export function texts({ values, both }, state, { tensors }) {
  const record = recordOf(state, tensors), kept = record.magnitudes.length, out = {};
  for (const one of both) {
    for (const part of PARTS) out[`${one.f.name}-${part}`] = percent(share(one, part));
    for (const kind of ["rms", "median", "worst"]) out[`${one.f.name}-${kind}`] = errorText(one[kind]);
  }
  const lost = both.map(lostOf), [first, second] = both.map((one) => one.f.title);
  out.verdict = lost.every((l) => l === 0) ? `Neither format loses a value. ${ratioOf(both)}`
    : `${first} loses ${percent(lost[0])}, ${second} ${percent(lost[1])}. ${ratioOf(both)} `
      + cureOf(lost[0] >= lost[1] ? both[0] : both[1], values);
  const what = kept === record.total ? `${kept} magnitudes` : `${kept} of ${record.total} magnitudes, evenly spaced in order`;
  const largest = significant(values.reduce((a, b) => Math.max(a, b), 0), 3);
  out.summary = `${what}, and ${state.outliers} outlier${state.outliers === 1 ? "" : "s"}; the largest is ${largest}.`;
  return out;
}

// Bars of the distribution: how many plain values and outliers begin in each binade.
function binades({ values, plain }) {
  const found = new Map();
  values.forEach((x, i) => {
    if (x === 0) return;
    const e = Math.min(Math.max(exponentOf(x), LOW), HIGH - 1);
    if (!found.has(e)) found.set(e, [0, 0]);
    found.get(e)[i < plain ? 0 : 1] += 1;
  });
  return found;
}

const GRID = { bars: 70, window: 84, strip: 20, over: 148, one: 168, bottom: 292 };

function picture(found, width, height) {
  const left = width < 480 ? 46 : 62, right = width - 6, parts = [];
  const x = (v) => left + ((Math.min(Math.max(v, LOW), HIGH) - LOW) / (HIGH - LOW)) * (right - left);
  const y = (error) => (error === Infinity ? GRID.over : error === 0 ? GRID.bottom + 14
    : GRID.one + (Math.max(Math.log2(error), FLOOR) / FLOOR) * (GRID.bottom - GRID.one));
  const label = (words, at, more = {}) => svg("text", { x: left - 8, y: at + 4, "text-anchor": "end", class: "mpl-quiet", ...more }, words);
  for (let e = -40; e <= HIGH; e += width < 480 ? 20 : 10) {
    parts.push(svg("line", { x1: x(e), x2: x(e), y1: 6, y2: GRID.bottom + 20, stroke: "var(--mpl-line)" }),
      svg("text", { x: x(e), y: height - 20, "text-anchor": "middle", class: "mpl-quiet" }, String(e)));
  }
  parts.push(svg("text", { x: (left + right) / 2, y: height - 3, "text-anchor": "middle", class: "mpl-quiet" }, "log2 of the magnitude"));
  const bars = binades(found), tallest = Math.max(...[...bars.values()].map(([a, b]) => a + b), 1), wide = x(1) - x(0);
  for (const [e, [plain, out]] of bars) {
    const at = (n) => (n / tallest) * (GRID.bars - 10), low = GRID.bars - at(plain);
    parts.push(svg("rect", { x: x(e), width: Math.max(wide - 1, 1), y: low, height: at(plain), fill: "var(--mpl-edge)" }));
    if (out) {
      const tall = Math.max(at(out), 5);
      parts.push(svg("rect", { x: x(e) + 0.75, width: Math.max(wide - 2, 1), y: low - tall, height: tall, fill: "var(--mpl-bg)",
        stroke: "var(--mpl-fg)", "stroke-width": 1.5 }));
    }
  }
  parts.push(label(width < 480 ? "count" : "values", GRID.bars - 28));
  found.both.forEach(({ f }, i) => {
    const group = paintFormat(svg("g", {}), f), top = GRID.window + i * GRID.strip;
    const bar = (a, b, more) => svg("rect", { x: x(a), width: Math.max(x(b) - x(a), 0), y: top, height: 13, fill: "var(--mpl-format)", ...more });
    group.append(bar(f.min_exponent - f.mantissa_bits, f.min_exponent, { "fill-opacity": 0.35, stroke: "var(--mpl-format)", "stroke-dasharray": "3 2" }),
      bar(f.min_exponent, f.max_exponent + 1));
    parts.push(label(f.title, top + 6), group);
  });
  for (const [words, at] of [["over", GRID.over], ["1", GRID.one], ["2^-5", y(2 ** -5)], ["2^-10", y(2 ** -10)], ["exact", GRID.bottom + 14]]) {
    const text = label("", at), [base, power] = words.split("^");
    text.append(base, ...(power ? [svg("tspan", { dy: -5, style: "font-size: 9px" }, power)] : []));
    parts.push(text, svg("line", { x1: left, x2: right, y1: at, y2: at, stroke: "var(--mpl-line)", "stroke-dasharray": "2 3" }));
  }
  // A dot for each value of FP16, a dash for each of BF16: shape tells them apart where colour does not.
  found.both.forEach(({ f, errors }, i) => {
    const marks = found.values.map((v, k) => (v === 0 ? "" : `M${x(Math.log2(v)).toFixed(1)} ${y(errors[k]).toFixed(1)}h${i ? 4 : 0}`));
    const dots = svg("path", { d: marks.join(""), fill: "none", stroke: "var(--mpl-format)", "stroke-width": i ? 1.25 : 3,
      "stroke-linecap": i ? "butt" : "round" });
    parts.push(paintFormat(svg("g", {}, dots), f));
  });
  return parts;
}

function legend(formats) {
  const sign = (f, i) => paintFormat(h("span", {}, svg("svg", { width: 26, height: 10, viewBox: "0 0 26 10", class: "mpl-line", style: "width: 26px" },
    svg("path", { d: i ? "M2 3h6M10 7h6M18 3h6" : "M5 3h0M13 7h0M21 3h0", fill: "none", stroke: "var(--mpl-format)",
      "stroke-width": i ? 1.5 : 4, "stroke-linecap": i ? "butt" : "round" })), `error in ${f.title}`), f);
  const box = svg("svg", { width: 10, height: 10, viewBox: "0 0 10 10", class: "mpl-line", style: "width: 10px" },
    svg("rect", { x: 1, y: 1, width: 8, height: 8, fill: "var(--mpl-bg)", stroke: "var(--mpl-fg)", "stroke-width": 1.5 }));
  return h("div", { class: "mpl-row mpl-legend" }, ...Object.values(formats).map(sign), h("span", {}, box, "outliers"));
}

function errorTable(formats) {
  const found = {}, names = Object.keys(formats), rows = NAMES.map(([key, words]) => {
    const line = cells(names.map((name) => `${name}-${key}`));
    Object.assign(found, line.found);
    line.row.prepend(h("th", { scope: "row" }, words));
    return line.row;
  });
  const heads = ["", ...Object.values(formats).map((f) => f.title)];
  return { found, node: table("Errors of the values that fit, and what becomes of all", heads, rows) };
}

function render({ model, el }) {
  const formats = formatsOf(model), tensors = model.get("tensors"), records = Object.values(tensors), data = { formats, tensors };
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const choose = (name) => set({ tensor: name, scale: records.find((record) => record.name === name).typical });
  const tensor = select("Tensor", records.map(({ name }) => [name, name]), choose);
  const scale = slider("Scale", { min: -28, max: 12, name: "scale" }, (v) => `2^${v}`, (v) => set({ scale: v }));
  const outliers = slider("Outliers", { min: 0, max: 64, name: "outliers" }, String, (v) => set({ outliers: v }));
  const size = slider("Their size", { min: 1, max: 16, name: "size" }, (v) => `2^${v} × scale`, (v) => set({ size: v }));
  const verdict = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const summary = h("p", { class: "mpl-muted", "data-field": "summary" });
  const errors = errorTable(formats), map = drawing(346, () => paint());
  const root = frame({ model, el, kind: "same-tensor", title: "Same tensor, two formats",
    hint: "Above, the values; below them, the relative error that each gets from rounding. Move the tensor, add outliers, and see which format pays." },
  h("div", { class: "mpl-controls" }, tensor.node, scale.node, outliers.node, size.node), verdict, map.node, legend(formats), summary, errors.node);
  const paint = () => {
    const now = state(), found = compute(now, data), words = texts(found, now, data);
    tensor.show(now.tensor);
    for (const [control, key] of [[scale, "scale"], [outliers, "outliers"], [size, "size"]]) control.show(now[key]);
    map.show(`Relative error against magnitude in both formats. ${words.verdict}`, (width, height) => picture(found, width, height));
    for (const [key, text] of Object.entries(words)) write({ verdict, summary }[key] ?? errors.found[key], text);
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, {
    tensor: oneOf(records.map((record) => record.name)), scale: whole(-28, 12), outliers: whole(0, 64), size: whole(1, 16) })) });
  link.read();
  return () => { stop(); map.stop(); link.stop(); };
}

export default { render };
