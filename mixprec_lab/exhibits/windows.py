"""Windows: every format's range on one axis, and what each makes of a distribution that can be moved and scaled."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import traitlets as t

from mixprec_lab.exhibits._base import choice, es_module, table_of
from mixprec_lab.exhibits._casts import casts_to
from mixprec_lab.exhibits._live import LiveExhibit, Measured, Tensors, place_of
from mixprec_lab.exhibits._text import percent
from mixprec_lab.formats import FloatFormat, FormatLike
from mixprec_lab.loss_scaling import MagnitudeHistogram

MODEL = "a model: log2 |x| normal"
SCALES = range(-24, 25)
_PARTS = ("flushed", "subnormal", "normal", "overflowed")
_DEFAULT = ("fp32", "tf32", "bf16", "fp16", "fp8_e5m2", "fp8_e4m3", "fp6_e3m2", "fp4_e2m1")


class Windows(LiveExhibit):
    """The windows of ``formats`` over a distribution, multiplied by ``2**scale``.

    ``source`` is ``MODEL`` (log2 of the magnitude is normal with mean ``centre`` and deviation ``spread``, in binades)
    or the name of a recording.  A recording holds, for every format and every scale from 2**-24 to 2**24, the exact
    counts of flushed, subnormal, normal and overflowed elements; ``Windows.from_tensors`` makes them.  In a live
    notebook the kernel casts the tensor for real, on its device, to every offered format that torch has.
    TraitError for values out of range and for an unknown source.
    """

    _esm = es_module("windows")
    _kind = "windows"
    _controls = ("source", "centre", "spread", "scale")

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
        tensors: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        offered = table_of(formats, _DEFAULT)
        if unsigned := [f.title for f in offered.values() if not f.signed]:
            raise ValueError(f"{', '.join(unsigned)} has no sign and no zero: choose formats that hold tensors")
        given = {key: _checked(key, x) for key, x in (tensors or {}).items()}
        held = Tensors(given, place_of(device, given.values()))
        recordings = {key: _record(key, held.at(key), offered) for key in given} | dict(recordings or {})
        start = source or next(iter(recordings), MODEL)
        state = {"centre": centre, "spread": spread, "scale": scale}
        super().__init__(offered, name, held, recordings=recordings, source=start, **state)
        self._shown = {"source": start} | {k: v for k, v in state.items() if v != self.trait_defaults()[k]}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], formats: Iterable[FormatLike] | None = None, **options: Any
    ) -> "Windows":
        """Windows over recorded ``tensors`` (name -> floating-point tensor); the first one is shown at the start.

        They are counted, and in a live notebook cast, on ``device`` (see ``place_of``); ``options`` go to the
        constructor.  Raises ValueError for no tensors, an empty one, or one that holds NaN or infinity, and TypeError
        for tensors that are not floating-point.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(f"expected tensors by name, got {type(tensors).__name__}: give {{'gradients': tensor}}")
        if not tensors:
            raise ValueError("expected at least one tensor, got none")
        return cls(formats=formats, tensors=tensors, **options)

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

    def _measure(self) -> Measured:
        place, recording = self._tensors.place.type, self.recordings.get(self.source)
        if self.source not in self._tensors:
            source = "normal distribution" if recording is None else "exact histogram"
            return Measured("", f"{place}: {source}", recording["total"] if recording else 0)
        told, same, x = [], True, self._tensors.at(self.source)
        cast = [f for f in self._offered.values() if f.torch_dtype not in (None, torch.float32)]
        for fmt, found in zip(cast, casts_to(cast, x, 2.0**self.scale), strict=True):
            _, flushed, _, _, over = self.shares(fmt)
            told.append(f"{fmt.title} {found.flushed} and {found.overflowed}")
            same &= (found.flushed, found.overflowed) == (round(flushed * x.numel()), round(over * x.numel()))
        said = f"Cast for real, elements that become zero and that overflow: {'; '.join(told)}. "
        said += "That is as predicted." if same else "That is not what the table predicts."
        return Measured(said if cast else "", f"{place}: {len(cast)} of {len(self._offered)} formats cast", x.numel())

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


def _checked(name: str, x: torch.Tensor) -> torch.Tensor:
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        raise TypeError(f"expected {name!r} to be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return x


def _record(name: str, x: torch.Tensor, formats: Mapping[str, FloatFormat]) -> dict:
    """The exact counts of ``x``, made where it is: from a histogram, or by sorting what FP32 may not hold."""
    count = _sorted_counts if x.dtype == torch.float64 else _histogram_counts
    total, zero, binades, above = count(name, x, formats)
    per_format = {}
    for key, edges in above.items():
        per_format[key] = [[total - zero - a, a - b, b - c, c] for a, b, c in zip(*edges, strict=True)]
    shares = [[e, float(f"{n / total:.3g}")] for e, n in binades.items()]
    return {"total": total, "zero": zero, "binades": shares, "counts": per_format}


_Counts = tuple[int, int, dict[int, int], dict[str, list[list[int]]]]  # elements, zeros, by binade, above each edge


def _histogram_counts(name: str, x: torch.Tensor, formats: Mapping[str, FloatFormat]) -> _Counts:
    histogram = MagnitudeHistogram.of(x, formats=formats.values())
    if histogram.total == 0 or histogram.infinite or histogram.nan:
        raise ValueError(f"expected {name!r} to hold finite numbers, got an empty tensor, NaN or infinity")
    above = {
        key: [[histogram.count_above(edge, upper=u, log2_scale=s) for s in SCALES] for edge, u in fmt.nearest_edges]
        for key, fmt in formats.items()
    }
    return histogram.total, histogram.zero, histogram.binades, above


def _sorted_counts(name: str, x: torch.Tensor, formats: Mapping[str, FloatFormat]) -> _Counts:
    magnitude = x.detach().abs().flatten().sort().values
    if magnitude.numel() == 0 or not bool(magnitude[-1].isfinite()):
        raise ValueError(f"expected {name!r} to hold finite numbers, got an empty tensor, NaN or infinity")
    total, zero = magnitude.numel(), int((magnitude == 0).sum())
    exponents, counts = (torch.frexp(magnitude[zero:]).exponent - 1).unique(return_counts=True)
    powers = torch.tensor([2.0**-s for s in SCALES], dtype=torch.float64, device=x.device)
    above = {
        key: [(total - torch.searchsorted(magnitude, e * powers, right=not u)).tolist() for e, u in fmt.nearest_edges]
        for key, fmt in formats.items()
    }
    return total, zero, dict(zip(exponents.tolist(), counts.tolist(), strict=True)), above
