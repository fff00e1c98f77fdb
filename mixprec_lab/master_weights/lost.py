"""Which updates a stored weight notices: the exact threshold, the share that is lost, a weight over many steps."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.rounding import Rounding, quantize, rounder, ulp

Direction = Literal["away", "toward"]
UpdateMethod = Literal["nearest", "stochastic", "kahan", "fp32_master"]
UPDATE_METHODS: tuple[str, ...] = ("nearest", "stochastic", "kahan", "fp32_master")


class UpdateThreshold(NamedTuple):
    """The edge between updates that are lost and updates that are not."""

    size: torch.Tensor  #: float64: every smaller magnitude is lost, every larger one moves the weight
    tie_moves: torch.Tensor  #: bool: whether an update of exactly ``size`` moves it


def update_threshold(weight: "torch.Tensor | float", fmt: FormatLike, direction: Direction = "away") -> UpdateThreshold:
    """The smallest update that changes a weight stored in ``fmt`` under round to nearest even, exact.

    ``weight`` (a number or a floating-point tensor) is first rounded to ``fmt``.  ``direction`` is ``away`` from zero
    or ``toward`` zero; for a weight of 0 both are the same.  The threshold is half the gap on that side: half an ulp,
    except that just below a power of two the gap is half as wide.  An update of exactly that size is a tie, which
    moves the weight if its last bit is odd.

    Beyond the largest value the format's own overflow counts as a change; where it saturates (FP6, FP4) nothing moves
    the weight and the size is infinite, as it is for an infinite weight.  NaN gives NaN.  Sizes have the shape of
    ``weight``.  Raises ValueError for another direction and for an unsigned format (E8M0), TypeError for integers.
    """
    if direction not in ("away", "toward"):
        raise ValueError(f"expected direction to be 'away' or 'toward' (zero), got {direction!r}")
    fmt, stored = _stored(weight, fmt)
    gap, magnitude = ulp(stored, fmt), stored.abs()
    odd = torch.where(stored.isfinite(), (magnitude / gap) % 2 == 1, False)
    if direction == "toward":
        mantissa, _ = torch.frexp(magnitude)
        at_power = (mantissa == 0.5) & (magnitude > fmt.smallest_normal)
        return UpdateThreshold(torch.where(at_power, gap / 4, gap / 2), odd & ~at_power)
    stuck = (magnitude == fmt.largest) & (fmt.specials == "none")
    return UpdateThreshold(torch.where(stuck, math.inf, gap / 2), odd & ~stuck)


def unchanged(
    weights: torch.Tensor,
    updates: torch.Tensor,
    fmt: FormatLike,
    rounding: Rounding = "nearest_even",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Whether ``weights + updates``, stored in ``fmt``, is still the stored weight: bool, in the broadcast shape.

    ``weights`` are first rounded to ``fmt``; the sum is formed in float64 and rounded once by ``rounding``, with the
    format's own overflow.  That is exact for updates of float32 or narrower.  A NaN or infinite update changes every
    weight.  Raises ValueError for weights that are NaN or infinite in ``fmt``, for shapes that do not broadcast, and
    as ``quantize``; TypeError for tensors that are not floating-point.
    """
    fmt, stored = _stored(weights, fmt)
    if not bool(stored.isfinite().all()):
        raise ValueError(f"expected weights that are finite in {fmt.title}, got NaN, infinity or an overflow")
    updates = _float64(updates, "updates")
    try:
        total = stored + updates
    except RuntimeError:
        raise ValueError(
            f"expected shapes that broadcast, got weights {tuple(stored.shape)} and updates {tuple(updates.shape)}"
        ) from None
    return quantize(total, fmt, rounding, "native", generator) == stored


def lost_updates(
    weights: torch.Tensor,
    updates: torch.Tensor,
    fmt: FormatLike,
    rounding: Rounding = "nearest_even",
    generator: torch.Generator | None = None,
) -> float:
    """The share of the non-zero ``updates`` that leave their weight, stored in ``fmt``, as it was.

    0 to 1; NaN if every update is zero.  Under stochastic rounding it is the share of one draw: those updates are not
    lost on average.  Arguments and errors as in ``unchanged``.
    """
    same = unchanged(weights, updates, fmt, rounding, generator)
    counted = (updates != 0).expand_as(same)
    return int((same & counted).sum()) / n if (n := int(counted.sum())) else math.nan


