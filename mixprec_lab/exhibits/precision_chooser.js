// The precision chooser: the rules of mixprec_lab.bf16_vs_fp16 for one pair of hardware and task, and a map of all pairs.

import { checked, drawing, follow, formatsOf, frame, h, links, oneOf, paintFormat, select, svg, write } from "./ui.js";

const KEYS = ["hardware", "task", "priority"];
const PRIORITIES = ["stability", "speed"];
const LETTERS = { fp32: "32", fp16: "F", bf16: "B" };

const find = (list, name) => list.find((entry) => entry.name === name);

// Whether a rule speaks about these facts and this task; the twin of Rule.applies().
const applies = (rule, facts, task) => rule.needs.every((fact) => facts.has(fact)) && !rule.lacks.some((fact) => facts.has(fact))
  && (rule.tasks.length === 0 || rule.tasks.includes(task));

// The facts before and after the forward format is chosen, and that format.
function factsOf(state, tables) {
  const facts = new Set([...find(tables.hardware, state.hardware).features, ...find(tables.tasks, state.task).features,
    `hardware:${state.hardware}`, `priority:${state.priority}`]);
  const { value } = tables.rules.find((rule) => rule.field === "forward" && applies(rule, facts, state.task));
  return { facts: new Set([...facts, `forward:${value}`]), forward: value };
}

// Every decision in order, as { field, at, value, reason, source }; the twin of recommend().
export function compute(state, tables) {
  const { facts, forward } = factsOf(state, tables), found = [];
  for (const field of [...tables.single_fields, ...tables.list_fields]) {
    const all = tables.rules.filter((rule) => rule.field === field && applies(rule, facts, state.task));
    (tables.single_fields.includes(field) ? all.slice(0, 1) : all).forEach((rule, at) => found.push({ field, at,
      value: rule.value.replaceAll("{forward}", forward), reason: rule.reason.replaceAll("{forward}", forward),
      source: tables.sources[rule.source] }));
  }
  return found;
}

// Every text, by data-field; the twin of PrecisionChooser.result().
export function texts(state, { tables, formats, parts }) {
  const chosen = compute(state, tables), title = (value) => formats[value]?.title ?? value, out = {};
  for (const { field, at, value, reason, source } of chosen) {
    out[`${field}-${at}-value`] = title(value);
    out[`${field}-${at}-reason`] = reason;
    out[`${field}-${at}-source`] = `${source.title}, ${source.date}`;
  }
  const other = PRIORITIES.find((p) => p !== state.priority), theirs = compute({ ...state, priority: other }, tables);
  const of = (field, decisions = chosen) => decisions.find((d) => d.field === field).value;
  const changed = parts.filter(([field]) => tables.single_fields.includes(field))
    .map(([field, name]) => [name, title(of(field, theirs)), title(of(field))])
    .filter(([, now, before]) => now !== before).map(([name, now, before]) => `${name}: ${now} instead of ${before}`);
  const hardware = find(tables.hardware, state.hardware), training = of("backward") !== "none";
  const scaling = of("loss_scaling") === "dynamic" ? "with dynamic loss scaling" : "without loss scaling";
  out.verdict = `${hardware.title}, ${find(tables.tasks, state.task).title}: ${training ? "training" : "inference"} in `
    + `${title(of("forward"))}${training ? `, ${scaling}` : ""}.${hardware.features.includes("bf16") ? "" : " It has no BF16 units."}`;
  out.changes = `With ${other} first: ${changed.join("; ") || "the same"}.`;
  return out;
}

// The forward format of every pair, row by row.
export const mapOf = (priority, tables) => tables.hardware.map(({ name }) =>
  tables.tasks.map((task) => factsOf({ hardware: name, task: task.name, priority }, tables).forward));

const MAP = { top: 104, row: 21, left: (width) => (width < 480 ? 118 : 212) };
const heightOf = (tables) => MAP.top + MAP.row * tables.hardware.length + 4;
const cellWide = (tables, width) => (width - MAP.left(width) - (width < 480 ? 28 : 64)) / tables.tasks.length;

