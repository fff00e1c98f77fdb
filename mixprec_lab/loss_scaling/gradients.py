"""Two questions about one tensor of gradients: what would a format make of it, and which scale would it take?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mixprec_lab.formats import FloatFormat, FormatLike, RangeShares, classify, get_format, text_table
from mixprec_lab.loss_scaling.histograms import MagnitudeHistogram


@dataclass(frozen=True)
class UnderflowReport:
    """Shares of a tensor's elements after scaling and rounding; ``str()`` of it is a table."""

    format: FloatFormat
    scale: float
    elements: int
    shares: RangeShares  #: zero (was zero), flushed, subnormal, normal, overflowed, infinite, nan; they add up to 1

    @property
    def lost(self) -> float:
        """Share of the elements that were not zero and are zero now; 0.0 if all were zero."""
        nonzero = 1 - self.shares.zero
        return self.shares.flushed / nonzero if nonzero else 0.0

    def __str__(self) -> str:
        always = {
            "zero": "zero (was zero)", "flushed": "flushed to zero", "subnormal": "subnormal", "normal": "normal",
            "overflowed": "overflowed",
        }  # fmt: skip
        rare = {"infinite": "was infinite", "nan": "was NaN"}
        shown = always | {name: title for name, title in rare.items() if getattr(self.shares, name)}
        rows = [[title, f"{getattr(self.shares, name):.2%}"] for name, title in shown.items()]
        head = f"{self.elements:,} elements x {self.scale:g} in {self.format.title}\n"
        return head + text_table(["after rounding", "share"], rows)


def underflow_report(
    x: "torch.Tensor | MagnitudeHistogram", fmt: FormatLike = "fp16", scale: float = 1.0
) -> UnderflowReport:
    """Shares of ``x * scale`` that are zero, flushed, subnormal, normal, overflowed, infinite and NaN in ``fmt``.

    ``x`` is a tensor (any positive, finite scale) or a histogram (powers of two).  Flushed means: was not zero, rounds
    to zero; a subnormal value is not lost, it is short of digits.  Errors as ``formats.classify``; ValueError for a
    histogram and a scale that is no power of two.
    """
    if not isinstance(x, MagnitudeHistogram):
        return UnderflowReport(get_format(fmt), scale, getattr(x, "numel", int)(), classify(x, fmt, scale))
    if not (scale > 0 and math.isfinite(scale) and math.frexp(scale)[0] == 0.5):
        raise ValueError(f"expected a power of two as the scale of a histogram, got {scale}: give the tensor itself")
    return UnderflowReport(get_format(fmt), scale, x.total, x.shares(fmt, math.frexp(scale)[1] - 1))


def choose_scale(
    gradients: "torch.Tensor | Iterable[torch.Tensor]", fmt: FormatLike = "fp16", headroom: float = 2.0
) -> float:
    """The largest power of two S with ``max|gradients| * S * headroom <= largest`` of ``fmt``.

    ``headroom`` (at least 1) is the factor by which gradients may grow before they overflow.  S stays within
    [2**-126, 2**126], where it and its inverse are normal FP32 numbers.  The rule is the one of Micikevicius et al.,
    arXiv:1710.03740, section 3.2, with room to spare.

    Raises ValueError for gradients that are not finite (no scale helps), all zero (every scale does), or absent;
    TypeError for anything but floating-point tensors.
    """
    fmt = get_format(fmt)
    if not 1 <= headroom < math.inf:
        raise ValueError(f"expected a finite headroom of at least 1, got {headroom}")
    amax = _largest_magnitude(gradients)
    if not math.isfinite(amax):
        raise ValueError(f"the largest |gradient| is {amax}: no scale makes it finite; look for its cause first")
    if amax == 0:
        raise ValueError("all gradients are zero: every scale fits them, so they cannot choose one")
    limit = fmt.largest / headroom
    exponent = math.frexp(limit)[1] - math.frexp(amax)[1]  # the answer or one too many
    exponent -= math.ldexp(math.frexp(amax)[0], math.frexp(limit)[1]) > limit
    return 2.0 ** max(-126, min(exponent, 126))


def _largest_magnitude(gradients: "torch.Tensor | Iterable[torch.Tensor]") -> float:
    tensors = [gradients] if isinstance(gradients, torch.Tensor) else list(gradients)
    for x in tensors:
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            raise TypeError(f"expected floating-point tensors, got {getattr(x, 'dtype', type(x).__name__)}")
    tensors = [x.detach() for x in tensors if x.numel()]
    if not tensors:
        raise ValueError("expected at least one element, got none: an iterator that was used before is empty")
    device = tensors[0].device
    ends = [end.double().to(device, non_blocking=True) for x in tensors for end in torch.aminmax(x)]
    return float(torch.stack(ends).abs().max())
