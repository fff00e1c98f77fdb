// Will it be faster?  One linear layer in two dtypes on a device: where the time goes, next to published points.

import { significant } from "./text.js";
import { checked, drawing, facts, follow, frame, h, links, oneOf, paintFormat, select, slider, svg, whole, write } from "./ui.js";

const KEYS = ["m", "k", "n", "device", "pair", "recipe", "layouts", "before", "after", "bandwidth", "launch", "share"];
const PAIRS = ["bf16 to fp8", "fp32 to bf16", "fp32 to tf32", "fp32 to fp16"];
const RECIPES = [["none", "none needed"], ["delayed", "delayed"], ["current", "current"], ["block", "blocks of 128"]];
const LAYOUTS = [["device", "by device"], ["both", "two"], ["one", "one"]];
const PARTS = ["arithmetic", "memory", "casts", "launches"];
const SIDES = ["before", "after"];
const DASH = "\u2014";

const productsOf = (m, k, n) => [[m, k, n], [m, n, k], [k, m, n]];

// The bound of the three products of a training step; the twin of speed.roofline(training=True).
export function roofline([m, k, n], dtype, device, efficiency, memoryEfficiency, tables) {
  const rate = device.peak[dtype] * efficiency, bandwidth = device.bandwidth * memoryEfficiency;
  const width = tables.bytes[dtype], out = dtype === "fp32" || dtype === "tf32" ? 4 : 2, shapes = productsOf(m, k, n);
  const flops = shapes.map(([a, b, c]) => 2 * a * b * c);
  const moved = shapes.map(([a, b, c]) => width * (a * b + b * c) + out * a * c);
  const sum = (list) => list.reduce((x, y) => x + y);
  return { intensity: sum(flops) / sum(moved), compute: sum(flops) / rate,
    time: sum(flops.map((f, i) => Math.max(f / rate, moved[i] / bandwidth))) };
}

// Two splits and their ratio; the twin of speed.expected_speedup.
export function expected(sizes, before, after, device, recipe, losses, tables) {
  const [reads, width] = tables.recipes[recipe], [m, k, n] = sizes, elements = m * k + k * n + m * n;
  const both = losses.layouts === "device" ? device.transposes : losses.layouts === "both";
  const moved = reads * 2 * elements + (both ? 2 : 1) * width * elements;
  const split = (dtype, efficiency, casts, kernels) => {
    const r = roofline(sizes, dtype, device, efficiency, losses.bandwidth / 100, tables);
    const parts = { arithmetic: r.compute, memory: Math.max(r.time - r.compute, 0), casts, launches: losses.launch * 1e-7 * kernels };
    return { ...parts, total: parts.arithmetic + parts.memory + parts.casts + parts.launches };
  };
  const first = split(before, losses.before / 100, 0, 3);
  const second = split(after, losses.after / 100, moved / (device.bandwidth * (losses.bandwidth / 100)), 3 + 3 * reads);
  return { before: first, after: second, ratio: first.total / second.total };
}

const dtypesOf = (state) => state.pair.split(" to ");
const sizesOf = ({ m, k, n }) => [2 ** m, 2 ** k, 2 ** n];

// What the model says of a published point, or null.
export function modelled(point, state, tables) {
  if (!point.shapes.length || state.pair !== PAIRS[0]) return null;
  let before = 0, after = 0;
  for (const shape of point.shapes) {
    const run = expected(shape, "bf16", "fp8", tables.devices[point.device], point.recipe, state, tables);
    before += run.before.total;
    after += run.after.total;
  }
  return before / after;
}

// The splits of the present state, or null where the device lacks a dtype.
export function compute(state, tables) {
  const device = tables.devices[state.device], [first, second] = dtypesOf(state);
  if (!(first in device.peak && second in device.peak)) return null;
  return expected(sizesOf(state), first, second, device, second === "fp8" ? state.recipe : "none", state, tables);
}

const milliseconds = (seconds) => `${significant(seconds * 1e3, 4)} ms`;
const amdahl = (fraction, speedup) => 1 / ((1 - fraction) + fraction / speedup);

