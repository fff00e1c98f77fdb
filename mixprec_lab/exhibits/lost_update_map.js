// The lost-update map: which updates a weight of each size notices, and 200 steps of one weight.

import { exponentOf, mulberry32, neighbours, pow2, quantize, ulp } from "./float.js";
import { percent, powerForm, significant } from "./text.js";
import { checked, drawing, facts, follow, formatsOf, frame, h, links, live, oneOf, paintFormat, select, slider, svg, uid, whole,
  write } from "./ui.js";

const KEYS = ["format", "method", "weight", "rate", "place", "direction", "shows", "seed"];
const METHODS = [["nearest", "nearest"], ["stochastic", "stochastic"], ["kahan", "Kahan"], ["fp32_master", "FP32 master"]];
const PLACES = [["first", "1 \u00d7 size"], ["middle", "1.5 \u00d7 size"], ["last", "below 2 \u00d7 size"]];
const DIRECTIONS = [["away", "grows"], ["toward", "shrinks"]];
const SHOWS = [["lost", "lost for good"], ["unmoved", "unmoved by one"]];
const LOW = -20, HIGH = 3, STEPS = 200;
const RATES = [8, 7, 6, 5, 4, 3, 2].flatMap((e) => [1, 2, 5].map((d) => `${d}e-${e}`)).concat("1e-1");

const nearest = (x, f) => quantize(x, f, "nearest_even", "native");

// The update of a learning rate: an optimizer computes it in FP32.
export const updateOf = (rate) => Math.fround(Number(rate));

// The stored weight before and after each of n equal updates; the twin of mixprec_lab.master_weights.simulate_weight.
export function simulate(start, u, n, f, method, seed) {
  const path = new Float64Array(n + 1).fill(start), random = mulberry32(seed);
  let held = start, owed = 0;
  for (let i = 1; i <= n; i++) {
    if (method === "fp32_master") {
      held = Math.fround(held + u);
      path[i] = nearest(held, f);
      continue;
    }
    const before = held, wanted = u + owed;
    held = method === "stochastic" ? quantize(before + u, f, "stochastic", "native", random()) : nearest(before + wanted, f);
    if (method === "kahan") owed = nearest(wanted - (held - before), f);
    path[i] = held;
  }
  return path;
}

// Where the compensation of an unmoved weight ends when updates u > 0 keep coming: there they are below half its gap.
export function stalledCompensation(u, f) {
  if (u <= f.smallest / 2) return 0;
  const binade = exponentOf(u), up = u > pow2(binade) ? 1 : 0;
  return pow2(binade + up + f.mantissa_bits + 1);
}

// Whether updates u leave the state of the weight w for ever as it is; sign: 1 away from zero, -1 toward it.
function isLost(w, sign, u, f, method) {
  if (method === "stochastic") return false;
  if (method === "fp32_master") return Math.fround(w + sign * u) === w;
  return nearest(w + sign * (method === "kahan" ? u + stalledCompensation(u, f) : u), f) === w;
}

// The gap between the positive weight w and its neighbour on one side.
const gapBeside = (w, sign, f) =>
  (sign < 0 && w > f.smallest_normal && w === pow2(exponentOf(w)) ? ulp(w, f) / 2 : ulp(w, f));

// The chance that one update leaves the stored weight as it is.
function unmovedChance(w, sign, u, f, method) {
  if (method === "stochastic") return Math.max(0, 1 - u / gapBeside(w, sign, f));
  return nearest(method === "fp32_master" ? Math.fround(w + sign * u) : w + sign * u, f) === w ? 1 : 0;
}

// The values of f in [2^k, 2^(k+1)): the first, their gap, their number (0 where f has none).
export function weightsOf(k, f) {
  const first = pow2(k), gap = ulp(first, f);
  if (first < f.smallest || first > f.largest) return { first, gap, n: 0 };
  return { first, gap, n: (Math.min(2 * first, f.largest + gap) - first) / gap };
}

// The share of the weights of one binade, in both directions, that an update loses or leaves unmoved; NaN for none.
// One weight speaks for all of its kind: only the first of a binade, odd last bits and even ones differ.
export function share(k, u, f, method, shows) {
  const { first, gap, n } = weightsOf(k, f), measure = shows === "lost" ? isLost : unmovedChance;
  if (n === 0) return NaN;
  let total = 0;
  for (const [i, count] of [[0, 1], [1, Math.ceil((n - 1) / 2)], [2, Math.floor((n - 1) / 2)]]) {
    if (count > 0) for (const sign of [1, -1]) total += count * measure(first + i * gap, sign, u, f, method);
  }
  return total / (2 * n);
}