function picture(map, { tables, formats }, width) {
  const left = MAP.left(width), wide = cellWide(tables, width), parts = [];
  tables.tasks.forEach(({ title }, k) => {
    const x = left + (k + 0.5) * wide + 4, y = MAP.top - 8;
    parts.push(svg("text", { x, y, transform: `rotate(-52 ${x} ${y})`, "data-task": k }, title));
  });
  tables.hardware.forEach(({ title }, i) => {
    const y = MAP.top + i * MAP.row, narrow = title.replace(/^(NVIDIA|AMD|Google|Intel) /, "").replace(/ with.*| without.*| \(.*/, "");
    const short = title.startsWith("CPU with AMX") ? "CPU, AMX" : title.startsWith("CPU") ? "CPU, no BF16" : narrow;
    parts.push(svg("text", { x: left - 8, y: y + 15, "text-anchor": "end", "data-hardware": i }, width < 480 ? short : title));
    map[i].forEach((name, k) => {
      const cell = paintFormat(svg("g", { "data-row": i, "data-column": k }), formats[name]), x = left + k * wide;
      cell.append(svg("rect", { x: x + 1, y: y + 1, width: wide - 2, height: MAP.row - 2, rx: 3, fill: "var(--mpl-format)",
        "fill-opacity": 0.22, stroke: "var(--mpl-format)", "stroke-width": 1 }),
      svg("text", { x: x + wide / 2, y: y + 15, "text-anchor": "middle" }, LETTERS[name]));
      parts.push(cell);
    });
  });
  parts.push(svg("rect", { class: "mpl-chosen", width: wide + 2, height: MAP.row + 2, rx: 4, fill: "none",
    stroke: "var(--mpl-fg)", "stroke-width": 2.5 }));
  return parts;
}

// The frame around the chosen pair and its names in bold; the cells stay as they are.
function mark(node, state, tables) {
  const at = (list, name) => list.findIndex((entry) => entry.name === name), width = node.viewBox.baseVal.width;
  const row = at(tables.hardware, state.hardware), column = at(tables.tasks, state.task), chosen = node.querySelector(".mpl-chosen");
  chosen.setAttribute("x", MAP.left(width) + column * cellWide(tables, width) - 1);
  chosen.setAttribute("y", MAP.top + row * MAP.row - 1);
  for (const [axis, index] of [["task", column], ["hardware", row]]) {
    for (const text of node.querySelectorAll(`[data-${axis}]`)) {
      const here = Number(text.dataset[axis]) === index;
      text.classList.toggle("mpl-quiet", !here);
      text.style.fontWeight = here ? 650 : "";
    }
  }
}

function legend(formats) {
  return h("div", { class: "mpl-row mpl-legend" }, h("span", {}, "Forward pass in"),
    ...Object.values(formats).map((f) => paintFormat(h("span", { class: "mpl-name" }, `${f.title} (${LETTERS[f.name]})`), f)));
}

// The decisions, one block each: what, why, and who says so.
function reasons(state, data, words) {
  const block = (field, at, source) => {
    const cell = (tag, key, attributes = {}) => {
      const node = h(tag, { "data-field": `${field}-${at}-${key}`, ...attributes });
      write(node, words[`${field}-${at}-${key}`]);
      return node;
    };
    const link = source.url ? { href: source.url, rel: "external" } : {};
    return h("div", {}, h("dt", {}, at === 0 ? data.parts.find(([name]) => name === field)[1] : ""),
      h("dd", { class: "mpl-choice" }, cell("span", "value")),
      h("dd", {}, cell("span", "reason"), h("br"), cell(source.url ? "a" : "span", "source", { class: "mpl-source", ...link })));
  };
  return compute(state, data.tables).map(({ field, at, source }) => block(field, at, source));
}

function render({ model, el }) {
  const data = { formats: formatsOf(model), tables: model.get("tables"), parts: model.get("parts") }, { tables } = data;
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const named = (list) => list.map(({ name, title }) => [name, title]);
  const lists = {
    hardware: select("Hardware", named(tables.hardware), (v) => set({ hardware: v })),
    task: select("Task", named(tables.tasks), (v) => set({ task: v })),
    priority: select("First comes", PRIORITIES.map((p) => [p, p]), (v) => set({ priority: v })),
  };
  const said = h("output", { class: "mpl-say", "aria-live": "polite" }), list = h("dl", { class: "mpl-facts mpl-reasons" });
  const verdict = h("strong", { "data-field": "verdict" }), changes = h("span", { "data-field": "changes" });
  said.append(verdict, h("br"), changes);
  const map = drawing(heightOf(tables), () => paint(true));
  const root = frame({ model, el, kind: "precision-chooser", title: "Precision chooser",
    hint: "Choose a pair from the lists, by a click on the map, or by arrow keys in it." },
  h("div", { class: "mpl-controls" }, ...Object.values(lists).map((control) => control.node)), said, map.node,
  legend(data.formats),
  h("div", { class: "mpl-scroll mpl-parts", role: "group", tabindex: 0, "aria-label": "The recommendation, part by part" }, list));
  map.node.classList.add("mpl-pick");
  map.node.setAttribute("role", "application");
  map.node.setAttribute("tabindex", "0");
  const choose = (row, column) => {
    const hardware = tables.hardware[row], task = tables.tasks[column];
    if (hardware && task) set({ hardware: hardware.name, task: task.name });
  };
  map.node.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-row]")?.dataset;
    if (cell) choose(Number(cell.row), Number(cell.column));
  });
  map.node.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const now = state(), at = (entries, name) => entries.findIndex((entry) => entry.name === name);
    choose(at(tables.hardware, now.hardware) + move[0], at(tables.tasks, now.task) + move[1]);
  });
  const maps = Object.fromEntries(PRIORITIES.map((priority) => [priority, mapOf(priority, tables)]));
  let drawn = null;
  const paint = (redraw = false) => {
    const now = state(), words = texts(now, data);
    for (const key of KEYS) lists[key].show(now[key]);
    write(verdict, words.verdict);
    write(changes, words.changes);
    const label = `Forward format of every pair of hardware and task. Chosen: ${words.verdict} Arrow keys choose another pair.`;
    if (redraw || drawn !== now.priority) map.show(label, (width) => picture(maps[now.priority], data, width));
    map.node.setAttribute("aria-label", label);
    drawn = now.priority;
    mark(map.node, now, tables);
    list.replaceChildren(...reasons(now, data, words));
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw, {
    hardware: oneOf(tables.hardware.map((e) => e.name)), task: oneOf(tables.tasks.map((e) => e.name)),
    priority: oneOf(PRIORITIES) })) });
  link.read();
  return () => { stop(); map.stop(); link.stop(); };
}

export default { render };
