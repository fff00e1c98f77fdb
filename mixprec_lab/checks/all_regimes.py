"""The exercises of the chapter ``all_regimes``."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from mixprec_lab.checks._verdict import Case, check
from mixprec_lab.regimes import paired_difference, t_quantile


def paired_interval(function: Callable[[Sequence[float], Sequence[float]], tuple[float, float]]) -> None:
    """``all_regimes``: low and high end of the 95 % interval of the mean difference of pairs, Student's t."""
    runs = [([2.0, 2.1, 1.9], [2.01, 2.13, 1.94]), ([1.0, 2.0], [1.5, 2.0]), ([3.0, 5.0, 4.0], [2.0, 5.0, 3.0])]

    def ends(baseline: Sequence[float], variant: Sequence[float]) -> object:
        found = function(list(baseline), list(variant))
        return list(found) if isinstance(found, tuple) else found

    def case(a: list[float], b: list[float]) -> Case:
        d = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
        return (a, b), [d.low, d.high]

    check(ends, (case(a, b) for a, b in runs), relative=1e-6)


def seeds_for_width(function: Callable[[float, float], int]) -> None:
    """``all_regimes``: the fewest paired seeds whose 95 % interval is not wider than a half width, by trying them."""
    runs = ((1.0, 0.5), (0.02, 0.005), (1.0, 20.0), (0.0008, 0.0005), (1.0, 0.12))

    def fewest(deviation: float, half: float) -> int:
        n = 2
        while t_quantile(0.975, n - 1) * deviation / math.sqrt(n) > half:
            n += 1
        return n

    check(function, ((run, fewest(*run)) for run in runs))


def mean_gaps(function: Callable[[Callable, Sequence[str], Sequence[int]], Sequence[float]]) -> None:
    """``all_regimes``: each regime's mean gap to the first one, over seeds that all regimes share.

    ``train(regime)`` draws its weights and batches from torch's global generator.  In the check what a regime adds to
    the loss is known for each seed, and a seed changes the loss by a hundred times as much.
    """
    effects = {"fp32": 0.0, "bf16": 0.0, "fp8": 0.01, "fp4": 0.0625}

    def train(regime: str) -> float:
        common, own = torch.randn(2).double().tolist()
        return common + effects[regime] * (2.0 + own)

    def mean_gaps(regimes: Sequence[str], seeds: Sequence[int]) -> object:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            found = function(train, regimes, seeds)
        found = found.tolist() if hasattr(found, "tolist") else found
        numbers = isinstance(found, list | tuple) and all(isinstance(x, int | float) for x in found)
        return [_digits(x) for x in found] if numbers else found

    def case(regimes: list[str], seeds: list[int]) -> Case:
        own = [torch.randn(2, generator=torch.Generator().manual_seed(s))[1].item() for s in seeds]
        share = 2.0 + sum(own) / len(own)
        return (regimes, seeds), [_digits(share * (effects[r] - effects[regimes[0]])) for r in regimes]

    runs = [(["fp32", "bf16"], [0, 1, 2]), (["fp32", "fp8", "fp4"], [5, 6, 7]), (["fp8", "fp32"], [11, 3])]
    check(mean_gaps, (case(*run) for run in runs))


def _digits(x: float) -> float:
    """``x`` to four decimals, never -0: a mean of differences and a difference of means round differently."""
    return round(x, 4) + 0.0


def seeded_batches(function: Callable[[int], Iterable]) -> None:
    """``all_regimes``: five batches of 8 inputs of 4 numbers with their sums of squares, by the seed alone."""

    def drawn(seed: int) -> object:
        """A number that stands for the batches of a seed, or words for what is wrong with them."""
        found = function(seed)
        if found is None or found is ...:
            return found
        batches = [(x, y) for x, y in found]
        shapes = {(tuple(x.shape), tuple(y.shape)) for x, y in batches}
        if len(batches) != 5 or shapes != {((8, 4), (8, 1))}:
            return f"{len(batches)} batches of shapes {sorted(shapes)}"
        if not all(torch.allclose(y, x.square().sum(1, keepdim=True)) for x, y in batches):
            return "targets that are not the sums of squares"
        if any(torch.equal(x, batches[0][0]) for x, _ in batches[1:]):
            return "one batch again and again"
        return _digest(batches)

    def batches(*seeds: int) -> object:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            first, again, other = (drawn(seed) for seed in seeds)
        if not isinstance(first, float):
            return first
        alike = ["the same" if x == first else "others" for x in (again, other)]
        return f"seed {seeds[1]} again: {alike[0]}; seed {seeds[2]}: {alike[1]}"

    check(batches, [((s, s, s + 1), f"seed {s} again: the same; seed {s + 1}: others") for s in (0, 7)])


def _digest(batches: list) -> float:
    return float(sum((i + 1) * x.double().sum() for i, (x, _) in enumerate(batches)))