// Every number for a state.
export function compute(state, formats) {
  const f = formats[state.format], u = updateOf(state.rate), sign = state.direction === "away" ? 1 : -1;
  const { first, gap, n } = weightsOf(state.weight, f);
  if (n === 0) return { f, u, sign, n };
  const start = first + gap * { first: 0, middle: Math.floor(n / 2), last: n - 1 }[state.place];
  const path = simulate(start, sign * u, STEPS, f, state.method, state.seed);
  return { f, u, sign, n, start, path, gap: gapBeside(start, sign, f), lost: isLost(start, sign, u, f, state.method) };
}

function verdict({ f, u, sign, n, start, path, gap, lost }, { method, rate }) {
  if (n === 0) return `${f.title} has no weight of this size: its values reach from ${powerForm(f.smallest)} to ${significant(f.largest, 6)}.`;
  const end = path[STEPS], at = significant(end, 7);
  if (!Number.isFinite(end)) return `The weight leaves the range of ${f.title} after ${path.findIndex((w) => !Number.isFinite(w))} updates.`;
  if (path.every((w) => w === start)) {
    if (lost) return `Lost: the weight stays at ${at}, however often an update of ${rate} comes.`;
    if (method === "stochastic") return `Not moved yet, and nothing is lost: every update moves the weight with a chance of ${percent(u / gap)}.`;
    return `Not moved yet, and nothing is lost: ${method === "kahan" ? "the compensation" : "the FP32 master"} holds what is missing.`;
  }
  if (method === "nearest" && nearest(end + sign * u, f) === end) {
    return `Moves to ${at} in ${path.indexOf(end)} updates and stalls there.`;
  }
  return `Moves to ${at}: ${significant((100 * (end - start)) / (sign * STEPS * u), 4)} % of the way that ${STEPS} exact updates go.`;
}

// Bytes that a weight costs: itself, and what the method keeps beside it.
function bytes(f, method) {
  const own = f.storage_bits / 8, more = { kahan: own, fp32_master: 4 }[method] ?? 0;
  return more ? `${own + more} (${own} + ${more})` : String(own);
}

// Every text, by data-field; the twin of LostUpdateMap.result().
export function texts(found, state) {
  const { f, u, sign, n, start, path, gap } = found, none = "\u2014";
  const part = (shows) => percent(share(state.weight, u, f, state.method, shows));
  return {
    verdict: verdict(found, state),
    lost: part("lost") + (n ? (state.method === "stochastic" ? " on average" : " for good") : ""),
    unmoved: part("unmoved") + (n ? " by one update" : ""),
    start: n ? significant(start, 7) : none,
    end: n ? significant(path[STEPS], 7) : none,
    exact: n ? significant(start + sign * STEPS * u, 7) : none,
    gap: n ? powerForm(gap) : none,
    update: n ? `${significant(u / gap, 3)} gaps` : none,
    bytes: bytes(f, state.method),
  };
}

// The middle of the cells that `keep` accepts, for a word in a region; null for a region too small for one.
function middle(cells, keep) {
  const kept = cells.filter((c) => keep(c.part));
  if (kept.length < 20) return null;
  return [0, 1].map((axis) => kept.reduce((sum, c) => sum + c.at[axis], 0) / kept.length);
}

const frameOf = (width, height) => ({ left: 46, right: width - 6, top: 26, bottom: height - 72 });

function mapPicture(state, f, width, height, hatch) {
  const { left, right, top, bottom } = frameOf(width, height);
  const columns = HIGH - LOW + 1, rows = RATES.length, w = (right - left) / columns, dy = (bottom - top) / rows;
  const x = (k) => left + (k - LOW) * w, y = (row) => bottom - (row + 1) * dy;
  const heat = paintFormat(svg("g", { "shape-rendering": "crispEdges" }), f), cells = [], parts = [];
  for (let row = 0; row < rows; row++) {
    let from = LOW, held = null;
    for (let k = LOW; k <= HIGH + 1; k++) {
      const part = k > HIGH ? null : share(k, updateOf(RATES[row]), f, state.method, state.shows);
      if (part !== null) cells.push({ part, at: [x(k) + w / 2, y(row) + dy / 2] });
      if (k > LOW && !Object.is(part, held)) { // one rectangle for neighbours that look alike
        heat.append(svg("rect", { x: x(from), y: y(row), width: (k - from) * w, height: dy,
          fill: held === held ? "var(--mpl-format)" : `url(#${hatch})`, "fill-opacity": held === held ? held : 1 }));
        from = k;
      }
      held = part;
    }
  }
  parts.push(heat, svg("rect", { x: left, y: top, width: right - left, height: bottom - top, fill: "none", stroke: "var(--mpl-edge)" }));
  const word = (at, text, fill) => at && parts.push(svg("text", { x: at[0], y: at[1] + 4, "text-anchor": "middle",
    style: `font-size: 14px; font-weight: 650; fill: ${fill}` }, text));
  const [most, least] = state.shows === "lost" ? ["lost", "kept"] : ["unmoved", "moved"];
  word(middle(cells, (p) => p > 0.9), most, "var(--mpl-bg)");
  word(middle(cells, (p) => p < 0.1), least, "var(--mpl-fg)");
  for (let k = LOW; k <= HIGH; k += 4) {
    parts.push(svg("text", { x: x(k) + w / 2, y: bottom + 16, "text-anchor": "middle", class: "mpl-quiet" }, String(k)));
  }
  RATES.forEach((rate, row) => rate[0] === "1" && parts.push(svg("text", { x: left - 6, y: y(row) + dy / 2 + 4,
    "text-anchor": "end", class: "mpl-quiet" }, rate)));
  parts.push(svg("text", { x: 2, y: 14, class: "mpl-quiet" }, "learning rate = size of the update"),
    svg("text", { x: (left + right) / 2, y: bottom + 31, "text-anchor": "middle", class: "mpl-quiet" }, "log2 |w|"));
  const row = RATES.indexOf(state.rate), box = { x: x(state.weight), y: y(row), width: w, height: dy, fill: "none" };
  parts.push(svg("rect", { ...box, stroke: "var(--mpl-bg)", "stroke-width": 5 }),
    svg("rect", { ...box, stroke: "var(--mpl-fg)", "stroke-width": 2 }));
  return [...parts, ...legend(f, width, height, hatch)];
}

