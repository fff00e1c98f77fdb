// The sum over ranks: one gradient of many ranks, added by a ring, by a tree and in FP32, its messages in a format.

import { mulberry32, pow2, quantize } from "./float.js";
import { significant } from "./text.js";
import { checked, drawing, follow, formatsOf, frame, h, links, oneOf, paintFormat, select, slider, svg, table, whole,
  write } from "./ui.js";

const KEYS = ["format", "log2_ranks", "noise", "size", "seed"];
const ORDERS = [["ring", "Ring", "ring"], ["tree", "Tree", "tree"], ["wide", "Wide", "wide sum"]];
const LINES = { ring: { "stroke-width": 2.5 }, tree: { "stroke-width": 2, "stroke-dasharray": "7 5" },
  wide: { "stroke-width": 3, "stroke-dasharray": "1 5", "stroke-linecap": "round" } };
const LOW = -0.15, HIGH = 1.15;

const send = (x, f) => quantize(x, f, "nearest_even", "native");

// What each rank holds; the twin of SumOverRanks.contributions().
export function contributions({ log2_ranks, noise, size, seed }) {
  const random = mulberry32(seed), values = new Float64Array(2 ** log2_ranks);
  for (let r = 0; r < values.length; r++) {
    let draws = 0;
    for (let i = 0; i < 4; i++) draws += random();
    values[r] = Math.fround((1 + (noise / 4) * (draws - 2)) * pow2(size));
  }
  return values;
}

// The running sums after each of the values: what arrives in f is added in FP32 and kept as keep() rounds it.
function runningSums(values, f, keep) {
  let total = 0;
  return Float64Array.from(values, (v) => (total = keep(Math.fround(total + send(v, f)))));
}

// The first sum of every level of a tree: of 1, 2, 4, ... ranks.
function levels(values, f) {
  let running = Float64Array.from(values, (v) => send(v, f));
  const firsts = [running[0]];
  while (running.length > 1) {
    const half = running.length / 2, before = running;
    running = Float64Array.from({ length: half }, (_, i) => send(Math.fround(before[i] + before[i + half]), f));
    firsts.push(running[0]);
  }
  return firsts;
}

// Every number for a state: the sum, and the sums on the way to it, by order.
export function compute(state, formats) {
  const f = formats[state.format], values = contributions(state), n = values.length;
  const exact = values.reduce((a, b) => a + b); // fewer than 53 bits, so nothing is rounded
  const paths = { ring: runningSums(values.toReversed(), f, (x) => send(x, f)), tree: levels(values, f),
    wide: runningSums(values, f, (x) => x) };
  const sums = { ring: paths.ring[n - 1], tree: paths.tree.at(-1), wide: send(paths.wide[n - 1], f) };
  return { f, n, exact, paths, sums };
}

const same = (a, b) => a === b || (a !== a && b !== b);
const moved = (path) => path.reduce((count, sum, i) => count + !same(sum, i ? path[i - 1] : 0), 0);
const apart = (exact, got) => (got !== got ? NaN : Math.abs(got - exact) / Math.abs(exact));

// Every text, by data-field; the twin of SumOverRanks.result().
export function texts({ f, n, exact, paths, sums }) {
  const found = { exact: significant(exact, 5) };
  for (const [order] of ORDERS) {
    found[`${order}-sum`] = significant(sums[order], 5);
    found[`${order}-error`] = significant(apart(exact, sums[order]), 3);
    found[`${order}-moved`] = order === "tree" ? "\u2014" : `${moved(paths[order])} of ${n}`;
  }
  const errors = ORDERS.map(([order, , word]) => `${found[`${order}-error`]} by ${word}`).join(", ");
  found.verdict = `${n} ranks, ${f.title} messages: relative error ${errors}.`;
  return found;
}

