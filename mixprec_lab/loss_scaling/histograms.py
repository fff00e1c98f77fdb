"""Exact statistics of gradients: one pass over a tensor answers for every format and every power-of-two scale.

A format looks at a magnitude through three edges (``FloatFormat.nearest_edges``): where rounding starts to give a
subnormal, a normal value, and overflow.  Scaling by ``2**k`` moves an edge by ``k`` binades and leaves its fraction
alone.  So it is enough to know, for each element, its binade and between which edge fractions its own fraction lies:
a table of a few thousand counts, ordered by magnitude, from which every share is one suffix sum.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mixprec_lab.formats import FORMATS, FormatLike, RangeShares, get_format

#: binades of FP32, subnormals included; row 0 of a table of counts holds the zeros, the last row inf and NaN
_FIRST_BINADE, _LAST_BINADE = -149, 127
_ROWS = _LAST_BINADE - _FIRST_BINADE + 3
_FIELD_OF_ROW_0 = 1023 + _FIRST_BINADE - 1  # float64 exponent field of the row before the first binade

Threshold = tuple[float, bool]  #: fraction in [0, 1), and whether a value with just that fraction lies above the edge


def _split(edge: float) -> tuple[int, float]:
    """(binade, fraction) with ``edge == 2**binade * (1 + fraction)``, exact."""
    mantissa, exponent = math.frexp(edge)
    return exponent - 1, 2 * mantissa - 1


def _thresholds(formats: Iterable[FormatLike] | None) -> tuple[Threshold, ...]:
    chosen = [f for f in FORMATS.values() if f.signed] if formats is None else [get_format(f) for f in formats]
    if unsigned := [f.title for f in chosen if not f.signed]:
        raise ValueError(f"expected formats with a sign and a zero, got {', '.join(unsigned)}")
    if not chosen:
        raise ValueError("expected at least one format, got none")
    # At one fraction the edge that a tie lies above comes first: its cell starts at the tie, the other one after it.
    edges = {(_split(edge)[1], upper) for fmt in chosen for edge, upper in fmt.nearest_edges}
    return tuple(sorted(edges, key=lambda t: (t[0], not t[1])))


def _boundaries(thresholds: tuple[Threshold, ...], device: torch.device) -> torch.Tensor:
    """The first 52-bit fraction field above each threshold, int64, ascending."""
    first = [int(fraction * 2.0**52) + (not upper) for fraction, upper in thresholds]
    return torch.tensor(first, dtype=torch.int64, device=device)


def _table(x: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Counts of ``x`` by binade and cell, shape (279, len(boundaries) + 1), int64, on the device of ``x``; no sync."""
    bits = x.detach().double().abs().reshape(-1).view(torch.int64)  # FP32 subnormals are normal numbers in float64
    cell = torch.bucketize(bits & (2**52 - 1), boundaries, right=True)
    cells = len(boundaries) + 1
    index = ((bits >> 52) - _FIELD_OF_ROW_0).clamp_(0, _ROWS - 1).mul_(cells).add_(cell)
    if x.device.type == "cpu":
        return torch.bincount(index, minlength=_ROWS * cells).view(_ROWS, cells)
    table = torch.zeros(_ROWS * cells, dtype=torch.int64, device=x.device)  # bincount would wait for the device
    return table.scatter_add_(0, index, torch.ones_like(index)).view(_ROWS, cells)


def _check(x: object) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.layout != torch.strided:
        got = f"{x.dtype} {x.layout}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"expected a dense floating-point tensor, got {got}: give gradients, not codes or indices")
    if x.dtype == torch.float64 and not torch.equal(x.float().double().nan_to_num(), x.detach().nan_to_num()):
        raise ValueError("expected values that FP32 can hold, got float64 values that it cannot: call .float() first")
    return x


