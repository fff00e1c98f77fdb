"""Patients: runs recorded with their curves, and with what every examination really said about them.

A record is what a clinician gets: curves over the steps, and, for each examination, its words.  Nothing in it is
written by hand.  The runs are those of ``FAULTS`` and ``HEALTHY``; each examination is a detector that watched the run,
judged as the detection matrix judges it.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from mixprec_lab import device
from mixprec_lab.formats import classify
from mixprec_lab.nan_debugging.detectors import (
    DetectAnomaly,
    Detection,
    Detector,
    LossIsFinite,
    ModuleOutputs,
    MonitorDetector,
    NamedGradients,
    ScalerLog,
    Watch,
)
from mixprec_lab.nan_debugging.faults import FAULTS, HEALTHY, Fault, Run
from mixprec_lab.nan_debugging.faults._run import seeded
from mixprec_lab.nan_debugging.matrix import _in_place, _watched
from mixprec_lab.nan_debugging.monitor import LEVELS, NumericalStabilityMonitor

HEALTHY_STEPS = 40  # of 200: enough to see a scale settle

#: what may be wrong, in the words of a diagnosis
FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "overflow": "overflow: too large for the format",
        "underflow": "underflow: too small for the format",
        "data": "bad data: the batch itself is wrong",
        "operation": "bad operation: undefined at its argument",
        "order": "order of calls: missing, early or late",
        "state": "stale state: lost, or kept too long",
        "lost": "lost updates: added, and nothing moved",
        "none": "nothing is wrong",
    }
)

#: where in a step it begins: the phases of a fault, and "none"
PLACES: Mapping[str, str] = MappingProxyType(
    {
        "data": "in the batch",
        "forward": "in the forward pass",
        "backward": "in the loss scaling or the backward pass",
        "optimizer": "at clipping or the optimizer's step",
        "checkpoint": "in saving and loading",
        "none": "nowhere",
    }
)

_CLASSES = {
    "overflow": "fp16_overflow scale_not_representable loss_scale_too_high static_scale_no_check exploding_lr",
    "underflow": "grad_underflow fp8_grad_underflow eps_underflow second_moment_underflow",
    "data": "nan_in_data inf_in_label index_out_of_range ids_cast_to_low_precision all_labels_ignored",
    "operation": "masked_softmax log_of_zero log_of_negative zero_over_zero inf_times_zero sqrt_of_negative "
    "sqrt_zero_grad where_trap acos_at_one batchnorm_one_value normalize_zero_vector fp8_alignment",
    "order": "clip_before_unscale optimizer_step_bypasses_scaler missing_scaler_update partial_loss_scaling "
    "unscale_per_micro_batch update_before_step accumulation_not_divided zero_grad_missing clip_spreads_nan "
    "scheduler_on_skipped_step scheduler_before_optimizer parameter_not_in_optimizer no_gradients master_not_copied "
    "fp16_master_weights_with_scaler",
    "state": "scaler_state_not_restored optimizer_state_not_restored scheduler_state_not_restored "
    "optimizer_state_cast fp8_stale_amax",
    "lost": "update_swamping weight_decay_lost ema_stagnation second_moment_frozen residual_swamping",
}
_FAMILY_OF = {kind: family for family, kinds in _CLASSES.items() for kind in kinds.split()}


class Examination(NamedTuple):
    """One thing that can be ordered, and its price."""

    title: str
    points: int


#: in the order of their price; the cheap ones read a log that is there, the dear ones run the training again
EXAMINATIONS: Mapping[str, Examination] = MappingProxyType(
    {
        "loss": Examination("isfinite of the loss", 2),
        "scaler": Examination("the scaler's log", 2),
        "settings": Examination("list of dtypes and settings", 3),
        "gradients": Examination("isfinite of every gradient, by name", 5),
        "outputs": Examination("forward hooks on every module", 8),
        "anomaly": Examination("torch's detect_anomaly", 10),
        "cheap": Examination("our monitor, cheap", 15),
        "deep": Examination("our monitor, deep", 25),
    }
)

#: how well an examination did, judged by its first alarm
MARKS: Mapping[str, str] = MappingProxyType(
    {
        "named": "names it: step, place and class are right",
        "located": "points at it: step and place are right",
        "seen": "raises an alarm, at another step or place",
        "missed": "sees nothing",
        "quiet": "rightly raises no alarm",
        "false": "raises a false alarm",
        "unjudged": "is not judged: you drew this run",
        "read": "raises no alarms: it is there to be read",
    }
)
_RIVALS: dict[str, Detector] = {
    "loss": LossIsFinite(),
    "scaler": ScalerLog(),
    "gradients": NamedGradients(),
    "outputs": ModuleOutputs(),
    "anomaly": DetectAnomaly(),
}


@dataclass(frozen=True)
class Result:
    """What one examination said, and how well it did (a key of ``MARKS``)."""

    text: str
    mark: str


@dataclass(frozen=True)
class PatientRecord:
    """One run: its truth, its curves with one value a step, and the result of every examination.

    Curves hold three significant digits, ``scale`` all of them.  NaN in ``scale`` stands for "no scaler", in the other
    curves also for a step that raised before the value was there.
    """

    name: str
    title: str  #: what is wrong, in one line; what the run is, if nothing is
    fault_class: str  #: a class of the catalogue; "" if nothing is wrong
    family: str  #: a key of ``FAMILIES``; "" if nobody knows
    place: str  #: a key of ``PLACES``; "" if nobody knows
    step: int  #: the first step at which it is visible; -1 if nothing is wrong
    cure: str
    loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]  #: over all parameters, as ``.grad`` is when the gradients are ready
    scale: tuple[float, ...]  #: of the GradScaler, at the start of the step
    flushed: tuple[float, ...]  #: share of the gradients that are zero, or that FP16 would round to zero
    bad_gradients: tuple[int, ...]  #: elements that are not finite
    bad_parameters: tuple[int, ...]  #: elements that are not finite at the end of the step
    results: Mapping[str, Result]  #: by the keys of ``EXAMINATIONS``
    error: str  #: the exception that ended the run; "" if it came to its end

    @property
    def steps(self) -> int:
        """The number of recorded steps."""
        return len(self.loss)

    @property
    def way(self) -> tuple[str, ...]:
        """The cheapest examinations that tell it, in the order in which they are made; () if none tells it.

        One that names the class tells it alone.  One that points at step and place does so together with the list of
        dtypes and settings.  If nothing is wrong, one that could have named a fault must raise no alarm.
        """
        ways = []
        for key in EXAMINATIONS:
            mark = self.results[key].mark
            if mark == "named" or (mark == "quiet" and key in LEVELS):
                ways.append((key,))
            elif mark == "located":
                ways.append(("settings", key))
        return min(ways, key=price, default=())


def price(examinations: Iterable[str]) -> int:
    """The points that these examinations cost together."""
    return sum(EXAMINATIONS[key].points for key in examinations)


def family_of(fault_class: str) -> str:
    """The key of ``FAMILIES`` to which a class of the catalogue belongs; KeyError for a class that it has not."""
    if fault_class not in _FAMILY_OF:
        raise KeyError(f"expected a fault class of the catalogue, got {fault_class!r}: it has {', '.join(_FAMILY_OF)}")
    return _FAMILY_OF[fault_class]


def record(fault: Fault | str, seed: int = 0, repaired: bool = False) -> PatientRecord:
    """The record of a fault, of its repaired twin, or of a healthy run (its first 40 steps), by name or as a Fault.

    The run is run again for every examination, on one thread; a second call with the same arguments returns the same
    record.  Raises KeyError for a name that neither ``FAULTS`` nor ``HEALTHY`` has, ValueError for the twin of a
    healthy run.
    """
    if isinstance(fault, str):
        if fault in HEALTHY:
            if repaired:
                raise ValueError(f"expected repaired=False for {fault!r}, got True: a healthy run has no repaired twin")
            return _healthy(fault, seed)
        if fault not in FAULTS:
            raise KeyError(f"expected the name of a fault or of a healthy run, got {fault!r}: see FAULTS and HEALTHY")
        fault = FAULTS[fault]
    return _of_fault(fault, seed, repaired)


@functools.cache
def _of_fault(fault: Fault, seed: int, repaired: bool) -> PatientRecord:
    with device.one_thread():
        found = recorded(lambda: fault.build(seed, repaired), seed, None if repaired else fault)
    if repaired:
        return replace(found, name=fault.name, title=f"repaired: {fault.title}")
    truth = {"fault_class": fault.fault_class, "family": family_of(fault.fault_class), "place": fault.phase}
    return replace(found, name=fault.name, title=fault.title, step=fault.step, cure=fault.cure, **truth)


@functools.cache
def _healthy(name: str, seed: int) -> PatientRecord:
    with device.one_thread():
        found = recorded(lambda: replace(HEALTHY[name](seed), steps=HEALTHY_STEPS), seed, None)
    return replace(found, name=name, title=f"a healthy run: {name.replace('_', ' ')}")


def recorded(build: Callable[[], Run], seed: int, fault: Fault | None) -> PatientRecord:
    """The nameless record of a run that ``build`` makes anew for each examination, judged by ``fault``, if any."""
    curves, error = _curves(build(), seed)
    results = {"settings": Result(_settings(build(), seed), "read")}
    for key, detector in _RIVALS.items():
        results[key] = _examined(detector, build(), seed, fault)
    for level in LEVELS:
        results[level] = _monitored(level, build(), seed, fault)
    nothing = {"name": "", "title": "", "fault_class": "", "family": "none", "place": "none", "step": -1, "cure": ""}
    ordered = MappingProxyType({key: results[key] for key in EXAMINATIONS})
    return PatientRecord(**nothing, **curves, results=ordered, error=error)


# -- the curves --------------------------------------------------------------------------------------------------------


class _Curves:
    """A probe that keeps one row a step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.begin()

    def begin(self) -> None:
        """A step starts: nothing is known of it but the scale."""
        scale = self.run.scaler.get_scale() if self.run.scaler else math.nan
        self.row = {"loss": math.nan, "gradient_norm": math.nan, "scale": scale, "flushed": math.nan}
        self.row |= {"bad_gradients": 0, "bad_parameters": 0}

    def loss(self, loss: torch.Tensor) -> None:
        self.row["loss"] = _rounded(float(loss.detach()))

    def gradients(self) -> None:
        grads = [p.grad.detach() for p in self.run.model.parameters() if p.grad is not None]
        if not grads:
            return
        flat = torch.cat([(g.coalesce().values() if g.is_sparse else g).double().flatten() for g in grads])
        shares = classify(flat, "fp16")
        self.row["gradient_norm"] = _rounded(float(flat.norm()))
        self.row["flushed"] = _rounded(shares.zero + shares.flushed)
        self.row["bad_gradients"] = int((~flat.isfinite()).sum())

    def end(self) -> None:
        """The step is over."""
        self.row["bad_parameters"] = sum(int((~p.isfinite()).sum()) for p in self.run.model.parameters())


