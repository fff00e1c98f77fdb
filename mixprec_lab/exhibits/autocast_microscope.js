// The autocast microscope: a transformer as its operators, each in the dtype that its result has in a setting.

import { checked, drawing, facts, follow, formatsOf, frame, h, links, oneOf, paintFormat, select, svg, write } from "./ui.js";

const KEYS = ["autocast", "policy", "manual", "softmax", "forward_pass", "operator"];
const CHOICES = {
  autocast: ["Autocast", [["off", "off"], ["fp16", "FP16"], ["bf16", "BF16"]]],
  policy: ["Lists of", [["cuda", "CUDA"], ["cpu", "CPU"]]],
  manual: ["The model", [["none", "FP32, as built"], ["half", "after .half()"], ["bfloat16", "after .bfloat16()"]]],
  softmax: ["The softmax", [["inside", "under autocast"], ["outside", "enabled=False"], ["float", "same, + .float()"]]],
  forward_pass: ["Batch", [["first", "first"], ["second", "second"]]],
};
const ORDER = ["fp32", "fp16", "bf16"], NONE = "\u2014";
const BOX = { least: 92, height: 44, gap: 14, stack: 6, row: 16, lane: 24 };

// Without autocast neither the lists nor the place of the softmax matter; the twin of _key() in Python.
const keyOf = (s) => (s.autocast === "off" ? `off/cpu/${s.manual}/inside` : [s.autocast, s.policy, s.manual, s.softmax].join("/"));

// The calls of the chosen pass, as objects, and the one that is looked at.
export function compute(state, data) {
  const setting = data.settings[keyOf(state)];
  const calls = setting.passes[state.forward_pass].map((i) => {
    const [step, operation, inputs, output, rule, backward, casts, reused] = data.calls[i];
    return { step, operation, inputs, output, rule, backward, casts, reused };
  });
  const wanted = data.steps.findIndex((step) => step[0] === state.operator);
  return { setting, calls, call: calls.find((c) => c.step >= wanted) };
}

// Every text, by data-field; the twin of AutocastMicroscope.result().
export function texts({ setting, calls, call }, data) {
  const title = (name) => data.formats[name]?.title ?? name, sum = (key) => calls.reduce((n, c) => n + c[key], 0);
  const counts = ORDER.map((name) => [calls.filter((c) => c.output === name).length, name]).filter(([n]) => n > 0);
  return {
    verdict: setting.verdict,
    operation: `${data.steps[call.step][0]}: ${call.operation}`,
    module: data.steps[call.step][2] || "the model itself",
    inputs: call.inputs.map(title).join(", ") || NONE,
    output: call.output ? title(call.output) : NONE,
    rule: call.rule in data.rules ? `${call.rule}: ${data.rules[call.rule]}` : call.rule,
    backward: call.backward ? title(call.backward) : NONE,
    "op-casts": `${call.casts} made, ${call.reused} reused`,
    counts: counts.map(([n, name]) => `${n} in ${title(name)}`).join(", ") || NONE,
    casts: `${sum("casts")} made, ${sum("reused")} reused`,
    source: setting.source,
  };
}

// Lanes of columns of steps: query, key and value stand in one column.
function lanesOf(steps) {
  const lanes = [];
  steps.forEach(([, lane, , beside], i) => {
    if (lanes.at(-1)?.name !== lane) lanes.push({ name: lane, columns: [] });
    if (beside) lanes.at(-1).columns.at(-1).push(i);
    else lanes.at(-1).columns.push([i]);
  });
  return lanes;
}

// Where every box stands in a drawing of this width, row by row as evenly as it goes; and the height of all.
export function place(steps, width) {
  const most = Math.max(1, Math.floor((width + BOX.gap) / (BOX.least + BOX.gap))), boxes = [], titles = [];
  const wide = Math.min(116, (width - 2 + BOX.gap) / most - BOX.gap);
  let y = 0;
  for (const { name, columns } of lanesOf(steps)) {
    titles.push({ name, y: y + 12 });
    y += BOX.lane;
    const rows = Math.ceil(columns.length / most), each = Math.ceil(columns.length / rows);
    for (let from = 0; from < columns.length; from += each) {
      const row = columns.slice(from, from + each), tallest = Math.max(...row.map((c) => c.length));
      const high = tallest * (BOX.height + BOX.stack) - BOX.stack;
      row.forEach((column, at) => column.forEach((step, k) => {
        const free = high - (column.length * (BOX.height + BOX.stack) - BOX.stack);
        boxes[step] = { x: at * (wide + BOX.gap) + 1, wide, y: y + free / 2 + k * (BOX.height + BOX.stack), first: at === 0,
          middle: y + high / 2, alone: k === 0 };
      }));
      y += high + BOX.row;
    }
  }
  return { boxes, titles, height: y - BOX.row + 4 };
}

