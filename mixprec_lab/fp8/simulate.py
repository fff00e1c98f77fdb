"""What a recipe does to one tensor over many steps: the scale it uses, and what that scale costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixprec_lab.formats import FormatLike, get_format
from mixprec_lab.fp8.recipes import ROLES, CurrentScaling, DelayedScaling, FixedScaling, format_of
from mixprec_lab.fp8.scaling import FP32_MAX
from mixprec_lab.rounding import sqnr_db


@dataclass(frozen=True)
class ScalingRun:
    """A tensor quantized step by step; every list has one entry a step."""

    amax: list[float]  #: its largest magnitude
    scale: list[float]  #: the scale it was quantized with
    clipped: list[float]  #: share of its values that saturate: nearest rounding would take them beyond the largest
    flushed: list[float]  #: share of its values that became zero and were not
    sqnr_db: list[float]  #: signal-to-quantization-noise ratio; NaN for a tensor of zeros or with infinities


def normal_shape(values: int = 256) -> torch.Tensor:
    """A tensor like a normal sample, without chance: quantiles at (i + 1/2) / values, the largest scaled to 1."""
    quantiles = torch.special.ndtri((torch.arange(values, dtype=torch.float64) + 0.5) / values)
    return quantiles / quantiles.abs().max()


def lognormal_shape(values: int = 256, binades: float = 3.0) -> torch.Tensor:
    """Gradients as they often look: log2 of the magnitudes normal with that standard deviation, the largest 1."""
    quantiles = torch.special.ndtri((torch.arange(values, dtype=torch.float64) + 0.5) / values)
    magnitudes = torch.exp2(binades * (quantiles - quantiles.max()))
    return magnitudes * torch.where(torch.arange(values) % 2 == 0, -1.0, 1.0)


def simulate_scaling(
    recipe: DelayedScaling | CurrentScaling | FixedScaling,
    amaxes: Sequence[float],
    *,
    role: str = "input",
    shape: torch.Tensor | None = None,
) -> ScalingRun:
    """How one operand fares when the tensor of each step is ``amax * shape``.

    ``role`` decides the format ("grad_output" is E5M2 under "hybrid").  ``shape`` has a largest magnitude of 1;
    ``normal_shape()`` by default.  An infinite amax makes the largest value of the step infinite and leaves the others
    as they were at the last finite one (1 before any).  Delayed scales move after each step, as in training.

    Raises ValueError for negative or NaN amaxes and for a shape whose largest magnitude is not 1.
    """
    shape = normal_shape() if shape is None else shape.double().flatten()
    if not shape.numel() or float(shape.abs().max()) != 1.0:
        raise ValueError("expected a shape whose largest magnitude is 1: divide it by its amax")
    if role not in ROLES:
        raise ValueError(f"expected role to be one of {', '.join(ROLES)}, got {role!r}")
    if bad := [a for a in amaxes if not (0 <= a <= FP32_MAX or a == math.inf)]:
        raise ValueError(f"expected amaxes that are float32 numbers from 0 on, or infinite, got {bad[0]}")
    quantizer, fmt = recipe.quantizer(role), format_of(recipe.fp8_format, role)
    run, level = ScalingRun([], [], [], [], []), 1.0
    for amax in amaxes:
        level = amax if math.isfinite(amax) else level
        x = _tensor(shape, amax, level)
        operand = quantizer(x.unsqueeze(0)).along(1)
        _note(run, amax, x, operand.scale, operand.values, fmt)
        if isinstance(recipe, DelayedScaling):
            quantizer.update()
    return run


def _tensor(shape: torch.Tensor, amax: float, level: float) -> torch.Tensor:
    x = (shape * level).float()
    return x if math.isfinite(amax) else x.masked_fill(shape.abs() == 1, math.inf).copysign(shape)


def _note(run: ScalingRun, amax: float, x: torch.Tensor, scale: torch.Tensor, q: torch.Tensor, fmt: FormatLike) -> None:
    scale, q = scale.double().flatten(), q.double().flatten()
    run.amax.append(float(amax))
    run.scale.append(float(scale[0]))
    edge, on_it = get_format(fmt).nearest_edges[2]  # not largest: amax * scale may exceed that by a rounding error
    magnitude = (x * scale.float()).abs()
    run.clipped.append(float((magnitude >= edge if on_it else magnitude > edge).double().mean()))
    run.flushed.append(float(((q == 0) & (x != 0)).double().mean()))
    run.sqnr_db.append(sqnr_db(x, q / scale))
