"""``NumericalStabilityMonitor``: always on, cheap, and exact when something happens."""

import operator
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from torch import distributed, nn

from mixprec_lab.nan_debugging.examine import Examiner
from mixprec_lab.nan_debugging.findings import Finding, TensorFacts, as_json, report, table
from mixprec_lab.nan_debugging.health import HealthMixin
from mixprec_lab.nan_debugging.ledger import Ledger
from mixprec_lab.nan_debugging.scopes import Scopes
from mixprec_lab.nan_debugging.sensors import Sensors
from mixprec_lab.nan_debugging.taps import listen
from mixprec_lab.nan_debugging.tracer import Tracer

LEVELS = ("cheap", "deep")


class NumericalStabilityMonitor(HealthMixin):
    """Watches the training of ``model``, and says which fault began when, where and why.

        monitor = NumericalStabilityMonitor(model, optimizer, scaler)
        for i, (x, y) in enumerate(batches):
            with monitor.step(i):
                loss = loss_fn(model(x), y)
                monitor.record_loss(loss)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                monitor.gradients_ready()
                scaler.step(optimizer); scaler.update()
        print(monitor.report())

    ``optimizer`` is one, or a list; ``scaler`` torch's GradScaler or one of ours.  Optimizers and scalers that are used
    inside of a step are seen without being passed, too.

    Level "cheap" reads from the device once a step: the loss, the norm of every gradient, parameter and module output,
    the scale; keeps a ledger of the order of calls; and looks at dtypes.  The first ``trace_first`` steps are traced
    operation by operation, as a calibration.  A step in which something is not finite is replayed at once: the
    outermost calls of the model are run again from the same inputs, random state and parameters, under the tracer, and
    so is their backward pass.  Level "deep" traces every step.

    ``findings`` are ordered by the time they were made.  Severity "fault" is a fault, "warning" may be one, "info" was
    dealt with by the loop.  ``close()``, or use as a context manager, removes all hooks.

    Raises TypeError and ValueError for a model without parameters and for an unknown level.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        scaler: Any = None,
        scheduler: Any = None,
        level: Literal["cheap", "deep"] = "cheap",
        *,
        trace_first: int = 2,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
        if next(model.parameters(), None) is None:
            raise ValueError("expected a model with parameters, got one without: there is nothing to train")
        if level not in LEVELS:
            raise ValueError(f"expected level to be one of {', '.join(LEVELS)}, got {level!r}")
        if not isinstance(trace_first, int) or trace_first < 0:
            raise ValueError(f"expected trace_first to be a whole number of at least 0, got {trace_first!r}")
        self.model, self.scaler, self.scheduler, self.level = model, scaler, scheduler, level
        self.optimizers = _optimizers(optimizer)
        _check_methods("scaler", scaler, ("state_dict", "load_state_dict", "step"))
        _check_methods("scheduler", scheduler, ("state_dict", "load_state_dict", "step"))
        self.trace_first = trace_first
        self.findings: list[Finding] = []
        self.history: list[dict[str, Any]] = []
        self.ledger = Ledger()
        self.sensors = Sensors(model)
        self.tracer: Tracer | None = None
        self.scopes = Scopes(model, self._note_output)
        self.examiner = Examiner(self)
        self._step: int | None = None  # the open one
        self._last = -1
        self._seen_steps = 0
        self._examined = False
        self._closed = False
        self.ledger.on_optimizer = self._before_optimizer
        self.ledger.after_optimizer = self.examiner.after_optimizer

    # -- a step --------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, i: int) -> Iterator["NumericalStabilityMonitor"]:
        """The context of training step ``i``; steps must grow.

        An exception passes through, after the monitor has noted what it makes of it.
        Raises RuntimeError inside of an open step and after ``close()``, ValueError for a step that does not follow.
        """
        i = self._open(i)
        try:
            with ExitStack() as stack:
                stack.enter_context(listen(self.ledger))
                if self._to_be_traced(i):
                    self.tracer = Tracer(self.scopes, self._phase, self.ledger.rescaled)
                    stack.enter_context(self.tracer)
                yield self
                with self._quietly():
                    self._examine()
                    self.examiner.end_of_step()
        except Exception as error:
            with self._quietly():
                self.examiner.explain(error)
            raise
        finally:
            self.scopes.end()
            self.tracer, self._step = None, None
            self._last, self._seen_steps = i, self._seen_steps + 1
            self.sensors.forget()

    def _to_be_traced(self, i: int) -> bool:
        return self.level == "deep" or self._seen_steps < self.trace_first or self.examiner.wants_trace(i)

    def _open(self, i: int) -> int:
        if self._closed:
            raise RuntimeError("expected an open monitor, got one that was closed: make a new one")
        if self._step is not None:
            raise RuntimeError(f"expected step {self._step} to be over, got a step inside of it")
        try:
            i = operator.index(i)
        except TypeError:
            raise TypeError(f"expected the step as a whole number, got {type(i).__name__}") from None
        if i <= self._last:
            raise ValueError(f"expected a step after {self._last}, got {i}: after a rollback call rewind(step)")
        self._step, self._examined = i, False
        self.ledger.begin(self.optimizers)
        self.scopes.begin()
        self.sensors.begin()
        self.examiner.begin()
        return i

    def rewind(self, step: int) -> None:
        """Go back: the next step may be ``step``.  What was found stays."""
        if self._step is not None:
            raise RuntimeError(f"expected no open step, got step {self._step}")
        self._last = step - 1

    def _note_output(self, path: str, module: nn.Module, output: Any) -> None:
        outer_grad = bool(self.scopes.calls) and self.scopes.calls[-1].grad
        if self.tracer is None:
            self.sensors.output(path, module, output, outer_grad)
        else:
            with self.tracer.quiet():
                self.sensors.output(path, module, output, outer_grad)

    def _phase(self) -> str:
        if self.ledger.phase == "optimizer":
            return "optimizer"
        return "forward" if self.scopes.stack else "loss"

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """The monitor's own operations are no part of the step."""
        with ExitStack() as stack:
            if self.tracer is not None:
                stack.enter_context(self.tracer.quiet())
            stack.enter_context(torch.no_grad())
            yield

    def record_loss(self, loss: torch.Tensor | float) -> None:
        """Note the loss of this step, unscaled, before backward; of several losses, each.

        Raises TypeError for what is no number, ValueError for a tensor of several elements, RuntimeError outside of a
        step.
        """
        self._require_step("record_loss")
        if isinstance(loss, torch.Tensor):
            if loss.numel() != 1:
                raise ValueError(f"expected a scalar loss, got shape {tuple(loss.shape)}: reduce it first")
        elif isinstance(loss, bool) or not isinstance(loss, Real):
            raise TypeError(f"expected the loss as a tensor or a number, got {type(loss).__name__}")
        with self._quietly():
            self.sensors.loss(loss, [node for call in self.scopes.calls for node in call.nodes])

    def gradients_ready(self) -> None:
        """Look at everything, now that gradients are there: after backward, and after ``unscale_`` where there is one.

        Raises RuntimeError outside of a step.
        """
        self._require_step("gradients_ready")
        with self._quietly():
            self._examine()

    def _require_step(self, what: str) -> None:
        if self._step is None:
            raise RuntimeError(f"expected {what}() inside of 'with monitor.step(i):', got it outside")

    def _before_optimizer(self, optimizer: Any) -> None:
        with self._quietly():
            self._examine()
            self.examiner.before_optimizer(optimizer)

    def _examine(self) -> None:
        if self._examined:
            return
        self._examined = True
        self.examiner.examine(self._step)

    # -- what was found ------------------------------------------------------------------------------------------------

    def add(self, found: Finding) -> None:
        """Keep a finding, or count it if it is one that is known."""
        for index, known in enumerate(self.findings):
            if known.key == found.key and known.severity == found.severity:
                self.findings[index] = known.again(found.step)
                return
        self.findings.append(found)

    @property
    def faults(self) -> list[Finding]:
        """The findings of severity "fault"."""
        return [f for f in self.findings if f.severity == "fault"]

    def report(self) -> str:
        """All findings as text, the worst first."""
        return report(self.findings)

    def table(self) -> str:
        """All findings as a text table."""
        return table(self.findings)

    def as_json(self) -> str:
        """All findings as JSON."""
        return as_json(self.findings)

    def gather(self) -> list[tuple[int, Finding]]:
        """The findings of all ranks of ``torch.distributed``, with the rank; every rank must call it.

        Without an initialized process group: those of this process, as rank 0.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return [(0, f) for f in self.findings]
        everywhere: list[list[Finding]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(everywhere, self.findings)
        return [(rank, f) for rank, findings in enumerate(everywhere) for f in findings]

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Findings, baselines and counters, for a checkpoint."""
        return {
            "last_step": self._last,
            "seen_steps": self._seen_steps,
            "findings": [f.as_dict() for f in self.findings],
            "baselines": self.examiner.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was saved.  ValueError for other keys; nothing is changed then."""
        if self._step is not None:
            raise RuntimeError(f"expected no open step, got step {self._step}: load between steps")
        expected = {"last_step", "seen_steps", "findings", "baselines"}
        if set(state) != expected:
            raise ValueError(f"expected keys {', '.join(sorted(expected))}, got {', '.join(sorted(map(str, state)))}")
        findings = [_finding_from(entry) for entry in state["findings"]]
        self.examiner.load(state["baselines"])
        self._last, self._seen_steps, self.findings = state["last_step"], state["seen_steps"], findings

    def close(self) -> None:
        """Remove all hooks; what was found stays readable.  A second call does nothing."""
        if not self._closed:
            with torch.no_grad():
                self.examiner.last_look()
            self.scopes.close()
            self._closed = True

    def __enter__(self) -> "NumericalStabilityMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _optimizers(given: Any) -> list[Any]:
    """A list of optimizers, from none, one or several; TypeError for anything else."""
    if given is None:
        return []
    several = isinstance(given, Iterable) and not hasattr(given, "param_groups")
    optimizers = list(given) if several else [given]
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
            raise TypeError(f"expected an optimizer, or a list of them, got {type(optimizer).__name__}")
    return optimizers


def _check_methods(what: str, given: Any, methods: tuple[str, ...]) -> None:
    missing = [name for name in methods if given is not None and not callable(getattr(given, name, None))]
    if missing:
        raise TypeError(f"expected a {what} with {', '.join(methods)}, got {type(given).__name__} without {missing[0]}")


def _finding_from(entry: dict[str, Any]) -> Finding:
    tensor = entry["tensor"]
    if tensor is not None:
        tensor = TensorFacts(**{**tensor, "shape": tuple(tensor["shape"])})
    return Finding(**{**entry, "tensor": tensor})
