"""The rooms of the theme "reports": counts of the wrong thing, and experiments that cannot show their moral."""

import math
from collections.abc import Callable

import torch

from mixprec_lab.checks._verdict import check
from mixprec_lab.checks.broken_code._told import told
from mixprec_lab.formats import decode, encode, get_format

Tensor, Dtype = torch.Tensor, torch.dtype
HALF, BRAIN = torch.float16, torch.bfloat16


def _cast(x: Tensor, dtype: Dtype) -> Tensor:
    """``x`` rounded to ``dtype`` by the book's own encoder, in float64."""
    return decode(encode(x, dtype), dtype)


def _running_sum(start: float, addend: float, steps: int, dtype: Dtype) -> float:
    """``start`` plus ``addend``, ``steps`` times, every sum rounded to ``dtype``; all inputs are numbers of it."""
    total = torch.tensor([start], dtype=torch.float64)
    for _ in range(steps):
        total = _cast(total + addend, dtype)
    return total.item()


def uncalled_report(function: Callable[[Tensor], list[str]]) -> None:
    """``broken_code``: a report has a line for the size and one for the flushed share."""

    def lines(gradients: list[float]) -> object:
        return told(function(torch.tensor(gradients)), " | ".join)

    cases = [
        (([1.0, 1e-9, 2.0, 1e-8],), "4 gradients | flushed 50%"),
        (([1e-3, 2e-7],), "2 gradients | flushed 0%"),
    ]
    check(lines, cases)


def smallest_value(function: Callable[[Dtype], float]) -> None:
    """``broken_code``: the smallest positive number of a dtype, subnormal numbers included."""
    check(function, (((dtype,), get_format(dtype).smallest_subnormal) for dtype in (HALF, BRAIN, torch.float32)))


def lost_share(function: Callable[[Tensor, Dtype], float]) -> None:
    """``broken_code``: the share of nonzero values that a dtype turns into zero."""
    spread = torch.exp2(torch.arange(-40.0, 0.0))
    zeros = torch.cat([spread, torch.zeros(40), -spread])
    tiny = spread.double() * 2.0**-110

    def case(x: Tensor, dtype: Dtype) -> tuple[tuple, float]:
        x = x[x != 0]
        return (x, dtype), float((_cast(x, dtype) == 0).double().mean())

    cases = [case(spread, HALF), case(tiny.float(), BRAIN), case(spread, BRAIN)]
    check(function, [*cases, ((zeros, HALF), case(zeros, HALF)[1])])


def range_verdict(function: Callable[[float, Dtype], str]) -> None:
    """``broken_code``: fine, overflow or underflow."""
    answers = {1.0: "fine", 1e10: "overflow", 1e-10: "underflow", -1e-10: "underflow", 0.0: "fine", 1e-7: "fine",
               -65520.0: "overflow"}  # fmt: skip
    runs = [(x, HALF, answer) for x, answer in answers.items()] + [(1e-10, BRAIN, "fine")]
    check(function, (((x, dtype), answer) for x, dtype, answer in runs))


def forgotten_cast(function: Callable[[Tensor, str], Tensor]) -> None:
    """``broken_code``: a tensor rounded to a format, for both names."""
    x = torch.tensor([1.0, 0.1, 3.14159, -70000.0, 1e-9])
    check(function, (((x, name), _cast(x, get_format(name).torch_dtype)) for name in ("fp16", "bf16")))


def bare_except(function: Callable[[object], str]) -> None:
    """``broken_code``: overflow or fine for numbers; for a text the reader's own error."""

    def verdict(x: object) -> object:
        if not isinstance(x, str):
            return function(x)
        try:
            return function(x)
        except (TypeError, ValueError):
            return "an exception"

    check(verdict, [((1.0,), "fine"), ((1e6,), "overflow"), ((-math.inf,), "overflow"), (("one",), "an exception")])


def tensor_format(function: Callable[[Tensor], str]) -> None:
    """``broken_code``: a line with the largest rounding error of FP16."""

    def line(values: list[float]) -> object:
        return function(torch.tensor(values))

    runs = ([1.0, 1.0 + 2.0**-12], [3.0, 2051.0, 7.0])
    worst = [max(abs(v - float(_cast(torch.tensor(v), HALF))) for v in values) for values in runs]
    check(line, (((values,), f"largest error {error:.2e}") for values, error in zip(runs, worst, strict=True)))


def promoted_sum(function: Callable[[float, int, Dtype], float]) -> None:
    """``broken_code``: a number added again and again in the accumulator's own dtype."""

    def case(addend: float, steps: int, dtype: Dtype) -> tuple[tuple, float]:
        rounded = _cast(torch.tensor([addend]), dtype).item()
        return (addend, steps, dtype), _running_sum(0.0, rounded, steps, dtype)

    runs = ((0.5, 4, HALF), (1e-7, 400, BRAIN), (1.0, 300, BRAIN), (0.25, 2100, HALF))
    check(function, (case(*run) for run in runs))


def blamed_sum(function: Callable[[float, int, Dtype], float]) -> None:
    """``broken_code``: the relative error of adding alone, without that of rounding the addend."""

    def case(addend: float, steps: int, dtype: Dtype) -> tuple[tuple, float]:
        rounded = _cast(torch.tensor([addend], dtype=torch.float64), dtype).item()
        return (addend, steps, dtype), abs(_running_sum(0.0, rounded, steps, dtype) / (steps * rounded) - 1)

    runs = ((1e-7, 100, HALF), (1e-7, 2500, HALF), (1e-7, 400, BRAIN))
    check(function, (case(*run) for run in runs), relative=1e-9)


def narrow_sample(function: Callable[[Dtype], float]) -> None:
    """``broken_code``: the share of the powers of two from 2**-40 to 2**40 that a dtype holds."""
    powers = torch.exp2(torch.arange(-40, 41, dtype=torch.float64))

    def case(dtype: Dtype) -> tuple[tuple, float]:
        held = _cast(powers, dtype)
        return (dtype,), float(((held > 0) & held.isfinite()).double().mean())

    check(function, [case(BRAIN), case(HALF), case(torch.float32)], relative=1e-12)


def walk_around_zero(function: Callable[[float, float, int, Dtype], float]) -> None:
    """``broken_code``: which share of many small updates a weight loses."""

    def case(weight: float, update: float, steps: int, dtype: Dtype) -> tuple[tuple, float]:
        moved = _running_sum(weight, update, steps, dtype) - weight
        return (weight, update, steps, dtype), 1 - moved / (steps * update)

    runs = ((1.0, 2.0**-10, 1000, BRAIN), (1.0, 2.0**-10, 1000, HALF), (1.0, 2.0**-7, 200, BRAIN))
    check(function, (case(*run) for run in runs))
