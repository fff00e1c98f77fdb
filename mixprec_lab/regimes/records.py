"""A full set as a file: what it must hold to be believed, checked when it is written and when it is read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mixprec_lab.regimes.regime import Regime, get_regime
from mixprec_lab.regimes.runs import check_pairs
from mixprec_lab.regimes.tasks import Task
from mixprec_lab.regimes.training import KINDS, Run
from mixprec_lab.speed import BrokenRecord, describe
from mixprec_lab.speed.provenance import provenance as origin
from mixprec_lab.speed.provenance import write_whole
from mixprec_lab.speed.records import check_origin, check_provenance, need, positive

SCHEMA = 1
_RUN = {"task": str, "regime": str, "seed": int, "steps": list, "held_out": list, "training": list, "skipped": int,
        "bytes": dict, "pair": str, "backend": str}  # fmt: skip
_TASK = {"title": str, "metric_title": str, "steps": int, "parameters": int}
_LARGEST = 1e4  #: no loss of these tasks is above it without being lost
_AGAIN = "python -m mixprec_lab.regimes"
_need = partial(need, again=_AGAIN)


#: what a result depends on
_PARTS = ("regimes", "amp", "bf16_vs_fp16", "fp8", "block_scaling", "master_weights", "loss_scaling", "rounding",
          "formats", "memory", "models.py", "device.py")  # fmt: skip


def provenance(device: torch.device, command: str, quick: bool) -> dict[str, Any]:
    """Where, when and with what, to be asked at the beginning: all but the seconds, which are known at the end."""
    found = origin(device, command, quick, [f"mixprec_lab/{part}" for part in _PARTS])
    return found | ({"threads": 1} if device.type == "cpu" else {})


def make_record(
    runs: Sequence[Run],
    tasks: Iterable[Task],
    regimes: Iterable["str | Regime"],
    device: torch.device,
    told: Mapping[str, Any],
    speed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a set: device, provenance, tasks, regimes, runs, and a speed section or None.

    ``told`` is of the call that finished the set: one that was interrupted took longer than its seconds.
    """
    under = [get_regime(r) for r in regimes]
    return {
        "kind": "regimes",
        "schema": SCHEMA,
        "device": describe(device),
        "device_type": device.type,
        "provenance": dict(told),
        "tasks": {t.name: t.settings() | {"title": t.title, "parameters": _parameters(t)} for t in tasks},
        "regimes": [{"name": r.name, "title": r.title, "emulated": r.emulated} | r.components() for r in under],
        "runs": [r.as_dict() for r in runs],
        "speed": None if speed is None else dict(speed),
    }


def _parameters(task: Task) -> int:
    return sum(p.numel() for p in task.model(0).parameters())


