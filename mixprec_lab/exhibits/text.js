// Numbers to text and back, digit for digit as mixprec_lab/exhibits/_text.py does it.

import { exponentOf, pow2 } from "./float.js";

const DECIMAL = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,4})?$/i;
const POWER = /^([+-]?)(?:(\d+\.?\d*|\.\d+)\s*[*x\u00d7\u00b7]\s*)?2\s*(?:\^|\*\*)\s*([+-]?\d{1,4})$/i;
const HEX = /^([+-]?)0x([0-9a-f]*)\.?([0-9a-f]*)(?:p([+-]?\d{1,4}))?$/i;

function parseHex([, sign, whole, part, power]) {
  const digits = whole + part;
  if (digits.length === 0 || digits.length > 13) return null;
  const exponent = Number(power || 0) - 4 * part.length;
  if (Math.abs(exponent) > 1000) return null;
  return (sign === "-" ? -1 : 1) * Number("0x" + digits) * pow2(exponent);
}

// { value } or { error }: decimal, 2^-24, 1.5*2^-3, 0x1p-3, inf, nan.
export function parseNumber(text) {
  const clean = text.trim().replace(/\u2212/g, "-");
  if (clean === "") return { error: "Type a number, for example 0.1, 65520, 2^-24 or nan." };
  const word = /^([+-]?)(inf|infinity|nan)$/i.exec(clean);
  if (word) {
    if (word[2].toLowerCase() === "nan") return { value: NaN };
    return { value: word[1] === "-" ? -Infinity : Infinity };
  }
  let value = null;
  const power = POWER.exec(clean), hex = HEX.exec(clean);
  if (DECIMAL.test(clean)) value = Number(clean);
  else if (power && Math.abs(power[3]) <= 1022) {
    value = (power[1] === "-" ? -1 : 1) * Number(power[2] || 1) * pow2(Number(power[3]));
  } else if (hex) value = parseHex(hex);
  if (value === null) {
    const shown = clean.length > 24 ? clean.slice(0, 24) + "\u2026" : clean;
    return { error: `\u201c${shown}\u201d is not a number: write 0.1, 1e-8, 2^-24, 0x1p-3, -0, inf or nan.` };
  }
  if (!Number.isFinite(value)) return { error: "That is beyond double precision (1.8e308): write inf for infinity." };
  return { value };
}

function layout(negative, digits, exponent) {
  const sign = negative ? "-" : "", kept = digits.replace(/0+$/, "") || "0";
  if (exponent < -4 || exponent > 15) {
    return sign + kept[0] + (kept.length > 1 ? "." + kept.slice(1) : "") + "e" + exponent;
  }
  if (exponent < 0) return sign + "0." + "0".repeat(-exponent - 1) + kept;
  const whole = kept.slice(0, exponent + 1).padEnd(exponent + 1, "0"), part = kept.slice(exponent + 1);
  return sign + whole + (part ? "." + part : "");
}

function special(v) {
  if (v !== v) return "nan";
  if (v === Infinity || v === -Infinity) return v > 0 ? "inf" : "-inf";
  return v === 0 ? (Object.is(v, -0) ? "-0" : "0") : null;
}

function laidOut(v, exponential) {
  const [mantissa, exponent] = exponential.split("e");
  return layout(v < 0, mantissa.replace(".", ""), Number(exponent));
}

// The shortest decimal that reads back as the same double.
export const shortest = (v) => special(v) ?? laidOut(v, Math.abs(v).toExponential());

// v to that many significant digits, trailing zeros dropped.
export const significant = (v, digits) => special(v) ?? laidOut(v, Math.abs(v).toExponential(digits - 1));

// The odd integer m and the exponent e of |v| = m * 2^e; null for v below 2^-970, too small for any format.
function oddPart(v) {
  let e = exponentOf(v) - 52;
  if (e < -1022) return null;
  let m = BigInt(Math.abs(v) / pow2(e));
  while (m % 2n === 0n) { m /= 2n; e += 1; }
  return [m, e];
}

// Every decimal digit of v, or null if there are more than 40.
export function exactDecimal(v) {
  const word = special(v);
  if (word !== null) return word;
  const odd = oddPart(v);
  if (odd === null) return null;
  const [m, e] = odd;
  const digits = String(e < 0 ? m * 5n ** BigInt(-e) : m * 2n ** BigInt(e));
  if (digits.replace(/0+$/, "").length > 40) return null;
  return layout(v < 0, digits, digits.length - 1 + Math.min(e, 0));
}

// v as an odd integer times a power of two: "819 \u00d7 2^-13", "2^-12", "1".
export function powerForm(v) {
  const word = special(v);
  if (word !== null) return word;
  const odd = oddPart(v);
  if (odd === null) return shortest(v);
  const [m, e] = odd, sign = v < 0 ? "-" : "";
  if (e === 0) return sign + m;
  return m === 1n ? `${sign}2^${e}` : `${sign}${m} \u00d7 2^${e}`;
}

// A share as a percentage with two decimals; tiny and almost full ones say so.
export function percent(share) {
  if (share !== share) return "\u2014";
  if (share < 1e-12) return "0 %";
  if (share > 1 - 1e-12) return "100 %";
  if (share < 0.0001) return "<0.01 %";
  if (share > 0.9999) return ">99.99 %";
  return (100 * share).toFixed(2) + " %";
}

// An error to three digits: "0", "2.44e-4", "inf"; a dash where it has no meaning.
export const errorText = (v) => (v !== v ? "\u2014" : significant(v, 3));
