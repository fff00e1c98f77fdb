// The memory calculator: what each GPU must hold for a model, a regime and a sharding, beside every other regime.

import { significant } from "./text.js";
import { button, checked, drawing, facts, follow, frame, h, links, oneOf, paintFormat, select, slider, svg, whole, write } from "./ui.js";

const KEYS = ["model", "layers", "width", "vocabulary", "regime", "stage", "world", "batch", "sequence", "stored", "attention",
  "rank", "base", "gpu"];
const OWN = "own sizes";
const SEQUENCES = Array.from({ length: 11 }, (_, k) => 2 ** (k + 7));
const VOCABULARIES = [256, 32000, 50257, 128256];
const RANKS = [0, 4, 8, 16, 32, 64, 128];
const STORED = ["every activation", "layer inputs only"];
const ATTENTION = [["flash", "fused, nothing of size sequence squared"], ["full", "probabilities stored"]];
const STAGES = [["0", "none"], ["1", "ZeRO 1: optimizer state"], ["2", "ZeRO 2: gradients too"], ["3", "ZeRO 3, FSDP: weights too"]];
const BASES = [["bf16", "BF16"], ["nf4", "NF4, double quantization"]];
const ROW = 27;

// The model of a state; own sizes are a GPT with heads of 128 and no learned positions.
function shapeOf(state, models) {
  if (models[state.model]) return models[state.model];
  const hidden = 128 * state.width, inner = 4 * hidden, layers = state.layers, matrices = 12 * hidden * hidden;
  const layer = matrices + 13 * hidden, head = state.vocabulary * hidden;
  return { title: "A GPT of own sizes", layers, hidden, heads: state.width, vocabulary: state.vocabulary, inner, gated: false,
    fused: true, norm: "layer", positions: 0, groups: 1, widths: [hidden, hidden, hidden, hidden], latent: null, experts: null,
    parameters: head + layers * layer + 2 * hidden, matrices: layers * matrices, layer,
    adapter: layers * (4 * 2 * hidden + 2 * (hidden + inner)) };
}

// Bytes of a value in each role, on CUDA; the twin of memory.activations.widths.
function widthsOf(compute) {
  if (compute === "fp32") return { input: 4, value: 4, residual: 4, softmax: [4], castEach: false };
  const autocast = compute === "autocast" || compute === "fp8_autocast";
  return { input: compute.startsWith("fp8") ? 1 : 2, value: 2, residual: autocast ? 4 : 2,
    softmax: autocast ? [4, 2] : [2], castEach: compute === "autocast" };
}

const normBytes = (shape, size, width) => width * size + (shape.norm === "layer" ? 8 : 4);

function attentionBytes(shape, { sequence, attention }, w) {
  const [query, key, value, out] = shape.widths, low = shape.latent;
  const readers = shape.fused || !w.castEach ? 1 : low ? 2 : 3;
  let total = readers * w.input * shape.hidden;
  if (low) {
    total += normBytes(shape, low.query_rank, w.value) + w.input * low.query_rank + w.input * low.latent_rank
      + normBytes(shape, low.latent_rank + low.rotary_size, w.value);
  }
  total += w.value * (query + (attention === "full" ? shape.groups : 1) * (key + value));
  if (attention === "flash") return total + 4 * shape.heads + w.value * out + (w.input === w.value ? 0 : w.input * out);
  const stored = w.softmax[0] + (w.softmax.length > 1 ? w.softmax[1] : 0);
  return total + stored * shape.heads * sequence + w.input * out;
}

function mlpBytes(shape, inner, w) {
  return w.value * inner * (shape.gated ? 3 : 1) + w.input * inner;
}

// Bytes that one token leaves in one layer, for dense layers and for layers with experts.
function layerBytes(shape, options, w, dense) {
  const norms = 2 * normBytes(shape, shape.hidden, w.residual), around = norms + attentionBytes(shape, options, w);
  if (dense) {
    const readers = shape.gated && !shape.fused && w.castEach ? 2 : 1;
    return around + readers * w.input * shape.hidden + mlpBytes(shape, shape.inner, w);
  }
  const e = shape.experts;
  return around + w.input * shape.hidden + 4 * e.routed + w.input * e.active * shape.hidden
    + mlpBytes(shape, e.inner * (e.active + e.shared), w) + w.value * e.active * shape.hidden;
}

function term(...products) {
  const kept = products.filter(([width, count]) => width && count);
  return { bytes: Math.ceil(kept.reduce((sum, [width, count]) => sum + width * count, 0)),
    expression: kept.map(([width, count]) => `${width}*${count}`).join(" + ") };
}

