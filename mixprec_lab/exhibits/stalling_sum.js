// The stalling sum: one addend, added again and again, the running sum kept in a format.

import { mulberry32, quantize } from "./float.js";
import { errorText, parseNumber, powerForm, significant } from "./text.js";
import { checked, drawing, facts, follow, formatsOf, frame, h, links, oneOf, paintFormat, select, slider, svg, textField, whole,
  write } from "./ui.js";

const KEYS = ["addend", "count", "format", "method", "seed"];
const METHODS = [["naive", "naive: round after every addition"], ["pairwise", "pairwise: halves to halves"],
  ["kahan", "Kahan: carry what was cut off"], ["stochastic", "stochastic rounding"],
  ["fp32", "FP32 accumulator, rounded at the end"]];
// Counts on the slider: 1 to 20,000, finer where it is small.
const COUNTS = [1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 300, 400, 500, 700, 1000, 1500, 2000, 2500, 3000, 4000, 5000,
  7000, 10000, 15000, 20000];

function pairwise(v, n, nearest) {
  const known = new Map([[1, v]]);
  const sum = (k) => {
    if (!known.has(k)) {
      const left = Math.floor(k / 2);
      known.set(k, nearest(sum(left) + sum(k - left)));
    }
    return known.get(k);
  };
  return Float64Array.from({ length: n }, (_, i) => sum(i + 1));
}

// All n partial sums of the addend v, a value of f; the twin of mixprec_lab.rounding.running_sum.
export function runningSum(v, n, f, method, seed) {
  const nearest = (x) => quantize(x, f, "nearest_even", "native"), sums = new Float64Array(n);
  if (method === "pairwise") return pairwise(v, n, nearest);
  const random = mulberry32(seed);
  let total = 0, lost = 0;
  for (let i = 0; i < n; i++) {
    if (method === "kahan") {
      const corrected = nearest(v - lost), grown = nearest(total + corrected);
      lost = nearest(nearest(grown - total) - corrected);
      total = grown;
    } else if (method === "stochastic") total = quantize(total + v, f, "stochastic", "native", random());
    else if (method === "fp32") total = Math.fround(total + v);
    else total = nearest(total + v);
    sums[i] = method === "fp32" ? nearest(total) : total;
  }
  return sums;
}

// Additions that moved a naive sum, or null if the last one still did.
export function stallOf(sums) {
  const n = sums.length;
  if (n < 2 || sums[n - 1] !== sums[n - 2]) return null;
  let at = n - 1;
  while (at > 0 && sums[at - 1] === sums[n - 1]) at -= 1;
  return sums[0] === 0 ? 0 : at + 1;
}

// Every number for a state.
export function compute(state, formats) {
  const f = formats[state.format], wanted = parseNumber(state.addend).value;
  const addend = quantize(wanted, f, "nearest_even", "native");
  const sums = runningSum(addend, state.count, f, state.method, state.seed);
  return { f, wanted, addend, sums, exact: wanted * state.count, total: sums[state.count - 1],
    stall: state.method === "naive" ? stallOf(sums) : null };
}

const apart = (exact, got) => (exact === got ? 0 : Math.abs(got - exact) / Math.abs(exact));

// Every text, by data-field; the twin of StallingSum.result().
export function texts({ f, wanted, addend, exact, total, stall }, state) {
  const at = `${significant(total, 7)} = ${powerForm(total)}`;
  let verdict = `${state.count} additions, no stall.`;
  if (!Number.isFinite(total)) verdict = `${state.count} additions leave the range of ${f.title}: the sum is ${significant(total, 7)}.`;
  else if (stall === 0) verdict = `The addend is flushed to zero in ${f.title}: the sum never leaves it.`;
  else if (stall !== null) verdict = `Stalls after ${stall} additions at ${at}.`;
  else if (state.method !== "naive") verdict = `${state.count} additions, sum ${at}.`;
  return {
    verdict,
    stored: `${significant(addend, 7)} (error ${errorText(apart(wanted, addend))})`,
    total: significant(total, 9),
    exact: significant(exact, 9),
    error: errorText(apart(exact, total)),
  };
}

