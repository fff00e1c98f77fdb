"""The bit explorer: toggle the bits of a code or type a number, and see what every format makes of it."""

import math
from typing import Any

import torch
import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, read_number, table_of
from mixprec_lab.exhibits._text import error_text, exact_decimal, parse_number, power_form, shortest, significant
from mixprec_lab.formats import Bits, FloatFormat, FormatLike, bits_of_code, encode, get_format, neighbours
from mixprec_lab.rounding import OVERFLOW_POLICIES, ROUNDING_MODES, quantize, relative_error, ulp

_NONE = "\u2014"
_KINDS = {"nan": "NaN", "infinity": "infinity", "zero": "zero", "subnormal": "subnormal", "normal": "normal"}


class BitExplorer(Exhibit):
    """One code of one format, taken apart, and its number rounded to every format.

    ``text`` is the number (``"0.1"``, ``"2^-24"``, ``"-0"``, ``"nan"``, or a float), ``code`` the bits that stand for
    it in ``format``; give either.  The two always agree: setting ``text`` rounds it to a code, setting ``code`` writes
    its value into ``text``.  NaN in a format without NaN (FP6, FP4) is refused by ``text``, and a change to such a
    format turns it into 0.  TraitError for a text that is no number, a code that the format does not have, an
    unknown format, mode or policy.
    """

    _esm = es_module("bit_explorer")
    _kind = "bit-explorer"

    format = t.Unicode("fp16").tag(sync=True)
    text = t.Unicode("0.1").tag(sync=True)
    code = t.Int(0).tag(sync=True)
    rounding = t.Unicode("nearest_even").tag(sync=True)
    overflow = t.Unicode("saturate").tag(sync=True)

    def __init__(
        self,
        format: FormatLike = "fp16",
        text: str | float = "0.1",
        *,
        code: int | None = None,
        rounding: str = "nearest_even",
        overflow: str = "saturate",
        formats: list[FormatLike] | None = None,
        name: str | None = None,
    ) -> None:
        offered, fmt = table_of(formats), get_format(format)
        offered.setdefault(fmt.name, fmt)
        if code is not None:
            text = shortest(_value_of(code, fmt))
        state = {"format": fmt.name, "text": text if isinstance(text, str) else shortest(text)}
        state |= {"rounding": rounding, "overflow": overflow}
        super().__init__(offered, name, **state)
        self._settle()
        if code is not None:
            self.code = code
            self._shown = {key: value for key, value in self._shown.items() if key != "text"} | {"code": code}

    _check_format = t.validate("format")(choice("format", lambda self: self._offered))
    _check_rounding = t.validate("rounding")(choice("rounding", lambda self: ROUNDING_MODES[:5]))
    _check_overflow = t.validate("overflow")(choice("overflow", lambda self: OVERFLOW_POLICIES))

    @t.validate("text")
    def _check_text(self, proposal: Any) -> str:
        read_number(proposal.value)
        return proposal.value.strip()

    @t.validate("code")
    def _check_code(self, proposal: Any) -> int:
        _value_of(proposal.value, self._format(self.format))
        return proposal.value

    @t.observe("code")
    def _follow_code(self, change: Any) -> None:
        value = self.bits.value
        if not _same(value, self._rounded(self._format(self.format))):
            self.text = shortest(value)

    @t.observe("format", "text", "rounding", "overflow")
    def _settle(self, change: Any = None) -> None:
        fmt = self._format(self.format)
        value = self._rounded(fmt)
        if self.code < 2**fmt.bits and _same(self.bits.value, value):
            return
        if math.isnan(value) and not fmt.has_nan:
            if change is not None and change.name == "text":
                self.text = change.old
                raise t.TraitError(f"expected a number that {fmt.title} has a code for, got nan")
            self.set_trait("text", "0")
            value = 0.0
        # A negative number that overflows to NaN keeps its sign bit, as encode() has it.
        self.code = int(encode(self.number if math.isnan(value) else value, fmt))

    @property
    def number(self) -> float:
        """The number that ``text`` names."""
        return parse_number(self.text)

    @property
    def bits(self) -> Bits:
        """The code, taken apart."""
        return bits_of_code(self.code, self._format(self.format))

    def _rounded(self, fmt: FloatFormat) -> float:
        return float(quantize(torch.tensor(self.number, dtype=torch.float64), fmt, self.rounding, self.overflow))

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        bits, fmt = self.bits, self._format(self.format)
        value = bits.value
        below, above = (_NONE, _NONE) if math.isnan(value) else map(_side, neighbours(value, fmt))
        texts = {
            "value": exact_decimal(value) or f"{shortest(value)} (rounded)",
            "power": power_form(value) if math.isfinite(value) else _NONE,
            "class": _KINDS[bits.kind],
            "code": f"0x{self.code:0{-(-fmt.bits // 4)}X} ({self.code})",
            "below": below,
            "above": above,
            "gap": power_form(float(ulp(torch.tensor(value, dtype=torch.float64), fmt)))
            if math.isfinite(value)
            else _NONE,
        }
        return texts | _anatomy(bits) | self._comparison()

    def _comparison(self) -> dict[str, str]:
        texts, x = {}, self.number
        for name, fmt in self._offered.items():
            q = self._rounded(fmt)
            error = float(relative_error(*(torch.tensor([v], dtype=torch.float64) for v in (x, q))))
            texts |= {
                f"{name}-value": significant(q, 9),
                f"{name}-outcome": _outcome(x, q, fmt),
                f"{name}-error": error_text(error),
            }
        return texts


