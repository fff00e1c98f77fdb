"""Any detector over any faults: what it sees, how exactly, and how often it cries over a run that is fine.

A detector is judged by its first alarm, because that is the one that is read first.  It has the right step if the
alarm is of the step at which the fault is first visible; the right place if the module or the operation that it names
is one that the fault allows; the right class if it calls the fault by its name.  Alarms on the repaired twin are
false.  A detector that raises, or that hides an exception of the run, is not forgiven: the matrix holds its error.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixprec_lab.formats import text_table
from mixprec_lab.nan_debugging.detectors import Detection, Detector, Watch
from mixprec_lab.nan_debugging.faults import FAULTS, HEALTHY, Fault, Outcome, Run, run_fault
from mixprec_lab.nan_debugging.faults._run import seeded

Plain = Callable[[str, int, bool], Outcome]  # (fault, seed, repaired) -> the run that nobody watches
HEADERS = ("detector", "detected", "silent ones", "right step and place", "and class", "alarms on twins", "errors")


@dataclass(frozen=True)
class Verdict:
    """What one detector made of one fault, over all seeds: true only where it is true of every seed."""

    detected: bool
    right_step: bool
    right_place: bool
    right_class: bool
    first: Detection | None  #: the first alarm, of the first seed that has one
    alarms: tuple[Detection, ...]  #: first alarms on repaired twins, at most one a seed
    error: str  #: what the detector raised or hid; "" if nothing

    @property
    def localised(self) -> bool:
        """The right step and the right module or operation."""
        return self.right_step and self.right_place

    @property
    def mark(self) -> str:
        """One letter: class, place, seen, or "." for missed; "!" for an alarm on the twin, "E" for an error."""
        grade = "c" if self.localised and self.right_class else "p" if self.localised else "s" if self.detected else "."
        return grade + "!" * bool(self.alarms) + "E" * bool(self.error)


class Summary(NamedTuple):
    """One detector over all faults, in counts."""

    detector: str
    detected: int
    silent: int  #: silent faults detected
    localised: int  #: right step, and right module or operation
    named: int  #: localised, and by its class
    alarms: int  #: twins with an alarm
    errors: int


@dataclass(frozen=True)
class DetectionMatrix:
    """Verdicts by detector and fault."""

    faults: tuple[Fault, ...]
    verdicts: Mapping[str, Mapping[str, Verdict]]  #: detector -> fault -> verdict
    unavailable: Mapping[str, str]  #: detectors that could not be used here, and why

    def summary(self) -> list[Summary]:
        """A row of counts for each detector that ran."""
        silent = {fault.name for fault in self.faults if fault.silent}
        return [
            Summary(
                name,
                sum(v.detected for v in row.values()),
                sum(v.detected for fault, v in row.items() if fault in silent),
                sum(v.localised for v in row.values()),
                sum(v.localised and v.right_class for v in row.values()),
                sum(bool(v.alarms) for v in row.values()),
                sum(bool(v.error) for v in row.values()),
            )
            for name, row in self.verdicts.items()
        ]

    def table(self) -> str:
        """The summary as text, with the number of faults above, and errors and absent detectors below."""
        silent = sum(fault.silent for fault in self.faults)
        lines = [f"{len(self.faults)} faults, {silent} of them silent", text_table(HEADERS, self.summary())]
        lines += [
            f"{name} failed on {fault}: {v.error}"
            for name, row in self.verdicts.items()
            for fault, v in row.items()
            if v.error
        ]
        return "\n".join(lines + [f"{name} did not run: {why}" for name, why in self.unavailable.items()])

    def by_fault(self) -> str:
        """Every verdict as text: c right step, place and class; p step and place; s seen; . missed; ! alarm on twin."""
        rows = [
            (
                fault.name,
                fault.fault_class,
                "silent" if fault.silent else "",
                *(row[fault.name].mark for row in self.verdicts.values()),
            )
            for fault in self.faults
        ]
        return text_table(("fault", "class", "", *self.verdicts), rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "faults": [
                {"name": f.name, "class": f.fault_class, "phase": f.phase, "step": f.step, "silent": f.silent}
                for f in self.faults
            ],
            "summary": [row._asdict() for row in self.summary()],
            "verdicts": {d: {f: _plain(v) for f, v in row.items()} for d, row in self.verdicts.items()},
            "unavailable": dict(self.unavailable),
        }


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {
        "detected": verdict.detected,
        "right_step": verdict.right_step,
        "right_place": verdict.right_place,
        "right_class": verdict.right_class,
        "first": verdict.first and verdict.first._asdict(),
        "alarms": [alarm._asdict() for alarm in verdict.alarms],
        "error": verdict.error,
    }


def detection_matrix(
    detectors: Iterable[Detector],
    faults: Iterable[Fault] | None = None,
    seeds: Sequence[int] = (0,),
) -> DetectionMatrix:
    """The verdict of every detector on every fault (all of ``FAULTS`` if None), broken and repaired, for every seed.

    Raises ValueError for no seed, and for two detectors or two faults of one name.
    """
    detectors, faults = tuple(detectors), tuple(FAULTS.values() if faults is None else faults)
    if not seeds:
        raise ValueError("expected at least one seed, got none: pass seeds=(0,)")
    for what, values in (("detectors", detectors), ("faults", faults)):
        names = [value.name for value in values]
        if len(set(names)) != len(names):
            raise ValueError(f"expected {what} with different names, got {names}: rename or leave out one of them")
    plain = functools.cache(lambda name, seed, repaired: run_fault(named[name], seed, repaired))
    named = {fault.name: fault for fault in faults}
    verdicts = {
        detector.name: {fault.name: _judge(detector, fault, seeds, plain) for fault in faults}
        for detector in detectors
        if not detector.unavailable
    }
    unavailable = {detector.name: detector.unavailable for detector in detectors if detector.unavailable}
    return DetectionMatrix(faults, verdicts, unavailable)


def alarms_on_healthy(
    detector: Detector,
    runs: Mapping[str, Callable[[int], Run]] = HEALTHY,
    seeds: Sequence[int] = (0,),
) -> dict[str, list[Detection]]:
    """All alarms of ``detector`` on each of ``runs`` over all seeds, by name of the run; all of them are false.

    What the detector raises goes through.
    """
    found = {}
    for name, build in runs.items():
        watched = [_watched(detector, build(seed), seed) for seed in seeds]
        for _, error, _ in watched:
            if error is not None:
                raise error
        found[name] = [detection for detections, _, _ in watched for detection in detections]
    return found


def _watched(detector: Detector, run: Run, seed: int) -> tuple[list[Detection], Exception | None, int]:
    """The alarms, oldest first, of a run to its end; the exception that ended it; the number of steps that ended."""
    with warnings.catch_warnings(), seeded(seed):
        warnings.simplefilter("ignore")
        try:
            watch = detector.watch(run)
        except Exception as error:
            return [], error, 0
        try:
            error, done = _drive(watch, run)
            return sorted(watch.detections, key=lambda d: d.step), error, done
        except Exception as error:
            return [], error, run.steps
        finally:
            watch.close()


def _drive(watch: Watch, run: Run) -> tuple[Exception | None, int]:
    for i in range(run.steps):
        try:
            with watch.step(i):
                run.step(i, watch)
        except Exception as error:
            return error, i
        if getattr(watch, "aborted", False):
            return None, i
    return None, run.steps


def _judge(detector: Detector, fault: Fault, seeds: Sequence[int], plain: Plain) -> Verdict:
    firsts, alarms, errors = [], [], []
    for seed in seeds:
        first, error = _first_alarm(detector, fault, plain(fault.name, seed, False), seed, repaired=False)
        alarm, twin_error = _first_alarm(detector, fault, plain(fault.name, seed, True), seed, repaired=True)
        firsts.append(first)
        alarms += [alarm] if alarm else []
        errors += [e for e in (error, twin_error) if e]
    return Verdict(
        detected=all(firsts),
        right_step=all(d and d.step == fault.step for d in firsts),
        right_place=all(d and _in_place(d, fault) for d in firsts),
        right_class=all(d and d.kind == fault.fault_class for d in firsts),
        first=next(filter(None, firsts), None),
        alarms=tuple(alarms),
        error="; ".join(errors),
    )


def _in_place(detection: Detection, fault: Fault) -> bool:
    return any(re.search(pattern, detection.module) for pattern in fault.modules) or any(
        re.search(pattern, detection.operation) for pattern in fault.operations
    )


def _first_alarm(
    detector: Detector, fault: Fault, plain: Outcome, seed: int, repaired: bool
) -> tuple[Detection | None, str]:
    """The first alarm, and the detector's error: an exception that the plain run has not, or one that it hides."""
    detections, error, done = _watched(detector, fault.build(seed, repaired), seed)
    which = f"{'twin' if repaired else 'fault'}, seed {seed}, step {done}"
    message = ""
    if error is not None and (type(error), done) != (type(plain.error), plain.error_step):
        message = f"{type(error).__name__}: {error} ({which})"
    elif error is None and plain.error is not None and done > plain.error_step:
        message = f"hid {type(plain.error).__name__}: {plain.error} ({which})"
    return (detections[0] if detections else None), message
