"""What others use to find out what went wrong, behind one interface, so that they can be compared.

Each of them looks at one thing: the loss, the gradients, the loss scale, the outputs of modules, or the results of
backward functions.  None of them knows why; ``MonitorDetector`` puts this package's monitor beside them.  A detector
watches a ``faults.Run`` and keeps what it saw as ``Detection`` values; what it is not made for, it does not see.
"""

import contextlib
import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from mixprec_lab.nan_debugging.faults import Run


class Detection(NamedTuple):
    """One alarm."""

    step: int
    kind: str  #: what the detector calls it
    module: str  #: a module path or a parameter; loss, scaler, ...; "" if it does not say
    operation: str  #: an operator or a backward function; "" if it does not say
    message: str


class Watch:
    """Looks on while one run trains: a ``faults.Probe``, and a context manager around each step."""

    #: whether the detector ended the run with its last alarm, as some of them do
    aborted = False

    def __init__(self) -> None:
        self.current = 0
        self._detections: list[Detection] = []

    @property
    def detections(self) -> list[Detection]:
        """All alarms so far, oldest first."""
        return self._detections

    @contextlib.contextmanager
    def step(self, i: int) -> Iterator[None]:
        """Goes around step ``i``.  An exception of the step passes through."""
        self.current = i
        yield

    def loss(self, loss: torch.Tensor) -> None:
        """The loss of the step is computed."""

    def gradients(self) -> None:
        """The gradients of the step are ready."""

    def close(self) -> None:
        """Takes back whatever was hung into the model."""

    def alarm(self, kind: str, module: str, operation: str, message: str) -> None:
        """Keep one alarm of the current step."""
        self._detections.append(Detection(self.current, kind, module, operation, message))


class Detector(Protocol):
    """Makes a Watch for a run."""

    name: str
    unavailable: str  #: why it cannot be used here; "" if it can

    def watch(self, run: Run) -> Watch:
        """A fresh watch over ``run``, which has not started."""


class LossIsFinite:
    """``torch.isfinite(loss)``, the check that every loop has first."""

    name, unavailable = "loss isfinite", ""

    def watch(self, run: Run) -> Watch:
        """See ``Detector``."""
        return _LossWatch()


class _LossWatch(Watch):
    def loss(self, loss: torch.Tensor) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            self.alarm("non_finite_loss", "loss", "", f"the loss is {value}")


class NamedGradients:
    """``isfinite`` of every gradient, by name, when the gradients are ready."""

    name, unavailable = "gradient isfinite", ""

    def watch(self, run: Run) -> Watch:
        """See ``Detector``."""
        return _GradientWatch(run.model)


class _GradientWatch(Watch):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def gradients(self) -> None:
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            if bad := int((~values.isfinite()).sum()):
                self.alarm("non_finite_gradient", name, "", f"{bad} of {values.numel()} gradients are not finite")


class DetectAnomaly:
    """``torch.autograd.detect_anomaly``: raises where a backward function returns NaN, and so ends the run."""

    name, unavailable = "detect_anomaly", ""

    def watch(self, run: Run) -> Watch:
        """See ``Detector``."""
        return _AnomalyWatch()


_ANOMALY = re.compile(r"Function '(\w+)' returned nan values in its \d+th output")


class _AnomalyWatch(Watch):
    @contextlib.contextmanager
    def step(self, i: int) -> Iterator[None]:
        self.current = i
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it is slow, and prints the forward traceback as a warning
            with torch.autograd.detect_anomaly():
                try:
                    yield
                except RuntimeError as error:
                    found = _ANOMALY.search(str(error))
                    if found is None:
                        raise
                    self.alarm("nan_in_backward", "", found[1], str(error))
                    self.aborted = True


class ScalerLog:
    """The line that DeepSpeed prints when a loss scale backs off: "OVERFLOW! Skipping step."."""

    name, unavailable = "scaler log", ""

    def watch(self, run: Run) -> Watch:
        """See ``Detector``."""
        return _ScalerWatch(run)


class _ScalerWatch(Watch):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    @contextlib.contextmanager
    def step(self, i: int) -> Iterator[None]:
        self.current = i
        before = self.run.scaler.get_scale() if self.run.scaler else 0.0
        yield
        after = self.run.scaler.get_scale() if self.run.scaler else 0.0
        if after < before:
            message = f"OVERFLOW! Skipping step. Attempted loss scale: {before:g}, reducing to {after:g}"
            self.alarm("overflow", "scaler", "update", message)


