// The loss-scale lab: recorded gradients, moved by log2 S, against the window of a format.

import { percent } from "./text.js";
import { button, checked, drawing, follow, formatsOf, frame, h, links, live, oneOf, select, slider, svg, table, uid, whole,
  write } from "./ui.js";

const KEYS = ["stage", "tensor", "format", "log2_scale", "phase", "guess", "expected"];
const FATES = ["zero", "flushed", "subnormal", "normal", "overflowed", "invalid"];
const FATE_NAMES = ["zero already", "flushed to zero", "subnormal", "normal", "overflowed", "inf or NaN already"];
const SMALLEST = -8, LARGEST = 40; // log2 S
const LOW = -56, HIGH = 40; // of the axis
const HIDDEN = "?";

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// One recording: `counts` has a row for each binade from `first_binade` on, a cell for each stretch between thresholds.
export function opened({ total, zero, infinite, nan, first_binade, counts }) {
  const cells = counts.length ? counts[0].length : 1, sums = [...counts.flat(), 0];
  for (let i = sums.length - 2; i >= 0; i--) sums[i] += sums[i + 1];
  const from = (binade, cell) => sums[Math.min(Math.max((binade - first_binade) * cells + cell, 0), sums.length - 1)];
  return {
    total, zero, invalid: infinite + nan, finite: sums[0], top: first_binade + counts.length - 1, bottom: first_binade,
    atLeast: (binade) => from(binade, 0), // elements at or above 2^binade
    beyond: ([threshold, binade]) => from(binade, threshold + 1), // elements beyond an edge
  };
}

// The edges of a format as S = 2^k moves them over the unscaled elements.
const shifted = (edges, k) => edges.map(([threshold, binade]) => [threshold, binade - k]);

// Counts by fate at S = 2^k, in the order of FATES.
export function fates(t, edges, k) {
  const [keeps, normal, over] = shifted(edges, k).map(t.beyond);
  return [t.zero, t.finite - keeps, keeps - normal, normal - over, over, t.invalid];
}

// log2 of the largest S at which nothing overflows; null where S decides nothing.
export function safest(t, edges) {
  if (t.invalid || !t.finite) return null;
  const [threshold, binade] = edges[2];
  return binade - t.top - (t.beyond([threshold, t.top]) ? 1 : 0);
}

const safeText = (t, edges) => {
  const best = safest(t, edges);
  return best === null ? (t.invalid ? "none" : "any") : `2^${best}`;
};

function verdict(t, f, edges, k) {
  const best = safest(t, edges), flushed = (at) => percent(fates(t, edges, at)[1] / t.total);
  if (t.invalid) return `${plural(t.invalid, "element")} inf or NaN already: the step is skipped at every S.`;
  if (best === null) return "Every element is zero: no S is too large, and none helps.";
  const head = `The largest safe S in ${f.title} is 2^${best}: it flushes ${flushed(best)} of the elements; S = 1 flushes ${flushed(0)}.`;
  if (k > best) {
    const over = fates(t, edges, k)[4];
    return `${head} S = 2^${k} is ${plural(k - best, "binade")} too large: ${over} of ${t.total} elements overflow.`;
  }
  return `${head} S = 2^${k} leaves ${plural(best - k, "binade")} of head-room and flushes ${flushed(k)}.`;
}

function score(t, edges, { guess, expected }) {
  const best = safest(t, edges), flushed = percent(fates(t, edges, guess)[1] / t.total);
  let found = "For this tensor there is no largest safe S to find.";
  if (best !== null) {
    const off = plural(Math.abs(guess - best), "binade");
    if (guess === best) found = `Your S = 2^${guess} is the largest safe one.`;
    else if (guess === LARGEST && guess < best) found = `Your S = 2^${guess} is safe, and so is any that the slider offers: up to 2^${best}.`;
    else if (guess < best) found = `Your S = 2^${guess} is ${off} below the largest safe one, 2^${best}.`;
    else found = `Your S = 2^${guess} is ${off} above the largest safe one, 2^${best}: it overflows.`;
  }
  return `${found} You expected it to flush ${expected} %; it flushes ${flushed}.`;
}