function boxOf(label, at, call, data, chosen) {
  const middle = at.x + at.wide / 2, f = call && data.formats[call.output], fails = call?.rule === "fails";
  const edge = { x: at.x, y: at.y, width: at.wide, height: BOX.height, rx: 5 };
  const group = svg("g", { "data-step": label });
  if (f) {
    paintFormat(group, f);
    group.append(svg("rect", { ...edge, fill: "var(--mpl-format)", "fill-opacity": 0.2, stroke: "var(--mpl-format)", "stroke-width": 1.5 }),
      svg("rect", { ...edge, width: 6, rx: 3, fill: "var(--mpl-format)" }));
  } else {
    group.append(svg("rect", { ...edge, fill: "var(--mpl-bg)", stroke: fails ? "var(--mpl-bad)" : "var(--mpl-line)",
      "stroke-width": fails ? 2.5 : 1.5, "stroke-dasharray": fails ? null : "4 3" }));
  }
  const under = f ? f.title : call ? call.rule : "not here";
  const style = fails ? "fill: var(--mpl-bad); font-weight: 650" : f ? "font-weight: 650" : null;
  group.append(svg("text", { x: middle + 3, y: at.y + 19, "text-anchor": "middle", class: f || fails ? null : "mpl-quiet" }, label),
    svg("text", { x: middle + 3, y: at.y + 35, "text-anchor": "middle", style, class: style ? null : "mpl-quiet" }, under));
  for (let i = 0; call && i < call.casts + call.reused; i++) { // filled: a cast made; hollow: one found in the cache
    group.append(svg("circle", { cx: at.x + 14 + 9 * i, cy: at.y, r: 3.5, stroke: "var(--mpl-fg)", "stroke-width": 1.25,
      fill: i < call.casts ? "var(--mpl-fg)" : "var(--mpl-bg)" }));
  }
  if (chosen) {
    group.append(svg("rect", { x: at.x - 3, y: at.y - 3, width: at.wide + 6, height: BOX.height + 6, rx: 7, fill: "none",
      stroke: "var(--mpl-fg)", "stroke-width": 2 }));
  }
  return group;
}

function picture({ calls, call }, data, width) {
  const { boxes, titles } = place(data.steps, width), parts = [];
  for (const { name, y } of titles) {
    parts.push(svg("text", { x: 0, y, class: "mpl-quiet", style: "font-weight: 600" }, name));
  }
  boxes.forEach((at) => { // an arrow from the column before
    if (!at.first && at.alone) {
      const x = at.x - BOX.gap + 2, y = at.middle;
      parts.push(svg("path", { d: `M${x} ${y}h${BOX.gap - 5}m-4 -4l4 4l-4 4`, fill: "none", stroke: "var(--mpl-edge)", "stroke-width": 1.5 }));
    }
  });
  data.steps.forEach(([label], i) => parts.push(boxOf(label, boxes[i], calls.find((c) => c.step === i), data, i === call.step)));
  return parts;
}

function legend(formats) {
  const dot = (fill) => svg("svg", { width: 10, height: 10, viewBox: "0 0 10 10", class: "mpl-line", style: "width: 10px" },
    svg("circle", { cx: 5, cy: 5, r: 3.5, stroke: "var(--mpl-fg)", "stroke-width": 1.25, fill }));
  return h("div", { class: "mpl-row mpl-legend" }, h("span", {}, "Result in"),
    ...Object.values(formats).map((f) => paintFormat(h("span", { class: "mpl-name" }, f.title), f)),
    h("span", {}, dot("var(--mpl-fg)"), "a cast made"), h("span", {}, dot("var(--mpl-bg)"), "a cast found in the weight cache"));
}

function render({ model, el }) {
  const data = { formats: formatsOf(model), steps: model.get("steps"), rules: model.get("rules"), calls: model.get("calls"),
    settings: model.get("settings") };
  const labels = data.steps.map((step) => step[0]);
  const choices = { ...CHOICES, operator: ["Operator", labels.map((label) => [label, label])] };
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const lists = Object.fromEntries(Object.entries(choices).map(([key, [label, options]]) =>
    [key, select(label, options, (v) => set({ [key]: v }))]));
  const said = h("output", { class: "mpl-say", "data-field": "verdict", "aria-live": "polite" });
  const list = facts([["operation", "Operator"], ["module", "Module"], ["inputs", "Inputs given"], ["output", "Result"],
    ["backward", "Gradient of it"], ["op-casts", "Casts for it"], ["counts", "All results"], ["casts", "All casts"],
    ["rule", "List"], ["source", "Answered by"]]);
  const map = drawing((width) => place(data.steps, width).height, () => paint());
  const root = frame({ model, el, kind: "autocast-microscope", title: "Autocast microscope",
    hint: "A transformer of one block, operator by operator, in the dtype of each result. Change the setting; choose an "
      + "operator by a click, by arrow keys, or from the list." },
  h("div", { class: "mpl-controls" }, ...Object.keys(choices).map((key) => lists[key].node)), said, map.node,
  legend(data.formats), list.node);
  map.node.classList.add("mpl-pick");
  map.node.setAttribute("role", "application");
  map.node.setAttribute("tabindex", "0");
  map.node.addEventListener("click", (event) => {
    const step = event.target.closest("[data-step]")?.dataset.step;
    if (step) set({ operator: step });
  });
  map.node.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const { calls, call } = compute(state(), data);
    const next = calls[calls.indexOf(call) + move];
    if (next) set({ operator: labels[next.step] });
  });
  const paint = () => {
    const now = state(), found = compute(now, data), words = texts(found, data);
    for (const key of KEYS) lists[key].show(now[key]);
    map.show(`The operators of a transformer. Results: ${words.counts}. Chosen: ${words.operation}, result ${words.output}. `
      + "Arrow keys choose the next or the previous operator.", (width) => picture(found, data, width));
    for (const [key, text] of Object.entries(words)) write(list.values[key] ?? said, text);
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => set(checked(raw,
    Object.fromEntries(KEYS.map((key) => [key, oneOf(choices[key][1].map((option) => option[0]))])))) });
  link.read();
  return () => { stop(); map.stop(); link.stop(); };
}

export default { render };
