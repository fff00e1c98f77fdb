// Windows: every format's range on one axis, and what each makes of a distribution that can be moved.

import { percent } from "./text.js";
import { checked, drawing, follow, formatsOf, frame, h, links, live, oneOf, paintFormat, select, slider, svg, whole, write } from "./ui.js";

const KEYS = ["source", "centre", "spread", "scale"];
const PARTS = ["flushed", "subnormal", "normal", "overflowed"];
const MODEL = "a model: log2 |x| normal";
const LOW = -56, HIGH = 24;

// The error function to double precision: its series, and beyond 3 a continued fraction.
export function erf(x) {
  const a = Math.abs(x), sign = x < 0 ? -1 : 1;
  if (a > 6) return sign;
  if (a > 3) {
    let f = 0;
    for (let k = 60; k > 0; k--) f = k / 2 / (a + f);
    return sign * (1 - Math.exp(-a * a) / Math.sqrt(Math.PI) / (a + f));
  }
  let term = a, sum = a;
  for (let k = 1; k < 80; k++) { term *= -a * a / k; sum += term / (2 * k + 1); }
  return sign * 2 / Math.sqrt(Math.PI) * sum;
}

// Magnitudes at which rounding to nearest changes its outcome: to zero, to a subnormal, to normal, to overflow.
const edges = (f) => {
  const step = f.smallest_normal * 2 ** -f.mantissa_bits;
  return [step / 2, f.smallest_normal - step / 2, f.overflow_threshold];
};

// Shares [zero already, flushed, subnormal, normal, overflowed] of the present distribution in a format.
export function shares(state, name, f, recordings) {
  const recording = recordings[state.source];
  if (recording) {
    const counts = recording.counts[name][state.scale + 24];
    return [recording.zero, ...counts].map((n) => n / recording.total);
  }
  const below = edges(f).map((t) => {
    const z = (Math.log2(t) - state.centre - state.scale) / state.spread;
    return (1 + erf(z / Math.SQRT2)) / 2;
  });
  return [0, below[0], below[1] - below[0], below[2] - below[1], 1 - below[2]];
}

// The height of the distribution at each binade, in shares of all elements.
function profile(state, recordings) {
  const recording = recordings[state.source];
  if (recording) return recording.binades.map(([e, share]) => [e + state.scale, share]);
  const at = (v) => (1 + erf((v - state.centre - state.scale) / state.spread / Math.SQRT2)) / 2;
  const points = [];
  for (let e = LOW - 1; e <= HIGH; e++) points.push([e, at(e + 1) - at(e)]);
  return points;
}

function picture(state, formats, recordings, width, height) {
  const left = width < 480 ? 78 : 104, right = width - 8, top = 92;
  const rows = Object.values(formats), rowHeight = (height - top - 34) / rows.length;
  const x = (v) => left + ((Math.min(Math.max(v, LOW), HIGH) - LOW) / (HIGH - LOW)) * (right - left);
  const parts = [], every = width < 480 ? 16 : 8;
  for (let e = LOW; e <= HIGH; e += every) {
    parts.push(svg("line", { x1: x(e), x2: x(e), y1: 8, y2: height - 30, stroke: "var(--mpl-line)" }),
      svg("text", { x: x(e), y: height - 16, "text-anchor": "middle", class: "mpl-quiet" }, String(e)));
  }
  parts.push(svg("text", { x: (left + right) / 2, y: height - 1, "text-anchor": "middle", class: "mpl-quiet" },
    "log2 of the magnitude"));
  const points = profile(state, recordings).filter(([e]) => e >= LOW - 1 && e < HIGH);
  const tallest = Math.max(...points.map((p) => p[1]), 1e-9);
  const path = points.map(([e, s]) => `H${x(e)}V${top - 6 - (s / tallest) * 70}H${x(e + 1)}`).join("");
  if (points.length) {
    parts.push(svg("path", { d: `M${x(points[0][0])} ${top - 6}${path}V${top - 6}Z`, fill: "var(--mpl-accent)",
      "fill-opacity": 0.25, stroke: "var(--mpl-accent)", "stroke-width": 1.5 }));
  }
  parts.push(svg("text", { x: left - 8, y: top - 36, "text-anchor": "end", class: "mpl-quiet" }, "tensor"));
  rows.forEach((f, i) => {
    const y = top + i * rowHeight, low = Math.log2(f.smallest), group = paintFormat(svg("g", {}), f);
    const bar = (a, b, more) => svg("rect", { x: x(a), width: Math.max(x(b) - x(a), 0), y: y + 3, height: rowHeight - 6,
      fill: "var(--mpl-format)", ...more });
    group.append(bar(low, f.min_exponent, { "fill-opacity": 0.35, stroke: "var(--mpl-format)", "stroke-dasharray": "3 2" }),
      bar(f.min_exponent, f.max_exponent + 1, {}),
      svg("text", { x: left - 8, y: y + rowHeight / 2 + 4, "text-anchor": "end" },
        width < 480 ? f.title.replace("FP8 ", "") : f.title));
    parts.push(group);
  });
  return parts;
}

