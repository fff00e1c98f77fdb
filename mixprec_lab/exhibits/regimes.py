"""Regimes side by side, picked from a stored set of runs: curves, gaps with intervals, memory, speed."""

import math
from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module
from mixprec_lab.exhibits._text import significant
from mixprec_lab.plots.memory import TERM_COLOURS
from mixprec_lab.plots.regimes import REGIME_STYLES, regime_colours
from mixprec_lab.plots.speed import source_line
from mixprec_lab.regimes import (
    Run,
    load_record,
    paired_difference,
    runs_of,
    t_quantile,
    unpaired_interval,
    validate_record,
)
from mixprec_lab.regimes.training import KINDS

INTERVALS = ("paired", "unpaired")
_DASH = "\u2014"
_MOST_SEEDS, _MOST_STEPS = 64, 1000


class RegimeComparison(Exhibit):
    """Regimes of one stored set beside a baseline: held-out loss, its gap with a 95 % interval, bytes, speed.

    ``record`` is a record of ``mixprec_lab.regimes``, or the path of one; it is checked.  ``task`` and ``baseline`` are
    names in it, ``shown`` names joined by commas, ``interval`` is "paired" or "unpaired" (the same runs without the
    knowledge of which are pairs), ``seeds`` how many of its seeds are used (2 or more), ``at`` which of its
    evaluations (0 is before training).  TraitError for anything else; BrokenRecord for a record that is none;
    ValueError if its tasks were not evaluated equally often.
    """

    _esm = es_module("regimes")
    _kind = "regimes"

    data = t.Dict(help="the losses, bytes and speeds of the set, and quantiles of Student's t").tag(sync=True)
    task = t.Unicode().tag(sync=True)
    baseline = t.Unicode().tag(sync=True)
    shown = t.Unicode().tag(sync=True)
    interval = t.Unicode("paired").tag(sync=True)
    seeds = t.Int(2, min=2, max=_MOST_SEEDS).tag(sync=True)
    at = t.Int(0, min=0, max=_MOST_STEPS).tag(sync=True)

    def __init__(self, record: Mapping[str, Any] | Path | str, *, name: str | None = None, **state: Any) -> None:
        if unknown := set(state) - {"task", "baseline", "shown", "interval", "seeds", "at"}:
            raise TypeError(f"RegimeComparison has no {', '.join(sorted(unknown))}")
        self._record = load_record(record) if isinstance(record, Path | str) else validate_record(record)
        self._data = _for_the_page(self._record)
        names = [r["name"] for r in self._data["regimes"]]
        first = {
            "task": self._data["tasks"][0]["name"], "baseline": names[0], "shown": ",".join(names),
            "seeds": len(self._data["seeds"]), "at": len(self._data["tasks"][0]["steps"]) - 1,
        }  # fmt: skip
        super().__init__({}, name, **{**first, **state})
        self._shown = state
        self.data = self._data

    _check_task = t.validate("task")(choice("task", lambda self: [x["name"] for x in self._data["tasks"]]))
    _check_baseline = t.validate("baseline")(choice("baseline", lambda self: self._names()))
    _check_interval = t.validate("interval")(choice("interval", lambda self: INTERVALS))

    @t.validate("shown")
    def _check_shown(self, proposal: Any) -> str:
        picked, known = proposal.value.split(",") if proposal.value else [], self._names()
        if len(set(picked)) < len(picked) or set(picked) - set(known):
            raise t.TraitError(
                f"expected different names of {', '.join(known)}, joined by commas, got {proposal.value!r}"
            )
        return proposal.value

    @t.validate("seeds", "at")
    def _check_number(self, proposal: Any) -> int:
        most = {"seeds": len(self._data["seeds"]), "at": len(self._data["tasks"][0]["steps"]) - 1}[proposal.trait.name]
        if proposal.value > most:
            raise t.TraitError(f"expected {proposal.trait.name} of at most {most} in this set, got {proposal.value}")
        return proposal.value

    def _names(self) -> list[str]:
        return [r["name"] for r in self._data["regimes"]]

    def losses(self, regime: str) -> list[float | None]:
        """The losses of one regime at the chosen evaluation, of the first ``seeds`` seeds; None where one was lost."""
        return [curve[self.at] for curve in self._data["losses"][self.task][regime][: self.seeds]]

    def gap(self, regime: str) -> tuple[float, float, float] | None:
        """Mean difference from the baseline and its interval; None if one of the two lost a seed."""
        first, second = self.losses(self.baseline), self.losses(regime)
        if None in first or None in second:
            return None
        paired = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
        if self.interval == "paired":
            return paired.mean, paired.low, paired.high
        return paired.mean, *unpaired_interval(first, second)

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        texts = {"verdict": self._verdict(), "source": self._data["source"]}
        task = next(x for x in self._data["tasks"] if x["name"] == self.task)
        for name in self._names():
            losses = self.losses(name)
            lost = losses.count(None)
            texts[f"{name}-loss"] = f"lost in {lost}" if lost else significant(_mean(losses), 4)
            texts[f"{name}-gap"] = self._gap_text(name)
            sizes = self._data["bytes"][self.task][name]
            texts[f"{name}-bytes"] = significant(sum(sizes) / task["parameters"], 3)
            texts[f"{name}-speed"] = _speed_text(self._data["speed"], self.task, name)
        return texts

    def _gap_text(self, name: str) -> str:
        if name == self.baseline:
            return "baseline"
        gap = self.gap(name)
        return _DASH if gap is None else f"{thousandths(gap[0])} [{thousandths(gap[1])}, {thousandths(gap[2])}]"

    def _verdict(self) -> str:
        titles = {r["name"]: r["title"] for r in self._data["regimes"]}
        task = next(x for x in self._data["tasks"] if x["name"] == self.task)
        others = [x for x in self._names() if x in self.shown.split(",") and x != self.baseline]
        if not others:
            return f"Pick at least one regime beside {titles[self.baseline]}."
        gaps = {x: self.gap(x) for x in others}
        told = [x for x, gap in gaps.items() if gap is not None]
        differ = [x for x in told if gaps[x][1] > 0 or gaps[x][2] < 0]
        words = (
            f"{task['title']}, step {task['steps'][self.at]}, {self.seeds} seeds, {self.interval}: of {len(others)} "
            f"picked, {len(differ)} can be told from {titles[self.baseline]}, {len(told) - len(differ)} cannot."
        )
        if len(told) < len(others):
            words += f" {len(others) - len(told)} cannot be compared: a loss was lost."
        if told:
            widest = max(told, key=lambda x: abs(gaps[x][0]))
            words += f" The widest gap: {titles[widest]}, {self._gap_text(widest)} thousandths."
        return words


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def thousandths(v: float) -> str:
    """1000 ``v`` with its sign and three decimals, halves away from zero; what rounds to zero has no sign.

    A record keeps six digits of a loss: the fourth decimal would be noise.
    """
    text = str(Decimal(abs(v * 1000)).quantize(Decimal("0.001"), rounding=ROUND_HALF_UP))
    return text if float(text) == 0 else ("-" if v < 0 else "+") + text