function picture({ f, n, exact, paths }, width, height) {
  const left = 52, right = width - 12, top = 10, bottom = height - 38;
  const x = (ranks) => left + (ranks / n) * (right - left);
  const y = (share) => bottom - ((Math.min(Math.max(share, LOW), HIGH) - LOW) / (HIGH - LOW)) * (bottom - top);
  const line = (order, ranksAt) => {
    const known = Array.from(paths[order], (sum, i) => [ranksAt(i), sum / exact]).filter(([, share]) => share === share);
    const points = [[0, 0], ...known].map(([ranks, share]) => `${x(ranks).toFixed(1)} ${y(share).toFixed(1)}`);
    return svg("path", { d: `M${points.join("L")}`, fill: "none", stroke: "var(--mpl-format)", ...LINES[order] });
  };
  const parts = [0, 0.5, 1].flatMap((share) => [
    svg("line", { x1: left, x2: right, y1: y(share), y2: y(share), stroke: "var(--mpl-line)" }),
    svg("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end", class: "mpl-quiet" }, `${100 * share} %`),
    svg("text", { x: x(share * n), y: bottom + 16, "text-anchor": share === 1 ? "end" : "middle", class: "mpl-quiet" },
      String(share * n))]);
  parts.push(svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle", class: "mpl-quiet" },
    "ranks in the sum"),
  paintFormat(svg("g", {}, line("wide", (i) => i + 1), line("tree", (i) => 2 ** i), line("ring", (i) => i + 1)), f));
  return parts;
}

// What the lines mean.
function legend() {
  const sample = (order) => svg("svg", { class: "mpl-line", width: 34, height: 10, viewBox: "0 0 34 10", "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 33, y1: 5, y2: 5, stroke: "var(--mpl-format)", ...LINES[order] }));
  return h("div", { class: "mpl-row mpl-legend" }, h("span", {}, "Running sum, share of the exact one:"),
    ...ORDERS.map(([order, , word]) => h("span", {}, sample(order), word)));
}

function resultTable() {
  const found = {}, rows = ORDERS.map(([order, title]) => {
    const row = h("tr", {}, h("th", { scope: "row" }, title));
    for (const key of ["sum", "error", "moved"]) {
      const name = `${order}-${key}`;
      row.append(found[name] = h("td", { "data-field": name }));
    }
    return row;
  });
  return { node: table("The sum by the order of the additions", ["Order", "Sum", "Relative error", "Ranks that moved it"], rows),
    found };
}

function render({ model, el }) {
  const formats = formatsOf(model), state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const range = (key, label, min, max, text) => slider(label, { min, max, name: key }, text, (v) => set({ [key]: v }));
  const controls = {
    format: select("Messages", Object.entries(formats).map(([k, f]) => [k, f.title]), (v) => set({ format: v })),
    log2_ranks: range("log2_ranks", "Ranks", 1, 10, (v) => String(2 ** v)),
    noise: range("noise", "Noise", 0, 16, (v) => `${v / 4} \u00d7`),
    size: range("size", "Gradient", -24, 16, (v) => `2^${v}`),
    seed: range("seed", "Seed", 0, 20, String),
  };
  const verdict = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const exact = h("span", { "data-field": "exact" }), results = resultTable(), drawn = drawing(260, () => paint());
  const key = legend();
  const root = frame({ model, el, kind: "sum-over-ranks", title: "Sum over ranks",
    hint: "Every rank adds its gradient. Look for the number of ranks at which the ring no longer hears them." },
  h("div", { class: "mpl-controls" }, ...Object.values(controls).map((control) => control.node)), key, drawn.node, verdict,
  h("p", {}, "Exact sum: ", exact), results.node);
  const paint = () => {
    const now = state(), found = compute(now, formats), words = texts(found);
    for (const [name, control] of Object.entries(controls)) control.show(now[name]);
    controls.seed.field.disabled = now.noise === 0;
    paintFormat(key, found.f);
    drawn.show(`Running sums by ring, tree and wide sum as shares of the exact sum. ${words.verdict}`,
      (width, height) => picture(found, width, height));
    for (const [name, text] of Object.entries(words)) write({ verdict, exact }[name] ?? results.found[name], text);
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { format: oneOf(Object.keys(formats)),
    log2_ranks: whole(1, 10), noise: whole(0, 16), size: whole(-24, 16), seed: whole(0, 20) })) });
  link.read();
  return () => { stop(); drawn.stop(); link.stop(); };
}

export default { render };
