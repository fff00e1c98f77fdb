// One tensor, every scheme: errors and losses of a tensor with outliers in each block scheme, and a map of the errors.

import { exponentOf, mulberry32, pow2, quantize } from "./float.js";
import { errorText, percent, significant } from "./text.js";
import { cells, checked, drawing, follow, frame, h, links, live, oneOf, paintFormat, select, slider, svg, table, whole, write } from "./ui.js";

const KEYS = ["distribution", "outlier", "frequency", "place", "rule", "axis", "scheme"];
const ROWS = 32, COLUMNS = 256, SEEDS = { normal: 1, student: 2, wide: 3 }, PLACE_SEED = 4;
const DISTRIBUTIONS = [["normal", "normal"], ["student", "Student's t, 2 degrees of freedom"], ["wide", "wide: log2 |x| normal"]];
const PLACES = [["scattered", "scattered"], ["channels", "in channels (columns)"], ["tokens", "in tokens (rows)"]];
const RULES = [["floor", "floor (OCP)"], ["round_up", "round up"], ["even", "round, then floor"]];
const AXES = [["rows", "along rows"], ["columns", "along columns"]];
const PARTS = ["error", "sqnr", "flushed", "saturated", "bits"];
const f32 = Math.fround;

function normal(random) {
  let sum = 0;
  for (let i = 0; i < 12; i++) sum += random();
  return sum - 6;
}

const LAWS = {
  normal: (random) => f32(normal(random)),
  student(random) {
    const p = (random() * 4294967296 + 0.5) / 4294967296;
    return f32((2 * p - 1) / Math.sqrt(2 * p * (1 - p)));
  },
  wide(random) {
    const power = pow2(Math.floor(3 * normal(random))), magnitude = power * (1 + random());
    return f32(random() < 0.5 ? -magnitude : magnitude);
  },
};

const drawn = {};

// The ordinary values; each distribution is drawn once.
function ordinary(distribution, own) {
  if (distribution === "own") return own;
  if (!drawn[distribution]) {
    const random = mulberry32(SEEDS[distribution]), law = LAWS[distribution];
    drawn[distribution] = { rows: ROWS, columns: COLUMNS, values: Float64Array.from({ length: ROWS * COLUMNS }, () => law(random)) };
  }
  return drawn[distribution];
}

// 1 where an outlier stands.
function places({ place, frequency }, rows, columns) {
  const random = mulberry32(PLACE_SEED), hit = new Uint8Array(rows * columns);
  const lines = { scattered: rows * columns, channels: columns, tokens: rows }[place];
  const wanted = Math.max(1, lines >> frequency), each = Math.floor(lines / wanted);
  for (let i = 0; i < wanted; i++) {
    const at = i * each + Math.floor(random() * each);
    if (place === "scattered") hit[at] = 1;
    else if (place === "tokens") hit.fill(1, at * columns, (at + 1) * columns);
    else for (let row = 0; row < rows; row++) hit[row * columns + at] = 1;
  }
  return hit;
}

// The tensor that is quantized, and where its outliers are.
export function tensorOf(state, own) {
  const { rows, columns, values, of } = ordinary(state.distribution, own);
  const hit = places(state, rows, columns), factor = 10 ** state.outlier;
  return { rows, columns, of, hit, x: Float64Array.from(values, (v, i) => (hit[i] ? f32(v * factor) : v)) };
}

const held = (e, f) => Math.min(Math.max(e, f.min_exponent), f.max_exponent);

// The scale of a block whose largest magnitude is amax; twin of block_scales().
function scaleOf(amax, { rule, element, scale }) {
  if (rule === "nearest") {
    const wanted = f32(amax / element.largest);
    return scale.mantissa_bits === 23 ? Math.max(wanted, scale.smallest_normal) : quantize(wanted, scale);
  }
  if (amax === 0) return pow2(scale.mantissa_bits === 23 ? scale.min_exponent : Math.max(scale.min_exponent, -127));
  let e = exponentOf(amax);
  const lead = amax / pow2(e);
  if (rule === "round_up") e += lead > element.largest / pow2(element.max_exponent) ? 1 : 0;
  else if (rule === "even") e += Math.floor(lead * 2 ** element.mantissa_bits + 0.5) >= 2 ** (element.mantissa_bits + 1) ? 1 : 0;
  return pow2(held(e - element.max_exponent, scale));
}