function stageVerdict(all, names, edges, k) {
  const limits = all.map((t) => safest(t, edges)).filter((best) => best !== null);
  const counts = all.map((t) => fates(t, edges, k)), lost = counts.map((c, i) => c[1] / all[i].total);
  const worst = lost.reduce((a, share, i) => (share > lost[a] ? i : a), 0);
  const over = counts.filter((c) => c[4] + c[5] > 0).length;
  const one = limits.length ? `The largest S that is safe for all ${plural(all.length, "tensor")} is 2^${Math.min(...limits)}.`
    : `S decides nothing for ${all.length === 1 ? "this tensor" : "these tensors"}.`;
  const most = lost[worst] > 0 ? `the most is flushed in ${names[worst]} (${percent(lost[worst])})` : "nothing is flushed";
  return `${one} At S = 2^${k}, ${over ? `${over} of ${all.length} overflow` : "none overflows"}, and ${most}.`;
}

// Every text, by data-field; the twin of LossScaleLab.result().
export function texts(state, formats, book) {
  const f = formats[state.format], edges = book.edges[state.format], k = state.log2_scale;
  const all = book.tensors[state.stage], t = all[book.names.indexOf(state.tensor)], hidden = state.phase === "predict";
  const out = { device: book.device, score: state.phase === "revealed" ? score(t, edges, state) : "" };
  out.verdict = hidden ? "Set S to the largest power of two that you think is safe, and the share that you expect it to "
    + "flush. Then press Reveal." : verdict(t, f, edges, k);
  const now = fates(t, edges, k), one = fates(t, edges, 0);
  FATES.forEach((fate, i) => {
    out[`${fate}-one`] = hidden ? HIDDEN : percent(one[i] / t.total);
    out[`${fate}-now`] = hidden ? HIDDEN : percent(now[i] / t.total);
    out[`${fate}-count`] = hidden ? HIDDEN : String(now[i]);
  });
  all.forEach((other, i) => {
    const counts = fates(other, edges, k);
    out[`t${i}-flushed`] = hidden ? HIDDEN : percent(counts[1] / other.total);
    out[`t${i}-overflowed`] = hidden ? HIDDEN : percent(counts[4] / other.total);
    out[`t${i}-safe`] = hidden ? HIDDEN : safeText(other, edges);
  });
  out.stage = hidden ? HIDDEN : stageVerdict(all, book.names, edges, k);
  return out;
}

// Per occupied binade: its exponent and its elements by fate (flushed, subnormal, normal, overflowed) at S = 2^k.
export function bars(t, edges, k) {
  const limits = shifted(edges, k).map(t.beyond), out = [];
  for (let b = t.bottom; b <= t.top; b++) {
    const most = t.atLeast(b), least = t.atLeast(b + 1);
    const cut = [most, ...limits, least].map((n) => Math.min(Math.max(n, least), most));
    if (most > least) out.push([b, [0, 1, 2, 3].map((i) => cut[i] - cut[i + 1])]);
  }
  return out;
}

const COLOURS = ["var(--mpl-lost)", "var(--mpl-sub)", "var(--mpl-norm)", "var(--mpl-over)"];

// The hatching of what is lost, so that colour is not alone in saying it.
function hatches(ids) {
  const stripes = (id, angle, colour, line) => svg("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse",
    patternTransform: `rotate(${angle})` }, svg("rect", { width: 5, height: 5, fill: colour, "fill-opacity": line ? 1 : 0.35 }),
  svg("rect", { width: 2, height: 5, fill: line ?? colour }));
  return svg("defs", {}, stripes(ids[0], 45, COLOURS[0], null), stripes(ids[3], -45, COLOURS[3], "var(--mpl-bg)"));
}