function legend(f, width, height, hatch) {
  const y = height - 26, step = 16, group = paintFormat(svg("g", {}), f);
  [0, 0.25, 0.5, 0.75, 1].forEach((part, i) => group.append(svg("rect", { x: 46 + i * step, y, width: step, height: 12,
    fill: "var(--mpl-format)", "fill-opacity": part, stroke: "var(--mpl-edge)" })));
  const at = 46 + 5 * step, text = (x, words) => svg("text", { x, y: y + 10, class: "mpl-quiet" }, words);
  group.append(svg("text", { x: 40, y: y + 10, "text-anchor": "end", class: "mpl-quiet" }, "0 %"), text(at + 6, "100 %"),
    svg("rect", { x: at + 64, y, width: 22, height: 12, fill: `url(#${hatch})`, stroke: "var(--mpl-edge)" }),
    text(at + 92, width < 480 ? `no such ${f.title}` : `no such weight in ${f.title}`));
  const lines = svg("pattern", { id: hatch, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("line", { x1: 0, x2: 0, y1: 0, y2: 6, stroke: "var(--mpl-edge)", "stroke-width": 2, "stroke-opacity": 0.6 }));
  return [svg("defs", {}, lines), group];
}

// The values of f between two numbers, at most 12; none if there are more.
function rungs(low, high, f) {
  const values = [];
  for (let v = quantize(low, f, "up"); v !== null && v <= high && Number.isFinite(v); v = neighbours(v, f)[1]) {
    if (values.push(v) > 12) return [];
  }
  return values;
}

function pathPicture({ f, u, sign, n, start, path }, width, height) {
  const left = 70, right = width - 12, top = 22, bottom = height - 34;
  const title = svg("text", { x: 2, y: 12, class: "mpl-quiet" }, "change of the stored weight");
  if (n === 0) return [title];
  const changes = Array.from(path, (w) => w - start).filter(Number.isFinite), goal = sign * STEPS * u;
  const low = Math.min(...changes, goal), high = Math.max(...changes, goal);
  const x = (i) => left + (i / STEPS) * (right - left), y = (c) => bottom - ((c - low) / (high - low)) * (bottom - top);
  const parts = [title, svg("text", { x: (left + right) / 2, y: height - 2, "text-anchor": "middle", class: "mpl-quiet" }, "updates")];
  for (const v of rungs(start + low, start + high, f)) {
    parts.push(svg("line", { x1: left, x2: right, y1: y(v - start), y2: y(v - start), stroke: "var(--mpl-line)" }));
  }
  for (const part of [0, 0.5, 1]) {
    const i = part * STEPS, c = low + part * (high - low);
    parts.push(svg("text", { x: left - 6, y: y(c) + 4, "text-anchor": "end", class: "mpl-quiet" }, significant(c, 3)),
      svg("text", { x: x(i), y: bottom + 16, "text-anchor": part === 1 ? "end" : "middle", class: "mpl-quiet" }, String(i)));
  }
  parts.push(svg("line", { x1: x(0), y1: y(0), x2: x(STEPS), y2: y(goal), stroke: "var(--mpl-muted)", "stroke-width": 2,
    "stroke-dasharray": "6 4" }),
  svg("text", { x: x(0.8 * STEPS), y: y(0.8 * goal) + (goal > 0 ? 20 : -10), class: "mpl-quiet" }, "exact"));
  let line = `M${x(0)} ${y(0)}`;
  for (let i = 1; i < changes.length; i++) line += `H${x(i).toFixed(1)}V${y(changes[i]).toFixed(1)}`;
  return [...parts, paintFormat(svg("g", {}, svg("path", { d: line, fill: "none", stroke: "var(--mpl-format)",
    "stroke-width": 2.5 })), f)];
}

function render({ model, el }) {
  const formats = formatsOf(model), hatch = uid("hatch");
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const titles = Object.entries(formats).map(([k, f]) => [k, f.title]);
  const choices = { format: ["Format", titles], method: ["Update rule", METHODS], place: ["Starts at", PLACES], direction: ["The weight", DIRECTIONS],
    shows: ["The map shows", SHOWS] };
  const lists = Object.fromEntries(Object.entries(choices).map(([key, [label, options]]) =>
    [key, select(label, options, (v) => set({ [key]: v }))]));
  const weight = slider("Size of the weight", { min: LOW, max: HIGH, name: "weight" }, (k) => `2^${k}`, (k) => set({ weight: k }));
  const rate = slider("Learning rate", { min: 0, max: RATES.length - 1, name: "rate" }, (i) => RATES[i], (i) => set({ rate: RATES[i] }));
  const seed = slider("Seed", { min: 0, max: 20, name: "seed" }, String, (v) => set({ seed: v }));
  const said = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const list = facts([["lost", "Cell: lost"], ["unmoved", "Cell: unmoved"], ["start", "Weight at first"],
    ["gap", "Gap on its way"], ["end", `After ${STEPS} updates`], ["update", "One update is"], ["exact", "Exact would be"],
    ["bytes", "Bytes a weight"]]);
  const map = drawing(370, () => paint()), line = drawing(190, () => paint());
  const root = frame({ model, el, kind: "lost-update-map", title: "Lost-update map",
    hint: "Choose a cell and see what 200 updates make of that weight. A cell counts every value between one power of two "
      + "and the next, going either way. An update is as large as the learning rate, as a normalised Adam step is." },
  h("div", { class: "mpl-controls" }, lists.format.node, lists.method.node, weight.node, rate.node, lists.direction.node,
    lists.place.node, seed.node, lists.shows.node), map.node, said, line.node, list.node);
  map.node.classList.add("mpl-pick");
  map.node.setAttribute("role", "application");
  map.node.setAttribute("tabindex", "0");
  const inside = (v, low, high) => Math.min(Math.max(v, low), high);
  const pick = (event) => {
    if (event.buttons !== 1) return;
    const box = map.node.getBoundingClientRect(), { left, right, top, bottom } = frameOf(box.width, box.height);
    const column = Math.floor(((event.clientX - box.left - left) / (right - left)) * (HIGH - LOW + 1));
    const row = Math.floor(((bottom - event.clientY + box.top) / (bottom - top)) * RATES.length);
    set({ weight: inside(LOW + column, LOW, HIGH), rate: RATES[inside(row, 0, RATES.length - 1)] });
  };
  map.node.addEventListener("pointerdown", pick);
  map.node.addEventListener("pointermove", pick);
  map.node.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const now = state(), row = RATES.indexOf(now.rate) + move[1];
    set({ weight: inside(now.weight + move[0], LOW, HIGH), rate: RATES[inside(row, 0, RATES.length - 1)] });
  });
  const tell = (words) => { for (const [key, text] of Object.entries(words)) write(list.values[key] ?? said, text); };
  const kernel = live({ model, after: said, keys: KEYS, show: tell });
  const paint = () => {
    const now = state(), found = compute(now, formats), words = texts(found, now);
    for (const key of Object.keys(lists)) lists[key].show(now[key]);
    weight.show(now.weight);
    rate.show(RATES.indexOf(now.rate));
    seed.show(now.seed);
    seed.field.disabled = now.method !== "stochastic";
    map.show(`Map of lost updates. Marked: weights from 2^${now.weight}, learning rate ${now.rate}, `
      + `lost ${words.lost}. Arrow keys move the mark.`,
      (width, height) => mapPicture(now, found.f, width, height, hatch));
    line.show(`Stored weight over ${STEPS} updates against the exact one. ${words.verdict}`,
      (width, height) => pathPicture(found, width, height));
    tell(words);
    kernel.changed();
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const first = (options) => oneOf(options.map((o) => o[0]));
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, { format: first(titles),
    method: first(METHODS), weight: whole(LOW, HIGH), rate: oneOf(RATES), place: first(PLACES),
    direction: first(DIRECTIONS), shows: first(SHOWS), seed: whole(0, 20) })) });
  link.read();
  return () => { stop(); kernel.stop(); map.stop(); line.stop(); link.stop(); };
}

export default { render };