def _value_of(code: int, fmt: FloatFormat) -> float:
    if not 0 <= code < 2**fmt.bits:
        raise t.TraitError(f"expected a code of {fmt.title} in [0, {2**fmt.bits}), got {code}")
    return bits_of_code(code, fmt).value


def _same(a: float, b: float) -> bool:
    """Equal as ``Object.is`` has it: NaN equals NaN, -0 differs from 0."""
    return math.isnan(a) and math.isnan(b) or a == b and math.copysign(1, a) == math.copysign(1, b)


def _side(v: float | None) -> str:
    return "none" if v is None else significant(v, 17)


def _anatomy(bits: Bits) -> dict[str, str]:
    fmt, finite = bits.format, math.isfinite(bits.value)
    scale = f"2^{max(bits.exponent, int(fmt.signed)) - fmt.bias}"
    fraction = f"{bits.fraction}/{2**fmt.mantissa_bits}"
    significand = f"(1 + {fraction})" if bits.exponent else fraction
    signed_product = f"{'-1' if bits.sign else '+1'} × {scale} × {significand}" if fmt.mantissa_bits else scale
    field = f"{bits.exponent:0{fmt.exponent_bits}b} = {bits.exponent}"
    return {
        "sign": ("1, negative" if bits.sign else "0, positive") if fmt.signed else "none, always positive",
        "exponent": f"{field}, scale {scale}" if finite else f"{field}, a special code",
        "fraction": f"{bits.fraction:0{fmt.mantissa_bits}b} = {bits.fraction} of {2**fmt.mantissa_bits}"
        if fmt.mantissa_bits
        else "none",
        "formula": signed_product if finite else _NONE,
    }


def _outcome(x: float, q: float, fmt: FloatFormat) -> str:
    """What became of ``x`` when it was rounded to ``q``, in words."""
    if math.isnan(q):
        return "NaN" if math.isnan(x) else "becomes NaN"
    if math.isinf(q):
        return "infinity" if math.isinf(x) else "overflows to infinity"
    if q == 0:
        return "flushed to zero" if x else "zero"
    if abs(x) > fmt.largest:
        return "held at the largest"
    if not fmt.signed and x < fmt.smallest:
        return "held at the smallest"
    return "subnormal" if abs(q) < fmt.smallest_normal else "normal"
