"""The exercises of the chapter ``loss_scaling``."""

import math
from collections.abc import Callable, Iterable

import torch

from mixprec_lab.checks._verdict import check
from mixprec_lab.loss_scaling import DynamicLossScaler

SCALE = 2.0**16


def unscales_all(function: Callable[[Iterable[torch.nn.Parameter], float], bool]) -> None:
    """``loss_scaling``: unscale a generator of parameters and say whether a gradient was not finite."""

    def unscale(gradients: list[float], scale: float) -> object:
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in gradients]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor([g])
        found = function((p for p in parameters), scale)
        if found is None or found is ...:
            return None
        return _told(bool(found), None if found else [p.grad.item() for p in parameters])

    good, late = [SCALE, -3 * SCALE, 0.5 * SCALE], [1.0, 2.0, math.nan]
    cases = [
        ((good, SCALE), _told(False, [1.0, -3.0, 0.5])),
        (([8.0], 4.0), _told(False, [2.0])),
        (([-math.inf, 1.0], SCALE), _told(True, None)),
        ((late, SCALE), _told(True, None)),
    ]
    check(unscale, cases)


def _told(found: bool, gradients: list[float] | None) -> str:
    return f"overflow {found}" + (f", gradients {gradients}" if gradients else "")


def next_scale(function: Callable[[float, int, bool], tuple[float, int]]) -> None:
    """``loss_scaling``: a rule with a floor of 1 and a ceiling of 2**24; window 2000."""

    def scale_after(overflows: str, start: float, clean: int) -> object:
        scale, tracker = start, clean
        for overflow in (letter == "x" for letter in overflows):
            state = function(scale, tracker, overflow)
            if state is None or state is ...:
                return None
            scale, tracker = state
        return after(scale, tracker)

    def after(scale: float, tracker: int) -> str:
        return f"scale {scale:.6g}, {tracker} clean steps"

    cases = [
        (("x", SCALE, 700), after(SCALE / 2, 0)),
        ((".", SCALE, 7), after(SCALE, 8)),
        ((".", SCALE, 1999), after(2 * SCALE, 0)),
        (("x" * 40, SCALE, 0), after(1.0, 0)),
        ((".", 2.0**24, 1999), after(2.0**24, 0)),
        (("x.", 2.0**24, 1999), after(2.0**23, 1)),
    ]
    check(scale_after, cases)


def scaled_loss(function: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """``loss_scaling``: the scaled loss is finite for an FP16 loss too, and the FP32 one is untouched by it."""
    cases = [
        ((torch.tensor(3.0, dtype=torch.float16), SCALE), 3 * SCALE),
        ((torch.tensor(0.25, dtype=torch.float16), 2.0**20), 2.0**18),
        ((torch.tensor(2.5), SCALE), 2.5 * SCALE),
    ]
    check(function, cases)


def unscaled_in_fp32(function: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """``loss_scaling``: the quotient of an FP16 gradient and the scale keeps every bit of the gradient."""
    gradients = [[2.0**-10, -0.25, 1.0, 3.0], [2.0**-24, 65504.0]]
    half = [torch.tensor(g, dtype=torch.float16) for g in gradients]
    check(function, (((g, SCALE), g.double() / SCALE) for g in half))


def clipped_step(
    function: Callable[[DynamicLossScaler, torch.optim.Optimizer, list[torch.nn.Parameter], torch.Tensor], bool],
) -> None:
    """``loss_scaling``: one step that clips the true gradient to norm 1, and is skipped when it overflows."""

    def weight_after(gradient: list[float]) -> object:
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer, scaler = torch.optim.SGD([weight], lr=1.0), DynamicLossScaler()
        taken = function(scaler, optimizer, [weight], (weight * torch.tensor(gradient)).sum())
        if taken is None or taken is ...:
            return None
        return after(*weight.tolist(), scaler.scale, bool(taken))

    def after(x: float, y: float, scale: float, taken: bool) -> str:
        return f"weight ({x:.4f}, {y:.4f}), scale {scale:.6g}, step taken {taken}"

    cases = [
        (([3.0, 4.0],), after(-0.6, -0.8, SCALE, True)),
        (([0.25, -0.5],), after(-0.25, 0.5, SCALE, True)),
        (([1e35, 1.0],), after(0.0, 0.0, SCALE / 2, False)),
    ]
    check(weight_after, cases)
