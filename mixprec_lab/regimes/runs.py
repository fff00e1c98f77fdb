"""All tasks, all regimes, all seeds: resumable, one small file a run."""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from mixprec_lab.regimes.regime import REGIMES, Regime, get_regime
from mixprec_lab.regimes.statistics import PairedDifference, paired_difference
from mixprec_lab.regimes.tasks import TASKS, Task, get_task
from mixprec_lab.regimes.training import Run, fingerprint, train
from mixprec_lab.speed.provenance import write_whole


def run_all(
    tasks: Iterable["str | Task"] | None = None,
    regimes: Iterable["str | Regime"] | None = None,
    seeds: Iterable[int] = range(5),
    *,
    quick: bool = True,
    folder: Path | str | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> list[Run]:
    """Every regime on every task with every seed, seeds outermost: an interrupted set holds whole pairs.

    None means all tasks or all of ``REGIMES``.  With a ``folder`` each run is stored there when it is done, whole or
    not at all, and is not trained again: a set that was interrupted goes on.  ``progress`` draws a bar on stderr.

    Raises ValueError for a stored run of other settings (other steps, rates, components or torch), of other initial
    weights or batches, or damaged; for the same name twice, a name that is no part of a file name, and for no seeds.
    What a run raises ends the set, and those before it stay stored.  That ``loss``, ``metric`` or ``held_out`` of a
    task of your own have changed is not seen: give it another name, or another folder.
    """
    chosen = [get_task(t, quick, device) for t in (TASKS if tasks is None else tasks)]
    under = [get_regime(r) for r in (REGIMES if regimes is None else regimes)]
    seeds = list(seeds)
    _check_names([t.name for t in chosen], [r.name for r in under], seeds)
    if folder is not None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(task, regime, seed) for seed in seeds for task in chosen for regime in under]
    found, bar = [], _Bar(len(jobs), sys.stderr if progress else None)
    for task, regime, seed in jobs:
        bar.show(len(found), f"{task.name}, {regime.name}, seed {seed}")
        found.append(_run(task, regime, seed, folder))
    bar.show(len(found), "done")
    bar.end()
    return found


def _check_names(tasks: list[str], regimes: list[str], seeds: list[int]) -> None:
    for what, names in (("tasks", tasks), ("regimes", regimes), ("seeds", seeds)):
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected {what} of different names, at least one, got {names}")
    if odd := [x for x in (*tasks, *regimes) if not isinstance(x, str) or not re.fullmatch(r"[\w. +-]{1,80}", x)]:
        raise ValueError(f"expected names of up to 80 letters, digits, spaces and _.+- (for files), got {odd}")
    if not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds):
        raise ValueError(f"expected seeds that are whole numbers of at least 0, got {seeds}")


def _run(task: Task, regime: Regime, seed: int, folder: Path | None) -> Run:
    if folder is None:
        return train(task, regime, seed)
    path, settings = folder / f"{task.name}-{regime.name}-{seed}.json", settings_of(task, regime)
    if path.exists():
        return _read(path, settings, task, regime, seed)
    run = train(task, regime, seed)
    write_whole(path, {"settings": settings, "run": run.as_dict()})
    return run


def settings_of(task: Task, regime: Regime) -> dict[str, Any]:
    """What a stored run must agree with to be taken for one of this set, as plain values."""
    return {"task": task.settings(), "regime": repr(regime), "torch": torch.__version__}


def _read(path: Path, settings: Mapping[str, Any], task: Task, regime: Regime, seed: int) -> Run:
    try:
        stored = json.loads(path.read_text("utf-8"))
        found, run = dict(stored["settings"]), Run.from_dict(stored["run"])
        _check_stored(run, task, regime, seed)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected a stored run in {path}, got something else ({error}): delete the file") from error
    differing = [key for key in {**settings, **found} if found.get(key) != settings.get(key)]
    if not differing and run.pair != fingerprint(task, seed):
        differing = ["model or batches"]
    if differing:
        raise ValueError(
            f"expected a run of these settings in {path}, got one with another {', '.join(differing)}: delete it, or "
            f"give another folder"
        )
    return run


def _check_stored(run: Run, task: Task, regime: Regime, seed: int) -> None:
    """ValueError unless ``run`` is what ``train`` returns for these three."""
    if (run.task, run.regime, run.seed) != (task.name, regime.name, seed):
        raise ValueError(f"a run of {run.task}, {run.regime}, seed {run.seed}")
    if not len(run.steps) == len(run.held_out) == len(run.training) > 1:
        raise ValueError("lists of losses of other lengths")
    for x in (*run.held_out, *run.training):
        if not (x is None or (isinstance(x, float) and math.isfinite(x))):
            raise ValueError(f"a loss of {x!r}")


def finals(runs: Iterable[Run], task: str, regime: str) -> dict[int, float]:
    """The final held-out losses of one regime on one task, by seed; NaN where a run was lost."""
    return {r.seed: r.final for r in runs if (r.task, r.regime) == (task, regime)}


def differences(runs: Sequence[Run], baseline: str = "fp32") -> dict[tuple[str, str], PairedDifference]:
    """The paired difference of final held-out losses from ``baseline``, by (task, regime), in the order of the runs.

    Left out are ``baseline`` itself and regimes with a run whose loss is not finite: see ``diverged``.  Raises
    ValueError if the baseline is missing or diverged, if two runs of a seed are no pair (other initial weights or
    batches), and as ``paired_difference``.
    """
    check_pairs(runs)
    lost, found = diverged(runs), {}
    for task, regime in dict.fromkeys((r.task, r.regime) for r in runs):
        if (task, baseline) in lost or not finals(runs, task, baseline):
            raise ValueError(f"expected finished runs of the baseline {baseline!r} on {task!r}, got none or lost ones")
        if regime != baseline and (task, regime) not in lost:
            found[task, regime] = paired_difference(finals(runs, task, baseline), finals(runs, task, regime))
    return found


def diverged(runs: Iterable[Run]) -> dict[tuple[str, str], list[int]]:
    """The seeds whose final loss was not finite, by (task, regime)."""
    found: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        if not math.isfinite(run.final):
            found.setdefault((run.task, run.regime), []).append(run.seed)
    return found


def check_pairs(runs: Iterable[Run]) -> None:
    """ValueError unless all runs of a task and seed began with the same weights and saw the same batches."""
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        first = seen.setdefault((run.task, run.seed), run)
        if run.pair != first.pair:
            raise ValueError(
                f"expected pairs, got other weights or batches under {run.regime!r} than under {first.regime!r} "
                f"({run.task}, seed {run.seed}): seed model and data alike in all regimes"
            )


class _Bar:
    """A progress bar on ``stream``, none for None."""

    def __init__(self, total: int, stream: TextIO | None) -> None:
        self._total, self._stream = total, stream

    def show(self, done: int, what: str) -> None:
        """Draw the bar: ``done`` finished, ``what`` is under way."""
        if self._stream is not None:
            full = 30 * done // self._total
            self._stream.write(f"\r[{'#' * full}{'.' * (30 - full)}] {done}/{self._total} {what:<50.50}")
            self._stream.flush()

    def end(self) -> None:
        """Close the line."""
        if self._stream is not None:
            self._stream.write("\n")