function zones(f, edges, book, x, top, bottom) {
  const at = edges.map(([threshold, binade]) => binade + Math.log2(book.fractions[threshold]));
  const ends = [LOW, ...at, HIGH].map((v) => Math.min(Math.max(v, LOW), HIGH)), words = ["flushed", "subnormal", "normal", "overflow"];
  return words.flatMap((word, i) => {
    const a = x(ends[i]), b = x(ends[i + 1]), parts = [];
    if (b <= a) return parts;
    parts.push(svg("rect", { x: a, width: b - a, y: top, height: bottom - top, fill: COLOURS[i], "fill-opacity": 0.13 }));
    if (ends[i] > LOW) parts.push(svg("line", { x1: a, x2: a, y1: top, y2: bottom, stroke: "var(--mpl-edge)" }));
    const wide = b - a > 7 * word.length + 6, y = wide ? top - 6 : top - 20;
    if (!wide) parts.push(svg("line", { x1: (a + b) / 2, x2: (a + b) / 2, y1: y + 3, y2: top, stroke: "var(--mpl-edge)" }));
    parts.push(svg("text", { x: (a + b) / 2, y, "text-anchor": "middle", class: "mpl-quiet" }, word));
    return parts;
  });
}

function axis(x, left, right, bottom, height) {
  const parts = [], every = right - left < 400 ? 16 : 8;
  for (let e = Math.ceil(LOW / every) * every; e <= HIGH; e += every) {
    parts.push(svg("line", { x1: x(e), x2: x(e), y1: bottom, y2: bottom + 4, stroke: "var(--mpl-edge)" }),
      svg("text", { x: x(e), y: bottom + 17, "text-anchor": "middle", class: "mpl-quiet" }, String(e)));
  }
  return [...parts, svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "var(--mpl-edge)" }),
    svg("text", { x: (left + right) / 2, y: height - 3, "text-anchor": "middle", class: "mpl-quiet" },
      "log2 of |gradient| \u00d7 S")];
}

// Where the histogram lay before it was scaled.
function outline(found, x, y, bottom) {
  const path = found.flatMap(([b, counts], i) => [i && found[i - 1][0] === b - 1 ? "" : `M${x(b)} ${bottom}`,
    `V${y(counts).toFixed(1)}H${x(b + 1).toFixed(1)}`, found[i + 1]?.[0] === b + 1 ? "" : `V${bottom}`]);
  return svg("path", { d: path.join(""), fill: "none", stroke: "var(--mpl-muted)", "stroke-width": 1.5, "stroke-dasharray": "3 2" });
}

const MARGIN = 8, TOP = 40;
const binadeWidth = (width) => (width - 2 * MARGIN) / (HIGH - LOW);

function picture({ t, f, edges, k, hidden }, book, ids, width, height) {
  const left = MARGIN, right = width - MARGIN, bottom = height - 38, step = binadeWidth(width);
  const x = (v) => left + (v - LOW) * step, gap = step < 5 ? 0 : 1, found = bars(t, edges, k);
  const tallest = found.reduce((most, [, counts]) => Math.max(most, counts.reduce((a, b) => a + b)), 1);
  const high = (n) => (n ? Math.max((n / tallest) * (bottom - TOP - 18), 2) : 0);
  const parts = [hatches(ids), ...zones(f, edges, book, x, TOP, bottom), ...axis(x, left, right, bottom, height)];
  const shift = hidden ? 0 : k, shown = (b) => b >= LOW && b < HIGH;
  for (const [b, counts] of found) {
    const at = b + shift;
    let y = bottom;
    counts.forEach((n, i) => {
      if (!shown(at) || !n) return;
      y -= high(n);
      parts.push(svg("rect", { x: x(at) + gap / 2, width: step - gap, y, height: high(n),
        fill: hidden ? "var(--mpl-accent)" : i === 0 || i === 3 ? `url(#${ids[i]})` : COLOURS[i] }));
    });
  }
  if (shift) parts.push(outline(found.filter(([b]) => shown(b)), x, (counts) => bottom - high(counts.reduce((a, c) => a + c)), bottom));
  const outside = (side) => found.filter(([b]) => side(b + shift)).flatMap((p) => p[1]).reduce((a, b) => a + b, 0);
  const [under, over] = [outside((b) => b < LOW), outside((b) => b >= HIGH)];
  const note = (at, anchor, text) => svg("text", { x: at, y: TOP + 14, "text-anchor": anchor }, text);
  if (under) parts.push(note(left + 4, "start", `\u2190 ${percent(under / t.total)} further left`));
  if (over) parts.push(note(right - 4, "end", `${percent(over / t.total)} further right \u2192`));
  return parts;
}