// Every text, by data-field; the twin of WillItBeFaster.result().
export function texts(found, state, tables) {
  const device = tables.devices[state.device], dtypes = dtypesOf(state), names = dtypes.map((d) => d.toUpperCase()), out = {};
  tables.points.forEach((point, i) => {
    const model = modelled(point, state, tables);
    out[`point-${i}-ratio`] = significant(point.ratio, 3);
    out[`point-${i}-model`] = model === null ? DASH : significant(model, 3);
  });
  if (found === null) {
    const missing = dtypes.filter((d) => !(d in device.peak)).map((d) => d.toUpperCase()).join(" and ");
    for (const side of SIDES) for (const part of [...PARTS, "total"]) out[`${side}-${part}`] = DASH;
    return { ...out, intensity: DASH, ceiling: DASH, step: DASH,
      verdict: `The table has no ${missing} rate for ${device.title}: choose another device or pair.` };
  }
  for (const side of SIDES) for (const part of [...PARTS, "total"]) out[`${side}-${part}`] = milliseconds(found[side][part]);
  const most = PARTS.reduce((best, part) => (found.after[part] > found.after[best] ? part : best));
  const share = significant(100 * found.after[most] / found.after.total, 3);
  const lines = dtypes.map((dtype, i) => {
    const { intensity } = roofline(sizesOf(state), dtype, device, 1, 1, tables);
    return `${names[i]} ${significant(intensity, 4)} (ridge ${significant(device.peak[dtype] / device.bandwidth, 4)})`;
  });
  return { ...out,
    verdict: `${names[1]} takes ${milliseconds(found.after.total)} where ${names[0]} takes ${milliseconds(found.before.total)}: `
      + `${significant(found.ratio, 3)} times as fast. ${share} % of it is ${most}.`,
    intensity: lines.join("; "),
    ceiling: `${significant(device.peak[dtypes[1]] / device.peak[dtypes[0]], 4)} times`,
    step: `${significant(amdahl(state.share / 100, found.ratio), 4)} times, if ${state.share} % of the step before is such layers` };
}

// Two bars of time, and a strip of ratios with the published points of the device.
function picture(found, state, tables, width, height) {
  const left = 4, right = width - 8, names = dtypesOf(state).map((d) => d.toUpperCase()), parts = [];
  if (found !== null) {
    const most = Math.max(found.before.total, found.after.total), x = (t) => left + (t / most) * (right - left);
    SIDES.forEach((side, i) => {
      const y = 4 + 50 * i;
      let at = 0;
      parts.push(svg("text", { x: left, y: y + 12, style: "font-weight: 650" }, names[i]),
        svg("text", { x: right, y: y + 12, "text-anchor": "end" }, milliseconds(found[side].total)));
      for (const part of tables.parts) {
        const time = found[side][part.name], wide = x(at + time) - x(at);
        if (wide > 0.2) {
          parts.push(paintFormat(svg("rect", { x: x(at), y: y + 18, width: Math.max(wide - 1, 0.5), height: 18,
            fill: "var(--mpl-format)" }), part));
        }
        at += time;
      }
    });
  }
  return [...parts, ...strip(found, state, tables, left + 16, right - 12, height)];
}

function strip(found, state, tables, left, right, height) {
  const low = 0.25, high = 4, base = height - 26, parts = [];
  const x = (ratio) => left + (Math.log2(Math.min(Math.max(ratio, low), high) / low) / Math.log2(high / low)) * (right - left);
  parts.push(svg("line", { x1: left, x2: right, y1: base, y2: base, stroke: "var(--mpl-edge)" }));
  for (const tick of [0.25, 0.5, 1, 2, 4]) {
    parts.push(svg("line", { x1: x(tick), x2: x(tick), y1: base, y2: base + 5, stroke: "var(--mpl-edge)" }),
      svg("text", { x: x(tick), y: base + 20, class: "mpl-quiet", "text-anchor": "middle" },
        tick === 1 ? "equal" : `${tick}\u00d7`));
  }
  if (state.pair === PAIRS[0]) {
    tables.points.forEach((point, i) => {
      if (point.device !== state.device) return;
      const up = i % 2 ? 26 : 10;
      parts.push(svg("line", { x1: x(point.ratio), x2: x(point.ratio), y1: base, y2: base - up, stroke: "var(--mpl-muted)" }),
        svg("text", { x: x(point.ratio), y: base - up - 4, "text-anchor": "middle", class: "mpl-quiet" }, String(i + 1)));
    });
  }
  if (found !== null) {
    const at = x(found.ratio);
    parts.push(svg("path", { d: `M${at} ${base}l-6 11h12z`, fill: "var(--mpl-accent)" }),
      svg("line", { x1: at, x2: at, y1: base, y2: base - 44, stroke: "var(--mpl-accent)", "stroke-width": 2 }));
  }
  return parts;
}

