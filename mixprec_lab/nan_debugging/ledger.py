"""A ledger of the training loop: what was called in which order, and what that order does to the gradients.

The calls of a step are noted while it lasts: GradScaler (torch's and ours), clipping, backward, optimizers, schedulers.
No tensor is touched, so this costs nothing; and faults of order are silent, so no tool that looks at numbers sees them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: operations through which a scaled loss may pass and still be the scaled loss
_LINEAR = ("Add", "Sub", "Mul", "Div", "Neg", "Sum", "Mean", "Stack", "ToCopy", "View", "Squeeze", "Unsqueeze")


class Misuse(NamedTuple):
    """One fault of order."""

    kind: str
    module: str
    op: str
    evidence: str
    severity: str = "fault"
    step_back: int = 0  #: steps before the present one at which it became visible


class Ledger:
    """What the loop called, in this step and before; ``misuses`` are the faults of the present step."""

    def __init__(self) -> None:
        self.misuses: list[Misuse] = []
        self.events: list[tuple] = []
        self.on_optimizer: Callable[[Any], None] = lambda optimizer: None
        self.after_optimizer: Callable[[Any], None] = lambda optimizer: None
        self.scales: list[torch.Tensor] = []  #: after each update of this step, not read
        self.scaler: Any = None  #: the last one used
        self.total_norms: list[torch.Tensor] = []  #: that clipping saw in this step, not read
        self.scale_inputs: list[tuple[torch.Tensor, torch.Tensor]] = []  #: losses and scaled losses of this step
        self.stepped: list[Any] = []  #: optimizers that stepped, in this step
        self.scaler_stepped = False
        self.phase = "forward"
        self._depth = 0  # of scaler.step
        self._scaled: dict[int, dict[int, int]] = {}  # id of optimizer -> versions of gradients after a scaled backward
        self._scaled_pending = False
        self._unscaled: set[int] = set()
        self._needs_update = False
        self._roots: list[tuple[Any, bool, bool]] = []
        self._before_backward: dict[int, tuple[int, int]] = {}
        self._known_scale: float | None = None
        self._optimizers: list[Any] = []
        self.root: torch.Tensor | None = None
        self.stale: list[torch.Tensor] = []  #: gradients that were there before backward, though a step was made
        self.touched: list[torch.Tensor] = []  #: gradients that were changed between two backward passes
        self._left: dict[int, int] = {}  # id of a parameter -> version of its gradient after the last backward
        self.schedulers: list[Any] = []  #: that stepped, in this step
        self._used, self._ever_stepped, self._window_stepped = False, False, False
        self._early_scheduler = self._updated_inside = False

    def begin(self, optimizers: list[Any]) -> None:
        """A new step: forget what belongs to the last one, keep what is pending."""
        self.misuses, self.events, self.scales, self.total_norms = [], [], [], []
        self.scale_inputs, self.stepped, self._roots = [], [], []
        self.scaler_stepped, self.phase, self.root = False, "forward", None
        self.stale, self.touched, self.schedulers = [], [], []
        self._optimizers = optimizers

    @property
    def used_scaler(self) -> bool:
        """Whether a scaler that is switched on has been used."""
        return self.scaler is not None

    # -- the calls -----------------------------------------------------------------------------------------------------

    def scaled(self, scaler: Any, outputs: Any, result: Any) -> None:
        """``scaler.scale(outputs)`` returned ``result``."""
        if not _enabled(scaler):
            return
        if self._needs_update and scaler is self.scaler:
            self.misuses.append(
                Misuse("missing_scaler_update", "scaler", "scaler.update",
                       "scaler.step() was called in the step before, scaler.update() was not")
            )  # fmt: skip
            self._needs_update = False
        self.scaler = scaler
        for before, after in zip(_tensors(outputs), _tensors(result), strict=False):
            self.scale_inputs.append((before.detach(), after.detach()))
            self.events.append(("scale", after.grad_fn))

    def backward(self, tensors: Any) -> None:
        """``backward`` starts from ``tensors``."""
        self._look_for_stale_gradients()
        self._look_for_touched_gradients()
        scaled_nodes = [event[1] for event in self.events if event[0] == "scale" and event[1] is not None]
        for root in _tensors(tensors):
            self.root = root.detach()
            with_scale, without = _terms(root.grad_fn, scaled_nodes)
            self._roots.append((root.grad_fn, with_scale, without))
        held = [p for o in self._optimizers for p in _parameters(o) if p.grad is not None]
        self._before_backward = {id(p): (id(p.grad), p.grad._version) for p in held}
        if self.used_scaler and any(with_scale for _, with_scale, _ in self._roots):
            self._look_for_partial_scaling()
            known = [o for o in self._optimizers if self._scaled.get(id(o))]
            rescaled = [o for o in known if not self._still_scaled(o, _parameters(o))]
            if self._roots[-1][1] and (self._unscaled or rescaled):
                self.misuses.append(
                    Misuse("unscale_per_micro_batch", "scaler", "scaler.unscale_",
                           "a scaled backward added to gradients that were unscaled already")
                )  # fmt: skip
        self.phase = "backward"

    def after_backward(self) -> None:
        """Gradients are there; remember their versions, to see whether somebody rescales them by hand."""
        self.phase = "loss"
        held = [p for o in self._optimizers for p in _parameters(o) if p.grad is not None]
        self._left = {id(p): p.grad._version for p in held}
        fresh = [p for p in held if self._before_backward.get(id(p)) != (id(p.grad), p.grad._version)]
        with_scale = bool(self._roots) and self._roots[-1][1]
        self._scaled_pending |= with_scale
        for optimizer in self._optimizers:
            own = {id(p) for p in _parameters(optimizer)}
            known = self._scaled.setdefault(id(optimizer), {})
            for p in fresh:
                if id(p) in own and with_scale:
                    known[id(p)] = p.grad._version
                elif id(p) in own:
                    known.pop(id(p), None)

    def rescaled(self, tensors: list[torch.Tensor]) -> None:
        """An operation on many tensors at once changed ``tensors`` in place; a trace keeps that from counting."""
        changed = {id(t) for t in tensors}
        for optimizer in self._optimizers:
            for p in _parameters(optimizer):
                if p.grad is not None and id(p.grad) in changed:
                    self._scaled.get(id(optimizer), {}).pop(id(p), None)
                    self._left.pop(id(p), None)

    def _look_for_stale_gradients(self) -> None:
        """Gradients that the last step has used already, and that backward is about to add to."""
        if self._used and not self._scaled_pending and self.root is None:
            old = [p.grad for o in self._optimizers for p in _parameters(o) if p.grad is not None][:4]
            self.stale += [g.detach().float().abs().max() for g in old if not g.is_sparse and g.numel()]

    def _look_for_touched_gradients(self) -> None:
        """Gradients that somebody rescaled after one backward pass, and that another is about to add to."""
        held = [p for o in self._optimizers for p in _parameters(o) if p.grad is not None and id(p) in self._left]
        if held and not self._unscaled and all(p.grad._version != self._left[id(p)] for p in held):
            self.touched += [p.grad.detach().float().abs().max() for p in held[:4] if not p.grad.is_sparse]

    def zeroed(self) -> None:
        """``zero_grad`` ran."""
        self._left.clear()
        self._used = False
        self._scaled.clear()
        self._scaled_pending = False

    def _look_for_partial_scaling(self) -> None:
        roots = self._roots if len(self._optimizers) == 1 else self._roots[-1:]  # others may have losses of their own
        with_scale, without = any(w for _, w, _ in roots), any(n for _, _, n in roots)
        if with_scale and without and not any(m.kind == "partial_loss_scaling" for m in self.misuses):
            self.misuses.append(
                Misuse("partial_loss_scaling", "scaler", "scaler.scale",
                       "backward ran from a sum of scaled and unscaled losses, or from both in one step")
            )  # fmt: skip

    def unscaled(self, scaler: Any, optimizer: Any) -> None:
        """``scaler.unscale_(optimizer)`` ran."""
        if not _enabled(scaler):
            return
        self._unscaled.add(id(optimizer))
        self._scaled.pop(id(optimizer), None)

    def clipped(self, gradients: list[torch.Tensor], total_norm: torch.Tensor | None) -> None:
        """Clipping looked at ``gradients``."""
        if total_norm is not None:
            self.total_norms.append(total_norm.detach())
        if not (self._scaled_pending and self.used_scaler):
            return
        clipped = {id(g) for g in gradients}
        for optimizer in self._optimizers:
            owned = [p for p in _parameters(optimizer) if p.grad is not None and id(p.grad) in clipped]
            if owned and self._still_scaled(optimizer, owned):
                self.misuses.append(
                    Misuse("clip_before_unscale", "optimizer", "clip_grad_norm_",
                           "gradients were clipped while they carried the loss scale: unscale_() came late, or never")
                )  # fmt: skip
                self._scaled.pop(id(optimizer))

    def _still_scaled(self, optimizer: Any, parameters: list) -> bool:
        """Whether the gradients are as the scaled backward left them: unscaling by hand changes their version."""
        versions = self._scaled.get(id(optimizer))
        if versions is None:
            return False
        known = [p for p in parameters if id(p) in versions]
        return bool(known) and all(p.grad._version == versions[id(p)] for p in known)

    def optimizer_steps(self, optimizer: Any) -> None:
        """An optimizer is about to step."""
        self.phase = "optimizer"
        self.stepped.append(optimizer)
        if self._early_scheduler:
            self._early_scheduler = False
            self.misuses.append(
                Misuse("scheduler_before_optimizer", "scheduler", "scheduler.step",
                       "the scheduler stepped before the optimizer's first step: the first learning rate is never used")
            )  # fmt: skip
        self.on_optimizer(optimizer)
        if self._depth or not self._scaled_pending:
            return
        owned = [p for p in _parameters(optimizer) if p.grad is not None]
        if self._still_scaled(optimizer, owned):
            self.misuses.append(
                Misuse("optimizer_step_bypasses_scaler", "optimizer", "optimizer.step",
                       f"{type(optimizer).__name__}.step() ran on gradients that carry the loss scale")
            )  # fmt: skip
        elif id(optimizer) in self._unscaled:
            self.misuses.append(
                Misuse("optimizer_step_bypasses_scaler", "optimizer", "optimizer.step",
                       f"{type(optimizer).__name__}.step() ran after unscale_(): only scaler.step() skips overflows")
            )  # fmt: skip

    def optimizer_stepped(self, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self.phase, self._ever_stepped, self._used = "loss", True, True
        self._left.clear()
        self.after_optimizer(optimizer)
        self._scaled.pop(id(optimizer), None)

    def scaler_step_begins(self) -> None:
        """``scaler.step`` starts."""
        self._depth += 1

    def scaler_steps(self, scaler: Any) -> None:
        """``scaler.step`` ran."""
        self._depth -= 1
        self.scaler_stepped = self._window_stepped = True
        if _enabled(scaler):
            self._needs_update, self._updated_inside = not self._updated_inside, False
            self._scaled_pending = False
            self._scaled.clear()

    def updated(self, scaler: Any) -> None:
        """``scaler.update()`` ran."""
        if not _enabled(scaler):
            return
        if self._depth:
            self._updated_inside = True  # ours: step() ends with the update
        elif self._scaled_pending and not self._window_stepped:
            self.misuses.append(
                Misuse("update_before_step", "scaler", "scaler.update",
                       "scaler.update() ran between backward and scaler.step(): the scale moves inside of a window")
            )  # fmt: skip
        self._window_stepped = False
        self._needs_update, self._scaled_pending = False, False
        self._unscaled.clear()
        self._scaled.clear()
        scale = scale_of(scaler)
        if scale is not None:
            self.scales.append(scale)

    def scheduler_stepped(self, scheduler: Any) -> None:
        """A learning-rate scheduler stepped; the first step is that of its constructor."""
        if getattr(scheduler, "last_epoch", 1) == 0:
            return
        self.events.append(("scheduler",))
        self.schedulers.append(scheduler)
        fresh = not getattr(getattr(scheduler, "optimizer", None), "state", None)
        if fresh and not self._ever_stepped and not self.scaler_stepped and not self.stepped:
            self._early_scheduler = True


def scale_of(scaler: Any) -> torch.Tensor | None:
    """The scale of a scaler as a tensor that is not read; None before it has one."""
    present = getattr(scaler, "_scale", None)
    if isinstance(present, torch.Tensor):
        return present.detach().clone()
    number = getattr(scaler, "scale", None)
    return torch.tensor(float(number)) if isinstance(number, int | float) else None


def _enabled(scaler: Any) -> bool:
    enabled = getattr(scaler, "is_enabled", None)
    return enabled() if callable(enabled) else True


def _parameters(optimizer: Any) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for t in x if isinstance(t, torch.Tensor)] if hasattr(x, "__iter__") else []


def _terms(node: Any, scaled: list[Any]) -> tuple[bool, bool]:
    """Whether the sum that ``node`` stands for has terms with the loss scale, and terms without."""
    with_scale, without, seen = False, False, set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if any(node is s for s in scaled):
            with_scale = True
        elif node.name().startswith(_LINEAR) and len(seen) < 64:
            children = [child for child, _ in node.next_functions if child is not None]
            stack += children
            without = without or not children
        else:
            without = True
    return with_scale, without