function shareTable() {
  const found = {}, shares = {}, rows = FATES.map((fate, i) => {
    // The style sheet leaves zeros blank, for the one bar of the windows; here they have a bar of their own.
    const style = fate === "zero" ? "background: var(--mpl-edge)" : "";
    const swatch = h("span", { class: `mpl-swatch mpl-share-${fate}`, style });
    const row = h("tr", {}, h("th", { scope: "row" }, swatch, FATE_NAMES[i]));
    for (const column of ["one", "now", "count"]) {
      row.append(found[`${fate}-${column}`] = h("td", { "data-field": `${fate}-${column}` }));
    }
    shares[fate] = h("span", { class: `mpl-share mpl-share-${fate}`, style });
    row.append(h("td", { class: "mpl-bar-cell" }, h("span", { class: "mpl-bar", "aria-hidden": "true" }, shares[fate])));
    return row;
  });
  const node = table("Shares of all elements of the tensor", ["What becomes of them", "S = 1", "this S", "elements", "share at this S"], rows);
  return { node, found, shares };
}

function stageTable(names) {
  const found = {}, rows = names.map((name, i) => {
    const row = h("tr", {}, h("th", { scope: "row" }, name));
    for (const column of ["flushed", "overflowed", "safe"]) {
      row.append(found[`t${i}-${column}`] = h("td", { "data-field": `t${i}-${column}` }));
    }
    return row;
  });
  const node = table("All tensors of this stage at the same S", ["Tensor", "Flushed", "Overflowed", "Largest safe S"], rows);
  node.classList.add("mpl-tall");
  return { node, found, rows };
}

// The recordings as the drawing wants them.
export function bookOf(model) {
  const { stages, names, tensors, fractions, edges } = model.get("recordings");
  const sorted = Object.fromEntries(stages.map((stage, i) => [stage, tensors[i].map(opened)]));
  return { stages, names, fractions, edges, tensors: sorted, device: model.get("device") };
}