function activations(shape, options, compute) {
  const w = widthsOf(compute), tokens = options.sequence * options.batch, dense = shape.experts ? shape.experts.dense_layers : 0;
  const ends = 8 + (shape.positions ? 8 : 0) + normBytes(shape, shape.hidden, w.residual) + w.value * shape.hidden;
  const first = layerBytes(shape, options, w, true), last = layerBytes(shape, options, w, !shape.experts);
  if (options.stored !== STORED[0]) {
    const kept = w.residual * shape.hidden;
    return term([kept, shape.layers * tokens], [Math.max(first, last) - kept, tokens], [ends, tokens]);
  }
  return term([first, dense * tokens], [last, (shape.layers - dense) * tokens], [ends, tokens]);
}

const LOGITS = { fp32: 16, autocast: 14, fp8_autocast: 14, bf16: 8, fp8: 8 };

// The bill of one GPU by term; the twin of memory.training_memory.
export function bill(shape, r, options, nf4) {
  const { stage, batch, sequence } = options, world = 2 ** options.world;
  const shard = (n, from) => (stage >= from ? Math.ceil(n / world) : n);
  const adapters = options.rank * shape.adapter, base = options.base === "nf4" ? nf4 : 2, head = shape.vocabulary * shape.hidden;
  const trained = adapters || shape.parameters, matrices = adapters || shape.matrices;
  let temporary = { autocast: matrices + (adapters ? 0 : head), fp8_autocast: adapters ? 0 : head }[r.compute] ?? 0;
  temporary = [2, temporary];
  if (stage === 3) {
    temporary = [adapters ? base : (r.compute === "fp32" ? 4 : Math.min(r.weights, 2)) + r.copies, 2 * shape.layer];
  }
  const none = term(), compute = adapters && r.compute === "autocast" ? "bf16" : r.compute;
  const terms = {
    weights: term([base, adapters ? shard(shape.parameters, 3) : 0], [r.weights, shard(trained, 3)]),
    gradients: term([r.gradients, shard(trained, 2)], [r.accumulated, shard(trained, 2)]),
    masters: term([r.master, shard(trained, 1)]),
    moments: term([r.moments, shard(trained, 1)]),
    copies: term([stage < 3 ? r.copies : 0, matrices]),
    activations: batch ? activations(shape, options, compute) : none,
    logits: batch ? term([LOGITS[r.compute], batch * sequence * shape.vocabulary]) : none,
    temporary: term(temporary),
  };
  const total = Object.values(terms).reduce((sum, { bytes }) => sum + bytes, 0);
  const formula = Object.values(terms).filter(({ bytes }) => bytes).map(({ expression }) => expression).join(" + ");
  return { terms, total, formula, adapters };
}

const gigabytes = (n) => `${significant(n / 1e9, 4)} GB`;
const inOrder = (table) => Object.entries(table).sort((a, b) => a[1].rank - b[1].rank);

// Every text, by data-field; the twin of MemoryCalculator.result().
export function texts(found, state, tables) {
  const { shape, bills } = found, mine = bills[state.regime], r = tables.regimes[state.regime], gpu = tables.gpus[state.gpu];
  const count = state.stage ? `each of ${2 ** state.world} GPUs` : "one GPU";
  const answer = mine.total <= gpu.capacity ? `fits into the ${gpu.title}` : `does not fit into the ${gpu.title}`;
  const held = inOrder(tables.gpus).filter(([, g]) => mine.total <= g.capacity).map(([, g]) => g.title);
  const per = [[r.weights, "weights"], [r.gradients, "gradients"], [r.accumulated, "accumulated"], [r.master, "masters"],
    [r.moments, "moments"]];
  const parts = per.filter(([n]) => n).map(([n, word]) => `${significant(n, 6)} ${word}`).join(" + ");
  const trained = mine.adapters ? `, ${significant(mine.adapters / 1e6, 4)} million of them in adapters` : "";
  const refused = state.rank && !mine.adapters ? ` LoRA is not counted for ${shape.title}.` : "";
  const out = Object.fromEntries(Object.entries(mine.terms).map(([name, { bytes }]) => [name, gigabytes(bytes)]));
  return { ...out,
    verdict: `${shape.title} takes ${gigabytes(mine.total)} on ${count}: it ${answer}.${refused}`,
    parameters: `${significant((shape.parameters + mine.adapters) / 1e9, 4)} billion${trained}`,
    convention: `${significant(r.total, 6)} bytes a trained parameter: ${parts}`,
    total: gigabytes(mine.total),
    held: held.join(", ") || "none of these",
    formula: mine.formula,
  };
}

