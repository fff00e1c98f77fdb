// The bit explorer: one code of one format, taken apart, and its number in every other format.

import { decode, encode, fieldsOf, kindOf, neighbours, quantize, relativeError,
  ulp } from "./float.js";
import { errorText, exactDecimal, parseNumber, powerForm, shortest, significant } from "./text.js";
import { MODES, button, cells, checked, facts, follow, formatsOf, frame, h, links, oneOf, rowHead, select, table,
  textField, whole, write } from "./ui.js";

const KEYS = ["format", "text", "code", "rounding", "overflow"];
const NONE = "\u2014";
const KINDS = { nan: "NaN", infinity: "infinity", zero: "zero", subnormal: "subnormal", normal: "normal" };

// What became of x when it was rounded to q.
export function outcome(x, q, f) {
  if (q !== q) return x !== x ? "NaN" : "becomes NaN";
  if (Math.abs(q) === Infinity) return Math.abs(x) === Infinity ? "infinity" : "overflows to infinity";
  if (q === 0) return x === 0 ? "zero" : "flushed to zero";
  if (Math.abs(x) > f.largest) return "held at the largest";
  if (!f.signed && x < f.smallest) return "held at the smallest";
  return kindOf(q, f);
}

const binary = (n, width) => n.toString(2).padStart(width, "0");

function exponentText(parts, value, f) {
  const field = `${binary(parts.exponent, f.exponent_bits)} = ${parts.exponent}`;
  if (!Number.isFinite(value)) return `${field}, a special code`;
  const scale = f.signed ? Math.max(parts.exponent, 1) : parts.exponent;
  return `${field}, scale 2^${scale - f.bias}`;
}

function formula(parts, value, f) {
  if (!Number.isFinite(value)) return NONE;
  const scale = `2^${Math.max(parts.exponent, f.signed ? 1 : 0) - f.bias}`;
  const fraction = `${parts.fraction}/${2 ** f.mantissa_bits}`;
  if (!f.mantissa_bits) return scale;
  return `${parts.sign ? "-1" : "+1"} \u00d7 ${scale} \u00d7 ${parts.exponent ? `(1 + ${fraction})` : fraction}`;
}

// Every text for a state, by data-field; the twin of BitExplorer.result().
export function texts(state, formats) {
  const f = formats[state.format], value = decode(state.code, f), parts = fieldsOf(state.code, f);
  const x = parseNumber(state.text).value;
  const [below, above] = value === value ? neighbours(value, f) : [null, null];
  const side = (v) => (v === null ? (value === value ? "none" : NONE) : significant(v, 17));
  const exact = exactDecimal(value);
  const out = {
    value: exact ?? `${shortest(value)} (rounded)`,
    power: Number.isFinite(value) ? powerForm(value) : NONE,
    class: KINDS[kindOf(value, f)],
    code: `0x${state.code.toString(16).toUpperCase().padStart(Math.ceil(f.bits / 4), "0")} (${state.code})`,
    sign: f.signed ? (parts.sign ? "1, negative" : "0, positive") : "none, always positive",
    exponent: exponentText(parts, value, f),
    fraction: f.mantissa_bits
      ? `${binary(parts.fraction, f.mantissa_bits)} = ${parts.fraction} of ${2 ** f.mantissa_bits}` : "none",
    formula: formula(parts, value, f),
    below: side(below),
    above: side(above),
    gap: Number.isFinite(value) ? powerForm(ulp(value, f)) : NONE,
  };
  for (const [name, g] of Object.entries(formats)) {
    const q = quantize(x, g, state.rounding, state.overflow);
    out[`${name}-value`] = significant(q, 9);
    out[`${name}-outcome`] = outcome(x, q, g);
    out[`${name}-error`] = errorText(relativeError(x, q));
  }
  return out;
}

// The code that belongs to the text: the present one if it already means that value, else the encoded one.
export function settle(state, formats) {
  const f = formats[state.format], x = parseNumber(state.text).value;
  const value = quantize(x, f, state.rounding, state.overflow);
  if (state.code < 2 ** f.bits && Object.is(decode(state.code, f), value)) return state;
  const code = encode(x, f, state.rounding, state.overflow);
  return code === null ? { ...state, text: "0", code: 0 } : { ...state, code };
}

function bitButtons(f, toggle) {
  const width = f.bits, buttons = [];
  const group = (name, count, from) => {
    const row = h("div", { class: "mpl-bits" });
    for (let i = from; i > from - count; i--) {
      const bit = h("button", { type: "button", class: "mpl-bit", "data-bit": i, tabindex: -1, onclick: () => toggle(i) });
      bit.dataset.place = `${name} bit ${i - from + count - 1}`;
      buttons.push(bit);
      row.append(bit);
    }
    return h("div", { class: `mpl-part mpl-${name}` }, h("span", { class: "mpl-part-name" }, `${name}, ${count}`), row);
  };
  const box = h("div", { class: "mpl-code", role: "toolbar", "aria-label": "Bits, most significant first" });
  if (f.signed) box.append(group("sign", 1, width - 1));
  box.append(group("exponent", f.exponent_bits, f.exponent_bits + f.mantissa_bits - 1));
  if (f.mantissa_bits) box.append(group("fraction", f.mantissa_bits, f.mantissa_bits - 1));
  const visit = (at) => {
    buttons.forEach((b, i) => { b.tabIndex = i === at ? 0 : -1; });
    return buttons[at];
  };
  visit(0);
  box.addEventListener("focusin", (e) => { if (buttons.includes(e.target)) visit(buttons.indexOf(e.target)); });
  box.addEventListener("keydown", (e) => {
    const at = buttons.indexOf(e.target), last = buttons.length - 1;
    const to = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last), Home: 0, End: last }[e.key];
    if (at < 0 || to === undefined) return;
    e.preventDefault();
    visit(to).focus();
  });
  return { box, buttons };
}