def _speed_text(speed: Mapping[str, Any], task: str, regime: str) -> str:
    if not speed:
        return _DASH
    ratio, backend = speed[task][regime]
    return significant(ratio, 2) + ("" if backend == "native" else "*")


def _for_the_page(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws, with lists wherever the order counts: the built page sorts the keys of a widget's state."""
    runs, tasks = runs_of(record), list(record["tasks"])
    steps = {task: _steps(runs, task) for task in tasks}
    if len({len(x) for x in steps.values()}) != 1:
        raise ValueError(f"expected every task to be evaluated equally often, got {steps}")
    names, seeds = [r["name"] for r in record["regimes"]], sorted({run.seed for run in runs})
    found = {(run.task, run.regime, run.seed): run for run in runs}
    return {
        "source": _source(record),
        "tasks": [
            {"name": x, "title": record["tasks"][x]["title"], "metric": record["tasks"][x]["metric_title"],
             "parameters": record["tasks"][x]["parameters"], "steps": steps[x]}
            for x in tasks
        ],
        "regimes": [
            {"name": r["name"], "title": r["title"], "colours": list(regime_colours(r["name"])),
             "dashes": list(REGIME_STYLES.get(r["name"], ("fp32", (1, 1)))[1])}
            for r in record["regimes"]
        ],
        "seeds": seeds,
        "losses": {x: {r: [list(found[x, r, s].held_out) for s in seeds] for r in names} for x in tasks},
        "bytes": {x: {r: [found[x, r, seeds[0]].bytes[k] for k in KINDS] for r in names} for x in tasks},
        "kinds": [{"name": kind, "colours": list(TERM_COLOURS[kind])} for kind in KINDS],
        "speed": _speed(record["speed"], tasks),
        "quantiles": [t_quantile(0.975, df) for df in range(1, 2 * len(seeds) - 1)],
    }  # fmt: skip


def _steps(runs: list[Run], task: str) -> list[int]:
    """The steps after which a task was evaluated.  ValueError if they are not the same in all its runs."""
    found = {run.steps for run in runs if run.task == task}
    if len(found) != 1:
        raise ValueError(f"expected all runs of {task!r} to be evaluated after the same steps, got {sorted(found)}")
    return list(found.pop())


def _source(record: Mapping[str, Any]) -> str:
    speed, star = record["speed"], "* emulated: says nothing about hardware that has the format."
    told = f"Trained on {source_line(record)}."
    if speed is None:
        return f"{told} Speed was not measured. {star}"
    when = speed["provenance"]["date"][:10]
    return f"{told} Speed: training steps a second over those of FP32, interleaved, same machine, {when}. {star}"


def _speed(speed: Mapping[str, Any] | None, tasks: list[str]) -> dict[str, dict[str, list]]:
    """task -> regime -> [median ratio to FP32, backend]; empty if it was not measured."""
    if speed is None:
        return {}
    rows = {task: {} for task in tasks}
    for row in speed["rows"]:
        rows[row["task"]][row["regime"]] = [row["ratio"]["median"], row["backend"]]
    return rows