// The bills of all regimes for a state.
export function compute(state, tables) {
  const shape = shapeOf(state, tables.models);
  const bills = Object.fromEntries(inOrder(tables.regimes).map(([name, r]) => [name, bill(shape, r, state, tables.nf4)]));
  return { shape, bills };
}

function picture({ bills }, state, tables, width, height) {
  const left = 4, right = width - 8, top = 30, names = Object.keys(bills), gpu = tables.gpus[state.gpu];
  const most = Math.max(gpu.capacity * 1.15, ...Object.values(bills).map((b) => b.total));
  const x = (bytes) => left + (bytes / most) * (right - left), parts = [], bottom = top + names.length * ROW;
  const outlines = Object.fromEntries(tables.terms.map(({ name }) => [name, ""]));
  names.forEach((name, i) => {
    const y = top + i * ROW, chosen = name === state.regime, { terms, total } = bills[name];
    if (chosen) parts.push(svg("rect", { x: 0, y: y - 1, width, height: ROW, fill: "var(--mpl-panel)", stroke: "var(--mpl-edge)" }));
    const style = chosen ? "font-weight: 650" : "";
    parts.push(svg("text", { x: left, y: y + 11, style, class: chosen ? "" : "mpl-quiet" }, name),
      svg("text", { x: right, y: y + 11, "text-anchor": "end", style, class: chosen ? "" : "mpl-quiet" }, gigabytes(total)));
    let at = 0;
    for (const { name: part } of tables.terms) {
      const { bytes } = terms[part];
      if (!bytes) continue;
      outlines[part] += `M${x(at)} ${y + 15}h${Math.max(x(at + bytes) - x(at) - 1, 0.5)}v8H${x(at)}z`;
      at += bytes;
    }
  });
  for (const term of tables.terms) {  // one path a term: fewer nodes than one rectangle a part
    const path = svg("path", { d: outlines[term.name], fill: "var(--mpl-format)" });
    if (outlines[term.name]) parts.push(paintFormat(path, term));
  }
  const line = x(gpu.capacity), late = line > (left + right) / 2;
  parts.push(svg("line", { x1: line, x2: line, y1: top - 8, y2: bottom, stroke: "var(--mpl-fg)", "stroke-width": 1.5,
    "stroke-dasharray": "5 4" }),
  svg("text", { x: line, y: 14, "text-anchor": late ? "end" : "start" }, gpu.title));
  for (const share of [0, 0.5, 1]) {
    parts.push(svg("text", { x: x(share * most), y: height - 4, class: "mpl-quiet",
      "text-anchor": ["start", "middle", "end"][share * 2] }, `${significant((share * most) / 1e9, 2)} GB`));
  }
  return parts;
}

function termTable(terms) {
  const found = {}, body = h("tbody", {});
  for (const { name, colours } of terms) {
    found[name] = h("td", { "data-field": name });
    body.append(h("tr", {}, h("th", { scope: "row" }, paintFormat(h("span", { class: "mpl-name" }, name), { colours })), found[name]));
  }
  found.total = h("td", { "data-field": "total" });
  body.append(h("tr", { class: "mpl-current" }, h("th", { scope: "row" }, "total"), found.total));
  const heads = h("tr", {}, ...["Term", "On one GPU"].map((text) => h("th", { scope: "col" }, text)));
  return { node: h("table", {}, h("caption", {}, "The bill of the marked regime"), h("thead", {}, heads), body), found };
}

