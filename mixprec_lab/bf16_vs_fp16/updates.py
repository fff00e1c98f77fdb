"""How gradients reach BF16 weights: over FP32 masters, or into the narrow weights themselves."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from mixprec_lab.master_weights import BF16AdamW, MasterWeightOptimizer

_FOLLOWED = ("lr", "betas", "eps", "weight_decay")


class MasterUpdate:
    """FP32 masters for the BF16 parameters; ``exact`` holds the values they start from, unrounded."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, exact: Mapping[str, torch.Tensor]) -> None:
        self._masters = MasterWeightOptimizer(optimizer, model)
        with torch.no_grad():
            for name, master in self._masters.named_masters().items():
                master.copy_(exact[name])
        self._masters.copy_master_to_model()

    def collect(self) -> None:
        """Add the model's gradients to the masters' in FP32, and free them."""
        self._masters.copy_grads_to_master()

    def gradients(self, *, complete: bool) -> list[torch.Tensor]:
        """The FP32 gradients; with ``complete``, zeros stand for missing ones."""
        masters = [m for m in self._masters.named_masters().values() if m.requires_grad]
        for master in masters if complete else ():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in masters if m.grad is not None]

    def step(self) -> None:
        """One step of the masters, rounded into the model."""
        self._masters.step()

    def zero(self) -> None:
        """Forget the gradients."""
        self._masters.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Masters, optimizer, and the gradients accumulated so far."""
        named = self._masters.named_masters().items()
        gradients = {name: m.grad for name, m in named if m.grad is not None}
        return {"optimizer": self._masters.state_dict(), "narrow": None, "gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved."""
        self._masters.load_state_dict(state["optimizer"])
        for name, master in self._masters.named_masters().items():
            saved = state["gradients"].get(name)
            master.grad = None if saved is None else saved.to(master.device, copy=True)


class GradientSlot:
    """A parameter and the FP32 sum of its gradients."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.total: torch.Tensor | None = None


def gradient_slots(
    model: nn.Module, optimizer: torch.optim.Optimizer, own: torch.optim.Optimizer | None
) -> list[GradientSlot]:
    """One slot for each parameter that ``optimizer`` or ``own`` steps, in the model's order."""
    groups = optimizer.param_groups + ([] if own is None else own.param_groups)
    stepped = {p for group in groups for p in group["params"]}
    return [GradientSlot(name, p) for name, p in model.named_parameters() if p in stepped and p.requires_grad]


class NarrowUpdate:
    """No masters: gradients are summed in FP32, rounded once to the dtype of their parameter, and stepped.

    ``optimizer`` steps what it holds; ``own``, a ``BF16AdamW`` with one group for each of its groups, the rest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, own: BF16AdamW | None, slots: list[GradientSlot]) -> None:
        self._optimizer, self._own, self._slots = optimizer, own, slots

    def collect(self) -> None:
        """Add the model's gradients to the FP32 sums, and free them."""
        for slot in self._slots:
            if slot.parameter.grad is not None:
                gradient = slot.parameter.grad.float()
                slot.total = gradient if slot.total is None else slot.total.add_(gradient)
                slot.parameter.grad = None

    def gradients(self, *, complete: bool) -> list[torch.Tensor]:
        """The FP32 gradients; with ``complete``, zeros stand for missing ones."""
        for slot in self._slots if complete else ():
            if slot.total is None:
                slot.total = torch.zeros_like(slot.parameter, dtype=torch.float32)
        return [slot.total for slot in self._slots if slot.total is not None]

    def step(self) -> None:
        """One step of both optimizers, the second with the hyper-parameters of the first."""
        for slot in self._slots:
            slot.parameter.grad = None if slot.total is None else slot.total.to(slot.parameter.dtype)
        self._optimizer.step()
        if self._own is not None:
            for group, leader in zip(self._own.param_groups, self._optimizer.param_groups, strict=True):
                group.update({key: leader[key] for key in _FOLLOWED})
            self._own.step()

    def zero(self) -> None:
        """Forget the gradients."""
        for slot in self._slots:
            slot.total = slot.parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers, and the gradients accumulated so far."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "narrow": None if self._own is None else self._own.state_dict(),
            "gradients": {slot.name: slot.total for slot in self._slots if slot.total is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved."""
        self._optimizer.load_state_dict(state["optimizer"])
        if self._own is not None:
            self._own.load_state_dict(state["narrow"])
        for slot in self._slots:
            saved = state["gradients"].get(slot.name)
            slot.total = None if saved is None else saved.to(slot.parameter.device, copy=True)


def check_followable(optimizer: torch.optim.Optimizer, update: str) -> None:
    """Raise TypeError unless ``optimizer`` is a ``torch.optim.AdamW``, ValueError for what ``BF16AdamW`` cannot do."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise TypeError(
            f"expected a torch.optim.AdamW for update={update!r}, got {type(optimizer).__name__}: "
            f"update='master' takes any optimizer"
        )
    for option in ("amsgrad", "maximize"):
        if any(group[option] for group in optimizer.param_groups):
            raise ValueError(f"BF16AdamW has no option {option}: build the AdamW without it, or use update='master'")


def bf16_adamw_for(
    optimizer: torch.optim.AdamW, update: Literal["stochastic", "kahan"], generator: torch.Generator | None
) -> BF16AdamW:
    """A ``BF16AdamW`` that takes the BF16 parameters out of ``optimizer``, group by group; FP32 ones stay in it."""
    groups = []
    for group in optimizer.param_groups:
        narrow = [p for p in group["params"] if p.dtype == torch.bfloat16]
        group["params"] = [p for p in group["params"] if p.dtype != torch.bfloat16]
        groups.append({"params": narrow, "update": update} | {key: group[key] for key in _FOLLOWED})
    return BF16AdamW(groups, update=update, generator=generator)
