"""From values to codes and back, exactly; and the view of one code or one point of the number line."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mixprec_lab.formats.descriptor import FloatFormat, FormatLike, get_format

Kind = Literal["zero", "subnormal", "normal", "infinity", "nan"]


def _as_float64(x: "torch.Tensor | float") -> torch.Tensor:
    """``x`` in float64 (exact for every supported input); TypeError for integer, bool and complex tensors."""
    if not isinstance(x, torch.Tensor):
        return torch.as_tensor(x, dtype=torch.float64)
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {x.dtype}: call .float() or .double() on it first")
    return x.detach().double()


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """``2.0**exponent`` in float64, exact, for int64 exponents from -1022 to 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def encode(x: "torch.Tensor | float", fmt: FormatLike) -> torch.Tensor:
    """The int64 codes of ``x`` rounded to nearest, ties to even; same shape and device as ``x``.

    Overflow follows the format: inf where it has one, else NaN, else (FP6, FP4) the largest value.  NaN becomes the
    format's NaN with a zero sign bit; ValueError if it has none.  -0 keeps its sign where the format has a -0.
    E8M0 has neither sign nor zero: zero and negative values become NaN, positive ones below 2**-127 become 2**-127.
    ``x`` may be a number or a tensor of any floating dtype; float64 input is rounded once, not through FP32.
    """
    fmt, v = get_format(fmt), _as_float64(x)
    is_nan = v.isnan()
    if not fmt.has_nan and bool(is_nan.any()):
        raise ValueError(f"{fmt.title} has no code for NaN: replace NaNs first (torch.nan_to_num)")
    magnitude = v.abs().nan_to_num(nan=0.0).clamp_(max=2 * fmt.overflow_threshold)
    exponent = ((magnitude.view(torch.int64) >> 52) - 1023).clamp_(min=fmt.min_exponent)
    steps = torch.round(magnitude * _power_of_two(fmt.mantissa_bits - exponent)).long()  # in [0, 2**(m + 1)]
    field = exponent - fmt.min_exponent + int(fmt.signed)
    codes = ((field << fmt.mantissa_bits) + steps - 2**fmt.mantissa_bits).clamp_(min=0)  # a carry moves the field up
    overflow = fmt.inf_code or fmt.nan_code or fmt.largest_code
    codes = torch.where(codes > fmt.largest_code, overflow, codes)
    if not fmt.signed:
        return torch.where(is_nan | (v <= 0), fmt.nan_code, codes)
    negative = v.signbit() & ~is_nan
    if not fmt.has_negative_zero:
        negative &= (codes != 0) & (codes != fmt.nan_code)
    codes = codes | (negative.long() << (fmt.bits - 1))
    return torch.where(is_nan, fmt.nan_code, codes) if fmt.has_nan else codes


def decode(codes: torch.Tensor, fmt: FormatLike) -> torch.Tensor:
    """The float64 values of integer ``codes`` (exact); same shape and device.

    Raises TypeError if ``codes`` is not an integer tensor and ValueError if a code lies outside ``[0, 2**bits)``.
    """
    fmt = get_format(fmt)
    if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.is_complex():
        got = codes.dtype if isinstance(codes, torch.Tensor) else type(codes).__name__
        raise TypeError(f"expected an integer tensor of codes, got {got}: encode() makes codes from values")
    c = codes.long()
    if c.numel() and (int(c.min()) < 0 or int(c.max()) >= 2**fmt.bits):
        raise ValueError(f"expected codes of {fmt.title} in [0, {2**fmt.bits}), got {int(c.min())} to {int(c.max())}")
    width = fmt.exponent_bits + fmt.mantissa_bits
    magnitude = c & (2**width - 1)
    field, fraction = magnitude >> fmt.mantissa_bits, magnitude & (2**fmt.mantissa_bits - 1)
    lead = 2**fmt.mantissa_bits * ((field > 0) | (not fmt.signed)).long()
    exponent = field.clamp(min=int(fmt.signed)) - fmt.bias - fmt.mantissa_bits
    values = (lead + fraction).double() * _power_of_two(exponent)
    beyond = magnitude > fmt.largest_code
    values = torch.where(beyond, math.inf if fmt.has_inf else math.nan, values)
    if fmt.has_inf:
        values = torch.where(magnitude > fmt.inf_code, math.nan, values)
    values = torch.where((c >> width) == 1, -values, values) if fmt.signed else values
    return torch.where(c == fmt.nan_code, math.nan, values) if fmt.specials == "nan_negative_zero" else values


