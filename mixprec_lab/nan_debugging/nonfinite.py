"""Something is not finite: where was the first bad value born, and of what fault?"""

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from mixprec_lab.nan_debugging.classify import birth_finding, kind_of_birth
from mixprec_lab.nan_debugging.findings import Finding, finding
from mixprec_lab.nan_debugging.lint import LOW
from mixprec_lab.nan_debugging.lossgraph import Saved
from mixprec_lab.nan_debugging.replay import replay
from mixprec_lab.nan_debugging.scopes import OutermostCall, tensors_in
from mixprec_lab.nan_debugging.sensors import measurable
from mixprec_lab.nan_debugging.tracer import Event, facts

if TYPE_CHECKING:
    from mixprec_lab.nan_debugging.monitor import NumericalStabilityMonitor

_SKIPS_IN_A_ROW = 12  # a calibration from 2**16 has fewer
_GROWTH = 4.0  # of a parameter's norm in one step
_COMPARING = ("MseLoss", "L1Loss", "SmoothL1", "Huber", "Abs", "Pow", "BinaryCross")
Growth = tuple[int, str, float]  # step, parameter, factor


class NonFinite:
    """Judges values that are not finite, by the trace of the step or by a replay of it."""

    def __init__(self, monitor: "NumericalStabilityMonitor") -> None:
        self.m = monitor
        self.skips_in_a_row, self.first_skip = 0, -1
        self.parameter_norms: dict[str, float] = {}
        self.grown: Growth | None = None

    # -- parameters and inputs -----------------------------------------------------------------------------------------

    def note_growth(self, step: int, norms: list[tuple[str, float]]) -> None:
        """Remember parameters whose norm has multiplied in the step before."""
        worst = (1.0, "")
        for name, norm in norms:
            before = self.parameter_norms.get(name)
            if before and before > 1e-3 and math.isfinite(norm):
                worst = max(worst, (norm / before, name))
            self.parameter_norms[name] = norm
        if worst[0] > _GROWTH:
            self.grown = (step - 1, worst[1], worst[0])

    def parameters(self, step: int, names: list[str]) -> list[Finding]:
        """Parameters went bad in the optimizer step before; said once, and as a fault if nothing explains it."""
        if any(f.kind == "bad_parameters" for f in self.m.findings):
            return []
        at = step - 1 if self.m._seen_steps else step
        explained = any(f.severity == "fault" and at - 1 <= f.step <= at for f in self.m.findings)
        evidence = f"{len(names)} parameters are not finite, first {names[0]}"
        where = {"module": "optimizer", "parameter": names[0]}
        return [finding("bad_parameters", "warning" if explained else "fault", at, evidence, **where)]

    def inputs(self, step: int) -> Finding | None:
        """The model was given NaN or +inf; None for masks of -inf, and for infinities that the loss could mask out."""
        for call in self.m.scopes.calls:
            if call is not self.m.scopes.calls[0] and self._made_bad_before(call):
                return None
            for x in tensors_in((call.args, call.kwargs)):
                if not measurable(x):
                    continue
                wide = x.double()
                if bool(wide.isnan().any()) or bool((wide == math.inf).any()):
                    bad = ~wide.isfinite()
                    rows = bad.flatten(1).any(1).nonzero().flatten().tolist() if x.dim() > 1 else []
                    born = self._birth_after_input()
                    if born is not None:
                        return born
                    evidence = f"the model was given {facts(x)}" + (f", in samples {rows[:8]}" if rows else "")
                    return finding("nan_in_data", "fault", step, evidence, module="input", op="input")
        return None

    def _made_bad_before(self, call: OutermostCall) -> bool:
        """Whether a call before ``call`` returned something that is not finite: then that is where it comes from."""
        earlier = self.m.scopes.calls[: self.m.scopes.calls.index(call)]
        outputs = [x for c in earlier for x in c.outputs if x.is_floating_point()]
        return any(not bool(x.isfinite().all()) for x in outputs)

    def _birth_after_input(self) -> Finding | None:
        """What the traced step tells of an input that is not finite: it was made in the step, or multiplied by zero."""
        if self.m.tracer is None:
            return None
        events = [e for e in self.m.tracer.events if e.phase != "backward"]
        births = [e for e in events if e.what == "birth"]
        entered = [e for e in events if e.what == "entered"]
        if births and (not entered or births[0].index < entered[0].index):
            return birth_finding(births[0], kind_of_birth(births[0]), self.m._step)
        return self._masked(events, [])

    def _masked(self, events: list[Event], births: list[Event]) -> Finding | None:
        """Infinities that were meant to be masked and were multiplied by zero."""
        if births and kind_of_birth(births[0]) != "division_by_zero":
            return None
        for event in events:
            if event.what == "masked" and event.phase != "backward":
                evidence = f"{event.share:.0%} of the elements are 0 times something that is not finite"
                where = {"module": event.module or "loss", "op": event.op, "tensor": event.output}
                return finding("inf_times_zero", "fault", self.m._step, evidence, **where)
        return None

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, step: int, paths: list[str]) -> Finding:
        """A module's output is not finite: the operation that made it so."""
        events, reproducible = self._events(backward=False)
        births = [e for e in events if e.what == "birth" and e.phase != "backward"]
        entered = [e for e in events if e.what == "entered" and e.phase != "backward"]
        grown = self.grown if self.grown is not None and step - self.grown[0] <= 3 else None
        masked = self._masked(events, births)
        if masked is not None:
            return masked
        if births:
            kind = self._settled(kind_of_birth(births[0], grown=grown is not None), births[0], grown)
            if kind == "exploding_lr":
                return self._exploding(step, births[0], grown, reproducible)
            return birth_finding(births[0], kind, step, reproducible=reproducible)
        if entered:
            where = {"module": "input", "op": entered[0].op}
            return finding("nan_in_data", "fault", step, f"entered with {entered[0].inputs[0]}", **where)
        if grown is not None:
            return self._exploding(step, None, grown, reproducible)
        evidence = f"the output of {paths[0]} is not finite"
        evidence += ", and a replay of the step is" if reproducible == "no" else ""
        return finding("unknown", "fault", step, evidence, module=paths[0], reproducible=reproducible)

    def _settled(self, kind: str, birth: Event, grown: Growth | None) -> str:
        """An overflow after weights have exploded is the learning rate's, whatever the format."""
        if grown is not None and kind in ("fp16_overflow", "unknown"):
            return "exploding_lr"
        if kind == "exploding_lr" and grown is None:
            return "fp16_overflow" if birth.output.dtype == "float16" else "unknown"
        return kind

    def _exploding(self, step: int, birth: Event | None, grown: Growth | None, reproducible: str) -> Finding:
        evidence, parameter = "activations overflow", ""
        if grown is not None:
            evidence = f"the norm of {grown[1]} grew {grown[2]:.3g} times in step {grown[0]}, then activations overflow"
            parameter = grown[1]
        where = {"module": birth.module or "optimizer", "op": birth.op} if birth else {"module": "optimizer"}
        details = {"phase": "forward", "reproducible": reproducible, "parameter": parameter}
        return finding("exploding_lr", "fault", step, evidence, **details, **where)

    # -- loss ----------------------------------------------------------------------------------------------------------

    def loss(self, step: int) -> Finding:
        """The model's output is finite and the loss is not."""
        events = [] if self.m.tracer is None else [e for e in self.m.tracer.events if e.phase != "backward"]
        births = [e for e in events if e.what == "birth"]
        entered = [e for e in events if e.what == "entered"]
        known = self._all_ignored(step) or self._masked(events, births)
        if known is not None:
            return known
        if entered and (not births or entered[0].index < births[0].index):
            where = {"phase": "data", "module": "target", "op": entered[0].op}
            return finding("inf_in_label", "fault", step, f"the loss was given {entered[0].inputs[-1]}", **where)
        if births:
            kind = kind_of_birth(births[0])
            return birth_finding(births[0], "unknown" if kind == "exploding_lr" else kind, step)
        return self._from_loss_graph(step)

    def _all_ignored(self, step: int) -> Finding | None:
        """A cross entropy over no label: 0 / 0, with gradients that are exactly zero."""
        for item in self.m.sensors.saved:
            labels = item.node.startswith("NllLoss") and item.name == "target" and item.ignore is not None
            if labels and bool((item.tensor == item.ignore).all()):
                where = {"module": "target", "op": f"cross_entropy ({item.node})"}
                evidence = f"all {item.tensor.numel()} labels are {item.ignore}, the index that is ignored"
                return finding("all_labels_ignored", "fault", step, evidence, **where)
        return None

    def _from_loss_graph(self, step: int) -> Finding:
        """What the nodes of the loss saved: the first that is not finite, or an argument at the edge of a domain."""
        for item in self.m.sensors.saved:
            found = self._from_saved(step, item)
            if found is not None:
                return found
        nodes = self.m.sensors.loss_nodes
        last = nodes[-1] if nodes else ""
        if torch.float16 in self.m.sensors.loss_dtypes:
            first = next((n for n in nodes if n.startswith(("Sum", "Mean", "Exp", "Mul"))), last)
            evidence = "the model's output is finite, its FP16 loss is not"
            return finding("fp16_overflow", "fault", step, evidence, module="loss", op=op_of(first))
        if any(n.startswith(_COMPARING) for n in nodes) and self.m.scopes.calls:
            evidence = "the model's output is finite, the loss that compares it is not"
            where = {"phase": "data", "module": "target", "op": op_of(last)}
            return finding("inf_in_label", "fault", step, evidence, **where)
        evidence = "the model's output is finite, the loss is not; its nodes: " + ", ".join(nodes[:6])
        return finding("unknown", "fault", step, evidence, module="loss", op=op_of(last))

    def _from_saved(self, step: int, item: Saved) -> Finding | None:
        node, x = item.node, item.tensor
        if node.startswith("Log") and item.name == "self" and bool((x == 0).any()):
            where = {"module": "loss", "op": f"aten.log ({node})", "tensor": facts(x)}
            return finding("log_of_zero", "fault", step, f"the argument is {facts(x)}", **where)
        if not measurable(x) or bool(x.detach().double().isfinite().all()):
            return None
        if item.name == "target" or (item.outside and node.startswith(_COMPARING)):
            where = {"phase": "data", "module": "target", "op": op_of(node)}
            return finding("inf_in_label", "fault", step, f"{node} was given {facts(x)}", **where)
        kind = "fp16_overflow" if x.dtype == torch.float16 else "unknown"
        where = {"module": "loss", "op": op_of(node), "tensor": facts(x)}
        return finding(kind, "fault", step, f"{item.name} of {node} is {facts(x)}", **where)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def gradients(
        self, step: int, read: dict, names: list[str], scale: float | None
    ) -> tuple[list[Finding], bool]:
        """Forward and loss are finite, gradients are not; and whether the scaler deals with it by skipping the step."""
        if scale is not None and scale > 1 and self._finite_at_scale_one(scale):
            return self._skip(step, scale, names), True
        hand = self.scaled_by_hand(read)
        if hand and not self.m.ledger.used_scaler:
            evidence = f"the loss was multiplied by {hand:g}, {len(names)} gradients are not finite, and nothing looked"
            where = {"module": "scaler", "op": "scale, aten._to_copy", "parameter": names[0]}
            return [finding("static_scale_no_check", "fault", step, evidence, **where)], False
        events, reproducible = self._events(backward=True)
        births = [e for e in events if e.what == "birth" and e.phase == "backward"]
        if births:
            behind = births[0].extra.get("where", False) or any("Where" in n for n in self.m.sensors.loss_nodes)
            kind = kind_of_birth(births[0], behind_where=behind)
            details = {"reproducible": reproducible, "parameter": names[0]}
            return [birth_finding(births[0], kind, step, **details)], False
        return [self._backward_of_loss(step, names, reproducible)], False

    def _backward_of_loss(self, step: int, names: list[str], reproducible: str) -> Finding:
        """No operation of the model made it: it came from the loss."""
        nodes = self.m.sensors.loss_nodes
        for node in nodes:
            kind = edge_kind(node, nodes)
            if kind:
                evidence = f"{len(names)} gradients are not finite; the loss holds {node}"
                where = {"module": "loss", "op": op_of(node), "parameter": names[0]}
                return finding(kind, "fault", step, evidence, **where)
        evidence = f"{len(names)} gradients are not finite, first {names[0]}; outputs and loss are"
        where = {"phase": "backward", "module": names[0].rpartition(".")[0], "parameter": names[0]}
        return finding("unknown", "fault", step, evidence, reproducible=reproducible, **where)

    def _finite_at_scale_one(self, scale: float) -> bool:
        """Whether the backward pass is finite when the gradients that enter the model are divided by the scale."""
        entered = [g for call in self.m.scopes.calls for g in call.gradients.values()]
        if not entered:
            return True
        if not all(bool(g.isfinite().all()) for g in entered):
            nodes = self.m.sensors.loss_nodes
            return any(d in LOW for d in self.m.sensors.loss_dtypes) or not any(edge_kind(n, nodes) for n in nodes)
        outcome = replay(self.m, backward=True, divide=scale)
        return outcome is None or outcome.gradients_finite

    def _skip(self, step: int, scale: float, names: list[str]) -> list[Finding]:
        """An overflow that the scaler deals with; a fault once it has gone on for longer than a calibration."""
        if self.skips_in_a_row == 0:
            self.first_skip = step
        self.skips_in_a_row += 1
        where = {"module": "scaler", "op": "unscale_", "scale_dependent": "yes"}
        evidence = f"{len(names)} gradients overflow at scale {scale:g}, and are finite without it"
        found = [finding("loss_scale_too_high", "info", self.first_skip, evidence, handled=True, **where)]
        hopeless = scale > 2.0**24 and self.skips_in_a_row >= 4
        if self.skips_in_a_row >= _SKIPS_IN_A_ROW or hopeless:
            evidence = f"{self.skips_in_a_row} steps in a row were skipped; the scale is still {scale:g}"
            found.append(finding("loss_scale_too_high", "fault", self.first_skip, evidence, **where))
        return found

    def scaled_by_hand(self, read: dict) -> float | None:
        """What the recorded loss was multiplied by before backward; None if by nothing, or by a scaler."""
        root, losses = read["backward_root"], read["loss"]
        if len(losses) != 1 or not root or self.m.ledger.scale_inputs:
            return None
        value, loss = root[-1][1], abs(losses[0][1])
        return value / loss if math.isfinite(loss) and loss > 0 and value / loss >= 8 else None

    def _events(self, backward: bool) -> tuple[list[Event], str]:
        """The events of this step: from its trace, or from a replay; and whether the replay showed the fault."""
        if self.m.tracer is not None:
            return self.m.tracer.events, "unknown"
        outcome = replay(self.m, backward=backward)
        if outcome is None:
            return [], "unknown"
        again = not outcome.gradients_finite if backward else not outcome.outputs_finite
        return outcome.events, "yes" if again else "no"

    def state(self) -> dict[str, Any]:
        """Counters and baselines, for a checkpoint."""
        return {key: getattr(self, key) for key in ("skips_in_a_row", "first_skip", "parameter_norms")}

    def load(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for key in ("skips_in_a_row", "first_skip", "parameter_norms"):
            setattr(self, key, state[key])


def edge_kind(node: str, nodes: list[str]) -> str | None:
    """The fault of a function whose gradient has an edge, if the loss holds one."""
    if node.startswith(("Log", "Reciprocal", "Div")) and any("Where" in n for n in nodes):
        return "where_trap"
    return "sqrt_zero_grad" if node.startswith("Sqrt") else None


def op_of(node: str) -> str:
    """"PowBackward0" -> "aten.pow (PowBackward0)"; "" for ""."""
    name = re.sub(r"Backward\d*$", "", node)
    return f"aten.{re.sub(r'(?<!^)(?=[A-Z])', '_', name).lower()} ({node})" if name else ""
