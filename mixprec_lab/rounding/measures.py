"""How far a rounded tensor is from the original: gaps, relative error, signal-to-noise ratio."""

import math

import torch

from mixprec_lab.formats import FormatLike, get_format


def _float(x: torch.Tensor, name: str) -> torch.Tensor:
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        raise TypeError(f"expected {name} to be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return x.detach().double()


def _pair(x: torch.Tensor, approximation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, approximation = _float(x, "x"), _float(approximation, "approximation")
    if x.shape != approximation.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(x.shape)} and {tuple(approximation.shape)}")
    return x, approximation


def ulp(x: torch.Tensor, fmt: FormatLike) -> torch.Tensor:
    """The gap between neighbouring values of ``fmt`` in the binade of each element, float64, in the shape of ``x``.

    Zero and subnormals give the subnormal gap (the smallest there is); beyond the largest value the gap of its binade;
    NaN gives NaN and infinity gives infinity.
    """
    fmt, v = get_format(fmt), _float(x, "x")
    _, exponent = torch.frexp(v.abs())
    exponent = (exponent.long() - 1).masked_fill_(v == 0, fmt.min_exponent)
    exponent = exponent.clamp_(fmt.min_exponent, fmt.max_exponent) - fmt.mantissa_bits
    gap = torch.ldexp(torch.ones_like(v), exponent)
    return torch.where(v.isfinite(), gap, v.abs())


def relative_error(x: torch.Tensor, approximation: torch.Tensor) -> torch.Tensor:
    """``|approximation - x| / |x|`` element by element in float64.

    Where ``x`` is 0 the error is 0 if the approximation is 0 too, else inf.  Equal infinities give 0; NaN gives NaN.
    """
    x, approximation = _pair(x, approximation)
    error = (approximation - x).abs() / x.abs()
    return torch.where(x == approximation, torch.zeros_like(error), error)


def sqnr_db(x: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(sum x**2 / sum (approximation - x)**2)`` in decibels, in float64.

    inf when the two are equal; NaN when either holds NaN or infinity, or when all of ``x`` is zero.
    Raises ValueError for empty tensors or different shapes.
    """
    x, approximation = _pair(x, approximation)
    if x.numel() == 0:
        raise ValueError("expected at least one element, got an empty tensor")
    largest = float(x.abs().max())
    if not math.isfinite(largest) or largest == 0.0:
        return math.nan
    signal = float((x / largest).square().sum())  # scaled, so that squares neither overflow nor vanish
    noise = float(((approximation - x) / largest).square().sum())
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf if noise == 0 else math.nan