function render({ model, el }) {
  const tables = model.get("tables"), regimes = inOrder(tables.regimes), names = regimes.map(([name]) => name);
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const models = [...inOrder(tables.models).map(([k, m]) => [k, m.title]), [OWN, "A GPT of own sizes"]];
  const gpus = inOrder(tables.gpus).map(([k, g]) => [k, g.title]);
  const choices = { model: ["Model", models], regime: ["Regime", names.map((n) => [n, n])], gpu: ["GPU", gpus],
    stage: ["Sharding", STAGES, Number], stored: ["Forward pass keeps", STORED.map((s) => [s, s])],
    attention: ["Attention", ATTENTION], base: ["Frozen base in", BASES] };
  const lists = Object.fromEntries(Object.entries(choices).map(([key, [label, options, read = String]]) =>
    [key, select(label, options, (v) => set({ [key]: read(v) }))]));
  const along = (label, key, values) => {
    const control = slider(label, { min: 0, max: values.length - 1, name: key }, (i) => String(values[i]), (i) => set({ [key]: values[i] }));
    return { ...control, show: (v) => control.show(values.indexOf(v)) };
  };
  const between = (label, key, min, max, text = String) => slider(label, { min, max, name: key }, text, (v) => set({ [key]: v }));
  const ranges = {
    world: between("GPUs", "world", 1, 13, (k) => String(2 ** k)),
    batch: between("Sequences a GPU", "batch", 0, 64), sequence: along("Tokens a sequence", "sequence", SEQUENCES),
    rank: along("LoRA rank (0: train all)", "rank", RANKS), layers: between("Layers", "layers", 1, 128),
    width: between("Width", "width", 1, 128, (k) => String(128 * k)), vocabulary: along("Vocabulary", "vocabulary", VOCABULARIES),
  };
  const said = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const list = facts([["parameters", "Parameters"], ["convention", "States"], ["held", "Fits into"]]);
  const formula = h("output", { class: "mpl-formula", "data-field": "formula" });
  const copied = h("span", { role: "status", class: "mpl-muted" });
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(formula.textContent);
      copied.textContent = "Formula copied.";
    } catch {
      getSelection().selectAllChildren(formula);
      copied.textContent = "The clipboard is not available: the formula is selected, copy it from there.";
    }
  };
  const table = termTable(tables.terms), bars = drawing(48 + ROW * names.length, () => paint());
  const order = ["model", "regime", "gpu", "stage", "world", "batch", "sequence", "stored", "attention", "rank", "base", "layers",
    "width", "vocabulary"];
  const root = frame({ model, el, kind: "memory-calculator", title: "Memory calculator",
    hint: "Choose a model and a way to train it. Every bar is one regime; the dashed line is what the GPU holds." },
  h("div", { class: "mpl-controls" }, ...order.map((key) => (lists[key] ?? ranges[key]).node)), said, bars.node,
  h("div", { class: "mpl-side" }, table.node, list.node),
  h("p", { class: "mpl-muted" }, "Bytes, as width times count, term by term:"), formula,
  h("div", { class: "mpl-row" }, button("Copy formula", copy, { "data-action": "copy-formula" }), copied));
  bars.node.classList.add("mpl-pick");
  bars.node.setAttribute("role", "application");
  bars.node.setAttribute("tabindex", "0");
  bars.node.addEventListener("pointerdown", (event) => {
    const box = bars.node.getBoundingClientRect(), row = Math.floor((event.clientY - box.top - 30) / ROW);
    if (names[row]) set({ regime: names[row] });
  });
  bars.node.addEventListener("keydown", (event) => {
    const move = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const row = names.indexOf(model.get("regime")) + move;
    if (names[row]) set({ regime: names[row] });
  });
  const paint = () => {
    const now = state(), found = compute(now, tables), words = texts(found, now, tables), experts = Boolean(found.shape.experts);
    for (const [key, control] of [...Object.entries(lists), ...Object.entries(ranges)]) control.show(now[key]);
    for (const key of ["layers", "width", "vocabulary"]) ranges[key].field.disabled = now.model !== OWN;
    ranges.world.field.disabled = now.stage === 0;
    ranges.sequence.field.disabled = lists.stored.field.disabled = lists.attention.field.disabled = now.batch === 0;
    ranges.rank.field.disabled = experts;
    lists.base.field.disabled = experts || now.rank === 0;
    bars.show(`Bars, one for each way to train. Marked: ${now.regime}. ${words.verdict} Up and down arrows mark another.`,
      (width, height) => picture(found, now, tables, width, height));
    for (const [key, text] of Object.entries(words)) write(table.found[key] ?? list.values[key] ?? (key === "formula" ? formula : said), text);
    copied.textContent = "";
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const listed = (values) => (text) => (values.map(String).includes(text) ? Number(text) : undefined);
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { model: oneOf(models.map((m) => m[0])),
    layers: whole(1, 128), width: whole(1, 128), vocabulary: listed(VOCABULARIES), regime: oneOf(names), stage: whole(0, 3),
    world: whole(1, 13), batch: whole(0, 64), sequence: listed(SEQUENCES), stored: oneOf(STORED),
    attention: oneOf(ATTENTION.map((a) => a[0])), rank: listed(RANKS), base: oneOf(BASES.map((b) => b[0])),
    gpu: oneOf(gpus.map((g) => g[0])) })) });
  link.read();
  return () => { stop(); bars.stop(); link.stop(); };
}

export default { render };