// Rows and columns of a block in a tensor of that size.
function blockOf([down, across], axis, rows, columns) {
  if (down === null) return [rows, columns];
  const along = axis === "rows" ? columns : rows, size = across === null ? along : across;
  return axis === "rows" ? [down, size] : [size, down];
}

// One scheme on a tensor: what comes back, the scale of every element's block, and the number of blocks.
export function roundTrip({ x, rows, columns }, scheme, axis) {
  const [r, c] = blockOf(scheme.block, axis, rows, columns), { element } = scheme;
  const back = new Float64Array(x.length), scales = new Float64Array(x.length), amaxes = [];
  const each = (visit) => {
    let block = 0;
    for (let top = 0; top < rows; top += r) {
      for (let left = 0; left < columns; left += c, block++) visit(block, top, Math.min(top + r, rows), left, Math.min(left + c, columns));
    }
  };
  let largest = 0;
  each((block, top, bottom, left, right) => {
    let amax = 0;
    for (let i = top; i < bottom; i++) for (let k = i * columns + left; k < i * columns + right; k++) amax = Math.max(amax, Math.abs(x[k]));
    amaxes.push(amax);
    largest = Math.max(largest, amax);
  });
  const second = scheme.second_level ? Math.max(f32(largest / (element.largest * scheme.scale.largest)), pow2(-126)) : 1;
  each((block, top, bottom, left, right) => {
    const total = f32(scaleOf(f32(amaxes[block] / second), scheme) * second);
    for (let i = top; i < bottom; i++) {
      for (let k = i * columns + left; k < i * columns + right; k++) {
        scales[k] = total;
        back[k] = f32(quantize(total === 0 ? 0 * x[k] : f32(x[k] / total), element) * total);
      }
    }
  });
  return { back, scales, blocks: amaxes.length };
}

// Errors and losses of one scheme; twin of block_report(), for all values and for the ordinary ones.
function reportOf(tensor, scheme, { back, scales, blocks }) {
  const { x, hit } = tensor, beyond = scheme.element.largest * (1 + 2 ** -22);
  let all = 0, noise = 0, plain = 0, plainNoise = 0, flushed = 0, saturated = 0, kept = 0, keptFlushed = 0;
  for (let k = 0; k < x.length; k++) {
    const signal = x[k] * x[k], error = back[k] - x[k], square = error * error;
    all += signal;
    noise += square;
    const lost = x[k] !== 0 && back[k] === 0 ? 1 : 0;
    flushed += lost;
    if (scales[k] > 0 && Math.abs(x[k]) > scales[k] * beyond) saturated += 1;
    if (hit[k]) continue;
    plain += signal;
    plainNoise += square;
    kept += 1;
    keptFlushed += lost;
  }
  const n = x.length, second = scheme.second_level ? 32 : 0;
  return { rms: relative(noise, all), ordinary: relative(plainNoise, plain), flushed: flushed / n, keptFlushed: keptFlushed / kept,
    saturated: saturated / n, bits: scheme.element.bits + (blocks * scheme.scale.bits + second) / n };
}

const relative = (noise, signal) => (signal === 0 ? NaN : Math.sqrt(noise) / Math.sqrt(signal));

// A scheme as the page computes with it: formats in place of their names, the rule that was chosen.
export function schemesOf({ schemes, formats }, rule) {
  return Object.values(schemes).sort((a, b) => a.rank - b.rank).map((s) => ({ ...s, element: formats[s.element], scale: formats[s.scale],
    rule: s.scale === "e8m0" ? rule : s.rule }));
}

export function compute(state, data) {
  const tensor = tensorOf(state, data.own), schemes = schemesOf(data, state.rule);
  const found = schemes.map((scheme) => {
    const trip = roundTrip(tensor, scheme, state.axis);
    return { scheme, trip, report: reportOf(tensor, scheme, trip) };
  });
  const shown = found.find(({ scheme }) => scheme.name === state.scheme);
  const other = roundTrip(tensor, shown.scheme, state.axis === "rows" ? "columns" : "rows").back;
  let moved = 0;
  for (let k = 0; k < other.length; k++) moved += other[k] !== shown.trip.back[k] ? 1 : 0;
  return { tensor, found, shown, moved: moved / other.length };
}

