"""What watching a training step costs, over the bare step in one run: our monitor and the detectors of others.

    python benchmarks/bench_monitor.py [--threads 1] [--rounds 15] [--width 256] [--depth 4] [--batch 128]

The step is that of a transformer (8 tokens an image), forward, backward and AdamW in FP32.  Candidates are timed in
turn, round by round, each on a model of its own, and medians compared, so that a busy neighbour slows all alike.  The
monitor's traced first steps are warm-up; ``deep`` is the cost of a step that is traced.
"""

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from mixprec_lab.formats import text_table
from mixprec_lab.models import transformer
from mixprec_lab.nan_debugging import NumericalStabilityMonitor
from mixprec_lab.nan_debugging.detectors import DetectAnomaly, LossIsFinite, ModuleOutputs, NamedGradients
from mixprec_lab.nan_debugging.faults import Run

BASE = "bare step"


class Bare:
    """A watch that does nothing."""

    def step(self, i: int) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def loss(self, loss: torch.Tensor) -> None: ...

    def gradients(self) -> None: ...


class Monitored:
    """The monitor as a watch."""

    def __init__(self, run: Run, level: str) -> None:
        self.monitor = NumericalStabilityMonitor(run.model, run.optimizers, level=level)
        self.step, self.loss, self.gradients = self.monitor.step, self.monitor.record_loss, self.monitor.gradients_ready


def run_of(width: int, depth: int, batch: int) -> Run:
    """A training run of the transformer on seeded noise."""
    model = transformer(width=width, heads=4, depth=depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    g = torch.Generator().manual_seed(0)
    images, labels = torch.rand(batch, 1, 8, 8, generator=g), torch.randint(10, (batch,), generator=g)

    def step(i: int, probe) -> None:
        loss = F.cross_entropy(model(images), labels)
        probe.loss(loss)
        optimizer.zero_grad()
        loss.backward()
        probe.gradients()
        optimizer.step()

    return Run(model, [optimizer], step, 0)


def arms(width: int, depth: int, batch: int) -> dict[str, Callable[[int], None]]:
    """Name -> one step of its own run, watched its own way."""
    makers = {
        BASE: lambda run: Bare(),
        "monitor, cheap": lambda run: Monitored(run, "cheap"),
        "loss isfinite": LossIsFinite().watch,
        "named gradients isfinite": NamedGradients().watch,
        "module outputs isfinite": ModuleOutputs().watch,
        "detect_anomaly": DetectAnomaly().watch,
        "monitor, deep": lambda run: Monitored(run, "deep"),
    }

    def arm(make: Callable[[Run], object]) -> Callable[[int], None]:
        run = run_of(width, depth, batch)
        watch = make(run)

        def step(i: int) -> None:
            with watch.step(i):
                run.step(i, watch)

        return step

    return {name: arm(make) for name, make in makers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("threads", 1), ("rounds", 15), ("width", 256), ("depth", 4), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {a.threads} thread(s)")
    steps = arms(a.width, a.depth, a.batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(a.rounds + 4):
        for name, step in steps.items():
            start = time.perf_counter()
            step(i)
            if i >= 4:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [(name, f"{1e3 * m:.1f}", f"{m / medians[BASE]:.2f}") for name, m in medians.items()]
    print(text_table(("step", "ms", "over bare"), rows))
    parameters = sum(p.numel() for p in transformer(width=a.width, heads=4, depth=a.depth).parameters())
    print(f"{parameters:,} parameters, {a.batch * 8} tokens")


if __name__ == "__main__":
    main()
