"""Quantization inside autograd: round on the way forward, and, if asked, on the way back."""

import torch

from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.rounding.quantizer import Overflow, Rounding, quantize


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward_fmt, backward_fmt, rounding, overflow, generator):
        ctx.backward = backward_fmt, rounding, overflow, generator
        return x.clone() if forward_fmt is None else quantize(x, forward_fmt, rounding, overflow, generator)

    @staticmethod
    def backward(ctx, grad):
        fmt, rounding, overflow, generator = ctx.backward
        rounded = grad if fmt is None else quantize(grad, fmt, rounding, overflow, generator)
        return rounded, None, None, None, None, None


def fake_quantize(
    x: torch.Tensor,
    forward_fmt: FormatLike | None,
    backward_fmt: FormatLike | None = None,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """``quantize(x, forward_fmt)`` with a straight-through gradient: the backward pass treats rounding as the identity.

    The gradient itself is rounded to ``backward_fmt`` if one is given, which is how FP8 training uses two formats
    (E4M3 forward, E5M2 backward).  None leaves that direction unrounded.  Elements that saturate keep their gradient
    too.  Special values and errors as in ``quantize``; the estimator is due to Bengio et al., arXiv:1308.3432.
    """
    forward: FloatFormat | None = None if forward_fmt is None else get_format(forward_fmt)
    backward: FloatFormat | None = None if backward_fmt is None else get_format(backward_fmt)
    return _FakeQuantize.apply(x, forward, backward, rounding, overflow, generator)
