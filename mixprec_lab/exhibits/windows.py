"""Windows: every format's range on one axis, and what each makes of a distribution that can be moved and scaled."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.exhibits._text import percent
from mixprec_lab.formats import FloatFormat, FormatLike

MODEL = "a model: log2 |x| normal"
SCALES = range(-24, 25)
_PARTS = ("flushed", "subnormal", "normal", "overflowed")
_DEFAULT = ("fp32", "tf32", "bf16", "fp16", "fp8_e5m2", "fp8_e4m3", "fp6_e3m2", "fp4_e2m1")


class Windows(Exhibit):
    """The windows of ``formats`` over a distribution, multiplied by ``2**scale``.

    ``source`` is ``MODEL`` (log2 of the magnitude is normal with mean ``centre`` and deviation ``spread``, in binades)
    or the name of a recording.  A recording holds, for every format and every scale from 2**-24 to 2**24, the exact
    counts of flushed, subnormal, normal and overflowed elements; ``Windows.from_tensors`` makes them.
    TraitError for values out of range and for an unknown source.
    """

    _esm = es_module("windows")
    _kind = "windows"

    recordings = t.Dict(help="name -> total, zero, binades and counts").tag(sync=True)
    source = t.Unicode(MODEL).tag(sync=True)
    centre = t.Int(-17, min=-48, max=16).tag(sync=True)
    spread = t.Int(4, min=1, max=12).tag(sync=True)
    scale = t.Int(0, min=-24, max=24).tag(sync=True)

    def __init__(
        self,
        source: str | None = None,
        *,
        centre: int = -17,
        spread: int = 4,
        scale: int = 0,
        formats: Iterable[FormatLike] | None = None,
        recordings: Mapping[str, dict] | None = None,
        name: str | None = None,
    ) -> None:
        offered = table_of(formats, _DEFAULT)
        if unsigned := [f.title for f in offered.values() if not f.signed]:
            raise ValueError(f"{', '.join(unsigned)} has no sign and no zero: choose formats that hold tensors")
        recordings = dict(recordings or {})
        start = source or next(iter(recordings), MODEL)
        state = {"centre": centre, "spread": spread, "scale": scale}
        super().__init__(offered, name, recordings=recordings, source=start, **state)
        self._shown = {"source": start} | {k: v for k, v in state.items() if v != self.trait_defaults()[k]}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], formats: Iterable[FormatLike] | None = None, **options: Any
    ) -> "Windows":
        """Windows over recorded ``tensors`` (name -> floating-point tensor); the first one is shown at the start.

        Raises ValueError for no tensors, an empty one, or one that holds NaN or infinity, and TypeError for tensors
        that are not floating-point.
        """
        if not tensors:
            raise ValueError("expected at least one tensor, got none")
        offered = table_of(formats, _DEFAULT)
        recordings = {name: _record(name, x, offered) for name, x in tensors.items()}
        return cls(formats=list(offered.values()), recordings=recordings, **options)

    _check_source = t.validate("source")(choice("source", lambda self: [*self.recordings, MODEL]))

    def shares(self, fmt: FloatFormat) -> tuple[float, ...]:
        """Shares of all elements: zero already, flushed, subnormal, normal, overflowed."""
        recording = self.recordings.get(self.source)
        if recording:
            counts = recording["counts"][fmt.name][self.scale - SCALES.start]
            return tuple(n / recording["total"] for n in (recording["zero"], *counts))
        below = [
            (1 + math.erf((math.log2(edge) - self.centre - self.scale) / self.spread / math.sqrt(2))) / 2
            for edge, _ in fmt.nearest_edges
        ]
        return (0.0, below[0], below[1] - below[0], below[2] - below[1], 1 - below[2])

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        texts = {}
        for name, fmt in self._offered.items():
            texts |= {f"{name}-{part}": percent(s) for part, s in zip(_PARTS, self.shares(fmt)[1:], strict=True)}
        recording = self.recordings.get(self.source)
        if recording:
            share = percent(recording["zero"] / recording["total"])
            return texts | {"summary": f"{recording['total']} elements, {share} of them zero already."}
        where = f"2^{self.spread} of 2^{self.centre + self.scale}"
        return texts | {"summary": f"Two thirds of the magnitudes lie within a factor of {where}."}


def _record(name: str, x: torch.Tensor, formats: Mapping[str, FloatFormat]) -> dict:
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        raise TypeError(f"expected {name!r} to be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    magnitude = x.detach().double().abs().flatten().cpu().sort().values
    if magnitude.numel() == 0 or not bool(magnitude[-1].isfinite()):
        raise ValueError(f"expected {name!r} to hold finite numbers, got an empty tensor, NaN or infinity")
    total, zero = magnitude.numel(), int((magnitude == 0).sum())
    exponents, counts = (torch.frexp(magnitude[zero:]).exponent - 1).unique(return_counts=True)
    binades = [[int(e), float(f"{int(n) / total:.3g}")] for e, n in zip(exponents, counts, strict=True)]
    powers = torch.tensor([2.0**-s for s in SCALES], dtype=torch.float64)
    per_format = {}
    for key, fmt in formats.items():
        below = [
            torch.searchsorted(magnitude, edge * powers, right=not upper).tolist() for edge, upper in fmt.nearest_edges
        ]
        per_format[key] = [[a - zero, b - a, c - b, total - c] for a, b, c in zip(*below, strict=True)]
    return {"total": total, "zero": zero, "binades": binades, "counts": per_format}
