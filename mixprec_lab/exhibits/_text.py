"""Numbers to text and back, digit for digit as ``text.js`` does it, so that page and Python can be compared."""

import math
import re
from decimal import ROUND_HALF_UP, Context, Decimal

_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,4})?", re.IGNORECASE | re.ASCII)
_POWER = re.compile(
    r"([+-]?)(?:(\d+\.?\d*|\.\d+)\s*[*x×·]\s*)?2\s*(?:\^|\*\*)\s*([+-]?\d{1,4})", re.IGNORECASE | re.ASCII
)
_HEX = re.compile(r"([+-]?)0x([0-9a-f]*)\.?([0-9a-f]*)(?:p([+-]?\d{1,4}))?", re.IGNORECASE | re.ASCII)
_WORD = re.compile(r"([+-]?)(inf|infinity|nan)", re.IGNORECASE)


def parse_number(text: str) -> float:
    """The double that ``text`` names: ``0.1``, ``1e-8``, ``2^-24``, ``1.5*2^-3``, ``0x1p-3``, ``-0``, ``inf``, ``nan``.

    Raises ValueError, saying what may be written, for anything else and for finite numbers beyond double precision.
    """
    clean = text.strip().replace("\u2212", "-")
    if clean == "":
        raise ValueError("Type a number, for example 0.1, 65520, 2^-24 or nan.")
    if word := _WORD.fullmatch(clean):
        return math.nan if word[2].lower() == "nan" else math.copysign(math.inf, -1 if word[1] == "-" else 1)
    value = _parse_finite(clean)
    if value is None:
        shown = clean[:24] + "\u2026" if len(clean) > 24 else clean
        raise ValueError(f"\u201c{shown}\u201d is not a number: write 0.1, 1e-8, 2^-24, 0x1p-3, -0, inf or nan.")
    if math.isinf(value):
        raise ValueError("That is beyond double precision (1.8e308): write inf for infinity.")
    return value


def _parse_finite(clean: str) -> float | None:
    power, hexadecimal = _POWER.fullmatch(clean), _HEX.fullmatch(clean)
    if _DECIMAL.fullmatch(clean):
        return float(clean)
    if power and abs(int(power[3])) <= 1022:
        return (-1 if power[1] == "-" else 1) * float(power[2] or 1) * 2.0 ** int(power[3])
    if hexadecimal:
        sign, whole, part, exponent = hexadecimal.groups()
        shift = int(exponent or 0) - 4 * len(part)
        if 0 < len(whole + part) <= 13 and abs(shift) <= 1000:
            return (-1 if sign == "-" else 1) * float(int(whole + part, 16)) * 2.0**shift
    return None


def _special(v: float) -> str | None:
    if math.isnan(v):
        return "nan"
    if math.isinf(v):
        return "inf" if v > 0 else "-inf"
    return None if v else "-0" if math.copysign(1, v) < 0 else "0"


def _layout(number: Decimal) -> str:
    """Plain notation from 1e-4 up to 1e16, scientific beyond; trailing zeros dropped."""
    sign = "-" if number.is_signed() else ""
    digits = "".join(map(str, number.as_tuple().digits)).rstrip("0") or "0"
    exponent = number.adjusted()
    if exponent < -4 or exponent > 15:
        return f"{sign}{digits[0]}{'.' + digits[1:] if len(digits) > 1 else ''}e{exponent}"
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    whole, part = digits[: exponent + 1].ljust(exponent + 1, "0"), digits[exponent + 1 :]
    return f"{sign}{whole}{'.' + part if part else ''}"


def shortest(v: float) -> str:
    """The shortest decimal that reads back as the same double; ``inf``, ``-inf``, ``nan``, ``-0`` by name."""
    return _special(v) or _layout(Decimal(repr(v)))


def significant(v: float, digits: int) -> str:
    """``v`` to that many significant digits (halves away from zero), trailing zeros dropped."""
    return _special(v) or _layout(Context(prec=digits, rounding=ROUND_HALF_UP).create_decimal(Decimal(v)))


def exact_decimal(v: float) -> str | None:
    """Every decimal digit of ``v``, or None if there are more than 40."""
    exact = Decimal(v)
    if _special(v):
        return _special(v)
    digits = "".join(map(str, exact.as_tuple().digits)).rstrip("0")
    return None if len(digits) > 40 or abs(v) < 2.0**-970 else _layout(exact)


def power_form(v: float) -> str:
    """``v`` as an odd integer times a power of two: ``'819 × 2^-13'``, ``'2^-12'``, ``'-3'``."""
    if word := _special(v):
        return word
    if abs(v) < 2.0**-970:
        return shortest(v)
    numerator, denominator = abs(v).as_integer_ratio()
    exponent = (numerator & -numerator).bit_length() - denominator.bit_length()
    odd, sign = numerator // (numerator & -numerator), "-" if v < 0 else ""
    if exponent == 0:
        return f"{sign}{odd}"
    return f"{sign}2^{exponent}" if odd == 1 else f"{sign}{odd} × 2^{exponent}"


def percent(share: float) -> str:
    """A share as a percentage with two decimals; ``'<0.01 %'`` and ``'>99.99 %'`` near the ends, a dash for NaN."""
    if math.isnan(share):
        return "\u2014"
    if share < 1e-12 or share > 1 - 1e-12:
        return "0 %" if share < 0.5 else "100 %"
    if share < 0.0001 or share > 0.9999:
        return "<0.01 %" if share < 0.5 else ">99.99 %"
    return f"{Decimal(100 * share).quantize(Decimal('0.01'), rounding=ROUND_HALF_UP)} %"


def error_text(v: float) -> str:
    """An error to three digits; a dash for NaN (there is nothing to compare)."""
    return "\u2014" if math.isnan(v) else significant(v, 3)
