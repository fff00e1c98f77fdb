"""What a cast on the device really does to a tensor: the counts that the exhibits set beside the predicted ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixprec_lab.exhibits._live import cast_path
from mixprec_lab.exhibits._text import shortest
from mixprec_lab.formats import FloatFormat
from mixprec_lab.rounding import quantize

_CHUNK = {"cpu": 1 << 18}  # elements worked on at once: a share of the cache; elsewhere what bounds the memory
_CHUNK_ELSEWHERE = 1 << 26
_FP32_MAX = torch.finfo(torch.float32).max
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class CastCounts:
    """How many elements of ``x * scale`` a cast makes zero, and how many it takes beyond the largest value."""

    total: int
    flushed: int  #: not zero before, zero after
    overflowed: int  #: finite before, beyond the largest value after
    becomes: str  #: what the first that overflowed became: "inf", "nan", "448"; "" if none did
    path: str


def cast_counts(x: torch.Tensor, fmt: FloatFormat, scale: float = 1.0) -> CastCounts:
    """The counts, from a multiplication in FP32 and a cast on the device of ``x``: torch's if it has one, else ours.

    ``scale`` is an FP32 number.  Raises ValueError for an empty tensor, RuntimeError for a cast that the device cannot
    do.
    """
    return casts_to([fmt], x, scale)[0]


def casts_to(formats: Sequence[FloatFormat], x: torch.Tensor, scale: float = 1.0) -> list[CastCounts]:
    """``cast_counts`` for each of ``formats``, in one walk over ``x``."""
    if x.numel() == 0:
        raise ValueError("expected at least one element, got an empty tensor")
    tallies = [_Tally() for _ in formats]
    for chunk in x.detach().reshape(-1).split(_CHUNK.get(x.device.type, _CHUNK_ELSEWHERE)):
        chunk = chunk.float()
        scaled, nonzero = chunk * scale, int(torch.count_nonzero(chunk))
        lowest, highest = torch.aminmax(scaled)
        largest = float(torch.maximum(-lowest, highest))  # NaN if there is one
        for fmt, tally in zip(formats, tallies, strict=True):
            cast = _cast(scaled, fmt)
            tally.flushed += nonzero - _nonzero(cast, fmt)
            if not largest < min(fmt.nearest_edges[2][0], _FP32_MAX):
                tally.add_overflow(cast, _beyond(scaled, fmt) & chunk.isfinite())
    return [
        CastCounts(x.numel(), tally.flushed, tally.overflowed, tally.becomes, cast_path(x.device, fmt))
        for fmt, tally in zip(formats, tallies, strict=True)
    ]


@dataclass
class _Tally:
    flushed: int = 0
    overflowed: int = 0
    becomes: str = ""

    def add_overflow(self, cast: torch.Tensor, beyond: torch.Tensor) -> None:
        self.overflowed += int(torch.count_nonzero(beyond))
        self.becomes = self.becomes or _first(cast, beyond)


def _first(cast: torch.Tensor, chosen: torch.Tensor) -> str:
    """The magnitude of the first chosen element as text, "" if none is chosen."""
    found = chosen.nonzero()
    return shortest(float(cast[found[0, 0]].float().abs())) if len(found) else ""


def _cast(x: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    return quantize(x, fmt, overflow="native") if fmt.torch_dtype is None else x.to(fmt.torch_dtype)


def _nonzero(x: torch.Tensor, fmt: FloatFormat) -> int:
    """Elements that are not zero, NaN among them; from the codes, because reading FP8 values back is slow."""
    codes = x.view(_INTEGERS[x.element_size()])
    return int(torch.count_nonzero(codes if fmt.specials == "nan_negative_zero" else codes << 1))


def _beyond(x: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    """Whether rounding to nearest takes each element beyond the largest value; never for NaN."""
    edge, at_edge = fmt.nearest_edges[2]
    magnitude = x.abs()
    if edge > _FP32_MAX:
        return magnitude == math.inf
    return magnitude >= edge if at_edge else magnitude > edge


def compared(found: CastCounts, flushed: int, overflowed: int) -> str:
    """The counts in words, beside the predicted ones."""
    over = f"{found.overflowed} overflow"
    over += f" (the first becomes {found.becomes})" if found.becomes else ""
    told = f"Cast for real: {found.flushed} of {found.total} elements become zero, {over}"
    if (found.flushed, found.overflowed) == (flushed, overflowed):
        return f"{told}, as predicted."
    return f"{told}; predicted were {flushed} and {overflowed}."