def validate_record(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """``record`` itself if it is complete and possible; BrokenRecord, naming the place, if not.

    Complete: a run for every task, regime and seed, two seeds at least, every field in it, provenance.  Possible:
    losses between 0 and 10,000 or None, evaluations in order up to the last step, bytes that are whole numbers, all
    runs of a seed with the same initial weights and batches, speed ratios positive and between their quartiles.
    """
    check_origin(record, "regimes", SCHEMA, _AGAIN)
    tasks, regimes, runs = (record.get(key) for key in ("tasks", "regimes", "runs"))
    _need(isinstance(tasks, Mapping) and len(tasks) > 0, "at least one task", tasks)
    _need(isinstance(regimes, list) and len(regimes) > 1, "at least two regimes", regimes)
    _need(isinstance(runs, list), "a list of runs", runs)
    for name, task in tasks.items():
        _check_task(name, task)
    for regime in regimes:
        _need(isinstance(regime, Mapping) and all(isinstance(regime.get(k), str) for k in ("name", "title")),
              "a regime with a name and a title", regime)  # fmt: skip
    for run in runs:
        _check_run(run, tasks)
    names = [r["name"] for r in regimes]
    _check_grid(runs, list(tasks), names)
    _need("speed" in record, "a speed section or null", "nothing")
    if record["speed"] is not None:
        _check_speed(record["speed"], tasks, names)
    return record


def _check_task(name: str, task: object) -> None:
    _need(isinstance(task, Mapping), f"a task {name!r} as an object", task)
    for key, kind in _TASK.items():
        x = task.get(key)
        _need(isinstance(x, kind) and not isinstance(x, bool), f"a task {name!r} with {key}", x)


def _check_run(run: object, tasks: Mapping[str, Any]) -> None:
    _need(isinstance(run, Mapping), "a run as an object", run)
    for key, kind in _RUN.items():
        _need(isinstance(run.get(key), kind | tuple if kind is list else kind), f"a run with {key}", run.get(key))
    where = f"{run['task']}, {run['regime']}, seed {run['seed']}"
    _need(run["task"] in tasks, f"a task that is described in {where}", run["task"])
    steps = list(run["steps"])
    _need(all(isinstance(s, int) for s in steps), f"whole numbers of steps in {where}", steps)
    _need(steps == sorted(set(steps)) and steps[:1] == [0] and steps[-1] == tasks[run["task"]]["steps"],
          f"evaluations from step 0 to the last in {where}", steps)  # fmt: skip
    for key in ("held_out", "training"):
        _need(len(run[key]) == len(steps), f"{len(steps)} values of {key} in {where}", len(run[key]))
        for x in run[key]:
            _need(x is None or (isinstance(x, int | float) and 0 <= x <= _LARGEST),
                  f"losses between 0 and {_LARGEST:g}, or null, in {where}", x)  # fmt: skip
    _need(0 <= run["skipped"] <= steps[-1], f"a number of skipped steps in {where}", run["skipped"])
    sizes = run["bytes"]
    _need(set(sizes) == set(KINDS) and all(isinstance(b, int) and b >= 0 for b in sizes.values()),
          f"bytes of {', '.join(KINDS)} in {where}", sizes)  # fmt: skip


def _check_grid(runs: list[Mapping[str, Any]], tasks: list[str], regimes: list[str]) -> None:
    seeds = sorted({run["seed"] for run in runs})
    _need(len(seeds) >= 2, "at least two seeds", seeds)
    wanted = sorted((t, r, s) for t in tasks for r in regimes for s in seeds)
    found = sorted((run["task"], run["regime"], run["seed"]) for run in runs)
    odd = sorted(set(wanted) ^ set(found))
    _need(wanted == found, "one run for each task, regime and seed", odd or "one twice")
    try:
        check_pairs([Run.from_dict(dict(run)) for run in runs])
    except ValueError as error:
        raise BrokenRecord(str(error)) from error


def _check_speed(speed: object, tasks: Mapping[str, Any], regimes: list[str]) -> None:
    _need(isinstance(speed, Mapping), "a speed section", speed)
    check_provenance(speed.get("provenance"), _AGAIN)
    rows = speed.get("rows")
    _need(isinstance(rows, list), "rows of speed", rows)
    for row in rows:
        _need(isinstance(row, Mapping) and all(isinstance(row.get(k), str) for k in ("task", "regime")),
              "a row of speed with task and regime", row)  # fmt: skip
    found = sorted((row.get("task"), row.get("regime")) for row in rows)
    _need(found == sorted((t, r) for t in tasks for r in regimes), "speed of every task and regime", found)
    for row in rows:
        where = f"speed of {row['task']}, {row['regime']}"
        for key in ("ratio", "steps_per_second"):
            spread = row.get(key)
            _need(isinstance(spread, Mapping) and all(positive(spread.get(k)) for k in ("low", "median", "high")),
                  f"positive {key} with low, median and high in {where}", spread)  # fmt: skip
            _need(spread["low"] <= spread["median"] <= spread["high"], f"ordered quartiles in {where}", spread)
        _need(isinstance(row.get("backend"), str) and row["backend"], f"a backend in {where}", row.get("backend"))


def save_record(record: Mapping[str, Any], path: Path) -> Path:
    """Write a valid record, whole or not at all, and return where.  BrokenRecord before anything is written.

    A quick record never replaces a full one: FileExistsError.
    """
    validate_record(record)
    if record["provenance"]["quick"] and path.exists() and not load_record(path)["provenance"]["quick"]:
        raise FileExistsError(f"expected another output than {path}, which holds a full record: pass --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, record)
    return path


def load_record(path: Path | str) -> Mapping[str, Any]:
    """The record in ``path``, checked; BrokenRecord, with the file's name, if it is not one."""
    path = Path(path)
    try:
        return validate_record(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, BrokenRecord) as error:
        raise BrokenRecord(f"{path.name}: {error}") from error


def runs_of(record: Mapping[str, Any]) -> list[Run]:
    """The runs in a record."""
    return [Run.from_dict(dict(run)) for run in record["runs"]]
