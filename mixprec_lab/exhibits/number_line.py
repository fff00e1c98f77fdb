"""The number line: the values of two formats around x, and the interval that rounds to the same value."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, read_number, table_of
from mixprec_lab.exhibits._text import error_text, parse_number, percent, power_form, shortest, significant
from mixprec_lab.formats import FloatFormat, FormatLike, get_format, neighbours
from mixprec_lab.rounding import ROUNDING_MODES, quantize, relative_error, ulp

_DEFAULT = ("fp32", "tf32", "bf16", "fp16", "fp8_e5m2", "fp8_e4m3", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1")


class NumberLine(Exhibit):
    """``x`` between the values of two formats, in any of the six rounding modes; beyond the largest value it saturates.

    ``x`` is text as in ``BitExplorer`` (or a float) and finite; ``formats`` are the two to start with; the view reaches
    ``2**-zoom`` to both sides of ``centre`` (``x`` unless given).  TraitError for anything else.
    """

    _esm = es_module("number_line")
    _kind = "number-line"

    x = t.Unicode("2.3").tag(sync=True)
    first = t.Unicode("fp8_e4m3").tag(sync=True)
    second = t.Unicode("fp8_e5m2").tag(sync=True)
    rounding = t.Unicode("nearest_even").tag(sync=True)
    centre = t.Float(2.3).tag(sync=True)
    zoom = t.Int(0, min=-12, max=16).tag(sync=True)

    def __init__(
        self,
        x: str | float = "2.3",
        formats: Sequence[FormatLike] = ("fp8_e4m3", "fp8_e5m2"),
        rounding: str = "nearest_even",
        *,
        zoom: int = 0,
        centre: float | None = None,
        offered: Iterable[FormatLike] | None = None,
        name: str | None = None,
    ) -> None:
        pair = list(formats)
        if len(pair) != 2:
            raise ValueError(f"expected two formats, got {len(pair)}")
        table = table_of(offered, _DEFAULT) | table_of(pair)
        if unsigned := [f.title for f in table.values() if not f.signed]:
            raise ValueError(f"{', '.join(unsigned)} has no sign and no zero: choose formats that hold numbers")
        first, second = (get_format(f).name for f in pair)
        text = x if isinstance(x, str) else shortest(x)
        state = {"x": text, "first": first, "second": second, "rounding": rounding, "zoom": zoom}
        middle = _read(text) if centre is None else centre
        super().__init__(table, name, centre=middle, **state)

    _check_first = t.validate("first")(choice("first", lambda self: self._offered))
    _check_second = t.validate("second")(choice("second", lambda self: self._offered))
    _check_rounding = t.validate("rounding")(choice("rounding", lambda self: ROUNDING_MODES))

    @t.validate("x")
    def _check_x(self, proposal: Any) -> str:
        _read(proposal.value)
        return proposal.value.strip()

    @t.validate("centre")
    def _check_centre(self, proposal: Any) -> float:
        if not math.isfinite(proposal.value):
            raise t.TraitError(f"expected a finite centre, got {proposal.value}")
        return proposal.value

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        x = parse_number(self.x)
        texts = {}
        for prefix, name in (("first", self.first), ("second", self.second)):
            found = _chances(x, self._offered[name]) if self.rounding == "stochastic" else None
            found = found or _rounded(x, self._offered[name], self.rounding)
            texts |= {f"{prefix}-{key}": text for key, text in found.items()}
        return texts


def _read(text: str) -> float:
    value = read_number(text)
    if not math.isfinite(value):
        raise t.TraitError(f"expected a finite number, got {text!r}")
    return value


def _quantize(x: float, fmt: FloatFormat, rounding: str) -> float:
    return float(quantize(torch.tensor(x, dtype=torch.float64), fmt, rounding))


def _gap(x: float, fmt: FloatFormat) -> str:
    return power_form(float(ulp(torch.tensor(x, dtype=torch.float64), fmt)))


def _chances(x: float, fmt: FloatFormat) -> dict[str, str]:
    low, high = _quantize(x, fmt, "down"), _quantize(x, fmt, "up")
    value = significant(low, 9)
    if low != high:
        up = (x - low) / (high - low)
        value = f"{value} ({percent(1 - up)}) or {significant(high, 9)} ({percent(up)})"
    interval = "none: x decides only the chances"
    return {"value": value, "error": "0 on average", "interval": interval, "gap": _gap(low, fmt)}


def _rounded(x: float, fmt: FloatFormat, rounding: str) -> dict[str, str]:
    value = _quantize(x, fmt, rounding)
    below, above = (v if v is not None and math.isfinite(v) else None for v in neighbours(value, fmt))
    low, high = _interval(value, below, above, rounding)
    ends = "-inf" if low is None else significant(low, 9), "inf" if high is None else significant(high, 9)
    error = relative_error(*(torch.tensor([v], dtype=torch.float64) for v in (x, value)))
    return {
        "value": significant(value, 9),
        "error": error_text(float(error)),
        "interval": " to ".join(ends),
        "gap": _gap(value, fmt),
    }


def _interval(
    value: float, below: float | None, above: float | None, rounding: str
) -> tuple[float | None, float | None]:
    """The numbers that ``rounding`` sends to ``value``, between its neighbours; None: no end on that side."""
    if rounding == "up":
        return below, None if above is None else value
    if rounding == "down":
        return None if below is None else value, above
    if rounding == "toward_zero":
        return (value, above) if value > 0 else (below, value) if value < 0 else (below, above)
    return (None if below is None else (below + value) / 2, None if above is None else (above + value) / 2)