def _curves(run: Run, seed: int) -> tuple[dict[str, tuple], str]:
    """The columns of ``PatientRecord``, and the error that ended the run; the step that raised has a row."""
    probe, rows, error = _Curves(run), [], ""
    with warnings.catch_warnings(), seeded(seed):
        warnings.simplefilter("ignore")
        for i in range(run.steps):
            probe.begin()
            try:
                run.step(i, probe)
            except Exception as raised:  # whatever a faulty run raises is what its owner sees
                error = f"step {i}: {type(raised).__name__}: {raised}"
            probe.end()
            rows.append(probe.row)
            if error:
                break
    return {key: tuple(row[key] for row in rows) for key in rows[0]}, error


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


# -- the examinations --------------------------------------------------------------------------------------------------


def _examined(detector: Detector, run: Run, seed: int, fault: Fault | None) -> Result:
    alarms, error, done = _watched(detector, run, seed)
    end = f" The run ended in step {done}" if done < run.steps else ""
    end += f": {type(error).__name__}: {error}" if error else "." * bool(end)
    return Result(_said(alarms) + end, _mark(alarms, fault))


def _monitored(level: str, run: Run, seed: int, fault: Fault | None) -> Result:
    made: list[NumericalStabilityMonitor] = []

    def make(run: Run) -> NumericalStabilityMonitor:
        made.append(NumericalStabilityMonitor(run.model, run.optimizers, run.scaler, run.scheduler, level=level))
        return made[0]

    alarms, _, _ = _watched(MonitorDetector(make), run, seed)
    return Result(made[0].report(), _mark(alarms, fault))


