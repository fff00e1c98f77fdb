// The clinic: a recorded run is the patient; its curves are free, examinations cost points, a diagnosis earns them.

import { percent, significant } from "./text.js";
import { button, checked, drawing, facts, follow, frame, h, links, oneOf, select, slider, svg, whole, write } from "./ui.js";

const DRAWN = ["rate", "precision", "scaler", "spike"], OWN = "own";
const KEYS = ["patient", "step", "ordered", "diagnosis", "place", "phase", ...DRAWN];
const FAMILY = 60, PLACE = 40, UNKNOWN = "?", MOST_STEPS = 256;
const HIDDEN = "Not revealed yet.";
const CURVES = [["loss", "Loss"], ["gradient_norm", "Gradient norm"], ["scale", "Loss scale"], ["flushed", "Zero in FP16"],
  ["bad_gradients", "Bad gradients"], ["bad_parameters", "Bad weights"]];
const ANSWERS = [["answer", "Answer"], ["cure", "Cure"], ["twin", "Repaired twin"], ["way", "Specialist"]];

export const orderedOf = ({ ordered }) => (ordered ? ordered.split(",") : []);
const patientOf = (state, { ward, drawn }) =>
  (state.patient === OWN ? drawn[DRAWN.map((key) => state[key]).join(" ")] : ward[Number(state.patient) - 1]);
const stepsOf = (one) => one.curves.loss.length;
const marked = (state, one) => Math.min(state.step, stepsOf(one) - 1);

function spentOf(state, { choices }) {
  const points = Object.fromEntries(choices.examinations.map(([key, , cost]) => [key, cost]));
  return orderedOf(state).reduce((sum, key) => sum + points[key], 0);
}

function scoreText(state, data, one) {
  if (state.patient === OWN) return "You drew this one, so nothing is scored. The monitor's report stands below.";
  const family = state.diagnosis === one.family, place = state.place === one.place, spent = spentOf(state, data);
  const score = Math.max(0, FAMILY * family + PLACE * place - spent), word = (right) => (right ? "right" : "wrong");
  return `The diagnosis is ${word(family)}, the place is ${word(place)}; ${spent} points went into examinations. Score: ${score} of 100.`;
}

function openText(state, data) {
  if (!state.ordered && state.patient === OWN) return "Nothing is ordered yet. You drew this one: choose, read, and order what you like.";
  if (!state.ordered) return "Nothing is ordered yet. Read the curves, order what you need, and make a diagnosis.";
  const last = orderedOf(state).at(-1), [, title] = data.choices.examinations.find(([key]) => key === last), spent = spentOf(state, data);
  if (state.patient === OWN) return `Ordered: ${title}. Nothing is scored.`;
  return `Ordered: ${title}. ${spent} points are spent; the best that is left is ${Math.max(0, 100 - spent)}.`;
}

// Every text, by data-field; the twin of Clinic.result().
export function texts(state, data) {
  const one = patientOf(state, data), revealed = state.phase === "revealed", done = orderedOf(state), at = marked(state, one);
  const out = { history: one.history, verdict: revealed ? scoreText(state, data, one) : openText(state, data) };
  for (const [key] of data.choices.examinations) {
    const text = one.examinations[key];
    out[`exam-${key}`] = revealed ? one.marks[key] + text : done.includes(key) ? text : "";
  }
  for (const [curve] of CURVES) {
    const value = one.curves[curve][at];
    out[`now-${curve}`] = curve === "flushed" ? percent(Number(value)) : value;
  }
  for (const key of ["report", ...ANSWERS.map(([name]) => name)]) out[key] = revealed ? one[key] : HIDDEN;
  return out;
}

// The number that a value of a curve stands for: "2^10", "0.384", "inf"; NaN for "nan" and "none".
function number(text) {
  if (text.startsWith("2^")) return 2 ** Number(text.slice(2));
  return text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text);
}

