"""What a fault is, what a training run in small is, and how one is driven."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn


class Probe(Protocol):
    """What looks on while a run trains."""

    def loss(self, loss: torch.Tensor) -> None:
        """Called once a step, when the loss is computed, before ``backward``."""

    def gradients(self) -> None:
        """Called once a step, when the gradients are ready: after ``backward``, and ``unscale_`` if there is one."""


@dataclass
class Run:
    """A training run in small: ``step(i, probe)`` is one whole step, as its author wrote it."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: Callable[[int, Probe], None]
    steps: int = 8
    scaler: torch.amp.GradScaler | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None


@dataclass(frozen=True)
class Fault:
    """A mistake that can be run, and the same run without it.

    ``modules`` and ``operations`` are regular expressions (``re.search``) for the places that a diagnosis may name: a
    module path, a parameter, or one of scaler, optimizer, scheduler, loss, input, target; an operator or a call.
    """

    name: str
    title: str  #: one line: what is wrong
    fault_class: str
    phase: str  #: data, forward, backward, optimizer or checkpoint
    step: int  #: the first step at which it is visible
    silent: bool  #: every loss stays finite and nothing raises
    modules: tuple[str, ...]
    operations: tuple[str, ...]
    cure: str
    build: Callable[[int, bool], Run] = field(repr=False)  #: (seed, repaired) -> a fresh run

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"expected the phase of {self.name} to be one of {', '.join(PHASES)}, got {self.phase!r}")


PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")


def fault(
    title: str,
    fault_class: str,
    phase: str,
    *,
    modules: tuple[str, ...],
    operations: tuple[str, ...],
    cure: str,
    step: int = 0,
    silent: bool = False,
) -> Callable[[Callable[[int, bool], Run]], Fault]:
    """A decorator: the function that builds a run becomes the Fault of its name."""

    def wrap(build: Callable[[int, bool], Run]) -> Fault:
        return Fault(build.__name__, title, fault_class, phase, step, silent, modules, operations, cure, build)

    return wrap


@dataclass(frozen=True)
class Outcome:
    """What a plain run came to.  A step that raised ends it; its loss is there if it was computed before."""

    losses: tuple[float, ...]
    error: Exception | None
    error_step: int | None
    warnings: tuple[str, ...]
    finite: bool  #: every loss, and every parameter and buffer at the end

    @property
    def silent(self) -> bool:
        """Whether every loss is finite and nothing raised."""
        return self.error is None and all(map(math.isfinite, self.losses))


class _Recorder:
    def __init__(self, probe: Probe | None) -> None:
        self.losses: list[float] = []
        self.probe = probe

    def loss(self, loss: torch.Tensor) -> None:
        self.losses.append(float(loss.detach()))
        if self.probe is not None:
            self.probe.loss(loss)

    def gradients(self) -> None:
        if self.probe is not None:
            self.probe.gradients()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generator of the CPU starts from ``seed``; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def run_fault(fault: Fault, seed: int = 0, repaired: bool = False, probe: Probe | None = None) -> Outcome:
    """The outcome of one plain run of ``fault``, or of its repaired twin.

    Warnings are collected, not shown.  An exception of the run ends it and is kept; so is one of ``probe``.
    """
    run = fault.build(seed, repaired)
    recorder = _Recorder(probe)
    error, error_step = None, None
    with warnings.catch_warnings(record=True) as caught, seeded(seed):
        warnings.simplefilter("always")
        for i in range(run.steps):
            try:
                run.step(i, recorder)
            except Exception as raised:  # whatever a faulty run raises is its outcome
                error, error_step = raised, i
                break
    tensors = [*run.model.parameters(), *run.model.buffers()]
    finite = all(map(math.isfinite, recorder.losses)) and all(bool(t.float().isfinite().all()) for t in tensors)
    return Outcome(tuple(recorder.losses), error, error_step, tuple(str(w.message) for w in caught), finite)