function render({ model, el }) {
  let book = bookOf(model);
  const formats = formatsOf(model), ids = [0, 1, 2, 3].map(() => uid("hatch"));
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  // A new question starts a new guess.
  const ask = (changes) => set(model.get("phase") === "revealed" ? { ...changes, phase: "predict", log2_scale: 0 } : changes);
  const named = (names) => names.map((name) => [name, name]);
  const stage = select("Training stage", named(book.stages), (v) => ask({ stage: v }));
  const tensor = select("Tensor", named(book.names), (v) => ask({ tensor: v }));
  const format = select("Format", Object.entries(formats).map(([k, f]) => [k, f.title]),
    (v) => ask({ format: v }));
  const scale = slider("Loss scale S", { min: SMALLEST, max: LARGEST, name: "log2_scale" }, (v) => `2^${v}`,
    (v) => set({ log2_scale: v }));
  const expected = slider("Share that you expect it to flush", { min: 0, max: 100, name: "expected" }, (v) => `${v} %`,
    (v) => set({ expected: v }));
  const predict = button("Predict first", () => set(model.get("phase") === "off" ? { phase: "predict", log2_scale: 0 }
    : { phase: "off" }), { "data-action": "predict" });
  const reveal = button("Reveal", () => set(model.get("phase") === "predict"
    ? { phase: "revealed", guess: model.get("log2_scale") } : { phase: "predict", log2_scale: 0 }), { "data-action": "reveal" });
  const say = (field) => h("output", { class: "mpl-say", "data-field": field, "aria-live": "polite" });
  const said = { verdict: say("verdict"), score: say("score"), stage: say("stage"),
    device: h("p", { class: "mpl-muted", "data-field": "device" }) };
  const shares = shareTable(), others = stageTable(book.names), picked = drawing(270, () => paint());
  const root = frame({ model, el, kind: "loss-scale-lab", title: "Loss-scale lab",
    hint: "Multiply the loss by S, and every gradient moves right by log2 S. Drag the histogram, or move the slider." },
  h("div", { class: "mpl-controls" }, stage.node, format.node), tensor.node, scale.node,
  h("div", { class: "mpl-row" }, predict, reveal), expected.node, picked.node,
  said.verdict, said.score, shares.node, said.stage, others.node, said.device);
  picked.node.classList.add("mpl-grab");
  let held = null;
  picked.node.addEventListener("pointerdown", (event) => {
    held = { x: event.clientX, scale: model.get("log2_scale") };
    picked.node.setPointerCapture(event.pointerId);
  });
  picked.node.addEventListener("pointermove", (event) => {
    if (event.buttons !== 1 || !held) return;
    const moved = held.scale + Math.round((event.clientX - held.x) / binadeWidth(picked.node.clientWidth));
    const next = Math.min(Math.max(moved, SMALLEST), LARGEST);
    if (next !== model.get("log2_scale")) set({ log2_scale: next });
  });
  const tell = (words) => {
    for (const [key, text] of Object.entries(words)) write(said[key] ?? shares.found[key] ?? others.found[key], text);
  };
  const kernel = live({ model, after: said.verdict, keys: KEYS, show: tell });
  const paint = () => {
    const now = state(), hidden = now.phase === "predict", f = formats[now.format], edges = book.edges[now.format];
    const index = book.names.indexOf(now.tensor), t = book.tensors[now.stage][index], k = now.log2_scale;
    for (const [control, key] of [[stage, "stage"], [tensor, "tensor"], [format, "format"], [scale, "log2_scale"],
      [expected, "expected"]]) control.show(now[key]);
    expected.node.hidden = expected.field.disabled = !hidden;
    predict.setAttribute("aria-pressed", now.phase === "off" ? "false" : "true");
    reveal.hidden = now.phase === "off";
    reveal.textContent = hidden ? "Reveal" : "Guess again";
    const words = texts(now, formats, book);
    tell(words);
    said.score.hidden = words.score === "";
    said.stage.hidden = hidden;
    const counts = fates(t, edges, k);
    FATES.forEach((fate, i) => { shares.shares[fate].style.width = hidden ? 0 : `${(100 * counts[i] / t.total).toFixed(2)}%`; });
    others.rows.forEach((row, i) => row.classList.toggle("mpl-current", i === index));
    picked.show(hidden ? `The gradients as recorded, under the window of ${f.title}; the result is hidden.`
      : `The gradients times S under the window of ${f.title}. ${words.verdict}`,
    (width, height) => picture({ t, f, edges, k, hidden }, book, ids, width, height));
    kernel.changed();
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  const recorded = () => { book = bookOf(model); paint(); kernel.changed(true); };
  model.on("change:recordings", recorded);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { stage: oneOf(book.stages),
    tensor: oneOf(book.names), format: oneOf(Object.keys(formats)), log2_scale: whole(SMALLEST, LARGEST),
    phase: oneOf(["off", "predict", "revealed"]), guess: whole(SMALLEST, LARGEST), expected: whole(0, 100) })) });
  link.read();
  return () => { stop(); model.off("change:recordings", recorded); kernel.stop(); picked.stop(); link.stop(); };
}

export default { render };
