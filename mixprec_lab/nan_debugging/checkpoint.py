"""Everything that decides how training goes on, as one value: taken, compared, and put back bit by bit.

A copy of the parameters is not a checkpoint.  The next step also depends on buffers, on the optimizer's moments, on the
scale and its growth tracker, on the scheduler and on the random state; and ``state_dict()`` hands out references, which
follow the training that they should preserve.  ``capture`` copies all of it, detached.  ``restore`` looks at everything
first, puts it back, compares what is there with what was saved, and undoes its work if anything is amiss.
"""

import copy
import random
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

VERSION = 1
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DICTS = (dict, OrderedDict, Counter)  # those that torch.load(weights_only=True) accepts
_COMPARED = ("model", "buffers", "optimizers", "scaler", "schedulers")
_KEYS = {*_COMPARED, "version", "step", "metadata", "kinds", "groups", "rng", "extra", "lr_factor"}


@dataclass(frozen=True)
class Parts:
    """What is saved and restored together."""

    model: nn.Module
    optimizers: tuple[Any, ...]
    scaler: Any
    schedulers: tuple[Any, ...]


def parts_of(model: Any, optimizer: Any, scaler: Any, scheduler: Any) -> Parts:
    """The parts of a run, where optimizer and scheduler are one or a list; errors as ``NumericalStabilityFixer``."""
    optimizers = _several(optimizer)
    inside = [o.scaler for o in optimizers if getattr(o, "scaler", None) is not None]
    parts = Parts(model, optimizers, inside[0] if scaler is None and inside else scaler, _several(scheduler))
    _check_parts(parts)
    return parts


def capture(
    parts: Parts, step: int, *, extra: Any = None, lr_factor: float = 1.0, keep_device: bool = False
) -> dict[str, Any]:
    """A deep copy of ``parts`` and of the generators of torch (CPU, CUDA), Python and NumPy.

    It holds tensors, numbers, strings, lists, tuples and dicts only: nothing that unpickling would have to run.
    Tensors go to the CPU, or stay on their device if ``keep_device``.  Raises TypeError, with the path, for a state
    that is made of anything else.  Gradients are not in it.
    """
    state = {
        "version": VERSION, "step": step, "lr_factor": lr_factor, "extra": extra, **_live(parts),
        "metadata": getattr(parts.model.state_dict(), "_metadata", {}),
        "kinds": _kinds(parts), "groups": _group_names(parts), "rng": _generators(),
    }  # fmt: skip
    return plain(state, None if keep_device else torch.device("cpu"))


def plain(value: Any, device: torch.device | None = None, path: str = "") -> Any:
    """A deep copy of nested dicts, lists, tuples, scalars and dense tensors; tensors detached, on ``device`` if given.

    NumPy scalars become Python's.  Raises TypeError for anything else, with its path.
    """
    if isinstance(value, torch.Tensor):
        copied = value.detach()
        if copied.layout == torch.strided and type(copied) is torch.Tensor:
            return copied.clone() if device is None else copied.to(device, copy=True)
    elif type(value) in _SCALARS:
        return value
    elif isinstance(value, np.generic):
        return value.item()
    elif type(value) in (list, tuple):
        return type(value)(plain(item, device, f"{path}[{i}]") for i, item in enumerate(value))
    elif type(value) in _DICTS and all(type(key) in _SCALARS for key in value):
        return type(value)({key: plain(item, device, f"{path}.{key}".lstrip(".")) for key, item in value.items()})
    raise TypeError(
        f"expected {path or 'the state'} to be made of dense tensors, numbers, strings, lists, tuples and dicts, got "
        f"{type(value).__name__}: a checkpoint holds nothing that must be run to be read"
    )