const LEFT = 64, RIGHT = 10, TALL = 44, LANE = 76, TOP = 24, LANES = 5, TICKS = TOP + LANES * LANE - 16, HEIGHT = TICKS + 30;
const words = (x, y, text, more = {}) => svg("text", { x, y, class: "mpl-quiet", ...more }, text);
const rule = (x1, x2, y) => svg("line", { x1, x2, y1: y, y2: y, stroke: "var(--mpl-line)" });
const LOSS = { stroke: "var(--mpl-norm)", "stroke-width": 2 };
const HEALED = { stroke: "var(--mpl-fg)", "stroke-width": 1.5, "stroke-dasharray": "4 3" };

// A staircase of one value a step; steps whose value is not finite interrupt it.
function staircase(values, x, y) {
  let pen = "", last = NaN;
  values.forEach((v, i) => {
    if (Number.isFinite(v)) pen += `${Number.isFinite(last) ? "V" : `M${x(i).toFixed(1)} `}${y(v).toFixed(1)}H${x(i + 1).toFixed(1)}`;
    last = v;
  });
  return pen;
}

// One lane of curves between its smallest and its largest finite value; what is not finite is a mark at its top.
function curveLane(at, title, lines, x, n, label) {
  const top = TOP + at * LANE, base = top + TALL, finite = lines.flatMap(([values]) => values).filter(Number.isFinite);
  const parts = [words(LEFT, top - 7, title, { class: "" }), rule(x(0), x(n), top), rule(x(0), x(n), base)];
  const low = Math.min(...finite), high = Math.max(...finite);
  const y = (v) => (high > low ? base - ((v - low) / (high - low)) * TALL : top + TALL / 2);
  const ends = !finite.length ? [] : high > low ? [[top + 4, high], [base + 4, low]] : [[top + TALL / 2 + 4, low]];
  parts.push(...ends.map(([where, v]) => words(LEFT - 8, where, label(v), { "text-anchor": "end" })));
  for (const [values, attributes] of lines) parts.push(svg("path", { d: staircase(values, x, y), fill: "none", ...attributes }));
  lines[0][0].forEach((v, i) => {
    if (!Number.isFinite(v)) parts.push(cross((x(i) + x(i + 1)) / 2, top + 7));
  });
  return parts;
}

const cross = (x, y) => svg("path", { d: `M${x - 3.5} ${y - 3.5}l7 7m0 -7l-7 7`, stroke: "var(--mpl-bad)", "stroke-width": 2, fill: "none" });

// One lane of bars, as high as their share of `full`, at least two pixels where there is anything.
function barLane(at, title, values, full, fill, x, label) {
  const top = TOP + at * LANE, base = top + TALL, n = values.length;
  const parts = [words(LEFT, top - 7, title, { class: "" }), rule(x(0), x(n), top), rule(x(0), x(n), base),
    words(LEFT - 8, top + 4, label, { "text-anchor": "end" }), words(LEFT - 8, base + 4, "0", { "text-anchor": "end" })];
  values.forEach((v, i) => {
    const tall = Math.max((v / full) * TALL, 2), wide = Math.max(x(1) - x(0) - 1, 1);
    if (v) parts.push(svg("rect", { x: x(i).toFixed(1), y: (base - tall).toFixed(1), width: wide.toFixed(1), height: tall.toFixed(1), fill }));
  });
  return parts;
}

