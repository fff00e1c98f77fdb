"""The exercises of the chapter ``rounding``."""

import math
from collections.abc import Callable

import torch

from mixprec_lab.checks._verdict import Case, check
from mixprec_lab.formats import all_values
from mixprec_lab.rounding import accumulate, quantize


def stall_point(function: Callable[[float, int], float]) -> None:
    """``rounding``: where a sum of equal increments stops growing in a format with so many mantissa bits."""
    cases = [(1e-7, 10), (1e-7, 7), (1.0, 7), (1.0, 10), (0.75, 3), (3e-4, 7)]
    names = {10: "fp16", 7: "bf16", 3: "fp8_e4m3"}

    def case(v: float, m: int) -> Case:
        stall = accumulate(torch.full((4200,), v), names[m])
        return (float(quantize(torch.tensor(v), names[m])), m), float(stall)

    check(function, (case(v, m) for v, m in cases))


def kahan_bf16(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``rounding``: a compensated sum of BF16 values in which every operation is a BF16 operation."""
    generator = torch.Generator().manual_seed(2)
    samples = [torch.full((1000,), 1e-3), torch.rand(500, generator=generator), torch.randn(300, generator=generator)]
    samples = [s.bfloat16() for s in samples]
    check(function, (((s,), accumulate(s, "bf16", "kahan")) for s in samples))


def stochastic_grid(function: Callable[[torch.Tensor, torch.Generator], torch.Tensor]) -> None:
    """``rounding``: stochastic rounding to integers: only neighbours, integers fixed, mean right within 5 sigma."""

    def verdict(draw: Callable) -> str:
        generator = torch.Generator().manual_seed(3)
        for value in (0.0, 2.0, 0.25, 1.9, -0.75, -3.0):
            x = torch.full((40_000,), value)
            y = draw(x, generator)
            if y is None or y is ...:
                return "nothing"
            low = math.floor(value)
            if not bool(((y == low) | ((y == low + 1) & (value != low))).all()):
                return f"a value other than the neighbours of {value}"
            p = value - low
            mean = float(y.double().mean())
            if abs(mean - value) > 5 * math.sqrt(p * (1 - p) / len(x)) + 1e-12:
                return f"mean {mean:.4f} instead of {value}"
        return "unbiased neighbours"

    def stochastic_round() -> str | None:
        found = verdict(function)
        return None if found == "nothing" else found

    check(stochastic_round, [((), "unbiased neighbours")])


def true_sum_in_bf16(function: Callable[[torch.Tensor], float]) -> None:
    """``rounding``: a sum whose accumulator really is BF16, not an FP32 sum of BF16 values."""
    samples = [torch.full((1000,), 1e-7), torch.full((1000,), 1.0), torch.arange(40.0)]
    check(function, (((s,), float(accumulate(s, "bf16"))) for s in samples))


def worst_relative_error(function: Callable[[str], float]) -> None:
    """``rounding``: the largest relative error of rounding to nearest in the normal range of a small format."""
    cases = []
    for name in ("fp8_e5m2", "fp8_e4m3", "fp4_e2m1"):
        values = all_values(name)
        values = values[values >= (1.0 if name == "fp4_e2m1" else 0.125)]
        middle = (values[1:] + values[:-1]) / 2
        cases.append(((name,), float(((middle - values[:-1]) / middle).max())))
    check(function, cases, relative=1e-3)