def restore(parts: Parts, state: Mapping[str, Any], *, keep_device: bool = False) -> None:
    """Put ``state`` back into ``parts`` and the generators, bit by bit, and clear all gradients.

    Raises ValueError if it does not fit: of other names, shapes, dtypes, kinds of optimizer, groups, with or without a
    scaler or a scheduler; nothing is changed then.  Raises what a part raises while it loads, and RuntimeError if one
    did not take its state exactly; everything but the gradients is then as it was.  The copy for that case goes to the
    CPU, or stays on its device if ``keep_device``.
    """
    check_fits(parts, state)
    before = capture(parts, 0, keep_device=keep_device)
    try:
        forget_step(parts)
        _load(parts, state)
        wrong = first_difference({key: state[key] for key in _COMPARED}, _live(parts))
        if wrong:
            raise RuntimeError(f"expected a restored state that is bit for bit the saved one, got another {wrong}")
    except BaseException:
        _load(parts, before)
        raise


def check_fits(parts: Parts, state: Mapping[str, Any]) -> None:
    """Nothing, or a ValueError that says in what ``state`` is not one of these ``parts``."""
    if not isinstance(state, Mapping) or set(state) != _KEYS:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected a checkpoint with the keys {sorted(_KEYS)}, got {got}")
    if state["version"] != VERSION:
        raise ValueError(f"expected a checkpoint of version {VERSION}, got version {state['version']!r}")
    live = _live(parts)
    for kind in ("model", "buffers"):
        _check_tensors(state[kind], live[kind])
    for what, mine in (("kinds", _kinds(parts)), ("groups", _group_names(parts))):
        wrong = first_difference(mine, state[what], what)
        if wrong:
            raise ValueError(f"expected a checkpoint of these objects, with the {what} {mine}, got {state[what]}")
    for kind in ("scaler", "schedulers"):
        if _keys(state[kind]) != _keys(live[kind]):
            raise ValueError(f"expected a {kind} state with {_keys(live[kind])}, got {_keys(state[kind])}")
    for mine, saved in zip(live["optimizers"], state["optimizers"], strict=True):
        if _keys(mine.get("param_groups")) != _keys(saved.get("param_groups")):
            raise ValueError(
                f"expected parameter groups with {_keys(mine.get('param_groups'))}, got "
                f"{_keys(saved.get('param_groups'))}: was the checkpoint made by another release of torch?"
            )
    devices = torch.cuda.device_count() if state["rng"]["cuda"] else 0
    if len(state["rng"]["cuda"]) > devices:
        raise ValueError(f"expected generators of at most {devices} GPUs, got {len(state['rng']['cuda'])}")


def forget_step(parts: Parts) -> None:
    """Clear all gradients, and let the scaler forget that some were unscaled; scale and counters stay."""
    for optimizer in parts.optimizers:
        optimizer.zero_grad(set_to_none=True)
    parts.model.zero_grad(set_to_none=True)
    scaler = parts.scaler
    if not isinstance(scaler, torch.amp.GradScaler):
        if scaler is not None:
            state = scaler_state(scaler)
            scaler.update_scale(False)  # closes the step, as a monitor sees; what it counted is taken back
            scaler.load_state_dict(state)
    elif scaler.is_enabled():
        device = next(parts.model.parameters()).device
        scaler.scale(torch.ones((), device=device))  # it has a scale to update only once it has scaled something
        scaler.update(scaler.get_scale())


def bad_tensors(parts: Parts, infinite_buffers: Mapping[str, int]) -> list[str]:
    """Names of parameters, buffers and optimizer state that hold NaN or inf; one read from the device.

    Infinities of a buffer count from one more than ``infinite_buffers`` says: a mask may be made of them.
    """
    named, flags = [], []
    for name, tensor, allowed in _watched(parts, infinite_buffers):
        wide = tensor.detach().float() if tensor.dtype.itemsize < 2 else tensor.detach()
        named.append(name)
        flags.append(wide.isnan().any() | (wide.isinf().sum() > allowed))
    read = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return [name for name, bad in zip(named, read, strict=True) if bad]


def count_infinite_buffers(model: nn.Module) -> dict[str, int]:
    """The number of infinities in each buffer that has some."""
    counts = {n: int(b.float().isinf().sum()) for n, b in model.named_buffers() if b.is_floating_point() and b.numel()}
    return {name: count for name, count in counts.items() if count}