function splitTable(parts) {
  const found = {}, heads = { before: h("th", { scope: "col" }), after: h("th", { scope: "col" }) }, body = h("tbody", {});
  for (const { name, colours } of [...parts, { name: "total" }]) {
    const row = h("tr", { class: colours ? "" : "mpl-current" },
      h("th", { scope: "row" }, colours ? paintFormat(h("span", { class: "mpl-name" }, name), { colours }) : name));
    for (const side of SIDES) row.append(found[`${side}-${name}`] = h("td", { "data-field": `${side}-${name}` }));
    body.append(row);
  }
  return { found, heads, node: h("table", {}, h("caption", {}, "Where the time goes"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Part"), heads.before, heads.after)), body) };
}

function pointTable({ points, devices }) {
  const found = {}, body = h("tbody", {}), rows = [];
  points.forEach((point, i) => {
    const row = h("tr", {}, h("th", { scope: "row" }, `${i + 1}. ${point.title}`), h("td", {}, devices[point.device].title),
      h("td", {}, point.scope));
    for (const key of ["ratio", "model"]) row.append(found[`point-${i}-${key}`] = h("td", { "data-field": `point-${i}-${key}` }));
    rows.push(row);
    body.append(row);
  });
  const heads = ["Who, what", "Device", "What was timed", "Ratio", "This model"].map((text) => h("th", { scope: "col" }, text));
  const caption = "FP8 over BF16 as published or measured, and what this model says with the losses set above";
  return { found, rows, node: h("div", { class: "mpl-scroll mpl-points", role: "group", tabindex: 0, "aria-label": caption },
    h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, ...heads)), body)) };
}

function render({ model, el }) {
  const tables = model.get("tables"), state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const devices = Object.entries(tables.devices).sort((a, b) => a[1].rank - b[1].rank).map(([key, d]) => [key, d.title]);
  const pairs = PAIRS.map((p) => [p, p.toUpperCase().replace(" TO ", " to ")]);
  const lists = { device: ["Device", devices], pair: ["Formats", pairs], recipe: ["FP8 scaling", RECIPES],
    layouts: ["FP8 copies", LAYOUTS] };
  const controls = Object.fromEntries(Object.entries(lists).map(([key, [label, options]]) =>
    [key, select(label, options, (v) => set({ [key]: v }))]));
  const range = (key, label, min, max, text) => { controls[key] = slider(label, { min, max, name: key }, text, (v) => set({ [key]: v })); };
  const power = (e) => String(2 ** e), percent = (p) => `${p} %`;
  range("m", "M: tokens", 4, 17, power);
  range("k", "K: in", 4, 17, power);
  range("n", "N: out", 4, 17, power);
  range("before", "First rate", 5, 100, percent);
  range("after", "Second rate", 5, 100, percent);
  range("bandwidth", "Bandwidth", 5, 100, percent);
  range("launch", "Kernel cost", 0, 100, (l) => `${significant(l / 10, 3)} \u00b5s`);
  range("share", "Share of step", 0, 100, percent);
  const said = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const split = splitTable(tables.parts), points = pointTable(tables);
  const list = facts([["intensity", "FLOP per byte"], ["ceiling", "Data sheet"], ["step", "Whole step"]]);
  const bars = drawing(186, () => paint());
  const root = frame({ model, el, kind: "will-it-be-faster", title: "Will it be faster?",
    hint: "A linear layer, forward and backward. Rates and bandwidth are percent of the data sheet. On the scale, numbered lines are "
      + "published points of the device." },
  h("div", { class: "mpl-controls" }, ...["m", "k", "n", "device", "recipe", "layouts", "pair", "before", "after", "bandwidth",
    "launch", "share"].map((key) => controls[key].node)), said, bars.node,
  split.node, list.node, points.node);
  const paint = () => {
    const now = state(), found = compute(now, tables), words = texts(found, now, tables), [first, second] = dtypesOf(now);
    for (const [key, control] of Object.entries(controls)) control.show(now[key]);
    controls.recipe.field.disabled = controls.layouts.field.disabled = second !== "fp8";
    write(split.heads.before, first.toUpperCase());
    write(split.heads.after, second.toUpperCase());
    points.rows.forEach((row, i) => row.classList.toggle("mpl-here", tables.points[i].device === now.device));
    bars.show(`Two bars of time, and a scale of ratios. ${words.verdict}`, (width, height) => picture(found, now, tables, width, height));
    for (const [key, text] of Object.entries(words)) write(split.found[key] ?? points.found[key] ?? list.values[key] ?? said, text);
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { m: whole(4, 17), k: whole(4, 17),
    n: whole(4, 17), device: oneOf(devices.map((d) => d[0])), pair: oneOf(PAIRS), recipe: oneOf(RECIPES.map((r) => r[0])),
    layouts: oneOf(LAYOUTS.map((l) => l[0])), before: whole(5, 100), after: whole(5, 100), bandwidth: whole(5, 100),
    launch: whole(0, 100), share: whole(0, 100) })) });
  link.read();
  return () => { stop(); bars.stop(); link.stop(); };
}

export default { render };
