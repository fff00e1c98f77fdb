"""A learning rate that is cut, and stays cut when the scheduler goes on."""

from collections.abc import Iterable
from typing import Any

import torch

_GROUP = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # what schedulers keep in the groups
_LISTS = ("base_lrs", "max_lrs")


def scale_learning_rates(optimizers: Iterable[Any], schedulers: Iterable[Any], factor: float) -> list[float]:
    """The learning rates of all groups after everything that they are computed from is multiplied by ``factor``.

    That is more than ``lr``: most schedulers compute the next rate from ``initial_lr``, ``base_lrs`` or ``eta_min``,
    and would undo the cut.  Schedulers inside of schedulers are included.  Rates that are tensors change in place.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    seen: set[int] = set()  # several groups may hold one tensor
    for group in groups:
        for key in _GROUP:
            value = group.get(key)
            if isinstance(value, torch.Tensor):
                if id(value) not in seen:
                    value.mul_(factor)
                    seen.add(id(value))
            elif value is not None:
                group[key] = value * factor
    for scheduler in _all_schedulers(schedulers):
        for key in _LISTS:
            if hasattr(scheduler, key):
                setattr(scheduler, key, [value * factor for value in getattr(scheduler, key)])
        if hasattr(scheduler, "eta_min"):
            scheduler.eta_min *= factor
    return [float(group["lr"]) for group in groups]


def _all_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    found = []
    for scheduler in schedulers:
        found += [scheduler, *_all_schedulers(getattr(scheduler, "_schedulers", ()))]
    return found
