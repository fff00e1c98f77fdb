"""The exercises of the chapter ``speed``: right answers pass, and each usual mistake is told apart."""

import math
import statistics

import pytest
from test_checks import verdict

from mixprec_lab import checks
from mixprec_lab.speed import UnequalWork, difference, get_device


def timed(warmup=1, before=True, after=True, calls=100):
    def kernel_time(gpu, kernel):
        for _ in range(warmup):
            kernel()
        if before:
            gpu.synchronize()
        start = gpu.perf_counter_ns()
        for _ in range(calls):
            kernel()
        if after:
            gpu.synchronize()
        return (gpu.perf_counter_ns() - start) / calls

    return kernel_time


def honest(bf16, fp8, timer):
    if difference(fp8(), bf16()) > 0.1:
        raise UnequalWork("not the same")
    return timer(bf16) / timer(fp8)


def swallows(bf16, fp8, timer):
    try:
        return honest(bf16, fp8, timer)
    except TypeError:
        return 1.0


def compares_the_outputs_only(bf16, fp8, timer):
    if difference(fp8()[0], bf16()[0]) > 0.1:
        raise UnequalWork("not the same")
    return timer(bf16) / timer(fp8)


def never_compares(bf16, fp8, timer):
    return timer(bf16) / timer(fp8)


def interleaved(a, b, timer, of=statistics.median):
    ratios = []
    for i in range(21):
        x, y = (timer(a), timer(b)) if i % 2 else (timer(b), timer(a))[::-1]
        ratios.append(x / y)
    return of(ratios)


def one_after_the_other(a, b, timer):
    first = [timer(a) for _ in range(20)]
    return statistics.median(first) / statistics.median(timer(b) for _ in range(20))


def tokens_by_formula(k, n, dtype, device, never=float("inf")):
    width, ridge = {"bf16": 2, "fp8": 1}[dtype], get_device(device).ridge(dtype)
    growth = 2 * k * n - ridge * (width * k + 2 * n)
    if growth <= 0 and never is not None:
        return never
    return math.ceil(ridge * width * k * n / growth)


def inverse(whole, part):
    return (1 - 1 / whole) / (1 - 1 / part)


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.kernel_time, timed()), (checks.honest_ratio, honest), (checks.drift_free_ratio, interleaved),
        (checks.ridge_tokens, tokens_by_formula), (checks.share_of_step, inverse),
    ],
)  # fmt: skip
def test_a_right_answer_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.kernel_time, timed(warmup=0), "expected 800000, got 3.80"),
        (checks.kernel_time, timed(after=False), "expected 800000, got 5000"),
        (checks.kernel_time, timed(before=False), "for time_of('while another kernel is still running')"),
        (checks.kernel_time, timed(before=False, calls=1000), "for time_of('while another kernel is still running')"),
        (checks.kernel_time, timed(calls=1), "for time_of('a kernel of 20 us')"),
        (checks.honest_ratio, never_compares, "leaves out the backward pass"),
        (checks.honest_ratio, swallows, "got 'a ratio of 1.0' for outcome('the FP8 arm raises TypeError')"),
        (checks.honest_ratio, compares_the_outputs_only, "leaves out the backward pass"),
        (checks.honest_ratio, lambda a, b, timer: timer(b) / timer(a), "expected 1.6, got 0.625"),
        (checks.drift_free_ratio, one_after_the_other, "for ratio('the chip slows down while it warms up')"),
        (checks.drift_free_ratio, lambda a, b, t: interleaved(a, b, t, statistics.fmean), "takes one call in seven"),
        (checks.drift_free_ratio, lambda a, b, timer: timer(a) / timer(b), "for ratio("),
        (checks.drift_free_ratio, lambda a, b, timer: interleaved(b, a, timer), "expected 2, got 0.5"),
        (checks.ridge_tokens, lambda k, n, dtype, device: round(get_device(device).ridge(dtype)), "expected 345, got"),
        (checks.ridge_tokens, lambda *a: tokens_by_formula(*a, never=None), "expected inf, got -991 for ridge_tokens("),
        (checks.share_of_step, lambda whole, part: (whole - 1) / (part - 1), "expected 0.544828, got 0.431034"),
    ],
)  # fmt: skip
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    wrong.__name__ = check.__name__
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line