function picture({ f, sums, wanted, exact, stall }, width, height) {
  const n = sums.length, left = 70, right = width - 12, top = 14, bottom = height - 36;
  const ends = [0, exact, ...sums.filter(Number.isFinite)];
  const low = ends.reduce((a, b) => Math.min(a, b)), high = ends.reduce((a, b) => Math.max(a, b)) || 1;
  const x = (k) => left + (k / n) * (right - left);
  const y = (v) => bottom - ((Math.min(Math.max(v, low), high) - low) / (high - low || 1)) * (bottom - top);
  const stride = Math.max(1, Math.floor(n / 600)), path = [`M${x(0)} ${y(0)}`];
  for (let i = 0; i < n; i += stride) path.push(`H${x(i + 1).toFixed(1)}V${y(sums[i]).toFixed(1)}`);
  path.push(`H${x(n)}`);
  const parts = [0, 0.5, 1].flatMap((share) => {
    const v = low + share * (high - low), k = Math.round(share * n);
    return [svg("line", { x1: left, x2: right, y1: y(v), y2: y(v), stroke: "var(--mpl-line)" }),
      svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "mpl-quiet" }, significant(v, 3)),
      svg("text", { x: x(k), y: bottom + 16, "text-anchor": share === 1 ? "end" : "middle", class: "mpl-quiet" }, String(k))];
  });
  parts.push(svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle", class: "mpl-quiet" }, "additions"));
  parts.push(svg("line", { x1: x(0), y1: y(0), x2: x(n), y2: y(wanted * n), stroke: "var(--mpl-muted)",
    "stroke-width": 2, "stroke-dasharray": "6 4" }),
  svg("text", { x: x(n) - 4, y: y(exact) + (exact > 0 ? 18 : -8), "text-anchor": "end", class: "mpl-quiet" }, "exact"));
  parts.push(paintFormat(svg("g", {}, svg("path", { d: path.join(""), fill: "none", stroke: "var(--mpl-format)",
    "stroke-width": 2.5 })), f));
  if (stall) {
    const cx = x(stall), cy = y(sums[n - 1]);
    parts.push(svg("circle", { cx, cy, r: 5, fill: "var(--mpl-bad)" }),
      svg("text", { x: Math.min(cx + 8, right - 110), y: cy + 20 > bottom - 4 ? cy - 10 : cy + 20 }, `stalls after ${stall}`));
  }
  return parts;
}

const nearestIndex = (count) =>
  COUNTS.reduce((best, c, i) => (Math.abs(c - count) < Math.abs(COUNTS[best] - count) ? i : best), 0);

function render({ model, el }) {
  const formats = formatsOf(model);
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const number = (text) => {
    const read = parseNumber(text);
    if (!read.error && !(Number.isFinite(read.value) && read.value !== 0)) {
      return { error: "The addend must be finite and not zero." };
    }
    return read;
  };
  const addend = textField("Addend", "addend", number, (text) => set({ addend: text }));
  const count = slider("Additions", { min: 0, max: COUNTS.length - 1, name: "count" },
    () => String(model.get("count")), (i) => set({ count: COUNTS[i] }));
  const format = select("Format of the sum", Object.entries(formats).map(([k, f]) => [k, f.title]),
    (v) => set({ format: v }));
  const method = select("Method", METHODS, (v) => set({ method: v }));
  const seed = slider("Seed", { min: 0, max: 20, name: "seed" }, String, (v) => set({ seed: v }));
  const verdict = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const list = facts([["stored", "Addend stored as"], ["total", "Sum"], ["exact", "Exact sum"], ["error", "Relative error"]]);
  const picked = drawing(260, () => paint());
  const root = frame({ model, el, kind: "stalling-sum", title: "Stalling sum",
    hint: "Add the same number again and again, and look for the point where nothing happens any more." },
  h("div", { class: "mpl-controls" }, addend.node, count.node, format.node, method.node, seed.node),
  picked.node, verdict, list.node);
  const paint = () => {
    const now = state(), found = compute(now, formats), said = texts(found, now);
    addend.show(now.addend);
    count.show(nearestIndex(now.count));
    format.show(now.format);
    method.show(now.method);
    seed.show(now.seed);
    seed.field.disabled = now.method !== "stochastic";
    picked.show(`Running sum in ${found.f.title} against the exact sum. ${said.verdict}`,
      (width, height) => picture(found, width, height));
    for (const [key, text] of Object.entries(said)) write(list.values[key] ?? verdict, text);
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, {
    addend: (text) => (number(text).error ? undefined : text), count: whole(1, 20000),
    format: oneOf(Object.keys(formats)), method: oneOf(METHODS.map((m) => m[0])), seed: whole(0, 20) })) });
  link.read();
  return () => { stop(); picked.stop(); link.stop(); };
}

export default { render };