function decibels(error) {
  if (error !== error || error === 0) return error === 0 ? "inf" : "\u2014";
  const tenths = Math.floor(-200 * Math.log10(error) + 0.5), size = Math.abs(tenths);
  return `${tenths < 0 ? "-" : ""}${Math.floor(size / 10)}.${size % 10}`;
}

function verdictOf({ found, shown, moved }) {
  const best = found.reduce((a, b) => (b.report.ordinary < a.report.ordinary ? b : a)), error = shown.report.ordinary;
  let told = `${shown.scheme.title} rounds the ordinary values with an error of ${errorText(error)}`;
  told += error === best.report.ordinary ? ", the least of all schemes."
    : `; the least is ${errorText(best.report.ordinary)}, in ${best.scheme.title}.`;
  if (shown.report.keptFlushed) told += ` It flushes ${percent(shown.report.keptFlushed)} of them to zero.`;
  return `${told} Transposing the tensor first changes ${moved ? `${percent(moved)} of the values` : "nothing"}.`;
}

// Every text, by data-field; the twin of OneTensorEveryScheme.result().
export function texts(result, state) {
  const { tensor, found } = result, out = {};
  for (const { scheme, report } of found) {
    out[`${scheme.name}-error`] = errorText(report.ordinary);
    out[`${scheme.name}-sqnr`] = decibels(report.rms);
    out[`${scheme.name}-flushed`] = percent(report.flushed);
    out[`${scheme.name}-saturated`] = percent(report.saturated);
    out[`${scheme.name}-bits`] = significant(report.bits, 4);
  }
  const count = tensor.hit.reduce((a, b) => a + b, 0), largest = tensor.x.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  out.verdict = verdictOf(result);
  out.summary = `${tensor.rows} rows of ${tensor.columns} values; ${count} are multiplied by ${10 ** state.outlier}. `
    + `The largest is ${significant(largest, 3)}.`
    + (tensor.of ? ` They are the first of your ${tensor.of[0]} x ${tensor.of[1]} values.` : "");
  return out;
}

// Steps of the map: relative error up to, words, darkness.  Flushed values have the last one.
const STEPS = [[0, "exact", 0], [2 ** -5, "up to 3 %", 0.12], [2 ** -4, "to 6 %", 0.3], [2 ** -2, "to 25 %", 0.55], [Infinity, "more", 0.8],
  [null, "flushed to 0", 1]];

function stepOf(x, back) {
  if (x === back) return 0;
  if (back === 0) return STEPS.length - 1;
  const error = Math.abs(back - x) / Math.abs(x);
  return STEPS.findIndex(([edge]) => error <= edge);
}

// The cells of each step as one path: runs of equal cells along a row become one bar.
function paths({ rows, columns, x }, back, left, wide, high) {
  const parts = STEPS.map(() => []);
  for (let i = 0; i < rows; i++) {
    let start = 0, step = stepOf(x[i * columns], back[i * columns]);
    for (let j = 1; j <= columns; j++) {
      const next = j < columns ? stepOf(x[i * columns + j], back[i * columns + j]) : -1;
      if (next === step) continue;
      if (step > 0) parts[step].push(`M${(left + start * wide).toFixed(1)} ${(i * high).toFixed(1)}h${((j - start) * wide).toFixed(2)}v${high.toFixed(2)}H${(left + start * wide).toFixed(1)}z`);
      start = j;
      step = next;
    }
  }
  return parts;
}

const fillOf = (i) => (i === STEPS.length - 1 ? "var(--mpl-over)" : `color-mix(in srgb, var(--mpl-norm) ${100 * STEPS[i][2]}%, var(--mpl-bg))`);

function picture({ tensor, shown }, axis, width) {
  const { rows, columns } = tensor, left = 34, right = width - 2, wide = (right - left) / columns, high = 160 / rows;
  const [r, c] = blockOf(shown.scheme.block, axis, rows, columns), lines = [];
  const parts = paths(tensor, shown.trip.back, left, wide, high).map((path, i) => svg("path", { d: path.join(""), fill: fillOf(i) }));
  if (c * wide >= 6) for (let j = c; j < columns; j += c) lines.push(`M${left + j * wide} 0v160`);
  if (r * high >= 6) for (let i = r; i < rows; i += r) lines.push(`M${left} ${i * high}h${right - left}`);
  parts.push(svg("path", { d: lines.join(""), stroke: "var(--mpl-fg)", "stroke-width": 0.75, "stroke-opacity": 0.5, fill: "none" }),
    svg("rect", { x: left, y: 0, width: right - left, height: 160, fill: "none", stroke: "var(--mpl-edge)" }));
  const text = (words, x, y, anchor) => svg("text", { x, y, "text-anchor": anchor, class: "mpl-quiet" }, words);
  parts.push(text("row", left - 6, 90, "end"), text("0", left - 6, 11, "end"), text(String(rows - 1), left - 6, 160, "end"),
    text("0", left, 176, "start"), text("column", (left + right) / 2, 176, "middle"), text(String(columns - 1), right, 176, "end"));
  return parts;
}

