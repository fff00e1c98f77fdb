// Numerics of every format of mixprec_lab, from the descriptors that Python sends (FloatFormat.as_dict()).
// A JavaScript number is a double, and a double holds every value of every format exactly.
// Twin of mixprec_lab.formats and mixprec_lab.rounding.quantize; tests/test_exhibits.py compares them code by code.

const F64 = new Float64Array(1);
const U32 = new Uint32Array(F64.buffer);

// 2^e, exact, for e from -1022 to 1023.
export function pow2(e) {
  U32[0] = 0;
  U32[1] = (e + 1023) << 20;
  return F64[0];
}

// floor(log2 |x|), exact; -1023 for zero and the subnormals of double precision, 1024 for inf and NaN.
export function exponentOf(x) {
  F64[0] = x;
  return ((U32[1] >>> 20) & 0x7ff) - 1023;
}

export const isNegative = (x) => x < 0 || Object.is(x, -0);

function roundsAway(mode, negative, whole, rest, random) {
  switch (mode) {
    case "nearest_even": return rest > 0.5 || (rest === 0.5 && whole % 2 === 1);
    case "nearest_away": return rest >= 0.5;
    case "up": return !negative && rest > 0;
    case "down": return negative && rest > 0;
    case "stochastic": return random < rest;
    default: return false; // toward_zero
  }
}

// What becomes of a magnitude beyond the largest value.  x: the number before rounding.
function overflowed(x, negative, f, mode, overflow) {
  const beyond = f.has_inf ? Infinity : NaN;
  const held = mode === "toward_zero" || mode === (negative ? "up" : "down");
  if (overflow === "saturate" || f.specials === "none" || (held && Math.abs(x) < Infinity)) return f.largest;
  return beyond;
}

// x rounded to format f.  random, in [0, 1), is the draw for mode "stochastic".
export function quantize(x, f, mode = "nearest_even", overflow = "saturate", random = 0) {
  if (x !== x) return NaN;
  if (!f.signed) return quantizeUnsigned(x, f, mode, overflow, random);
  const negative = isNegative(x), magnitude = Math.abs(x);
  let rounded = roundMagnitude(magnitude, negative, f, mode, random);
  if (rounded > f.largest) rounded = overflowed(x, negative, f, mode, overflow);
  if (rounded === 0 && !f.has_negative_zero) return 0;
  return negative ? -rounded : rounded;
}

function roundMagnitude(magnitude, negative, f, mode, random) {
  const binade = Math.min(Math.max(exponentOf(magnitude), f.min_exponent), f.max_exponent);
  const step = pow2(binade - f.mantissa_bits);
  const steps = magnitude / step, whole = Math.floor(steps);
  return (whole + (roundsAway(mode, negative, whole, steps - whole, random) ? 1 : 0)) * step;
}

// E8M0: no sign, no zero.
function quantizeUnsigned(x, f, mode, overflow, random) {
  if (x < 0 || (x === 0 && overflow === "native")) return NaN;
  const rounded = roundMagnitude(Math.abs(x), false, f, mode, random);
  if (rounded > f.largest) return overflowed(x, false, f, mode, overflow);
  return Math.max(rounded, f.smallest);
}

// The code of a magnitude that is a value of f.
function magnitudeCode(value, f) {
  const binade = Math.min(Math.max(exponentOf(value), f.min_exponent), f.max_exponent);
  const scale = 2 ** f.mantissa_bits;
  const field = binade - f.min_exponent + (f.signed ? 1 : 0);
  return Math.max(field * scale + value / pow2(binade - f.mantissa_bits) - scale, 0);
}

// The code of x rounded to f; null for a NaN in a format that has none.  A negative number that overflows to NaN
// keeps its sign bit.
export function encode(x, f, mode = "nearest_even", overflow = "native", random = 0) {
  const value = quantize(x, f, mode, overflow, random);
  if (value !== value) return x < 0 && f.signed && f.has_negative_zero ? f.nan_code + 2 ** (f.bits - 1) : f.nan_code;
  const code = value === Infinity || value === -Infinity ? f.inf_code : magnitudeCode(Math.abs(value), f);
  return isNegative(value) ? code + 2 ** (f.bits - 1) : code;
}

// Sign, stored exponent field and stored fraction field of a code.
export function fieldsOf(code, f) {
  const top = 2 ** (f.exponent_bits + f.mantissa_bits);
  const rest = code % top;
  return {
    sign: f.signed && code >= top ? 1 : 0,
    exponent: Math.floor(rest / 2 ** f.mantissa_bits),
    fraction: rest % 2 ** f.mantissa_bits,
  };
}

// The value of a code.
export function decode(code, f) {
  const { sign, exponent, fraction } = fieldsOf(code, f);
  if (f.specials === "nan_negative_zero" && code === f.nan_code) return NaN;
  const rest = exponent * 2 ** f.mantissa_bits + fraction;
  if (rest > f.largest_code) return f.has_inf && rest === f.inf_code ? (sign ? -Infinity : Infinity) : NaN;
  const lead = exponent > 0 || !f.signed ? 2 ** f.mantissa_bits : 0;
  const binade = Math.max(exponent, f.signed ? 1 : 0) - f.bias;
  const value = (lead + fraction) * pow2(binade - f.mantissa_bits);
  return sign ? -value : value;
}

// "zero", "subnormal", "normal", "infinity" or "nan".
export function kindOf(value, f) {
  if (value !== value) return "nan";
  if (Math.abs(value) === Infinity) return "infinity";
  if (value === 0) return "zero";
  return Math.abs(value) < f.smallest_normal ? "subnormal" : "normal";
}

// The nearest values of f strictly below and above x (not NaN); null where there is none.
export function neighbours(x, f) {
  return [nextBelow(x, f), nextAbove(x, f)];
}

function nextAbove(x, f) {
  if (!f.signed && x < f.smallest) return f.smallest;
  if (x >= f.largest) return f.has_inf && x < Infinity ? Infinity : null;
  if (x < -f.largest) return -f.largest;
  const above = quantize(x, f, "up");
  if (above > x) return above + 0;
  if (x === 0) return f.smallest;
  const code = magnitudeCode(Math.abs(x), f);
  return x > 0 ? decode(code + 1, f) : -decode(code - 1, f) + 0;
}

function nextBelow(x, f) {
  if (f.signed) {
    const above = nextAbove(-x, f);
    return above === null ? null : -above + 0;
  }
  if (x <= f.smallest) return null;
  if (x > f.largest) return f.largest;
  const below = quantize(x, f, "down");
  return below < x ? below : decode(magnitudeCode(x, f) - 1, f);
}

// The gap between neighbouring values in the binade of x.
export function ulp(x, f) {
  if (!Number.isFinite(x)) return Math.abs(x);
  const e = x === 0 ? f.min_exponent : exponentOf(x);
  return pow2(Math.min(Math.max(e, f.min_exponent), f.max_exponent) - f.mantissa_bits);
}

// |approximation - x| / |x|; 0 where both are equal, inf where only x is 0.
export function relativeError(x, approximation) {
  return x === approximation ? 0 : Math.abs(approximation - x) / Math.abs(x);
}

// A small seeded generator of numbers in [0, 1), multiples of 2^-32 (mulberry32, public domain, T. Ettinger).
export function mulberry32(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