function comparison(formats) {
  const found = {};
  const rows = Object.entries(formats).map(([name, f]) => {
    const { row, found: tds } = cells([`${name}-value`, `${name}-outcome`, `${name}-error`]);
    row.prepend(rowHead(f));
    row.dataset.format = name;
    Object.assign(found, tds);
    return row;
  });
  const heads = ["Format", "Value", "Outcome", "Relative error"];
  return { node: table("The same number, rounded to every format", heads, rows), rows, found };
}

function render({ model, el }) {
  const formats = formatsOf(model);
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const change = (changes) => set(settle({ ...state(), ...changes }, formats));
  const refuseNaN = (text) => {
    const read = parseNumber(text), f = formats[model.get("format")];
    return Number.isNaN(read.value) && !f.has_nan ? { error: `${f.title} has no code for NaN.` } : read;
  };
  const toCode = (code) => set({ ...state(), code, text: shortest(decode(code, formats[model.get("format")])) });
  const format = select("Format", Object.entries(formats).map(([k, f]) => [k, f.title]), (v) => change({ format: v }));
  const number = textField("Number", "text", refuseNaN, (text) => change({ text }));
  const rounding = select("Rounding", MODES, (v) => change({ rounding: v }));
  const overflow = select("Beyond the largest", [["saturate", "hold at the largest"],
    ["native", "what the format says: inf or NaN"]], (v) => change({ overflow: v }));
  const previous = button("Previous code", () => toCode(model.get("code") - 1), { "data-action": "previous" });
  const next = button("Next code", () => toCode(model.get("code") + 1), { "data-action": "next" });
  const place = h("div", { class: "mpl-place" });
  const list = facts([["value", "Value"], ["power", "Exact form"], ["class", "Class"], ["sign", "Sign bit"],
    ["exponent", "Exponent field"], ["fraction", "Fraction field"], ["formula", "Reads as"], ["gap", "Gap (ulp)"],
    ["below", "Neighbour below"], ["above", "Neighbour above"]]);
  const code = h("output", { "data-field": "code", "aria-live": "polite" });
  const others = comparison(formats);
  const root = frame({ model, el, kind: "bit-explorer", title: "Bit explorer",
    hint: "Toggle a bit, or type a number, and watch what the format makes of it." },
  h("div", { class: "mpl-controls" }, format.node, number.node, rounding.node, overflow.node), place,
  h("div", { class: "mpl-row" }, previous, next, h("span", {}, "Code ", code)), list.node, others.node);
  let drawn = null, bits = null;
  const toggle = (i) => {
    const now = model.get("code"), one = Math.floor(now / 2 ** i) % 2;
    toCode(one ? now - 2 ** i : now + 2 ** i);
  };
  const paint = () => {
    const now = state(), f = formats[now.format];
    if (drawn !== now.format) {
      bits = bitButtons(f, toggle);
      place.replaceChildren(bits.box);
      drawn = now.format;
    }
    for (const bit of bits.buttons) {
      const one = Math.floor(now.code / 2 ** Number(bit.dataset.bit)) % 2;
      bit.textContent = one;
      bit.setAttribute("aria-pressed", one ? "true" : "false");
      bit.setAttribute("aria-label", `${bit.dataset.place}: ${one}`);
    }
    format.show(now.format);
    number.show(now.text);
    rounding.show(now.rounding);
    overflow.show(now.overflow);
    previous.disabled = now.code === 0;
    next.disabled = now.code === 2 ** f.bits - 1;
    for (const [key, text] of Object.entries(texts(now, formats))) {
      write(list.values[key] ?? others.found[key] ?? code, text);
    }
    for (const row of others.rows) {
      row.classList.toggle("mpl-current", row.dataset.format === now.format);
    }
  };
  const { update: set, stop } = follow(model, KEYS, paint);
  paint();
  const link = links({ model, keys: KEYS, root, restore: (raw) => {
    const good = checked(raw, { format: oneOf(Object.keys(formats)), rounding: oneOf(MODES.map((m) => m[0])),
      overflow: oneOf(["saturate", "native"]), code: whole(0, 2 ** 32 - 1),
      text: (text) => (parseNumber(text).error ? undefined : text) });
    change(good);
  } });
  link.read();
  return () => { stop(); link.stop(); };
}

export default { render };