def first_difference(expected: Any, got: Any, path: str = "") -> str:
    """The path of the first place where two nested values differ in a bit; "" if there is none.  NaN equals NaN."""
    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        same = (expected.dtype, expected.shape) == (got.dtype, got.shape) and torch.equal(
            tensor_bytes(expected), tensor_bytes(got)
        )
        return "" if same else path or "tensor"
    if isinstance(expected, Mapping) and isinstance(got, Mapping) and expected.keys() == got.keys():
        parts = ((expected[key], got[key], f"{path}.{key}".lstrip(".")) for key in expected)
    elif isinstance(expected, list | tuple) and isinstance(got, list | tuple) and len(expected) == len(got):
        parts = ((a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(expected, got, strict=True)))
    else:
        same = not isinstance(expected, torch.Tensor | Mapping | list | tuple) and not isinstance(got, torch.Tensor)
        return "" if same and (repr(plain(expected)) == repr(plain(got))) else path or "value"
    return next((found for a, b, where in parts if (found := first_difference(a, b, where))), "")


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in the order of its elements: 1-dim uint8, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


# -- what there is ---------------------------------------------------------------------------------------------------


def _live(parts: Parts) -> dict[str, Any]:
    """The state of all parts by reference."""
    model = parts.model.state_dict()
    return {
        "model": dict(model),
        "buffers": {n: b for n, b in parts.model.named_buffers(remove_duplicate=False) if n not in model},
        "optimizers": [optimizer.state_dict() for optimizer in parts.optimizers],
        "scaler": scaler_state(parts.scaler),
        "schedulers": [scheduler.state_dict() for scheduler in parts.schedulers],
    }


def scaler_state(scaler: Any) -> dict[str, Any] | None:
    """The scaler's state, within a step too; None without one."""
    if scaler is None or isinstance(scaler, torch.amp.GradScaler):
        return None if scaler is None else scaler.state_dict()
    twin = copy.copy(scaler)  # the scaler itself refuses while a check is open
    twin._begin()
    return twin.state_dict()


def _kinds(parts: Parts) -> dict[str, list[str]]:
    everything = {
        "optimizers": parts.optimizers, "scaler": () if parts.scaler is None else (parts.scaler,),
        "schedulers": parts.schedulers,
    }  # fmt: skip
    return {what: [type(part).__name__ for part in several] for what, several in everything.items()}


def _group_names(parts: Parts) -> list[list[list[str]]]:
    """The names of the parameters in each group of each optimizer; "" for those that are not the model's."""
    names = {parameter: name for name, parameter in parts.model.named_parameters()}
    return [[[names.get(p, "") for p in group["params"]] for group in o.param_groups] for o in parts.optimizers]


def _generators() -> dict[str, Any]:
    legacy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
    }


def _all_parameters(parts: Parts) -> list[torch.Tensor]:
    """Those of the model, and masters that only an optimizer holds; each once."""
    held = [p for o in parts.optimizers for group in o.param_groups for p in group["params"]]
    return list({id(p): p for p in (*parts.model.parameters(), *held)}.values())


def _watched(parts: Parts, infinite_buffers: Mapping[str, int]) -> list[tuple[str, torch.Tensor, int]]:
    """Every floating-point tensor that a step leaves behind: its name, itself, and the infinities that it may have."""
    names = {parameter: name for name, parameter in parts.model.named_parameters()}
    for optimizer in parts.optimizers:
        for name, master in getattr(optimizer, "named_masters", dict)().items():
            names.setdefault(master, f"{name} (master)")
    found = [(f"parameter {names.get(p, '')}", p, 0) for p in _all_parameters(parts)]
    found += [(f"buffer {n}", b, infinite_buffers.get(n, 0)) for n, b in parts.model.named_buffers()]
    for optimizer in parts.optimizers:
        for parameter, entry in optimizer.state.items():
            if isinstance(entry, Mapping):
                owner = names.get(parameter, "a parameter")
                found += [(f"{key} of {owner}", t, 0) for key, t in entry.items() if isinstance(t, torch.Tensor)]
    return [(n, t, allowed) for n, t, allowed in found if (t.is_floating_point() or t.is_complex()) and t.numel()]