class ModuleOutputs:
    """A forward hook on every module that looks for NaN and infinities in its output; keeps the first of a step."""

    name, unavailable = "module outputs", ""

    def watch(self, run: Run) -> Watch:
        """See ``Detector``."""
        return _OutputWatch(run.model)


class _OutputWatch(Watch):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.last = -1  # the step of the last alarm
        self.handles = [
            module.register_forward_hook(lambda module, _inputs, out, name=name: self._look(name, module, out))
            for name, module in model.named_modules()
        ]

    def _look(self, name: str, module: nn.Module, out: Any) -> None:
        bad = [t for t in _tensors(out) if not bool(t.isfinite().all())]
        if bad and self.last != self.current:
            self.last = self.current
            kind = type(module).__name__
            self.alarm("non_finite_output", name, kind, f"the output of {name or 'the model'} ({kind}) is not finite")

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class HuggingFaceDebug:
    """``transformers.debug_utils.DebugUnderflowOverflow``, which raises at the first NaN or infinity that it meets."""

    name = "DebugUnderflowOverflow"

    @property
    def unavailable(self) -> str:
        """Why it cannot be used here; "" if it can."""
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed: pip install transformers"
        return ""

    def watch(self, run: Run) -> Watch:
        """See ``Detector``.  Raises ImportError where transformers is not installed."""
        return _HuggingFaceWatch(run.model)


_FRAME = re.compile(r"^ {17} (\S*) (\w+)$", re.MULTILINE)
_FOUND = re.compile(r"^(\S+) has (nan|inf)s$", re.MULTILINE)


class _HuggingFaceWatch(Watch):
    def __init__(self, model: nn.Module) -> None:
        from transformers.debug_utils import DebugUnderflowOverflow

        super().__init__()
        self.model, self.debug = model, DebugUnderflowOverflow(model)

    @contextlib.contextmanager
    def step(self, i: int) -> Iterator[None]:
        self.current, printed = i, io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                yield
            except ValueError as error:
                if "DebugUnderflowOverflow: inf/nan detected" not in str(error):
                    raise
                self._read(printed.getvalue())
                self.aborted = True

    def _read(self, text: str) -> None:
        """The alarm as its reader finds it: the last frame printed, and the first tensor said to be bad."""
        module, kind = _FRAME.findall(text)[-1]
        what, bad = _FOUND.findall(text)[0]
        self.alarm("non_finite_activation", module, kind, f"{what} of {module or 'the model'} ({kind}) has {bad}s")

    def close(self) -> None:
        """Remove its hooks, of which it keeps no handles."""
        for module in self.model.modules():
            for key in [k for k, hook in module._forward_hooks.items() if hook == self.debug.forward_hook]:
                del module._forward_hooks[key]


class MonitorDetector:
    """A stability monitor as a detector: its findings of severity "fault" are the alarms.

    ``make_monitor(run)`` returns a monitor with ``step(i)``, ``record_loss``, ``gradients_ready``, ``findings`` and
    ``close``.
    """

    unavailable = ""

    def __init__(self, make_monitor: Callable[[Run], Any], name: str = "monitor") -> None:
        self.make_monitor, self.name = make_monitor, name

    def watch(self, run: Run) -> Watch:
        """See ``Detector``."""
        return _MonitorWatch(self.make_monitor(run))


class _MonitorWatch(Watch):
    def __init__(self, monitor: Any) -> None:
        super().__init__()
        self.monitor = monitor

    @property
    def detections(self) -> list[Detection]:
        return [
            Detection(f.step, f.kind, f.module or f.parameter, f.op, f.evidence)
            for f in self.monitor.findings
            if f.severity == "fault"
        ]

    def step(self, i: int) -> contextlib.AbstractContextManager:
        return self.monitor.step(i)

    def loss(self, loss: torch.Tensor) -> None:
        self.monitor.record_loss(loss)

    def gradients(self) -> None:
        self.monitor.gradients_ready()

    def close(self) -> None:
        self.monitor.close()


RIVALS: tuple[Detector, ...] = (
    LossIsFinite(),
    NamedGradients(),
    ScalerLog(),
    DetectAnomaly(),
    HuggingFaceDebug(),
    ModuleOutputs(),
)
