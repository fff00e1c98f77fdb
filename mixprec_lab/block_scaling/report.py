"""What a scheme does to a tensor, in the numbers that decide: error, what was flushed, what saturated, bits stored."""

import math
from dataclasses import dataclass

import torch

from mixprec_lab.block_scaling.quantized import BlockQuantized, _cut, _total, block_quantize
from mixprec_lab.block_scaling.schemes import BlockScheme, SchemeLike
from mixprec_lab.rounding import Rounding, sqnr_db


@dataclass(frozen=True)
class BlockReport:
    """Errors and losses of one tensor in one scheme; shares are of all elements looked at, from 0 to 1."""

    scheme: BlockScheme
    sqnr_db: float  #: signal-to-quantization-noise ratio, decibels
    relative_rms: float  #: RMS of the error over RMS of the values
    max_error: float  #: largest ``|approximation - x|``
    flushed: float  #: share of elements that were not zero and became zero
    saturated: float  #: share of elements beyond the largest element value times their scale
    saturated_blocks: float  #: share of blocks with such an element
    bits_per_value: float  #: of the whole tensor, scales included


def block_report(
    x: torch.Tensor,
    scheme: SchemeLike,
    axis: int = -1,
    where: torch.Tensor | None = None,
    rounding: Rounding = "nearest_even",
    generator: torch.Generator | None = None,
) -> BlockReport:
    """What ``quantize_blocks`` with the same arguments does to ``x``, measured in float64.

    ``where``, a boolean tensor of the shape of ``x``, limits errors and shares to the elements it marks; blocks and
    scales stay those of the whole tensor, so that the fate of the others beside an outlier can be read.  A value is
    saturated if it lies beyond the largest by more than the rounding of an FP32 scale.  Errors of a tensor with NaN or
    infinity are NaN.  Raises ValueError for an empty tensor or an empty choice, else as ``block_quantize``.
    """
    stored = block_quantize(x, scheme, axis, rounding, generator)
    seen = torch.ones_like(x, dtype=torch.bool) if where is None else where
    if seen.shape != x.shape or seen.dtype != torch.bool:
        raise ValueError(f"expected a boolean tensor of shape {tuple(x.shape)}, got {seen.dtype} {tuple(seen.shape)}")
    if not bool(seen.any()):
        raise ValueError("expected at least one element, got none")
    original, approximation = x.detach().double(), stored.dequantize().double()
    saturated, blocks = _saturated(original, stored, seen)
    original, approximation = original[seen], approximation[seen]
    ratio = sqnr_db(original, approximation)
    return BlockReport(
        stored.scheme, ratio, 10 ** (-ratio / 20) if not math.isnan(ratio) else ratio,
        float((approximation - original).abs().max()), _share((original != 0) & (approximation == 0)),
        saturated, blocks, stored.bits_per_value,
    )  # fmt: skip


def _share(found: torch.Tensor) -> float:
    return float(found.double().mean())


def _saturated(original: torch.Tensor, stored: BlockQuantized, seen: torch.Tensor) -> tuple[float, float]:
    """Shares of the elements looked at, and of their blocks, beyond the largest element value."""
    cut = _cut(stored.shape, stored.scheme, stored.axis)
    total = cut.spread(_total(stored.scales, stored.tensor_scale).double())
    beyond = cut.split(original).abs() > total * (stored.scheme.element.largest * (1 + 2.0**-22))
    beyond &= total > 0  # a flushed block loses its values, it does not clamp them
    looked_at = cut.split(seen.double())
    beyond = looked_at * beyond
    of_blocks = cut.largest(beyond)[cut.largest(looked_at) > 0]
    return int(beyond.sum()) / int(seen.sum()), float(of_blocks.mean())
