"""The rooms of the theme "scaling": autocast, gradient scalers, and the order of a step."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from mixprec_lab.checks._verdict import check
from mixprec_lab.checks.broken_code._told import told, with_warnings
from mixprec_lab.checks.broken_code.stand_ins import HostReads, without_gpu
from mixprec_lab.loss_scaling import DynamicLossScaler

Tensor, HALF = torch.Tensor, torch.float16
SCALE = 2.0**16


def _product() -> torch.dtype:
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def old_name(function: Callable[[str], AbstractContextManager]) -> None:
    """``broken_code``: autocast to BF16 on the device that is asked for, without a warning."""

    def step_on(device: str) -> object:
        def run() -> object:
            context = function(device)
            if context is None or context is ...:
                return context
            with context:
                return _product()

        with without_gpu():
            got, warned = with_warnings(run)
        return told(got, lambda dtype: f"product in {dtype}, {warned} warnings")

    check(step_on, [(("cpu",), "product in torch.bfloat16, 0 warnings")])


def silent_cpu(function: Callable[[str], tuple[AbstractContextManager, torch.amp.GradScaler]]) -> None:
    """``broken_code``: FP16 autocast and a scaler that work on the device that is asked for, where there is no GPU."""

    def tools_on(device: str) -> object:
        def words(tools: object) -> str:
            context, scaler = tools
            with context:
                dtype = _product()
            scaler.scale(torch.ones(()))
            return f"product in {dtype}, scale {scaler.get_scale():.6g}"

        with without_gpu():
            return told(with_warnings(lambda: function(device))[0], words)

    check(tools_on, [(("cpu",), "product in torch.float16, scale 65536")])


def clipped_too_early(
    function: Callable[[torch.amp.GradScaler, torch.optim.Optimizer, nn.Parameter, Tensor], float],
) -> None:
    """``broken_code``: a step of torch's scaler whose true gradient is clipped to norm 1; returns the norm before."""

    def after_one_step(*gradient: float) -> object:
        weight = nn.Parameter(torch.zeros(2))
        optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu")
        norm = function(scaler, optimizer, weight, (weight * torch.tensor(gradient)).sum())
        return told(norm, lambda n: f"norm {float(n):.4f}, weight ({weight[0]:.4f}, {weight[1]:.4f})")

    cases = [
        ((3.0, 4.0), "norm 5.0000, weight (-0.6000, -0.8000)"),
        ((0.25, -0.25), "norm 0.3536, weight (-0.2500, 0.2500)"),
    ]
    check(after_one_step, cases)


def one_read_a_step(function: Callable[[list[Tensor]], float]) -> None:
    """``broken_code``: the mean of the losses of many steps, with one read by the host."""

    def over(*values: float) -> object:
        losses = [torch.tensor(v) for v in values]
        with HostReads() as reads:
            mean = function(losses)
        return told(mean, lambda m: f"mean {float(m):.6g}, {_reads(reads.count)}")

    check(over, [((1.0, 2.0, 4.5), "mean 2.5, at most 1 host read"), ((3.0,) * 8, "mean 3, at most 1 host read")])


def _reads(count: int) -> str:
    return "at most 1 host read" if count <= 1 else f"{count} host reads"


def late_record(function: Callable[[DynamicLossScaler, list[bool]], list[float]]) -> None:
    """``broken_code``: the scale after each of some steps."""

    def scales(steps: str) -> object:
        return told(function(DynamicLossScaler(), [letter == "x" for letter in steps]), lambda s: str(list(s)))

    cases = [((".x.",), [SCALE, SCALE / 2, SCALE / 2]), (("xx",), [SCALE / 2, SCALE / 4])]
    check(scales, ((steps, str(answer)) for steps, answer in cases))


def spent_generator(function: Callable[[Iterable[nn.Parameter], float], float]) -> None:
    """``broken_code``: gradients of a generator of parameters clipped to a norm; returns the norm before."""

    def clipped(gradients: list[float], max_norm: float) -> object:
        parameters = [nn.Parameter(torch.zeros(())) for _ in gradients]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g)
        norm = function((p for p in parameters), max_norm)
        return told(norm, lambda n: f"norm {float(n):.4f}, gradients {[round(p.grad.item(), 4) for p in parameters]}")

    cases = [
        (([3.0, 4.0], 1.0), "norm 5.0000, gradients [0.6, 0.8]"),
        (([0.25, 0.0], 1.0), "norm 0.2500, gradients [0.25, 0.0]"),
    ]
    check(clipped, cases)


def no_floor(function: Callable[[float, int], float]) -> None:
    """``broken_code``: the scale after overflows in a row, 1 at the least."""
    runs = ((SCALE, 3, SCALE / 8), (SCALE, 40, 1.0), (2.0**20, 1200, 1.0))
    check(function, (((scale, overflows), after) for scale, overflows, after in runs))


def no_ceiling(function: Callable[[Tensor], Tensor]) -> None:
    """``broken_code``: twice an FP32 scale; the same scale where twice is not finite."""
    runs = ((SCALE, 2 * SCALE), (2.0**127, 2.0**127), (2.0**126, 2.0**127))
    check(function, (((torch.tensor(scale),), after) for scale, after in runs))


def overflowing_loss(function: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """``broken_code``: two FP16 losses, added and scaled, stay finite."""

    def scaled(first: float, second: float, scale: float) -> object:
        return function(torch.tensor(first, dtype=HALF), torch.tensor(second, dtype=HALF), scale)

    runs = ((0.25, 0.5, 1024.0), (1.0, 2.0, SCALE), (60000.0, 60000.0, 1.0))
    check(scaled, ((run, (run[0] + run[1]) * run[2]) for run in runs))


def half_quotient(function: Callable[[list[Tensor], float], list[Tensor]]) -> None:
    """``broken_code``: FP16 gradients divided by the scale keep every bit."""

    def unscaled(gradients: list[float], scale: float) -> object:
        half = [torch.tensor(g, dtype=HALF) for g in gradients]
        return told(function(half, scale), lambda g: torch.stack(list(g)))

    runs = (([1.0, -3.0], 4.0), ([2.0**-10, 1.0, 3.0], SCALE))
    check(unscaled, ((run, torch.tensor(run[0]).double() / run[1]) for run in runs))


def read_per_tensor(function: Callable[[list[Tensor]], bool]) -> None:
    """``broken_code``: whether any gradient is not finite, with one read by the host."""

    def found(*values: float) -> object:
        gradients = [torch.tensor([1.0, v]) for v in values]
        with HostReads() as reads:
            bad = function(gradients)
        return told(bad, lambda b: f"not finite: {bool(b)}, {_reads(reads.count)}")

    runs = ((1.0, 2.0, 3.0), (1.0, 2.0, math.nan), (-math.inf, 1.0, 1.0))
    check(found, ((run, f"not finite: {not all(map(math.isfinite, run))}, at most 1 host read") for run in runs))