def _said(alarms: list[Detection]) -> str:
    """The first alarm in its own words, how many others its step has, and at how many steps there are any."""
    if not alarms:
        return "No alarm."
    first, steps = alarms[0], sorted({alarm.step for alarm in alarms})
    others = sum(alarm.step == first.step for alarm in alarms) - 1
    place = f"{first.module}: " if first.module and first.module not in first.message else ""
    beside = f", and {others} more like it" if others else ""
    later = "" if len(steps) == 1 else f" Alarms at {len(steps)} steps, the last at step {steps[-1]}."
    return f"Step {first.step}: {place}{first.message.rstrip('.')}{beside}.{later}"


def _mark(alarms: list[Detection], fault: Fault | None) -> str:
    if fault is None:
        return "false" if alarms else "quiet"
    if not alarms:
        return "missed"
    first = min(alarms, key=lambda alarm: alarm.step)
    if first.step != fault.step or not _in_place(first, fault):
        return "seen"
    return "named" if first.kind == fault.fault_class else "located"


def _settings(run: Run, seed: int) -> str:
    """The dtypes of parameters, of the first input, and of what every module returns; optimizer, scaler, schedule."""
    with _dtypes(run.model) as seen, warnings.catch_warnings(), seeded(seed), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        run.step(0, Watch())  # an exception of the run is for the other examinations
    lines = [f"parameters: {_counted(str(p.dtype)[6:] for p in run.model.parameters())}"]
    lines += seen
    for optimizer in run.optimizers:
        group = optimizer.param_groups[0]
        chosen = [f"{key} {group[key]:g}" for key in ("lr", "momentum", "eps", "weight_decay") if group.get(key)]
        state = _counted(
            f"{key} {str(value.dtype)[6:]}"
            for entry in optimizer.state.values()
            for key, value in entry.items()
            if isinstance(value, torch.Tensor) and value.dim()
        )
        lines.append(f"{type(optimizer).__name__}: {', '.join(chosen)}{f'; state: {state}' if state else ''}")
    lines.append(f"scaler: {type(run.scaler).__name__ if run.scaler else 'none'}")
    if run.scheduler:
        lines.append(f"schedule: {type(run.scheduler).__name__}")
    return "\n".join(lines)


@contextlib.contextmanager
def _dtypes(model: nn.Module) -> Iterator[list[str]]:
    """The list that is yielded is filled while the model runs: one line a module, and one for the first input."""
    seen: dict[str, str] = {}

    def look(name: str, module: nn.Module, inputs: tuple, out: Any) -> None:
        first = next((x for x in inputs if isinstance(x, torch.Tensor)), None)
        if first is not None:
            seen.setdefault("input", f"first input: {str(first.dtype)[6:]} {tuple(first.shape)}")
        if name and isinstance(out, torch.Tensor):
            seen.setdefault(name, f"{name} ({type(module).__name__}) returns {str(out.dtype)[6:]}")

    handles = [
        module.register_forward_hook(functools.partial(look, name), prepend=True)
        for name, module in model.named_modules()
    ]
    lines: list[str] = []
    try:
        yield lines
    finally:
        lines += seen.values()
        for handle in handles:
            handle.remove()


def _counted(words: Iterator[str]) -> str:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())
