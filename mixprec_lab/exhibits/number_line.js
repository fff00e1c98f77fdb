// The number line: the values of two formats around x, and the interval that rounds to the same value.

import { neighbours, quantize, relativeError, ulp } from "./float.js";
import { errorText, parseNumber, percent, powerForm, shortest, significant } from "./text.js";
import { MODES, checked, drawing, facts, follow, formatsOf, frame, h, links, oneOf, paintFormat, select, slider, svg, textField, whole,
  write } from "./ui.js";

const KEYS = ["x", "first", "second", "rounding", "centre", "zoom"];
const ALL_MODES = [...MODES, ["stochastic", "stochastic"]];
const STEPS = 400; // of the slider across the view
const DENSE = 240; // more values than this are a band, not ticks

export const halfWidth = (state) => 2 ** -state.zoom;

// What becomes of x in one format: the value or the two candidates with their chances, the interval, the error.
export function fate(x, f, rounding) {
  if (rounding === "stochastic") {
    const low = quantize(x, f, "down"), high = quantize(x, f, "up");
    return { low, high, chance: high === low ? 0 : (x - low) / (high - low) };
  }
  const value = quantize(x, f, rounding), [below, above] = neighbours(value, f);
  const edge = (v) => (v === null || !Number.isFinite(v) ? null : v);
  const low = edge(below), high = edge(above), mid = (v) => (v === null ? null : (v + value) / 2);
  let interval = [mid(low), mid(high)];
  if (rounding === "up") interval = [low, high === null ? null : value];
  if (rounding === "down") interval = [low === null ? null : value, high];
  if (rounding === "toward_zero") {
    interval = value > 0 ? [value, high] : value < 0 ? [low, value] : [low, high];
  }
  return { value, interval };
}

function fateTexts(prefix, x, f, rounding) {
  const found = fate(x, f, rounding);
  if (rounding === "stochastic") {
    const { low, high, chance } = found;
    return {
      [`${prefix}-value`]: low === high ? significant(low, 9)
        : `${significant(low, 9)} (${percent(1 - chance)}) or ${significant(high, 9)} (${percent(chance)})`,
      [`${prefix}-error`]: "0 on average",
      [`${prefix}-interval`]: "none: x decides only the chances",
      [`${prefix}-gap`]: powerForm(ulp(low, f)),
    };
  }
  const { value, interval: [a, b] } = found;
  return {
    [`${prefix}-value`]: significant(value, 9),
    [`${prefix}-error`]: errorText(relativeError(x, value)),
    [`${prefix}-interval`]: `${a === null ? "-inf" : significant(a, 9)} to ${b === null ? "inf" : significant(b, 9)}`,
    [`${prefix}-gap`]: powerForm(ulp(value, f)),
  };
}

// Every text for a state, by data-field; the twin of NumberLine.result().
export function texts(state, formats) {
  const x = parseNumber(state.x).value;
  return { ...fateTexts("first", x, formats[state.first], state.rounding),
    ...fateTexts("second", x, formats[state.second], state.rounding) };
}

function valuesBetween(low, high, f) {
  const values = [];
  let v = quantize(low, f, "up");
  if (v < low) return values;
  while (v !== null && v <= high && Number.isFinite(v)) {
    values.push(v);
    if (values.length > DENSE) return null;
    v = neighbours(v, f)[1];
  }
  return values;
}

function line(f, x, rounding, view, place, y, width) {
  const group = paintFormat(svg("g", {}), f), [low, high] = view;
  const inside = (v) => place(Math.min(Math.max(v, low), high));
  const found = fate(x, f, rounding), values = valuesBetween(low, high, f);
  group.append(svg("text", { x: 8, y: y - 24 }, f.title));
  if (found.interval) {
    const [a, b] = [found.interval[0] ?? low, found.interval[1] ?? high];
    group.append(svg("rect", { x: inside(a), width: Math.max(inside(b) - inside(a), 1), y: y - 16, height: 32, rx: 3,
      fill: "var(--mpl-format)", "fill-opacity": 0.22 }));
  }
  group.append(svg("line", { x1: 8, x2: width - 8, y1: y, y2: y, stroke: "var(--mpl-edge)" }));
  if (values === null) {
    group.append(svg("rect", { x: 8, width: width - 16, y: y - 7, height: 14, fill: "var(--mpl-format)", "fill-opacity": 0.5 }),
      svg("text", { x: width - 8, y: y - 24, "text-anchor": "end", class: "mpl-quiet" }, "too dense to draw: zoom in"));
  } else {
    for (const v of values) {
      group.append(svg("line", { x1: place(v), x2: place(v), y1: y - 9, y2: y + 9, stroke: "var(--mpl-format)",
        "stroke-width": values.length > 80 ? 1 : 2 }));
    }
    let free = -Infinity;
    for (const v of values) {
      const text = significant(v, 6), half = text.length * 3.6, at = place(v);
      if (at - half < free || at - half < 4 || at + half > width - 4) continue;
      group.append(svg("text", { x: at, y: y + 28, "text-anchor": "middle", class: "mpl-quiet" }, text));
      free = at + half + 10;
    }
  }
  const targets = found.interval ? [[found.value, 1]] : [[found.low, 1 - found.chance], [found.high, found.chance]];
  for (const [v, weight] of targets) {
    if (v >= low && v <= high && weight > 0) {
      group.append(svg("circle", { cx: place(v), cy: y, r: 6, fill: "var(--mpl-format)", "fill-opacity": 0.25 + 0.75 * weight,
        stroke: "var(--mpl-format)", "stroke-width": 2 }));
    }
  }
  return group;
}