@dataclass(frozen=True, eq=False)
class MagnitudeHistogram:
    """How the magnitudes of one or several tensors are spread, exactly enough for ``shares`` at any scale.

    ``counts`` has a row for zeros, one for each binade from 2**-149 to 2**127 and one for infinities (first cell) and
    NaNs; its columns are the cells between the ``thresholds``.  ``a + b`` is the histogram of both tensors together.
    """

    thresholds: tuple[Threshold, ...]
    counts: torch.Tensor = field(repr=False)  #: (279, len(thresholds) + 1), int64, on the CPU

    @classmethod
    def of(cls, *tensors: torch.Tensor, formats: Iterable[FormatLike] | None = None) -> "MagnitudeHistogram":
        """The histogram of all elements of ``tensors``, able to answer for ``formats`` (None: all signed ones).

        FP16, BF16 and FP32 tensors of any shape, subnormal values included; float64 where FP32 holds every value.
        Raises TypeError for other tensors, ValueError for other values, for an unsigned format and for no format.
        """
        thresholds = _thresholds(formats)
        counts = torch.zeros(_ROWS, len(thresholds) + 1, dtype=torch.int64)
        for x in tensors:
            counts += _table(_check(x), _boundaries(thresholds, x.device)).cpu()
        return cls(thresholds, counts)

    @property
    def total(self) -> int:
        """Number of elements."""
        return int(self.counts.sum())

    @property
    def zero(self) -> int:
        """Number of zeros of either sign."""
        return int(self.counts[0].sum())

    @property
    def infinite(self) -> int:
        """Number of infinities."""
        return int(self.counts[-1, 0])

    @property
    def nan(self) -> int:
        """Number of NaNs."""
        return int(self.counts[-1, 1:].sum())

    @property
    def binades(self) -> dict[int, int]:
        """exponent -> number of elements with ``2**exponent <= |x| < 2**(exponent + 1)``, ascending, no empty ones."""
        rows = self.counts[1:-1].sum(1).tolist()
        return {_FIRST_BINADE + i: n for i, n in enumerate(rows) if n}

    def count_above(self, edge: float, *, upper: bool, log2_scale: int = 0) -> int:
        """How many ``|x| * 2**log2_scale`` lie above ``edge``, or on it if ``upper``; infinities count, NaNs never do.

        ``edge`` and ``upper`` are a pair of ``nearest_edges`` of a format the histogram was made for, up to a power of
        two; ValueError for another one.
        """
        binade, fraction = _split(edge)
        if (fraction, upper) not in self.thresholds:
            raise ValueError(
                f"the histogram has no threshold at {edge!r}: make it with formats=[...] that include the format asked"
            )
        row = min(max(binade - log2_scale - _FIRST_BINADE + 1, 0), _ROWS - 1)
        inside = 1 <= row <= _ROWS - 2
        first = row * self.counts.shape[1] + inside * (self.thresholds.index((fraction, upper)) + 1)
        first = max(first, self.counts.shape[1])  # zeros lie below every edge
        return int(self.counts.view(-1)[first:].sum()) - self.nan

    def shares(self, fmt: FormatLike, log2_scale: int = 0) -> RangeShares:
        """What ``formats.classify(x, fmt, 2.0**log2_scale)`` says, to the last bit, for any integer ``log2_scale``.

        Raises ValueError for an empty histogram and for a format it was not made for, TypeError for another scale.
        """
        fmt = get_format(fmt)
        if not isinstance(log2_scale, int):
            raise TypeError(f"expected an integer log2_scale, got {log2_scale!r}: a scale is a power of two here")
        if not fmt.signed:
            raise ValueError(f"{fmt.title} is an unsigned scale format: ask for one with a sign and a zero")
        n, zero, infinite, nan = self.total, self.zero, self.infinite, self.nan
        if n == 0:
            raise ValueError("expected at least one element, got an empty histogram")
        keeps, normal, over = (self.count_above(e, upper=u, log2_scale=log2_scale) for e, u in fmt.nearest_edges)
        counts = (zero, n - zero - nan - keeps, keeps - normal, normal - over, over - infinite, infinite, nan)
        return RangeShares(*(c / n for c in counts))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the special counts, ``thresholds`` as [fraction, upper], and the rows of the occupied binades.

        ``counts[i][j]`` counts the elements of binade ``first_binade + i`` between the thresholds ``j - 1`` and ``j``.
        """
        rows = self.counts[1:-1]
        occupied = rows.sum(1).nonzero().flatten().tolist()
        first, last = (occupied[0], occupied[-1]) if occupied else (0, -1)
        return {
            "total": self.total, "zero": self.zero, "infinite": self.infinite, "nan": self.nan,
            "thresholds": [list(t) for t in self.thresholds],
            "first_binade": _FIRST_BINADE + first, "counts": rows[first : last + 1].tolist(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "MagnitudeHistogram":
        """The histogram that ``as_dict`` described; ValueError if the counts do not add up to the total."""
        thresholds = tuple((float(f), bool(u)) for f, u in state["thresholds"])
        counts = torch.zeros(_ROWS, len(thresholds) + 1, dtype=torch.int64)
        counts[0, 0], counts[-1, 0], counts[-1, 1] = state["zero"], state["infinite"], state["nan"]
        start = state["first_binade"] - _FIRST_BINADE + 1
        if state["counts"]:
            counts[start : start + len(state["counts"])] = torch.tensor(state["counts"], dtype=torch.int64)
        if int(counts.sum()) != state["total"]:
            raise ValueError(f"expected counts that add up to {state['total']}, got {int(counts.sum())}")
        return cls(thresholds, counts)

    def __add__(self, other: "MagnitudeHistogram") -> "MagnitudeHistogram":
        if not isinstance(other, MagnitudeHistogram):
            return NotImplemented
        if other.thresholds != self.thresholds:
            raise ValueError("expected histograms made for the same formats: give both the same formats=[...]")
        return MagnitudeHistogram(self.thresholds, self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MagnitudeHistogram):
            return NotImplemented
        return self.thresholds == other.thresholds and torch.equal(self.counts, other.counts)

    __hash__ = None  # a table of counts is a poor key
