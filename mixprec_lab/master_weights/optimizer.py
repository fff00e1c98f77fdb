"""Any optimizer on FP32 masters of a 16-bit model: ``MasterWeightOptimizer``.

model = model.to(torch.bfloat16)
optimizer = MasterWeightOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), model)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, 1000)
...
optimizer.zero_grad()
optimizer.scale_loss(loss).backward()
optimizer.step()
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mixprec_lab.master_weights.pairs import Pair, hand_over, load, make_pairs, move_gradients, owners_of, store
from mixprec_lab.master_weights.scaling import LossScaler, clip_gradients, loop_of


class MasterWeightOptimizer:
    """``optimizer``, built on the parameters of ``model``, taken over: it now steps FP32 masters of the 16-bit ones.

    Any ``torch.optim`` optimizer will do that needs no closure: several groups, tied parameters, state from earlier
    steps (which moves to FP32).  FP16 and BF16 parameters get a master that starts at their value; FP32 and FP64 ones
    are their own.  After every step the model holds the masters, rounded to nearest even; that is so after an exception
    in the optimizer too, Ctrl-C included.  With AdamW on a CPU pass it ``fused=True``.

    ``scaler`` is a ``torch.amp.GradScaler`` or a scaler of ``mixprec_lab.loss_scaling``: ``scale_loss`` scales with it
    and ``step`` unscales the masters' FP32 gradients (FP16 ones would underflow again), skips and updates.
    ``max_norm`` clips their total L2 norm, after unscaling; ``grad_norm`` holds the last norm before clipping.

    ``optimizer`` stays available under that name: learning-rate schedulers hold it, built before or after.  Move and
    cast the model first.  Bytes a parameter with Adam: 2 + 4 for weight and master, 8 for the moments, and 2 for the
    gradient, which becomes 4 between ``copy_grads_to_master`` and ``zero_grad``.

    Raises TypeError for something else than an optimizer, one whose ``step`` needs a closure (LBFGS), an unknown
    scaler, and parameters of other dtypes; ValueError for parameters that ``model`` does not hold and a ``max_norm``
    that is not positive.  Then nothing was changed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        scaler: "LossScaler | torch.amp.GradScaler | None" = None,
        max_norm: float | None = None,
    ) -> None:
        _check_arguments(optimizer, model, max_norm)
        self.optimizer, self.model, self.scaler, self.max_norm = optimizer, model, scaler, max_norm
        self.grad_norm: torch.Tensor | None = None
        self._scale, self._make_step = loop_of(scaler)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._pairs = make_pairs(parameters, owners_of(model))
        hand_over(optimizer, self._pairs)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, with the masters in them."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        """The state of the optimizer, by master."""
        return self.optimizer.state

    def named_masters(self) -> dict[str, torch.Tensor]:
        """The tensors that the optimizer steps, by the model's names, in the order of the groups."""
        return {pair.owner.name: pair.master for pair in self._pairs}

    @property
    def _narrow(self) -> list[Pair]:
        return [pair for pair in self._pairs if pair.master is not pair.parameter]

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call ``backward()`` on: multiplied by the scaler's scale, or as it is without a scaler."""
        if self.scaler is None:
            return loss
        return (
            self.scaler.scale(loss) if isinstance(self.scaler, torch.amp.GradScaler) else self.scaler.scale_loss(loss)
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the masters and of the model's parameters."""
        for pair in self._narrow:
            if set_to_none:
                pair.clear()
            elif pair.parameter.grad is not None:
                pair.parameter.grad.zero_()
        self.optimizer.zero_grad(set_to_none)

    def copy_grads_to_master(self) -> None:
        """Move the model's gradients to the masters: added in FP32 to what is there, then freed in the model.

        ``step`` does this.  Call it after each backward pass to accumulate micro-batches in FP32.  TypeError for sparse
        gradients.
        """
        move_gradients(self._narrow)

    def copy_master_to_model(self) -> None:
        """Round the masters into the model, to nearest even; a master beyond 65519 becomes inf in FP16.

        ``step`` does this.  It undoes whatever was written into the model since.
        """
        store(self._narrow)

    def sync_master_from_model(self) -> None:
        """Make the masters equal to the model's weights: after loading new ones.  The optimizer's state stays."""
        for pair in self._pairs:
            pair.check(values=False)
        load(self._narrow)

    def step(self, closure: Callable[[], Any] | None = None) -> bool:
        """One step on the masters, rounded into the model; True if it was taken, False if the scaler skipped it.

        Raises RuntimeError if no parameter has a gradient, if the gradients cannot be clipped because they are not
        finite (with a scaler that is a skip), and if the model's weights were written to, moved or replaced since the
        last step.  Writes through ``.data`` go unnoticed: call ``sync_master_from_model`` after them.  TypeError for a
        closure, which would compute gradients where they are not copied from.
        """
        if closure is not None:
            raise TypeError("expected step() without a closure: call loss.backward() first, then step()")
        for pair in self._pairs:
            pair.check()
        self.copy_grads_to_master()
        if all(pair.master.grad is None for pair in self._pairs):
            raise RuntimeError(
                "no parameter of the optimizer has a gradient: call backward() on the loss before step()"
            )
        try:
            return self._make_step(self.optimizer, self._clip)
        finally:
            self.copy_master_to_model()

    def _clip(self) -> None:
        if self.max_norm is not None:
            masters = [pair.master for pair in self._pairs]
            self.grad_norm = clip_gradients(masters, self.max_norm, may_skip=self.scaler is not None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters, as ``torch.optim.Optimizer.add_param_group`` does.

        Raises ValueError for parameters that are not the model's or are in a group already; then nothing changes.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"expected a dict with the key 'params', got {param_group!r:.80}")
        given = param_group["params"]
        named = [given] if isinstance(given, torch.Tensor) else list(given)
        parameters = [entry[1] if isinstance(entry, tuple) else entry for entry in named]
        known = {pair.parameter for pair in self._pairs}
        if len({*parameters}) < len(parameters) or not known.isdisjoint(parameters):
            raise ValueError("some parameters appear in more than one parameter group, or twice in this one")
        pairs = make_pairs(parameters, owners_of(self.model))
        masters = [
            (entry[0], pair.master) if isinstance(entry, tuple) else pair.master
            for entry, pair in zip(named, pairs, strict=True)
        ]
        self.optimizer.add_param_group({**param_group, "params": masters})
        self._pairs += pairs

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs: optimizer, masters, scaler.  By reference, as in torch: copy to keep."""
        return {
            "kind": type(self.optimizer).__name__,
            "groups": self._group_names(),
            "masters": {name: master.detach() for name, master in self.named_masters().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved; the masters are rounded into the model.

        Raises ValueError if ``state`` does not fit (another optimizer, other groups, names or shapes, a scaler on one
        side only), and whatever optimizer and scaler raise for their parts; then nothing changes.
        """
        self._check_state(state)
        before = None if self.scaler is None else copy.deepcopy(self.scaler.state_dict())
        try:
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.optimizer.load_state_dict(state["optimizer"])  # checks all before it changes anything
        except BaseException:
            if self.scaler is not None:
                self.scaler.load_state_dict(before)
            raise
        with torch.no_grad():
            for name, master in self.named_masters().items():
                master.copy_(state["masters"][name])
        self.copy_master_to_model()

    def _group_names(self) -> list[list[str]]:
        names = iter(self.named_masters())
        return [[next(names) for _ in group["params"]] for group in self.param_groups]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        expected = {"kind", "groups", "masters", "optimizer", "scaler"}
        if not isinstance(state, Mapping) or set(state) != expected:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"expected a state with the keys {sorted(expected)}, got {got}")
        if state["kind"] != type(self.optimizer).__name__:
            raise ValueError(f"expected the state of {type(self.optimizer).__name__}, got that of {state['kind']}")
        if state["groups"] != self._group_names():
            raise ValueError(f"expected the parameter groups {self._group_names()}, got {state['groups']}")
        if (state["scaler"] is None) != (self.scaler is None):
            raise ValueError("expected a scaler both in the state and here, or in neither")
        _check_masters(state["masters"], self.named_masters())


def _check_arguments(optimizer: object, model: object, max_norm: float | None) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates the loss itself through a closure, where masters and model cannot "
            f"be kept equal: use an optimizer that steps on given gradients"
        )
    if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"expected max_norm to be positive and finite, or None, got {max_norm}")


def _check_masters(saved: Mapping[str, Any], masters: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(saved, Mapping) or set(saved) != set(masters):
        raise ValueError("expected one master for each parameter of the groups, got other names")
    for name, master in masters.items():
        got = saved[name]
        if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (master.shape, master.dtype):
            found = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, torch.Tensor) else type(got).__name__
            raise ValueError(f"expected {name!r} to be {master.dtype} {tuple(master.shape)}, got {found}")