function render({ model, el }) {
  const formats = formatsOf(model);
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const titles = Object.entries(formats).map(([k, f]) => [k, f.title]);
  const view = (s) => [s.centre - halfWidth(s), s.centre + halfWidth(s)];
  const number = (text) => {
    const read = parseNumber(text);
    return !read.error && !Number.isFinite(read.value) ? { error: "The number line ends before infinity: type a number." } : read;
  };
  // The view follows a number that leaves it.
  const moved = (x, zoom) => {
    const s = state(), half = 2 ** -(zoom ?? s.zoom);
    return Math.abs(x - s.centre) <= half && zoom === undefined ? {} : { centre: x };
  };
  const accept = (text) => set({ x: text, ...moved(parseNumber(text).value) });
  const typed = textField("x", "x", number, accept);
  const slide = slider("Move x", { min: 0, max: STEPS, name: "position" }, () => model.get("x"), (k) => {
    const [low, high] = view(state());
    set({ x: shortest(low + (k / STEPS) * (high - low)) });
  });
  const first = select("First format", titles, (v) => set({ first: v }));
  const second = select("Second format", titles, (v) => set({ second: v }));
  const rounding = select("Rounding", ALL_MODES, (v) => set({ rounding: v }));
  const zoom = slider("Zoom", { min: -12, max: 16, name: "zoom" }, (v) => `width 2^${1 - v}`,
    (v) => set({ zoom: v, ...moved(parseNumber(model.get("x")).value, v) }));
  const picked = drawing(210, () => paint());
  const names = [["value", "becomes"], ["error", "relative error"], ["gap", "gap"], ["interval", "rounds alike"]];
  const lists = ["first", "second"].map((which) => facts(names.map(([k, term]) => [`${which}-${k}`, term])));
  const heads = lists.map(() => h("span", { class: "mpl-name" }));
  const root = frame({ model, el, kind: "number-line", title: "Number line",
    hint: "Drag x, or type it. The shaded interval holds every number that rounds to the same value." },
  h("div", { class: "mpl-controls" }, typed.node, slide.node, zoom.node, first.node, second.node, rounding.node),
  picked.node, h("output", { "aria-live": "polite", class: "mpl-pair" },
    ...lists.map((list, i) => h("div", {}, heads[i], list.node))));
  picked.node.classList.add("mpl-grab");
  const drag = (event) => {
    if (event.buttons !== 1) return;
    const box = picked.node.getBoundingClientRect(), [low, high] = view(state());
    const share = Math.min(Math.max((event.clientX - box.left - 8) / (box.width - 16), 0), 1);
    set({ x: shortest(low + (Math.round(share * STEPS) / STEPS) * (high - low)) });
  };
  picked.node.addEventListener("pointerdown", drag);
  picked.node.addEventListener("pointermove", drag);
  const paint = () => {
    const now = state(), x = parseNumber(now.x).value, [low, high] = view(now);
    typed.show(now.x);
    slide.show(Math.round(((Math.min(Math.max(x, low), high) - low) / (high - low)) * STEPS));
    first.show(now.first);
    second.show(now.second);
    rounding.show(now.rounding);
    zoom.show(now.zoom);
    const said = texts(now, formats);
    picked.show(`${now.x} on the number line: ${said["first-value"]} in ${formats[now.first].title}, `
      + `${said["second-value"]} in ${formats[now.second].title}.`, (width) => {
      const place = (v) => 8 + ((v - low) / (high - low)) * (width - 16);
      const at = place(Math.min(Math.max(x, low), high));
      return [line(formats[now.first], x, now.rounding, [low, high], place, 54, width),
        line(formats[now.second], x, now.rounding, [low, high], place, 150, width),
        svg("line", { x1: at, x2: at, y1: 30, y2: 186, stroke: "var(--mpl-fg)", "stroke-width": 1.5 }),
        svg("text", { x: Math.min(Math.max(at, 30), width - 30), y: 204, "text-anchor": "middle" },
          `x = ${significant(x, 7)}`)];
    });
    ["first", "second"].forEach((which, i) => {
      paintFormat(heads[i], formats[now[which]]);
      write(heads[i], formats[now[which]].title);
      for (const [key, node] of Object.entries(lists[i].values)) write(node, said[key]);
    });
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => {
    const good = checked(raw, { first: oneOf(Object.keys(formats)), second: oneOf(Object.keys(formats)),
      rounding: oneOf(ALL_MODES.map((m) => m[0])), zoom: whole(-12, 16),
      x: (text) => (number(text).error ? undefined : text) });
    set(good.x === undefined ? good : { ...good, centre: parseNumber(good.x).value });
  } });
  link.read();
  return () => { stop(); picked.stop(); link.stop(); };
}

export default { render };