def _keys(value: Any) -> Any:
    """The shape of nested state: its keys."""
    if isinstance(value, list):
        return [_keys(item) for item in value]
    return sorted(map(str, value)) if isinstance(value, Mapping) else None


def _check_tensors(saved: Any, mine: Mapping[str, Any]) -> None:
    if not isinstance(saved, Mapping) or saved.keys() != mine.keys():
        missing, foreign = sorted(mine.keys() - set(saved)), sorted(set(saved) - mine.keys())
        raise ValueError(
            f"expected a checkpoint of this model, got one without {missing[:5]} and with {foreign[:5]} that it lacks"
        )
    for name, tensor in mine.items():
        facts = [(t.dtype, tuple(t.shape)) if isinstance(t, torch.Tensor) else None for t in (tensor, saved[name])]
        if facts[0] != facts[1]:
            raise ValueError(f"expected {name!r} to be {facts[0]} as in this model, got {facts[1]} in the checkpoint")


def _several(x: Any) -> tuple[Any, ...]:
    return () if x is None else tuple(x) if isinstance(x, list | tuple) else (x,)


def _check_parts(parts: Parts) -> None:
    if not isinstance(parts.model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(parts.model).__name__}")
    known = set(parts.model.parameters())
    if not known or not parts.optimizers:
        raise ValueError("expected a model with parameters, and an optimizer, got none: there is nothing to train")
    needed = ("state_dict", "load_state_dict")
    for kind, objects, methods in (
        ("optimizer", parts.optimizers, (*needed, "zero_grad", "param_groups", "state")),
        ("scheduler", parts.schedulers, (*needed, "step")),
    ):
        for thing in objects:
            missing = [method for method in methods if not hasattr(thing, method)]
            if missing:
                raise TypeError(f"expected {kind} to be one or a list, got a {type(thing).__name__} without {missing}")
    if not (parts.scaler is None or isinstance(parts.scaler, torch.amp.GradScaler) or hasattr(parts.scaler, "_begin")):
        raise TypeError(
            f"expected scaler to be a torch.amp.GradScaler or a scaler of mixprec_lab.loss_scaling, got a "
            f"{type(parts.scaler).__name__}"
        )
    plainly = [o for o in parts.optimizers if isinstance(o, torch.optim.Optimizer)]
    foreign = sum(p not in known for o in plainly for group in o.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"expected optimizers of this model's parameters, got {foreign} that are not: pass all modules as one "
            f"nn.ModuleDict, and a MasterWeightOptimizer instead of the optimizer in it"
        )


# -- putting it back -------------------------------------------------------------------------------------------------


def _load(parts: Parts, state: Mapping[str, Any]) -> None:
    """All parts, from copies, so that training does not write into the checkpoint."""
    state = plain({key: state[key] for key in (*_COMPARED, "metadata", "rng")})
    model = OrderedDict(state["model"])
    model._metadata = state["metadata"]
    parts.model.load_state_dict(model)
    buffers = dict(parts.model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, saved in state["buffers"].items():
            buffers[name].copy_(saved)
    for optimizer, saved in zip(parts.optimizers, state["optimizers"], strict=True):
        _load_optimizer(optimizer, saved)
    if state["scaler"]:
        parts.scaler.load_state_dict(state["scaler"])
    for scheduler, saved in zip(parts.schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(saved)
    _load_generators(state["rng"])


def _load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Its own ``load_state_dict``; then what that has cast to the parameter's dtype, as torch does, in full again."""
    kept = copy.copy(saved)
    optimizer.load_state_dict(saved)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in kept["state"].items():
        if isinstance(index, int) and isinstance(entry, Mapping):
            present = optimizer.state[parameters[index]]
            for key, value in entry.items():
                if isinstance(value, torch.Tensor) and value.dtype != present[key].dtype:
                    present[key] = value.to(present[key].device)


def _load_generators(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"].cpu())
    for index, generator in enumerate(saved["cuda"]):
        torch.cuda.set_rng_state(generator.cpu(), index)
    random.setstate(saved["python"])
    legacy = saved["numpy"]
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": np.array(legacy["state"]["key"], np.uint32)}})
