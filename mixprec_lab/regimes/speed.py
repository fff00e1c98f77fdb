"""Steps per second of every regime, interleaved on one machine, as ratios to FP32."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from mixprec_lab.device import one_thread
from mixprec_lab.regimes.engines import build
from mixprec_lab.regimes.records import provenance
from mixprec_lab.regimes.regime import Regime, get_regime
from mixprec_lab.regimes.tasks import Task
from mixprec_lab.speed import Spread, benchmark


def _arm(task: Task, regime: Regime) -> tuple[Callable[[], None], str]:
    """A function that takes one training step on the same batch each time, and how its products run."""
    engine = build(regime, task, 0)
    inputs, targets = next(iter(task.batches(0)))
    return lambda: engine.step(inputs, targets), engine.backend


@one_thread()
def measure_speed(
    tasks: Iterable[Task],
    regimes: Iterable["str | Regime"],
    command: str,
    *,
    rounds: int = 15,
    number: int = 4,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The speed section of a record: for each task and regime how many times as fast as FP32 a training step is.

    Every round times ``number`` steps of every regime, and each round starts with another one, so that a machine that
    slows down slows all of them.  On a CPU one thread works.  Where ``backend`` is "emulated" the ratio is that of the
    emulation, and says nothing about hardware that has the format.
    """
    started, device, rows = time.perf_counter(), torch.device(device), []
    told = provenance(device, command, quick=rounds < 15)
    under = [get_regime("fp32"), *(r for r in map(get_regime, regimes) if r.name != "fp32")]
    for task in tasks:
        built = {regime.name: _arm(task, regime) for regime in under}
        arms = {name: arm for name, (arm, _) in built.items()}
        found = benchmark(arms, tolerance=None, rounds=rounds, number=number, device=device)
        for name, (_, backend) in built.items():
            per_second = Spread.of([1 / s for s in found[name].rounds])
            rows.append({"task": task.name, "regime": name, "backend": backend, "ratio": asdict(found.ratio(name)),
                         "steps_per_second": asdict(per_second)})  # fmt: skip
    return {"provenance": told | {"seconds": round(time.perf_counter() - started, 3)}, "rows": rows}