@dataclass(frozen=True)
class Bits:
    """One code, taken apart."""

    format: FloatFormat
    code: int
    sign: int
    exponent: int  #: the stored exponent field, bias included
    fraction: int  #: the stored fraction field
    value: float
    kind: Kind

    @property
    def pattern(self) -> str:
        """The bits, fields separated by blanks: ``'0 01111 0000000000'``."""
        fmt = self.format
        fields = [f"{self.exponent:0{fmt.exponent_bits}b}"]
        fields += [f"{self.fraction:0{fmt.mantissa_bits}b}"] if fmt.mantissa_bits else []
        return " ".join([str(self.sign)] * fmt.signed + fields)


def bits_of_code(code: int, fmt: FormatLike) -> Bits:
    """The fields, value and kind of ``code``; ValueError if it is not a code of ``fmt``."""
    fmt = get_format(fmt)
    value = float(decode(torch.tensor(code), fmt))
    exponent = (code >> fmt.mantissa_bits) & (2**fmt.exponent_bits - 1)
    fraction = code & (2**fmt.mantissa_bits - 1)
    kind: Kind = "nan" if math.isnan(value) else "infinity" if math.isinf(value) else "normal"
    if kind == "normal" and fmt.signed and exponent == 0:
        kind = "subnormal" if fraction else "zero"
    sign = code >> (fmt.bits - 1) if fmt.signed else 0
    return Bits(fmt, code, sign, exponent, fraction, value, kind)


def bits_of(x: float, fmt: FormatLike) -> Bits:
    """The number ``x`` rounded to nearest in ``fmt`` (see ``encode``), taken apart."""
    return bits_of_code(int(encode(float(x), fmt)), fmt)


def neighbours(x: float, fmt: FormatLike) -> tuple[float | None, float | None]:
    """The nearest values of ``fmt`` strictly below and strictly above ``x``; zeros are one value, 0.0.

    Next to the largest value stands inf where the format has one; None says that there is no value on that side.
    Raises ValueError for NaN.
    """
    fmt, x = get_format(fmt), float(x)
    if math.isnan(x):
        raise ValueError("NaN has no neighbours: give a number")
    return (_next_below(x, fmt), _next_above(x, fmt))


def _next_above(x: float, fmt: FloatFormat) -> float | None:
    if not fmt.signed and x < fmt.smallest:
        return fmt.smallest
    if x >= fmt.largest:
        return math.inf if fmt.has_inf and x < math.inf else None
    if x < -fmt.largest:
        return -fmt.largest
    code = int(encode(abs(x), fmt))
    nearest = math.copysign(float(decode(torch.tensor(min(code, fmt.largest_code)), fmt)), x)
    if nearest > x:
        return nearest
    if nearest == 0.0:
        return fmt.smallest
    step = 1 if x > 0 else -1
    return math.copysign(float(decode(torch.tensor(code + step), fmt)), x) + 0.0


def _next_below(x: float, fmt: FloatFormat) -> float | None:
    if fmt.signed:
        above = _next_above(-x, fmt)
        return None if above is None else -above + 0.0
    if x <= fmt.smallest:
        return None
    if x > fmt.largest:
        return fmt.largest
    code = int(encode(x, fmt))
    nearest = float(decode(torch.tensor(code), fmt)) if code <= fmt.largest_code else math.inf
    return nearest if nearest < x else float(decode(torch.tensor(code - 1), fmt))


def all_values(fmt: FormatLike) -> torch.Tensor:
    """Every distinct finite value of ``fmt``, ascending, float64; ValueError above 20 bits (FP32 has 2**32 codes)."""
    fmt = get_format(fmt)
    if fmt.bits > 20:
        raise ValueError(f"{fmt.title} has 2**{fmt.bits} codes: use neighbours() to walk along it")
    values = decode(torch.arange(2**fmt.bits), fmt)
    return torch.unique(values[values.isfinite()] + 0.0)
