"""The exercises of the chapter ``speed``: timing on a simulated GPU and scripted clocks, so that answers are exact."""

import math
from collections.abc import Callable

import torch

from mixprec_lab.checks._verdict import check
from mixprec_lab.speed import SimulatedGPU, amdahl_fraction, roofline

Arm = Callable[[], object]
Timer = Callable[[Arm], float]


def kernel_time(function: Callable[[SimulatedGPU, Callable[[], None]], float]) -> None:
    """``speed``: nanoseconds of one kernel within 2 %: first call, a queue that is not empty, a kernel of 20 us."""

    def time_of(case: str) -> float | None:
        gpu = SimulatedGPU()
        kernel = gpu.kernel("gemm", durations[case])
        if case == "while another kernel is still running":
            gpu.kernel("the work of two seconds", 2_000_000_000)()
        return function(gpu, kernel)

    durations = {"a kernel of 800 us": 800_000, "while another kernel is still running": 800_000,
                 "a kernel of 20 us": 20_000}  # fmt: skip
    check(time_of, (((case,), float(ns)) for case, ns in durations.items()), relative=0.02)


def honest_ratio(function: Callable[[Arm, Arm, Timer], float]) -> None:
    """``speed``: BF16 time over FP8 time if both arms give the same tensors within 10 %; an exception if not."""
    y, gradient = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -2.0])
    wholes = {"bf16": lambda: (y, gradient), "fp8": lambda: (1.03 * y, 0.96 * gradient)}

    def missing() -> object:
        raise TypeError("expected float32 parameters and inputs of one dtype, got float16 inputs")

    others = {
        "both arms do the same": wholes["fp8"],
        "the FP8 arm raises TypeError": missing,
        "the FP8 arm leaves out the backward pass": lambda: (y,),
        "the FP8 arm gets another input": lambda: (5 * y, 5 * gradient),
        "the FP8 arm returns NaN": lambda: (y * torch.nan, gradient),
    }
    seconds = {"bf16": 8e-3}

    def outcome(case: str) -> object:
        arm = others[case]

        def timer(call: Arm) -> float:
            call()
            return seconds["bf16"] if call is wholes["bf16"] else 5e-3

        if case == "both arms do the same":
            return function(wholes["bf16"], arm, timer)
        try:
            got = function(wholes["bf16"], arm, timer)
        except NotImplementedError:
            return None
        except Exception as error:  # refusing is the right answer here, whatever the exception
            return "an exception" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
        return got if got is None or got is ... else f"a ratio of {got}"

    answers = {case: "an exception" for case in others} | {"both arms do the same": 1.6}
    check(outcome, (((case,), answer) for case, answer in answers.items()), relative=1e-9)


def drift_free_ratio(function: Callable[[Arm, Arm, Timer], float]) -> None:
    """``speed``: how many times as fast the second arm is, within 3 %, on a chip that drifts or hiccups."""

    def ratio(machine: str) -> float | None:
        calls = 0

        def slow() -> None:
            return None

        def fast() -> None:
            return None

        def timer(call: Arm) -> float:
            nonlocal calls
            calls += 1
            return (4e-3 if call is slow else 2e-3) * machines[machine](calls)

        return function(slow, fast, timer)

    machines: dict[str, Callable[[int], float]] = {
        "steady": lambda i: 1.0,
        "the chip slows down while it warms up": lambda i: 1 + 0.02 * i,
        "another process takes one call in seven": lambda i: 6.0 if i % 7 == 2 else 1.0,
    }
    check(ratio, (((machine,), 2.0) for machine in machines), relative=0.03)


def ridge_tokens(function: Callable[[int, int, str, str], float]) -> None:
    """``speed``: the fewest tokens M for which a forward product is bound by arithmetic, infinity if none are enough.

    Checked by trying every M; that none are enough by 10**15 tokens, because intensity only grows with M.
    """

    def case(k: int, n: int, dtype: str, device: str) -> tuple[tuple, float]:
        if roofline(10**15, k, n, dtype, device).bound == "memory":
            return (k, n, dtype, device), math.inf
        m = 1
        while roofline(m, k, n, dtype, device).bound == "memory":
            m += 1
        return (k, n, dtype, device), m

    runs = ((4096, 4096, "bf16", "h100"), (4096, 4096, "fp8", "h100"), (8192, 28672, "bf16", "a100"),
            (1024, 4096, "fp8", "h200"), (512, 2048, "fp8", "h100"))  # fmt: skip
    check(function, (case(*run) for run in runs))


def share_of_step(function: Callable[[float, float], float]) -> None:
    """``speed``: which share of the time became ``part`` times as fast, if the whole became ``whole`` times as fast."""
    runs = ((1.25, 1.58), (1.1, 1.4), (2.0, 2.0), (1.0, 1.69), (0.9, 0.8))
    check(function, ((run, amdahl_fraction(*run)) for run in runs), relative=1e-6)
