"""Faults of the loop that need a memory: state that was not restored, parameters that nobody steps, schedules."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mixprec_lab.nan_debugging.findings import Finding, finding
from mixprec_lab.nan_debugging.lint import LOW
from mixprec_lab.nan_debugging.scopes import tensors_in
from mixprec_lab.nan_debugging.sensors import measurable

if TYPE_CHECKING:
    from mixprec_lab.nan_debugging.monitor import NumericalStabilityMonitor


class Habits:
    """Remembers scales, the age of optimizers and schedulers, and which parameters were stepped."""

    def __init__(self, monitor: "NumericalStabilityMonitor") -> None:
        self.m = monitor
        self.known_scale: float | None = None
        self.ages: dict[int, float] = {}  # id of a parameter -> steps its optimizer had made
        self.moments: dict[int, int] = {}  # id of a parameter -> id of its second moment
        self.epochs: dict[int, int] = {}  # id of a scheduler -> how far it was
        self.owners: dict[int, Any] = {}  # id of a parameter -> the optimizer that stepped it
        self.versions: dict[str, int] = {}

    # -- scaler --------------------------------------------------------------------------------------------------------

    def scaler_state(self, step: int, scale: float | None, after: list[tuple[str, float]]) -> Iterator[Finding]:
        """A scale that is not the one of the last update, or a fresh scaler beside an optimizer that has made steps."""
        if scale is None:
            return
        known, self.known_scale = (after[-1][1] if after else self.known_scale), scale
        evidence = ""
        if known is not None and scale > 4 * known:
            evidence = f"the scale went from {known:g} to {scale:g} without a window of clean steps"
        elif known is None and self._age() > 1 and self._fresh(scale):
            evidence = f"the optimizer has made {self._age():.0f} steps, the scaler starts at {scale:g}"
        if evidence:
            yield finding("scaler_state_not_restored", "fault", step, evidence, module="scaler", op="state_dict")

    def _age(self) -> float:
        states = [state for o in self.m.optimizers for state in list(o.state.values())[:1]]
        return max((_age(state, 2.0) for state in states), default=0.0)

    def _fresh(self, scale: float) -> bool:
        scaler = self.m.ledger.scaler
        init = getattr(scaler, "_init_scale", None)
        return init is not None and scale == init and getattr(scaler, "_init_growth_tracker", 0) == 0

    # -- gradients -----------------------------------------------------------------------------------------------------

    def gradients(self, step: int, read: dict) -> Iterator[Finding]:
        """Gradients that were used before and are added to, and parts of the model that got none."""
        if any(v > 0 for _, v in read["stale"]):
            evidence = "backward added to gradients that the last optimizer step had used: nothing set them to zero"
            yield finding("zero_grad_missing", "fault", step, evidence, module="optimizer", op="zero_grad")
        by_hand = self.m.ledger.used_scaler or self.m.examiner.nonfinite.scaled_by_hand(read) is not None
        if by_hand and any(v > 0 for _, v in read["touched"]):
            evidence = "gradients were changed after one backward pass, and a later one added to them"
            where = {"module": "scaler", "op": "unscale_, div, backward"}
            yield finding("unscale_per_micro_batch", "fault", step, evidence, **where)
        if self.m._seen_steps < 2:
            yield from self._without_gradients(step)
            yield from self._orphans(step)

    def _without_gradients(self, step: int) -> Iterator[Finding]:
        """Modules that ran with gradients switched off, although what they made is trained on."""
        owned = {id(p) for o in self.m.optimizers for p in _parameters(o)}
        modules = {path: self.m.model.get_submodule(path) for path in [*self.m.sensors.without_grad, *self._cut_off()]}
        for path, module in modules.items():
            trainable = [p for p in module.parameters() if p.requires_grad and id(p) in owned]
            if trainable and all(p.grad is None for p in trainable):
                evidence = f"{path} ran under no_grad, and the optimizer holds {len(trainable)} of its parameters"
                yield finding("no_gradients", "fault", step, evidence, module=path, op="no_grad")
                return

    def _cut_off(self) -> Iterator[str]:
        """Outermost calls without gradients whose output went into a later call with gradients."""
        made: dict[int, list[str]] = {}
        for call in self.m.scopes.calls:
            given = [x.data_ptr() for x in tensors_in((call.args, call.kwargs)) if measurable(x)]
            behind = [path for place in given for path in made.get(place, ())]
            if call.grad:
                yield from behind
            else:
                made |= {x.data_ptr(): [*behind, call.path] for x in call.outputs if measurable(x)}

    def _orphans(self, step: int) -> Iterator[Finding]:
        """Parameters with gradients in no optimizer, while an optimizer holds others that are not the model's."""
        named = dict(self.m.model.named_parameters())
        ours = {id(p) for p in named.values()}
        held = [p for o in self.m.optimizers for p in _parameters(o)]
        strangers = [p for p in held if id(p) not in ours and p.grad is None]
        if not held or not strangers or not any(id(p) in ours for p in held):
            return
        have = {id(p) for p in held}
        left_out = [n for n, p in named.items() if p.requires_grad and p.grad is not None and id(p) not in have]
        if left_out:
            evidence = (
                f"{len(left_out)} parameters with a gradient are in no optimizer, first {left_out[0]}, and "
                f"{len(strangers)} that an optimizer holds are not in the model"
            )
            where = {"module": left_out[0].rpartition(".")[0], "parameter": left_out[0], "op": "optimizer"}
            yield finding("parameter_not_in_optimizer", "fault", step, evidence, **where)

    # -- optimizer and scheduler ---------------------------------------------------------------------------------------

    def optimizer_steps(self, step: int, optimizer: Any) -> Iterator[Finding]:
        """An optimizer whose state is younger, or narrower, than what stepped these parameters before."""
        parameters = [p for p in _parameters(optimizer) if p.grad is not None]
        for p in parameters[:1]:
            before = self.ages.get(id(p), 0.0)
            age = _age(optimizer.state.get(p, {}), before)
            same = self.owners.get(id(p)) is optimizer  # another one may be meant to start afresh
            if same and before > 2 and age < before / 2 and _keeps_state(optimizer):
                evidence = f"these parameters had been stepped {before:.0f} times, their state is of step {age:.0f}"
                where = {"module": "optimizer", "op": "state_dict exp_avg"}
                yield finding("optimizer_state_not_restored", "fault", step, evidence, **where)
            self.ages[id(p)], self.owners[id(p)] = age + 1, optimizer
        for p in parameters[:1]:
            moment = optimizer.state.get(p, {}).get("exp_avg_sq")
            if isinstance(moment, torch.Tensor):
                known, self.moments[id(p)] = self.moments.get(id(p)), id(moment)
                if known is not None and known != id(moment):
                    yield from self._replaced_state(step, optimizer, parameters)

    def _replaced_state(self, step: int, optimizer: Any, parameters: list) -> Iterator[Finding]:
        """The state of an optimizer is not the tensors it was: it was loaded, and may have been cast on the way."""
        where = {"module": "optimizer", "op": "_to_copy exp_avg_sq"}
        narrow = _narrow_state(optimizer, parameters)
        if narrow:
            evidence = f"the state {narrow} is 16 bits wide beside float32 parameters: it was cast when it was loaded"
            yield finding("optimizer_state_cast", "fault", step, evidence, **where)
            return
        share = vanished_share(optimizer, parameters)
        if share > 0.02:
            evidence = f"{share:.0%} of exp_avg_sq are zero where exp_avg is not: the state went through 16 bits"
            yield finding("optimizer_state_cast", "fault", step, evidence, **where)

    def end(self, step: int, skipped: bool) -> Iterator[Finding]:
        """The scheduler, and masters that were not copied back."""
        ledger = self.m.ledger
        for scheduler in ledger.schedulers:
            yield from self._scheduler(step, scheduler)
        if skipped and ledger.schedulers:
            evidence = "the scheduler stepped in a step that the scaler skipped"
            yield finding("scheduler_on_skipped_step", "fault", step, evidence, module="scheduler", op="scheduler.step")
        yield from self._masters(step)

    def _scheduler(self, step: int, scheduler: Any) -> Iterator[Finding]:
        epoch = int(getattr(scheduler, "_step_count", 0))
        known = self.epochs.get(id(scheduler))
        if known is not None and known >= 4 and epoch < known / 2:
            evidence = f"the schedule had come to {known}, and starts again at {epoch}"
            where = {"module": "scheduler", "op": "state_dict lr"}
            yield finding("scheduler_state_not_restored", "fault", step, evidence, **where)
        self.epochs[id(scheduler)] = epoch

    def _masters(self, step: int) -> Iterator[Finding]:
        """An optimizer stepped copies of the parameters, and the parameters were not written."""
        named = {n: p for n, p in self.m.model.named_parameters() if p.requires_grad}
        before, self.versions = self.versions, {n: p._version for n, p in named.items()}
        ours = {id(p) for p in named.values()}
        outside = [p for o in self.m.ledger.stepped for p in _parameters(o) if p.grad is not None]
        trained = self.m.scopes.calls and any(p.grad is not None for p in named.values())
        if not before or not outside or not trained or any(id(p) in ours for p in outside):
            return
        shapes = [tuple(p.shape) for p in outside]
        if all(tuple(p.shape) in shapes for p in named.values()) and before == self.versions:
            evidence = "the optimizer stepped copies of the parameters, and nothing was written back to the model"
            yield finding("master_not_copied", "fault", max(step - 1, 0), evidence, module="optimizer", op="copy_")

    def state(self) -> dict[str, Any]:
        """What survives a checkpoint."""
        return {"known_scale": self.known_scale}

    def load(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.known_scale = state["known_scale"]


def _parameters(optimizer: Any) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _age(state: dict[str, Any], uncounted: float) -> float:
    """The steps that the state of a parameter has seen; ``uncounted`` where it exists and does not say."""
    if "step" in state:
        return float(state["step"])
    return uncounted if any(value is not None for value in state.values()) else 0.0


def _keeps_state(optimizer: Any) -> bool:
    group = optimizer.param_groups[0]
    return "betas" in group or bool(group.get("momentum")) or "alpha" in group or "rho" in group


def vanished_share(optimizer: Any, parameters: list[torch.Tensor]) -> float:
    """The share of second moments that are zero although the first moment is not: no sum of squares can be."""
    zero = total = 0
    for p in parameters:
        state = optimizer.state.get(p, {})
        first, second = state.get("exp_avg"), state.get("exp_avg_sq")
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and first.shape == second.shape:
            moved = first != 0
            zero, total = zero + int((moved & (second == 0)).sum()), total + int(moved.sum())
    return zero / total if total >= 8 else 0.0


def _narrow_state(optimizer: Any, parameters: list[torch.Tensor]) -> str:
    """The name of a 16-bit moment of a float32 parameter, in an optimizer of torch's; "" if there is none."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return ""
    for p in parameters:
        if p.dtype == torch.float32:
            for name, value in optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == p.shape and value.dtype in LOW:
                    return name
    return ""


