"""Unscaling and checking many gradients in one pass, whoever holds them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch


class Check:
    """One unscaling: the parameters it covered, and a flag on the device that is above 0 if one was not finite."""

    def __init__(self, parameters: list[torch.Tensor], flags: list[torch.Tensor]) -> None:
        self.parameters = parameters
        first, *others = flags
        self.flag = first + sum(f.to(first.device, non_blocking=True) for f in others) if others else first

    @cached_property
    def ids(self) -> frozenset[int]:
        """The ids of the parameters."""
        return frozenset(map(id, self.parameters))

    @cached_property
    def found(self) -> bool:
        """Whether a gradient was not finite; the first look reads the flag from the device."""
        return bool(self.flag.item())


def parameters_of(target: Any) -> list[torch.Tensor]:
    """The parameters of an optimizer or of an iterable (a generator is read once), each once, in their order.

    Raises TypeError for anything else, a single tensor and a module included; ValueError if there are none.
    """
    if hasattr(target, "param_groups"):  # torch has checked these: tensors, each once, at least one
        return [p for group in target.param_groups for p in group["params"]]
    if isinstance(target, Iterable) and not isinstance(target, torch.Tensor | torch.nn.Module | str | Mapping):
        parameters = list(target)
    else:
        raise TypeError(
            f"expected an optimizer or an iterable of parameters, got {type(target).__name__}: for a module give "
            f"model.parameters()"
        )
    if not parameters:
        raise ValueError("expected parameters, got none: a generator that was used before has nothing left to give")
    for p in parameters:
        if not isinstance(p, torch.Tensor):
            raise TypeError(f"expected parameters, got {type(p).__name__}: give model.parameters()")
    return list({id(p): p for p in parameters}.values())


@torch.no_grad()
def check_and_unscale(parameters: list[torch.Tensor], inverse_scale: float) -> Check:
    """Multiply the gradients by ``inverse_scale`` in place and check them as they were, a device and dtype at a time.

    Sparse gradients are unscaled through their values.  Raises RuntimeError if no parameter has a gradient, ValueError
    for FP16 gradients; in both cases nothing was changed.
    """
    covered, groups = group_gradients(parameters)
    if not covered:
        raise RuntimeError(
            f"none of the {len(parameters)} parameters has a gradient, so no inf check was recorded: call "
            f"scale_loss(loss).backward() first, and see that the optimizer holds the model's parameters"
        )
    if any(dtype == torch.float16 for _, dtype in groups):
        raise ValueError(
            "Attempting to unscale FP16 gradients: the quotients would be flushed to zero in FP16 again. Keep the "
            "parameters in FP32 and use autocast instead of model.half(), or step FP32 master weights "
            "(mixprec_lab.master_weights)"
        )
    flags: dict[torch.device, torch.Tensor] = {}
    for (device, _), gradients in groups.items():
        if device not in flags:
            flags[device] = torch.zeros((), dtype=torch.float32, device=device)
        inverse = torch.full((), inverse_scale, dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, flags[device], inverse)
    return Check(covered, list(flags.values()))


Groups = dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]


def group_gradients(parameters: list[torch.Tensor]) -> tuple[list[torch.Tensor], Groups]:
    """The parameters that have a gradient, and the gradients (of sparse ones the values) by device and dtype."""
    covered, groups = [], defaultdict(list)
    for p in parameters:
        gradient = p.grad
        if gradient is None:
            continue
        covered.append(p)
        dense = gradient if gradient.layout is torch.strided else gradient._values()
        groups[dense.device, dense.dtype].append(dense)
    return covered, groups