function shareTable(formats) {
  const body = h("tbody", {}), found = {}, bars = {};
  for (const [name, f] of Object.entries(formats)) {
    const title = h("th", { scope: "row" }, paintFormat(h("span", { class: "mpl-name" }, f.title), f));
    const row = h("tr", {}, title);
    for (const part of PARTS) row.append(found[`${name}-${part}`] = h("td", { "data-field": `${name}-${part}` }));
    bars[name] = PARTS.map((part) => h("span", { class: `mpl-share mpl-share-${part}` }));
    row.append(h("td", { class: "mpl-bar-cell" }, h("span", { class: "mpl-bar", "aria-hidden": "true" }, ...bars[name])));
    body.append(row);
  }
  const heads = ["Format", "Flushed to 0", "Subnormal", "Normal", "Overflowed", "Shares"];
  const node = h("div", { class: "mpl-scroll", role: "group", tabindex: 0, "aria-label": "Shares in every format" },
    h("table", {}, h("caption", {}, "Shares of all elements, by what rounding makes of them"),
      h("thead", {}, h("tr", {}, ...heads.map((t) => h("th", { scope: "col" }, t)))), body));
  return { node, found, bars };
}

// Every text for a state, by data-field; the twin of Windows.result().
export function texts(state, formats, recordings) {
  const out = {};
  for (const [name, f] of Object.entries(formats)) {
    const all = shares(state, name, f, recordings);
    PARTS.forEach((part, i) => { out[`${name}-${part}`] = percent(all[i + 1]); });
  }
  const recording = recordings[state.source];
  out.summary = recording
    ? `${recording.total} elements, ${percent(recording.zero / recording.total)} of them zero already.`
    : `Two thirds of the magnitudes lie within a factor of 2^${state.spread} of 2^${state.centre + state.scale}.`;
  return out;
}

function render({ model, el }) {
  const formats = formatsOf(model), recordings = model.get("recordings");
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const names = [...Object.keys(recordings), MODEL];
  const source = select("Tensor", names.map((n) => [n, n]), (v) => set({ source: v }));
  const power = (v) => `2^${v}`;
  const centre = slider("Typical magnitude", { min: -48, max: 16, name: "centre" }, power, (v) => set({ centre: v }));
  const spread = slider("Spread, in binades", { min: 1, max: 12, name: "spread" }, String, (v) => set({ spread: v }));
  const scale = slider("Scale factor S", { min: -24, max: 24, name: "scale" }, power, (v) => set({ scale: v }));
  const summary = h("output", { class: "mpl-say", "data-field": "summary", "aria-live": "polite" });
  const table = shareTable(formats);
  const picked = drawing(126 + 24 * Object.keys(formats).length, () => paint());
  const root = frame({ model, el, kind: "windows", title: "Windows",
    hint: "Multiply the tensor by a scale factor and watch which formats can hold it." },
  h("div", { class: "mpl-controls" }, source.node, scale.node, centre.node, spread.node), picked.node, summary, table.node);
  const tell = (words) => { for (const [key, text] of Object.entries(words)) write(table.found[key] ?? summary, text); };
  const kernel = live({ model, after: summary, keys: KEYS, show: tell });
  const paint = () => {
    const now = state(), recorded = now.source in recordings;
    source.show(now.source);
    for (const [control, key] of [[centre, "centre"], [spread, "spread"], [scale, "scale"]]) control.show(now[key]);
    for (const control of [centre, spread]) control.field.disabled = recorded;
    picked.show("Ranges of the formats under the distribution of the tensor; the table below has the shares.",
      (width, height) => picture(now, formats, recordings, width, height));
    tell(texts(now, formats, recordings));
    for (const [name, f] of Object.entries(formats)) {
      const all = shares(now, name, f, recordings);
      table.bars[name].forEach((bar, i) => { bar.style.width = `${(100 * all[i + 1]).toFixed(2)}%`; });
    }
    kernel.changed();
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { source: oneOf(names),
    centre: whole(-48, 16), spread: whole(1, 12), scale: whole(-24, 24) })) });
  link.read();
  return () => { stop(); kernel.stop(); picked.stop(); link.stop(); };
}

export default { render };