function picture(one, state, width) {
  const n = stepsOf(one), x = (i) => LEFT + (i / n) * (width - LEFT - RIGHT), numbers = (curve) => one.curves[curve].map(number);
  const revealed = state.phase === "revealed", plain = (v) => significant(v, 3), bad = numbers("bad_gradients");
  const loss = [[numbers("loss"), LOSS], ...(revealed && one.healed.length ? [[one.healed.map(number), HEALED]] : [])];
  const scaled = one.curves.scale[0] !== "none", scale = numbers("scale").map(Math.log2), most = Math.max(...bad);
  const parts = [...curveLane(0, "loss", loss, x, n, plain),
    ...curveLane(1, "norm of the gradients", [[numbers("gradient_norm"), LOSS]], x, n, plain),
    ...(scaled ? curveLane(2, "log2 of the loss scale", [[scale, LOSS]], x, n, (v) => significant(v, 3))
      : [words(LEFT, TOP + 2 * LANE - 7, "log2 of the loss scale", { class: "" }), words(LEFT, TOP + 2 * LANE + TALL / 2 + 4, "no GradScaler")]),
    ...barLane(3, "share of the gradients that is 0 in FP16", numbers("flushed"), 1, "var(--mpl-lost)", x, "100 %"),
    ...barLane(4, "bad gradients: NaN or inf", bad, most || 1, "var(--mpl-over)", x, most ? String(most) : "")];
  const middle = x(marked(state, one) + 0.5);
  parts.push(svg("line", { x1: middle, x2: middle, y1: TOP, y2: TICKS - 10, stroke: "var(--mpl-fg)" }));
  if (revealed && one.begins >= 0) {
    parts.push(svg("rect", { x: x(one.begins), y: TOP, width: Math.max(x(1) - x(0), 3), height: TICKS - 10 - TOP, fill: "var(--mpl-over)",
      "fill-opacity": 0.16 }));
  }
  for (const i of [0, n >> 1, n - 1]) parts.push(words(x(i + 0.5), TICKS + 6, String(i), { "text-anchor": "middle" }));
  return [...parts, words(x(n / 2), HEIGHT - 4, "step", { "text-anchor": "middle" })];
}

// What the lines and marks mean.
function legend() {
  const mark = (...inside) => svg("svg", { class: "mpl-line", width: 34, height: 12, viewBox: "0 0 34 12", "aria-hidden": "true" }, ...inside);
  const line = (attributes) => mark(svg("line", { x1: 0, x2: 34, y1: 6, y2: 6, ...attributes }));
  return h("div", { class: "mpl-row mpl-legend" }, h("span", {}, line(LOSS), "this run"), h("span", {}, mark(cross(17, 6)), "not finite"),
    h("span", {}, line(HEALED), "repaired twin, once revealed"));
}

// One examination: a button that orders it, and what it said.
function examinationRow([key, title, points], order) {
  const said = h("p", { class: "mpl-told", "data-field": `exam-${key}` });
  const node = button(`Order: ${points} points`, () => order(key), { "data-action": `order-${key}` });
  return { said, node: h("li", {}, h("span", { class: "mpl-part-name" }, title), node, said),
    show(done, closed) {
      const words = done ? `Ordered: ${points} points` : `Order: ${points} points`;
      node.setAttribute("aria-pressed", String(done));
      node.setAttribute("aria-label", `${words}, ${title}`);
      node.disabled = closed;
      write(node, words);
    } };
}

function diagnosisOf(data, set) {
  const open = [UNKNOWN, "choose"], pairs = (list) => [open, ...list];
  return {
    diagnosis: select("What is wrong", pairs(data.choices.families), (v) => set({ diagnosis: v })),
    place: select("Where in the step it begins", pairs(data.choices.places), (v) => set({ place: v })),
  };
}

function orders(examinations) {
  return (text) => {
    const keys = text ? text.split(",") : [];
    return new Set(keys).size === keys.length && keys.every((key) => examinations.includes(key)) ? text : undefined;
  };
}

const patientsOf = ({ ward, drawn }) => [...ward.map((_, i) => String(i + 1)), ...(Object.keys(drawn).length ? [OWN] : [])];

const CHECKS = (data) => {
  const { choices } = data, keys = (list) => list.map(([key]) => key);
  const own = Object.fromEntries(choices.own.map(([key, options]) => [key, oneOf(keys(options))]));
  return { ...own, patient: oneOf(patientsOf(data)), step: whole(0, MOST_STEPS - 1), ordered: orders(keys(choices.examinations)),
    diagnosis: oneOf([UNKNOWN, ...keys(choices.families)]), place: oneOf([UNKNOWN, ...keys(choices.places)]),
    phase: oneOf(["open", "revealed"]) };
};

const HINT = "Each patient is a recorded run. Its curves are free, examinations cost points. Find what is wrong, and where. "
  + "Some patients are healthy.";
const FRESH = { ordered: "", diagnosis: UNKNOWN, place: UNKNOWN, phase: "open" };

