"""The examiner: reads the sensors once a step, judges what was read, and hands what is not finite to ``nonfinite``."""

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from mixprec_lab.nan_debugging.classify import birth_finding, kind_of_birth, matters, precision_findings
from mixprec_lab.nan_debugging.findings import Finding, finding
from mixprec_lab.nan_debugging.habits import Habits
from mixprec_lab.nan_debugging.ledger import scale_of
from mixprec_lab.nan_debugging.lint import lint_inputs, lint_moments, lint_optimizer
from mixprec_lab.nan_debugging.nonfinite import NonFinite
from mixprec_lab.nan_debugging.replay import replay
from mixprec_lab.nan_debugging.scopes import tensors_in
from mixprec_lab.nan_debugging.sensors import measurable
from mixprec_lab.nan_debugging.tracer import Event, dtype_of
from mixprec_lab.nan_debugging.updates import UpdateWatch

if TYPE_CHECKING:
    from mixprec_lab.nan_debugging.monitor import NumericalStabilityMonitor

_SPIKE = 6.0  # binades above the mean of a module's output norm
_SETTLED = 8  # steps before a mean is trusted
Read = dict[str, list[tuple[str, float]]]


class Examiner:
    """Judges what was measured; one for each monitor."""

    def __init__(self, monitor: "NumericalStabilityMonitor") -> None:
        self.m = monitor
        self.names = {id(p): name for name, p in monitor.model.named_parameters()}
        self.updates = UpdateWatch(monitor.model, self.names)
        self.habits = Habits(monitor)
        self.nonfinite = NonFinite(monitor)
        self.output_norms: dict[str, tuple[float, int]] = {}  # running mean of log2, number
        self.dead: set[str] = set()  # modules that were seen with an output of zeros, and looked at
        self.spiked_at: int | None = None
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self.found_this_step = self.gradients_bad = self.loss_bad = self.skipped = False
        self.updates.begin()

    def wants_trace(self, step: int) -> bool:
        """Whether the step after a spike should be traced: what a spike leaves behind shows only there."""
        return self.spiked_at is not None and step - self.spiked_at <= 2

    def add(self, found: Finding) -> None:
        """Hand a finding to the monitor."""
        self.found_this_step |= found.severity == "fault"
        self.m.add(found)

    def add_all(self, findings: Iterable[Finding]) -> None:
        """Hand several over."""
        for found in findings:
            self.add(found)

    @property
    def first_looks(self) -> bool:
        """Whether this is one of the first steps, in which everything is looked at."""
        return self.m._seen_steps < max(2, self.m.trace_first) or self.m.level == "deep"

    # -- the one read --------------------------------------------------------------------------------------------------

    def examine(self, step: int) -> None:
        """Read what was measured so far in this step, and judge it.  Gradients are ready, parameters not yet moved."""
        read = self._read()
        self.loss_bad = any(not math.isfinite(v) for _, v in read["loss"])
        bad_gradients = self._confirmed(read["gradient"], lambda p: p.grad)
        self.gradients_bad = bool(bad_gradients)
        self.nonfinite.note_growth(step, read["parameter"])
        scale = read["scale"][0][1] if read["scale"] else None
        self.add_all(self.habits.scaler_state(step, scale, read["scale_after"]))
        self.add_all(self.updates.judge(read["update"]))
        self._judge_representable(step, read, scale)
        if self.first_looks:
            self.add_all(lint_inputs(self._inputs(), self.m.model, step))
        self._judge_values(step, read, bad_gradients, scale)
        self.add_all(self.habits.gradients(step, read))

    def _read(self) -> Read:
        m, s = self.m, self.m.sensors
        parameters = dict(m.model.named_parameters())
        s.norms("gradient", {n: p.grad for n, p in parameters.items() if p.grad is not None})
        s.norms("parameter", parameters)
        s.norms("buffer", dict(m.model.named_buffers()))
        for x in self._inputs():
            if measurable(x):
                s.note("input", dtype_of(x), _magnitude(x))
        for call in m.scopes.calls:
            for x in call.outputs:
                if measurable(x):
                    s.note("root", call.path, _magnitude(x))
        ledger = m.ledger
        for kind, values in (("clip", ledger.total_norms), ("stale", ledger.stale), ("touched", ledger.touched)):
            for value in values:
                s.note(kind, kind, value)
        for before, after in m.ledger.scale_inputs:
            s.note("unscaled", dtype_of(before), before.double().abs().max())
            s.note("scaled", dtype_of(after), after.double().abs().max())
        if m.ledger.root is not None and measurable(m.ledger.root):
            s.note("backward_root", dtype_of(m.ledger.root), m.ledger.root.double().abs().max())
        scale = scale_of(m.ledger.scaler) if m.ledger.scaler is not None else None
        if scale is not None:
            s.note("scale", "scale", scale.max())
        return s.read()

    def _confirmed(self, norms: list[tuple[str, float]], tensor_of: Callable) -> list[str]:
        """The names whose norm is not finite because an element is not; a norm may also be too large for FP32."""
        named = dict(self.m.model.named_parameters())
        bad = [name for name, v in norms if not math.isfinite(v)]
        return [name for name in bad if not bool(tensor_of(named[name]).isfinite().all())]

    def _inputs(self) -> list[torch.Tensor]:
        return [x for call in self.m.scopes.calls for x in tensors_in((call.args, call.kwargs))]

    def _judge_values(self, step: int, read: Read, bad_gradients: list[str], scale: float | None) -> None:
        """What is not finite, from its source on: parameters, inputs, outputs, loss, gradients."""
        kinds = ("output", "root", "input")
        bad = {kind: [n for n, v in read[kind] if not math.isfinite(v)] for kind in kinds}
        bad["parameter"] = self._confirmed(read["parameter"], lambda p: p)
        harmed = self.loss_bad or self.gradients_bad  # masks and logits may be infinite where neither is
        judge = self.nonfinite
        if bad["parameter"]:
            self.add_all(judge.parameters(step, bad["parameter"]))
        elif bad["input"] and harmed and (found := judge.inputs(step)) is not None:
            self.add(found)
        elif (bad["output"] or bad["root"]) and harmed:
            self.add(judge.forward(step, bad["output"] or bad["root"]))
        elif self.loss_bad:
            self.add(judge.loss(step))
        elif bad_gradients:
            found, self.skipped = judge.gradients(step, read, bad_gradients, scale)
            self.add_all(found)
        else:
            judge.skips_in_a_row = 0
            self._judge_dead_outputs(step, read)
            self._judge_spikes(step, read)

    # -- what is finite and wrong --------------------------------------------------------------------------------------

    def _judge_dead_outputs(self, step: int, read: Read) -> None:
        """A module whose output is exactly zero for the first time: something inside may have overflowed."""
        dead = {name for name, v in read["output"] if v == 0.0} - self.dead
        self.dead |= dead
        if not dead or self.m.tracer is not None:
            return
        outcome = replay(self.m, backward=False)
        events = [] if outcome is None else outcome.events
        births = [e for e in events if e.what == "birth" and matters(e, False, False)]
        if births:
            self.add(birth_finding(births[0], kind_of_birth(births[0]), step, reproducible="yes"))

    def _judge_spikes(self, step: int, read: Read) -> None:
        """An output norm far above its running mean: a warning, and a trace of the steps after it."""
        for name, value in [*read["output"], *(("input", v) for _, v in read["input"][:1])]:
            if value <= 0:
                continue
            log = math.log2(value)
            mean, number = self.output_norms.get(name, (log, 0))
            if number >= _SETTLED and log - mean > _SPIKE:
                self.spiked_at = step
                evidence = f"the norm of {name} is {2 ** (log - mean):.3g} times its mean of {number} steps"
                self.add(finding("spike", "warning", step, evidence, module=name))
            kept = min(number, 50)
            self.output_norms[name] = ((mean * kept + log) / (kept + 1), number + 1)

    def _judge_clipping(self, step: int) -> None:
        """Clipping by a norm that is not finite spoils every gradient; it takes the place of an unknown cause."""
        norms = self.m.ledger.total_norms
        if not self.gradients_bad or self.m.ledger.used_scaler or all(bool(n.isfinite()) for n in norms):
            return
        unknown = [f for f in self.m.findings if f.kind == "unknown" and f.step == step and f.phase == "backward"]
        for found in unknown:
            self.m.findings.remove(found)
        evidence = "clip_grad_norm_ saw a norm that is not finite: it multiplies every gradient by 0 or NaN"
        parameter = unknown[0].parameter if unknown else ""
        where = {"module": "optimizer", "op": "clip_grad_norm_, mul", "parameter": parameter}
        self.add(finding("clip_spreads_nan", "fault", step, evidence, **where))

    def _judge_representable(self, step: int, read: Read, scale: float | None) -> None:
        for (dtype, before), (_, after) in zip(read["unscaled"], read["scaled"], strict=False):
            too_large = dtype == "float16" and scale is not None and scale >= 65520
            if math.isfinite(before) and (too_large or not math.isfinite(after)):
                evidence = f"the loss is {dtype}, and its gradient, the scale {scale:g}, is no {dtype} number"
                where = {"module": "scaler", "op": "scale, aten._to_copy (MulBackward0)"}
                self.add(finding("scale_not_representable", "fault", step, evidence, **where))

    # -- the optimizer, and the end of the step ------------------------------------------------------------------------

    def before_optimizer(self, optimizer: Any) -> None:
        """Dtypes and hyper-parameters, in the first steps; and samples of 16-bit parameters."""
        step = self.m._step
        self.add_all(self.habits.optimizer_steps(step, optimizer))
        if self.first_looks or step % 100 == 0:
            self.add_all(lint_optimizer(optimizer, step, self.m.ledger.used_scaler, self.names))
        self.updates.before(optimizer)

    def after_optimizer(self, optimizer: Any) -> None:
        """What became of the samples."""
        with torch.no_grad():
            self.updates.after(optimizer, self.m._step, self.m.sensors)
            if self.first_looks:
                self.add_all(lint_moments(optimizer, self.m._step, self.names))

    def end_of_step(self) -> None:
        """The order of calls, the trace, and what came after the gradients."""
        m, step = self.m, self.m._step
        self._add_misuses(step)
        self._judge_clipping(step)
        if m.tracer is not None:
            self._judge_trace(step, m.tracer.events)
        self.updates.end(step, m.sensors)
        for scale in m.ledger.scales[-1:]:
            m.sensors.defer("scale_after", "", scale)
        self.add_all(self.habits.end(step, self.skipped))

    def _add_misuses(self, step: int) -> None:
        for misuse in self.m.ledger.misuses:
            where = {"module": misuse.module, "op": misuse.op}
            self.add(finding(misuse.kind, misuse.severity, step, misuse.evidence, **where))
        self.m.ledger.misuses = []

    def _judge_trace(self, step: int, events: list[Event]) -> None:
        """What a traced step shows beyond what was judged already."""
        if not self.found_this_step and not self.gradients_bad:
            harmful = [e for e in events if e.what == "birth" and matters(e, self.loss_bad, False)]
            if harmful:
                self.add(birth_finding(harmful[0], kind_of_birth(harmful[0]), step))
        since = self.spiked_at if self.wants_trace(step) else step
        seen: set[str] = set()
        for found in precision_findings(events, since):
            if found.kind not in seen and self._credible(found):
                seen.add(found.kind)
                self.add(found)

    def _credible(self, found: Finding) -> bool:
        """Gradients that vanish under a scaler are its business; updates are judged by samples."""
        under_scaler = found.kind == "grad_underflow" and self.m.ledger.used_scaler
        return found.kind != "update_swamping" and not under_scaler

    def explain(self, error: Exception) -> None:
        """A finding for an exception that ends the step, where the monitor knows its cause."""
        step, text = self.m._step, str(error)
        self.add_all(lint_inputs(self._inputs(), self.m.model, step))
        if self.m.tracer is not None:
            self._judge_trace(step, self.m.tracer.events)
        if not self.m._examined and self.m.sensors.losses:
            self.m._examined = True
            self.examine(step)
        self._add_misuses(step)
        for pattern, kind, where, op in _ERRORS:
            if re.search(pattern, text):
                module = where or self.m.scopes.failed_in or self.m.scopes.path
                evidence = f"{type(error).__name__}: {text[:200]}"
                self.add(finding(kind, "fault", step, evidence, module=module, op=op))
                return

    def last_look(self) -> None:
        """After the last step: what was not read yet, and parameters that it left not finite."""
        read = self.m.sensors.read()
        self.add_all(self.updates.judge(read["update"]))
        named = [(n, p) for n, p in self.m.model.named_parameters() if measurable(p)]
        bad = [n for n, p in named if not bool(p.detach().isfinite().all())]
        if self.m._last >= 0 and bad:
            self.add_all(self.nonfinite.parameters(self.m._last + 1, bad))

    def state(self) -> dict[str, Any]:
        """Baselines, for a checkpoint."""
        return {"output_norms": dict(self.output_norms), **self.nonfinite.state(), **self.habits.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take baselines back; ValueError for other keys, and nothing is changed then."""
        if set(state) != set(self.state()):
            raise ValueError(f"expected baselines {', '.join(sorted(self.state()))}, got {', '.join(sorted(state))}")
        self.output_norms = dict(state["output_norms"])
        self.nonfinite.load(state)
        self.habits.load(state)


_ERRORS = (
    (r"Target -?\d+ is out of bounds", "index_out_of_range", "target", "nll_loss"),
    (r"index out of range in self|out of range|out of bounds", "index_out_of_range", "", "embedding"),
    (r"Attempting to unscale FP16 gradients", "fp16_master_weights_with_scaler", "scaler", "unscale_"),
    (r"step\(\) has already been called since the last update", "missing_scaler_update", "scaler", "scaler.step"),
    (r"unscale_\(\) has already been called", "unscale_per_micro_batch", "scaler", "unscale_"),
    (r"unscale_\(\) is being called after step", "unscale_per_micro_batch", "scaler", "unscale_"),
    (r"No inf checks were recorded prior to update", "update_before_step", "scaler", "scaler.update"),
    (r"No inf checks were recorded", "no_gradients", "scaler", "scaler.step"),
    (r"Expected more than 1 value per channel", "batchnorm_one_value", "", "batch_norm"),
    (r"divisible by 16|multiple of 16|divisible by 8", "fp8_alignment", "", "_scaled_mm"),
)


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low.double(), high.double())
