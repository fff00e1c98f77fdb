"""The rooms of the theme "timing": four ways to measure something else, on a simulated GPU with an exact clock."""

from collections.abc import Callable

from mixprec_lab.checks._verdict import check
from mixprec_lab.checks.broken_code.stand_ins import timer
from mixprec_lab.speed import SimulatedGPU

Kernel = Callable[[], None]
Time = Callable[..., float]


def cold_start(function: Callable[[SimulatedGPU, Kernel], float]) -> None:
    """``broken_code``: nanoseconds of a kernel, within 2 %, without the cost of its first call."""

    def time_of(microseconds: int) -> object:
        gpu = SimulatedGPU()
        return function(gpu, gpu.kernel("product", 1000 * microseconds))

    check(time_of, (((us,), 1000.0 * us) for us in (800, 100)), relative=0.02)


def running_queue(function: Callable[[SimulatedGPU, Kernel], float]) -> None:
    """``broken_code``: nanoseconds of a kernel, within 2 %, while the GPU still works on something else."""

    def time_of(microseconds: int) -> object:
        gpu = SimulatedGPU()
        gpu.kernel("the work of two seconds", 2_000_000_000)()
        return function(gpu, gpu.kernel("product", 1000 * microseconds))

    check(time_of, (((us,), 1000.0 * us) for us in (800, 100)), relative=0.02)


def unequal_arms(function: Callable[[Time, Kernel, Kernel, Kernel], float]) -> None:
    """``broken_code``: how many times as fast the FP8 product is, casts in neither arm."""

    def ratio(cast: int, bf16: int, fp8: int) -> object:
        gpu = SimulatedGPU()
        kernels = [gpu.kernel(name, 1000 * us) for name, us in (("cast", cast), ("bf16", bf16), ("fp8", fp8))]
        return function(timer(gpu), *kernels)

    check(ratio, (((cast, 1000, 625), 1.6) for cast in (700, 3000)), relative=0.02)


def forward_only(function: Callable[[Time, dict[str, tuple[Kernel, Kernel]]], float]) -> None:
    """``broken_code``: how many times as fast a training step is in FP8; each arm is (forward, backward)."""

    def ratio(forward: tuple[int, int], backward: tuple[int, int]) -> object:
        gpu = SimulatedGPU()
        kernels = {
            name: (gpu.kernel(f"{name} forward", 1000 * f), gpu.kernel(f"{name} backward", 1000 * b))
            for name, f, b in zip(("bf16", "fp8"), forward, backward, strict=True)
        }
        return function(timer(gpu), kernels)

    cases = [
        (((1000, 500), (2000, 1900)), 3000 / 2400),
        (((800, 400), (1600, 1200)), 1.5),
    ]
    check(ratio, cases, relative=0.02)
