"""One function an exercise: it runs the reader's function and prints one line.

The line is ``Correct.``, ``Not done yet.`` (the function still returns None or ``...``, or raises NotImplementedError)
or ``Not yet: expected ..., got ... for f(...)`` with the first case that differs.  An exception in the reader's code is
shown as what was got: a check never fails with a traceback.
"""

import math
from collections.abc import Callable, Iterable

import torch

from mixprec_lab.formats import all_values, decode
from mixprec_lab.rounding import accumulate, quantize

Case = tuple[tuple, object]


def _show(x: object) -> str:
    if isinstance(x, torch.Tensor):
        x = x.detach().flatten()
        return _show(x.item()) if x.numel() == 1 else f"a tensor of {x.numel()} values ({_show(x[0])}, ...)"
    return f"{x:.6g}" if isinstance(x, float) else repr(x)


def _same(got: object, expected: object, relative: float) -> bool:
    if isinstance(expected, bool | str):
        return got == expected
    try:
        got, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return False
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=relative, atol=0, equal_nan=True)


def _check(function: Callable, cases: Iterable[Case], relative: float = 0.0) -> None:
    """Print the verdict on ``function`` over ``cases``: (arguments, expected result), drawn one by one."""
    for arguments, expected in cases:
        try:
            got = function(*arguments)
        except NotImplementedError:
            got = None
        except Exception as error:  # the reader's own code: whatever it raises is the answer to show
            got = f"{type(error).__name__}: {error}"
        if got is None or got is ...:
            print("Not done yet.")
            return
        if not _same(got, expected, relative):
            call = f"{function.__name__}({', '.join(map(_show, arguments))})"
            print(f"Not yet: expected {_show(expected)}, got {_show(got)} for {call}")
            return
    print("Correct.")


def flushed_share(function: Callable[[torch.Tensor], float]) -> None:
    """``formats``: the share of a tensor's non-zero values that FP16 turns into zero."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(10_000, generator=generator) * std for std in (1e-5, 1e-7, 1e-8)]
    samples.append(torch.tensor([0.0, 2.0**-25, 2.0**-24, -1e-9, 1.0]))
    cases = [((g,), float(((g != 0) & (g.half() == 0)).sum() / (g != 0).sum())) for g in samples]
    _check(function, cases, relative=1e-6)


def decode_e4m3(function: Callable[[int], float]) -> None:
    """``formats``: the value of every E4M3 code, NaN included."""
    values = decode(torch.arange(256), "fp8_e4m3").tolist()
    _check(function, [((code,), values[code]) for code in (0x38, 0x7E, 0x01, 0x08, 0xC0, 0x7F, *range(256))])


def first_lost_integer(function: Callable[[int], int]) -> None:
    """``formats``: the smallest positive integer that a format with so many stored mantissa bits cannot hold."""
    _check(function, [((m,), 2 ** (m + 1) + 1) for m in (7, 10, 3, 2, 1, 23)])


def reports_overflow(function: Callable[[float, str], str]) -> None:
    """``formats``: 'flushed', 'overflow' or 'fine' for a number and a format."""
    expected = {
        ("fp16", 1e-10): "flushed", ("fp16", 1e5): "overflow", ("fp16", 1e-5): "fine", ("fp16", -1e5): "overflow",
        ("bf16", 1e-10): "fine", ("bf16", 1e-42): "flushed", ("bf16", 3.4e38): "overflow", ("fp16", 0.0): "fine",
        ("fp8_e4m3", 1e3): "overflow", ("fp8_e4m3", 1e-4): "flushed", ("fp8_e5m2", 1e-4): "fine",
    }  # fmt: skip
    _check(function, [((value, name), verdict) for (name, value), verdict in expected.items()])


def stall_point(function: Callable[[float, int], float]) -> None:
    """``rounding``: where a sum of equal increments stops growing in a format with so many mantissa bits."""
    cases = [(1e-7, 10), (1e-7, 7), (1.0, 7), (1.0, 10), (0.75, 3), (3e-4, 7)]
    names = {10: "fp16", 7: "bf16", 3: "fp8_e4m3"}

    def case(v: float, m: int) -> Case:
        stall = accumulate(torch.full((4200,), v), names[m])
        return (float(quantize(torch.tensor(v), names[m])), m), float(stall)

    _check(function, (case(v, m) for v, m in cases))


def kahan_bf16(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``rounding``: a compensated sum of BF16 values in which every operation is a BF16 operation."""
    generator = torch.Generator().manual_seed(2)
    samples = [torch.full((1000,), 1e-3), torch.rand(500, generator=generator), torch.randn(300, generator=generator)]
    samples = [s.bfloat16() for s in samples]
    _check(function, (((s,), accumulate(s, "bf16", "kahan")) for s in samples))


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

    _check(stochastic_round, [((), "unbiased neighbours")])


def true_sum_in_bf16(function: Callable[[torch.Tensor], float]) -> None:
    """``rounding``: a sum whose accumulator really is BF16, not an FP32 sum of BF16 values."""
    samples = [torch.full((1000,), 1e-7), torch.full((1000,), 1.0), torch.arange(40.0)]
    _check(function, (((s,), float(accumulate(s, "bf16"))) for s in samples))


def worst_relative_error(function: Callable[[str], float]) -> None:
    """``rounding``: the largest relative error of rounding to nearest in the normal range of a small format."""
    cases = []
    for name in ("fp8_e5m2", "fp8_e4m3", "fp4_e2m1"):
        values = all_values(name)
        values = values[values >= (1.0 if name == "fp4_e2m1" else 0.125)]
        middle = (values[1:] + values[:-1]) / 2
        cases.append(((name,), float(((middle - values[:-1]) / middle).max())))
    _check(function, cases, relative=1e-3)
