"""Your own model under several regimes in one call."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mixprec_lab.formats import text_table
from mixprec_lab.regimes.regime import Regime, get_regime
from mixprec_lab.regimes.runs import differences, diverged, finals, run_all
from mixprec_lab.regimes.statistics import PairedDifference
from mixprec_lab.regimes.tasks import Batch, Loss, Task
from mixprec_lab.regimes.training import Run


@dataclass(frozen=True)
class Comparison:
    """The runs, and each regime's paired difference from the first one."""

    baseline: str
    runs: tuple[Run, ...]
    differences: dict[str, PairedDifference]  #: by regime; without those that diverged
    diverged: dict[str, list[int]]  #: regime -> seeds whose loss was not finite

    def __str__(self) -> str:
        rows = []
        for regime in dict.fromkeys(r.regime for r in self.runs):
            values = finals(self.runs, self.runs[0].task, regime)
            mean = f"{sum(values.values()) / len(values):.4f}"
            if regime in self.diverged:
                rows.append([regime, "diverged", f"seeds {self.diverged[regime]}", ""])
            elif regime == self.baseline:
                rows.append([regime, mean, "baseline", ""])
            else:
                d = self.differences[regime]
                said = "differs" if d.excludes_zero else "not told from 0"
                rows.append([regime, mean, f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]", said])
        return text_table(["regime", "mean loss", "difference, 95 %", ""], rows)


def compare(
    model_fn: Callable[[int], nn.Module],
    batches: Callable[[int], Iterable[Batch]],
    loss_fn: Loss,
    regimes: "Iterable[str | Regime]",
    *,
    held_out: Batch,
    seeds: Iterable[int] = range(5),
    steps: int | None = None,
    **settings: Any,
) -> Comparison:
    """``model_fn(seed)`` trained on ``batches(seed)`` under each of ``regimes``, in pairs against the first.

    Model and batches must depend on the seed alone: that makes pairs, and it is checked.  ``held_out`` is (inputs,
    targets), on which ``loss_fn`` gives what is compared.  ``steps`` defaults to all batches of the first seed;
    ``settings`` are those of ``Task`` (``learning_rate``, ``wide``, ``metric``, ...).  Raises ValueError for fewer than
    two regimes or seeds, and for a model or batches that differ between two calls with one seed.
    """
    under, seeds = [get_regime(r) for r in regimes], list(seeds)
    if len(under) < 2 or len(seeds) < 2:
        raise ValueError(f"expected at least two regimes and two seeds, got {len(under)} and {len(seeds)}")
    count = sum(1 for _ in batches(seeds[0])) if steps is None else steps
    evaluations = min(settings.pop("evaluations", 10), count)
    task = Task("own", "own model", model_fn, batches, loss_fn, held_out, count, evaluations=evaluations, **settings)
    runs = run_all([task], under, seeds, progress=False)
    lost = {regime: found for (_, regime), found in diverged(runs).items()}
    found = {regime: d for (_, regime), d in differences(runs, under[0].name).items()}
    return Comparison(under[0].name, tuple(runs), found, lost)
