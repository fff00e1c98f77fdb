"""The exercises of the chapter ``scaling_out``."""

import math
from collections.abc import Callable
from functools import wraps

import torch

from mixprec_lab.checks._verdict import check
from mixprec_lab.scaling_out import gradients, simulate_reduction

Shards = list[torch.Tensor]


def wide_sum(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``scaling_out``: the sum over (ranks, size) whose messages are BF16 and whose running sum is FP32."""
    ones, mixed = torch.ones(1024, 2), gradients(7, 5, noise=4.0)
    overflow = torch.full((4, 1), 1e38)
    overflow[2:] = -1e38
    check(function, [((x.clone(),), simulate_reduction(x, "bf16", "wide")) for x in (ones, mixed, overflow)])


def fp16_mean(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``scaling_out``: the mean over (ranks, size) whose messages and sums are FP16, without overflow or underflow."""
    values = (256.0, 2.0**-18, -512.0)
    cases = [((torch.full((ranks, 1), v),), torch.tensor([v])) for ranks, v in ((2, 1.5), *((512, v) for v in values))]

    @wraps(function)
    def mean(contributions: torch.Tensor) -> object:
        result = function(contributions)
        return result.float() if isinstance(result, torch.Tensor) and result.dtype == torch.float16 else result

    check(mean, cases)


def one_verdict(function: Callable[[Shards, Shards, float], float]) -> None:
    """``scaling_out``: all ranks step or none does, and the scale that comes back is that of all."""

    def step(gradients_by_rank: list[list[float]], scale: float) -> object:
        weights = [torch.zeros(len(g)) for g in gradients_by_rank]
        after = function(weights, [torch.tensor(g) for g in gradients_by_rank], scale)
        if after is None or after is ...:
            return None
        return _told([w.tolist() for w in weights], float(after))

    def expected(weights: list[list[float]], scale: float) -> str:
        return _told(weights, scale)

    cases = [
        (([[8.0, 16.0], [24.0]], 8.0), expected([[-1.0, -2.0], [-3.0]], 8.0)),
        (([[8.0, 16.0], [math.inf]], 8.0), expected([[0.0, 0.0], [0.0]], 4.0)),
        (([[math.nan], [8.0], [8.0]], 8.0), expected([[0.0], [0.0], [0.0]], 4.0)),
    ]
    check(step, cases)


def _told(weights: list[list[float]], scale: float) -> str:
    return f"weights {weights}, scale {scale:g}"


def clipped_shards(function: Callable[[Shards, float], Shards]) -> None:
    """``scaling_out``: the shards of one gradient, scaled down so that the norm of the whole is at most the limit."""

    def clip(*shards: list[float]) -> object:
        clipped = function([torch.tensor(s) for s in shards], 1.0)
        if clipped is None or clipped is ...:
            return None
        return torch.cat([torch.as_tensor(s, dtype=torch.float64).flatten() for s in clipped])

    cases = [
        (([3.0], [4.0]), torch.tensor([0.6, 0.8])),
        (([0.25], [0.5]), torch.tensor([0.25, 0.5])),
        (([6.0, 0.0], [0.0, 0.0], [8.0, 0.0]), torch.tensor([0.6, 0.0, 0.0, 0.0, 0.8, 0.0])),
    ]
    check(clip, cases, relative=1e-5)
