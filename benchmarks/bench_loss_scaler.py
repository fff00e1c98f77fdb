"""What a loss scaler costs a step, as ratios in one run: ours, torch's, the usual loop, and the limit of one multiply.

    python benchmarks/bench_loss_scaler.py [--threads 1] [--rounds 15] [--large]

A step is: unscale all gradients, check that they are finite, decide, move the scale; the optimizer's own step is left
out.  The limit is one in-place multiply of as many bytes in one flat tensor.  Candidates are timed in turn, round by
round, and medians compared, so that a busy neighbour slows all of them alike.  First it is checked that each of them
finds an infinity in the last gradient, and that the unscaled gradients are the same.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.formats import text_table
from mixprec_lab.loss_scaling import DynamicLossScaler

_NO_GROWTH = 2**30


class Still(torch.optim.Optimizer):
    """An optimizer that steps nowhere."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        """Do nothing."""


def loop(parameters: list[nn.Parameter], check: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """The loop of the tutorials: one check and one read for each gradient, then one multiply for each."""
    found = False
    for p in parameters:
        if bool(check(p.grad)):
            found = True
    for p in parameters:
        p.grad.mul_(1.0)
    return not found


def candidates(parameters: list[nn.Parameter]) -> dict[str, Callable[[], bool]]:
    """Each way to do a step; True if the gradients were finite.  The scale is 1, so that steps can be repeated."""
    optimizer = Still(parameters)
    ours = DynamicLossScaler(1.0, scale_window=_NO_GROWTH)
    reference = torch.amp.GradScaler("cpu", 1.0, growth_interval=_NO_GROWTH)
    reference.scale(torch.ones(()))
    gradients, inverse = [p.grad for p in parameters], torch.ones(())

    def fused() -> bool:
        found = torch.zeros(())
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
        return not found.item()

    def torchs() -> bool:
        before = reference.get_scale()
        reference.step(optimizer)
        reference.update()
        return reference.get_scale() == before

    return {
        "fused operator alone": fused,
        "ours": lambda: ours.step(optimizer),
        "torch.amp.GradScaler": torchs,
        "loop, isfinite().all()": lambda: loop(parameters, lambda g: ~g.isfinite().all()),
        "loop, isinf().any() or isnan().any()": lambda: loop(parameters, lambda g: g.isinf().any() or g.isnan().any()),
    }


def make(tensors: int, elements: int) -> list[nn.Parameter]:
    """``tensors`` parameters with random gradients, ``elements`` in all."""
    parameters = [nn.Parameter(torch.zeros(elements // tensors)) for _ in range(tensors)]
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def check() -> None:
    """Every candidate sees an infinity in the last gradient and leaves finite gradients as they were."""
    for name in candidates(make(3, 30)):
        parameters = make(3, 30)
        before = [p.grad.clone() for p in parameters]
        assert candidates(parameters)[name](), name
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True)), name
        parameters[-1].grad[-1] = torch.inf
        assert not candidates(parameters)[name](), name


def measure(tensors: int, elements: int, rounds: int) -> None:
    """Print the table for one size."""
    parameters = make(tensors, elements)
    flat = torch.randn(elements)
    runs = {"flat mul_ (limit)": lambda: flat.mul_(1.0)} | candidates(parameters)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    base, main = median["flat mul_ (limit)"], median["ours"]
    rows = [[name, f"{t * 1e3:.2f}", f"{t / base:.2f}", f"{t / main:.2f}"] for name, t in median.items()]
    print(text_table([f"{tensors} tensors, {elements:,} elements", "ms", "time / limit", "time / ours"], rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--large", action="store_true", help="100 million elements too (2 GB of memory)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    print(f"{machine}, {arguments.threads} thread(s), median of {arguments.rounds} rounds\n")
    check()
    for elements in (10**7, 10**8) if arguments.large else (10**7,):
        for tensors in (100, 1000):
            measure(tensors, elements, arguments.rounds)


if __name__ == "__main__":
    main()