const legend = () => h("div", { class: "mpl-row mpl-legend" }, h("span", {}, "Relative error of a value:"), ...STEPS.map(([, words], i) =>
  h("span", {}, h("span", { class: "mpl-swatch", style: `margin: 0; background: ${i ? fillOf(i) : "var(--mpl-bg)"}` }), words)));

function schemeTable(schemes, pick) {
  const found = {}, rows = {};
  const nodes = schemes.map((scheme) => {
    const line = cells(PARTS.map((part) => `${scheme.name}-${part}`));
    Object.assign(found, line.found);
    rows[scheme.name] = line.row;
    line.row.prepend(h("th", { scope: "row" }, paintFormat(h("span", { class: "mpl-name" }, scheme.title), scheme.element)));
    line.row.addEventListener("click", () => pick(scheme.name));
    return line.row;
  });
  return { found, rows, node: table("Every scheme: error of the ordinary values, and what becomes of all", ["Scheme", "Error", "SQNR, dB", "Flushed",
    "Clipped", "Bits"], nodes) };
}

function render({ model, el }) {
  const data = { schemes: model.get("schemes"), formats: model.get("formats"), own: model.get("own") };
  const schemes = schemesOf(data, "floor"), names = schemes.map((s) => s.name);
  const distributions = data.own.values ? [...DISTRIBUTIONS, ["own", "your tensor"]] : DISTRIBUTIONS;
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const setter = (key) => (value) => set({ [key]: value });
  const controls = {
    distribution: select("Ordinary values", distributions, setter("distribution")),
    place: select("Outliers", PLACES, setter("place")),
    outlier: slider("Their size", { min: 0, max: 6, name: "outlier" }, (v) => (v ? `10^${v} times` : "as they are"), setter("outlier")),
    frequency: slider("How many", { min: 4, max: 12, name: "frequency" }, (v) => `1 in ${2 ** v}`, setter("frequency")),
    axis: select("Blocks lie", AXES, setter("axis")),
    rule: select("Scale rule of MX", RULES, setter("rule")),
    scheme: select("The map shows", schemes.map((s) => [s.name, s.title]), setter("scheme")),
  };
  const verdict = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const summary = h("p", { class: "mpl-muted", "data-field": "summary" });
  const list = schemeTable(schemes, setter("scheme")), map = drawing(182, () => paint());
  const root = frame({ model, el, kind: "one-tensor", title: "One tensor, every scheme",
    hint: "Make outliers larger, and watch which schemes lose the ordinary values beside them." },
  h("div", { class: "mpl-controls" }, ...Object.values(controls).map((control) => control.node)), summary, list.node, verdict, map.node, legend());
  const tell = (words) => { for (const [key, text] of Object.entries(words)) write({ verdict, summary }[key] ?? list.found[key], text); };
  const kernel = live({ model, after: verdict, keys: KEYS, show: tell });
  const paint = () => {
    const now = state(), result = compute(now, data), words = texts(result, now);
    for (const [key, control] of Object.entries(controls)) control.show(now[key]);
    for (const name of names) list.rows[name].classList.toggle("mpl-current", name === now.scheme);
    map.show(`Relative error of every value of the tensor in ${result.shown.scheme.title}, with the borders of its blocks. ${words.verdict}`,
      (width) => picture(result, now.axis, width));
    tell(words);
    kernel.changed();
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const values = (pairs) => oneOf(pairs.map(([value]) => value));
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { distribution: values(distributions), place: values(PLACES),
    outlier: whole(0, 6), frequency: whole(4, 12), axis: values(AXES), rule: values(RULES), scheme: oneOf(names) })) });
  link.read();
  return () => { stop(); kernel.stop(); map.stop(); link.stop(); };
}

export default { render };