def simulate_weight(
    weight: "torch.Tensor | float",
    update: "torch.Tensor | float",
    steps: int,
    fmt: FormatLike,
    method: UpdateMethod = "nearest",
    generator: torch.Generator | None = None,
    *,
    draws: torch.Tensor | None = None,
) -> torch.Tensor:
    """The stored weight before and after each of ``steps`` equal updates, float64, shape (..., steps + 1).

    ``weight`` and ``update`` are numbers or tensors that broadcast to the shape (...).  The weight is rounded to
    ``fmt`` first; the update is not: an optimizer forms it in a wider register.  Methods, one step each:

    - ``nearest``: ``w = round(w + u)``.
    - ``stochastic``: the same, rounded away from zero where a draw from [0, 1) is below the distance from the inner
      neighbour in gaps.  ``draws`` of shape (steps,) or (..., steps) are used if given, else ``generator``'s.
    - ``kahan``: ``y = u + c; new = round(w + y); c = round(y - (new - w)); w = new``, the compensation ``c`` kept in
      ``fmt`` too (Kahan 1965; for weights Zamirai et al., arXiv:2010.06192).
    - ``fp32_master``: ``master = fp32(master + u)``; the model sees ``round(master)``.

    Everything between two roundings is float64 arithmetic, so a program of float64 numbers gets the same bits.
    Overflow is the format's own.  Raises ValueError for an unknown method, ``steps`` < 1, an unsigned format, draws of
    another shape or outside [0, 1), or draws where they have no use; TypeError for tensors that are not floating-point.
    """
    if method not in UPDATE_METHODS:
        raise ValueError(f"expected method to be one of {', '.join(UPDATE_METHODS)}, got {method!r}")
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    fmt, stored = _stored(weight, fmt)
    stored, update = (t.contiguous() for t in torch.broadcast_tensors(stored, _float64(update, "update")))
    draws = _draws(draws, generator, (*stored.shape, steps), stored.device) if _uses_draws(method, draws) else None
    step = _stepper(stored, update, fmt, method, draws)
    return torch.stack([stored, *(step(i) for i in range(steps))], dim=-1)


def _stepper(
    weight: torch.Tensor, update: torch.Tensor, fmt: FloatFormat, method: str, draws: torch.Tensor | None
) -> Callable[[int], torch.Tensor]:
    """The function that makes step ``i`` and returns the stored weight after it."""
    nearest, to_fp32 = rounder(fmt), rounder("fp32")
    state = {"weight": weight, "owed": torch.zeros_like(weight)}

    def step(i: int) -> torch.Tensor:
        w = state["weight"]
        if method == "fp32_master":
            state["weight"] = to_fp32(w + update)
            return nearest(state["weight"])
        if method == "kahan":
            wanted = update + state["owed"]
            state["weight"] = nearest(w + wanted)
            state["owed"] = nearest(wanted - (state["weight"] - w))
        elif method == "stochastic":
            state["weight"] = _round_by_draws(w + update, fmt, draws[..., i])
        else:
            state["weight"] = nearest(w + update)
        return state["weight"]

    return step


def _round_by_draws(exact: torch.Tensor, fmt: FloatFormat, draw: torch.Tensor) -> torch.Tensor:
    """``exact`` rounded away from zero where ``draw`` is below its distance from the inner neighbour, in gaps."""
    inner, gap = rounder(fmt, "toward_zero")(exact), ulp(exact, fmt)
    outward = draw < (exact - inner).abs() / gap
    rounded = inner + torch.where(outward, gap, 0.0).copysign(exact)
    return rounder(fmt)(torch.where(exact.isfinite(), rounded, exact))  # moves nothing but what overflowed


def _uses_draws(method: str, draws: torch.Tensor | None) -> bool:
    if draws is not None and method != "stochastic":
        raise ValueError(f"draws have no use in method {method!r}: leave them out")
    return method == "stochastic"


def _draws(
    draws: torch.Tensor | None, generator: torch.Generator | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    if draws is None:
        return torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    draws = _float64(draws, "draws")
    if draws.shape not in (shape, shape[-1:]):
        raise ValueError(f"expected draws of shape {shape[-1:]} or {shape}, got {tuple(draws.shape)}")
    if not bool(((draws >= 0) & (draws < 1)).all()):
        raise ValueError("expected draws in [0, 1), got a value outside")
    return draws


def _stored(weight: "torch.Tensor | float", fmt: FormatLike) -> tuple[FloatFormat, torch.Tensor]:
    fmt = get_format(fmt)
    if not fmt.signed:
        raise ValueError(f"{fmt.title} has no zero and no sign, so it cannot hold a weight: choose another format")
    return fmt, quantize(_float64(weight, "weight"), fmt, overflow="native")


def _float64(x: "torch.Tensor | float", name: str) -> torch.Tensor:
    if isinstance(x, int | float) and not isinstance(x, bool):
        return torch.tensor(float(x), dtype=torch.float64)
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"expected {name} to be a number or a floating-point tensor, got {got}")
    return x.detach().double()