function render({ model, el }) {
  const data = { ward: model.get("ward"), drawn: model.get("drawn"), choices: model.get("choices") };
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const paint = () => {
    const now = state(), one = patientOf(now, data), said = texts(now, data), revealed = now.phase === "revealed";
    const own = now.patient === OWN;
    patient.show(now.patient);
    for (const [key, control] of Object.entries(draw)) {
      control.show(now[key]);
      control.field.disabled = !own;
    }
    step.field.max = stepsOf(one) - 1;
    step.show(marked(now, one));
    for (const [key, control] of Object.entries(choose)) {
      control.show(now[key]);
      control.field.disabled = revealed || own;
    }
    for (const [key, row] of Object.entries(rows)) row.show(orderedOf(now).includes(key), revealed);
    for (const [key, text] of Object.entries(said)) write(fields[key], text);
    write(act, revealed ? "Try again" : own ? "Reveal" : "Diagnose");
    act.disabled = !revealed && !own && (now.diagnosis === UNKNOWN || now.place === UNKNOWN);
    picked.show(`Patient ${now.patient}: loss, gradient norm, loss scale, and counts over ${stepsOf(one)} steps. ${said.history}`,
      (width) => picture(one, now, width));
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  const fresh = (changes) => {
    set(changes);
    exams.scrollTop = answer.scrollTop = 0;
  };
  const patient = select("Patient", patientsOf(data).map((key) => [key, key === OWN ? "draw your own" : key]), (v) => fresh({ patient: v, step: 0, ...FRESH }));
  const step = slider("Step", { min: 0, max: MOST_STEPS - 1, name: "step" }, String, (v) => set({ step: v }));
  const titles = { rate: "Learning rate", precision: "Precision", scaler: "Scaler", spike: "Spike" };
  const draw = Object.fromEntries(data.choices.own.map(([key, options]) => [key, select(titles[key], options, (v) => set({ [key]: v }))]));
  const choose = diagnosisOf(data, set), picked = drawing(HEIGHT, () => paint());
  const order = (key) => {
    const done = orderedOf(state());
    if (state().phase === "revealed" || done.includes(key)) return;
    set({ ordered: [...done, key].join(",") });
    exams.scrollTop = rows[key].node.offsetTop; // what it said may stand below the edge of the box
  };
  const rows = Object.fromEntries(data.choices.examinations.map((entry) => [entry[0], examinationRow(entry, order)]));
  const act = button("Diagnose", () => fresh(state().phase === "open" ? { phase: "revealed" } : FRESH), { "data-action": "diagnose" });
  const now = facts(CURVES.map(([curve, title]) => [`now-${curve}`, title])), answers = facts(ANSWERS);
  const fields = { ...now.values, ...answers.values, history: h("p", { "data-field": "history" }),
    verdict: h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" }),
    report: h("p", { class: "mpl-told", "data-field": "report" }) };
  for (const [key, row] of Object.entries(rows)) fields[`exam-${key}`] = row.said;
  const box = (label, ...inside) => h("div", { class: "mpl-scroll mpl-tall", role: "group", tabindex: 0, "aria-label": label }, ...inside);
  const heading = (text) => h("p", { class: "mpl-part-name" }, text);
  const exams = box("Examinations and what they said", h("ul", { class: "mpl-exams" }, ...Object.values(rows).map((row) => row.node)));
  const answer = box("The answer, the monitor's report, and the way of a specialist", answers.node, heading("The monitor's report"), fields.report);
  const root = frame({ model, el, kind: "clinic", title: "The clinic",
    hint: HINT + (patientsOf(data).includes(OWN) ? " The last one you draw yourself." : "") },
  h("div", { class: "mpl-controls" }, patient.node, step.node),
  h("div", { class: "mpl-controls mpl-own" }, ...Object.values(draw).map((control) => control.node)), fields.history, legend(), picked.node, now.node,
  heading("Examinations"), exams, h("div", { class: "mpl-side" }, choose.diagnosis.node, choose.place.node), h("div", { class: "mpl-row" }, act), fields.verdict,
  heading("Answer"), answer);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, CHECKS(data))) });
  link.read();
  return () => { stop(); picked.stop(); link.stop(); };
}

export default { render };
