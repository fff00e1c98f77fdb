"""What a step on master weights costs, as ratios in one run: over FP32 AdamW, fused and foreach, and over usual loops.

    python benchmarks/bench_master_weights.py [--threads 1] [--rounds 15] [--elements 10000000]

A step is everything between ``backward()`` and the next forward pass: gradients to the masters, AdamW, weights back to
BF16, gradients cleared.  Gradients are put back before each step, outside the clock.  Candidates are timed in turn,
round by round, and medians compared, so that a busy neighbour slows all of them alike.  First it is checked that every
way with masters makes the same weights, bit by bit.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.formats import text_table
from mixprec_lab.master_weights import BF16AdamW, MasterWeightOptimizer

_HYPER = {"lr": 1e-3, "weight_decay": 0.01}
Step = Callable[[], None]


def model_of(tensors: int, elements: int, dtype: torch.dtype) -> nn.ParameterList:
    """``tensors`` seeded parameters, ``elements`` in all."""
    generator = torch.Generator().manual_seed(0)
    values = (0.02 * torch.randn(elements // tensors, generator=generator) for _ in range(tensors))
    return nn.ParameterList([nn.Parameter(v.to(dtype)) for v in values])


def stepped(optimizer: "torch.optim.Optimizer | MasterWeightOptimizer") -> Step:
    """Step and clear."""

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(model: nn.Module, **options: bool) -> Step:
    """The usual loop on FP32 copies: one cast for each gradient, one copy for each weight."""
    parameters = list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(masters, **_HYPER, **options)

    def step() -> None:
        for p, master in zip(parameters, masters, strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        for p, master in zip(parameters, masters, strict=True):
            p.data.copy_(master.detach())
        optimizer.zero_grad()
        for p in parameters:
            p.grad = None

    return step


def masters_on(model: nn.Module, **options: bool) -> Step:
    """Ours."""
    return stepped(MasterWeightOptimizer(torch.optim.AdamW(model.parameters(), **_HYPER, **options), model))


def bf16_adamw(update: str) -> Callable[[nn.Module], Step]:
    """Ours without masters."""
    generator = torch.Generator().manual_seed(0)
    return lambda model: stepped(BF16AdamW(model.parameters(), **_HYPER, update=update, generator=generator))


def adamw(**options: bool) -> Callable[[nn.Module], Step]:
    """torch's AdamW on the parameters themselves."""
    return lambda model: stepped(torch.optim.AdamW(model.parameters(), **_HYPER, **options))


FP32, BF16 = torch.float32, torch.bfloat16
BASE = "FP32, AdamW(fused)"
WITH_MASTERS: dict[str, Callable[[nn.Module], Step]] = {
    "masters by hand, AdamW(foreach)": lambda model: by_hand(model, foreach=True),
    "masters by hand, AdamW(fused)": lambda model: by_hand(model, fused=True),
    "MasterWeightOptimizer, AdamW(foreach)": lambda model: masters_on(model, foreach=True),
    "MasterWeightOptimizer, AdamW(fused)": lambda model: masters_on(model, fused=True),
}
CANDIDATES: dict[str, tuple[torch.dtype, Callable[[nn.Module], Step]]] = {
    BASE: (FP32, adamw(fused=True)),
    "FP32, AdamW(foreach)": (FP32, adamw(foreach=True)),
    **{name: (BF16, make) for name, make in WITH_MASTERS.items()},
    "BF16, AdamW(fused): loses updates": (BF16, adamw(fused=True)),
    **{f"BF16AdamW, {update}": (BF16, bf16_adamw(update)) for update in ("nearest", "stochastic", "kahan")},
}


class Candidate:
    """A model with gradients, and its step."""

    def __init__(self, name: str, tensors: int, elements: int) -> None:
        dtype, make = CANDIDATES[name]
        self.model = model_of(tensors, elements, dtype)
        generator = torch.Generator().manual_seed(1)
        self._gradients = [torch.randn(p.shape, generator=generator).to(dtype) for p in self.model.parameters()]
        self._step = make(self.model)

    def run(self) -> float:
        """Seconds of one step."""
        for p, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            p.grad = gradient
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start


def check() -> None:
    """All ways with masters and the same kernel make the same weights."""
    for kernel in ("foreach", "fused"):
        names = [name for name in WITH_MASTERS if kernel in name]
        first, *others = (Candidate(name, 7, 7000) for name in names)
        for _ in range(5):
            for candidate in (first, *others):
                candidate.run()
        for other in others:
            for p, q in zip(first.model.parameters(), other.model.parameters(), strict=True):
                assert torch.equal(p, q), kernel


def measure(tensors: int, elements: int, rounds: int) -> None:
    """Print the table for one size."""
    candidates = {name: Candidate(name, tensors, elements) for name in CANDIDATES}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, candidate in candidates.items():
            seconds = candidate.run()
            if i:  # the first makes the state
                times[name].append(seconds)
    median = {name: statistics.median(t) for name, t in times.items()}
    base, foreach = median[BASE], median["FP32, AdamW(foreach)"]
    rows = [[name, f"{t * 1e3:.1f}", f"{t / base:.2f}", f"{t / foreach:.2f}"] for name, t in median.items()]
    header = [f"{tensors} tensors, {elements:,} elements", "ms", "time / FP32 fused", "time / FP32 foreach"]
    print(text_table(header, rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--elements", type=int, default=10_000_000)
    parser.add_argument("--tensors", type=int, nargs="+", default=[100, 1000])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    print(f"{machine}, {arguments.threads} thread(s), median of {arguments.rounds} rounds\n")
    check()
    for tensors in arguments.tensors:
        measure(tensors, arguments.elements, arguments.rounds)


if __name__ == "__main__":
    main()
