"""Where the ledgers listen: functions of torch that are replaced while a step is open, and put back when none is.

The functions are replaced once for the whole process, however many monitors have a step open; each call is told to the
ledgers of its own thread.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import clip_grad
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from mixprec_lab.nan_debugging.ledger import Ledger

_lock = threading.Lock()
_local = threading.local()
_open = 0  # steps of all threads
_undo: list[Callable[[], None]] = []


@contextmanager
def listen(ledger: "Ledger") -> Iterator[None]:
    """Tell ``ledger`` what this thread calls, while the context lasts."""
    global _open
    with _lock:
        if _open == 0:
            _install()
        _open += 1
    mine = _listeners()
    mine.append(ledger)
    try:
        yield
    finally:
        mine.remove(ledger)
        with _lock:
            _open -= 1
            if _open == 0:
                while _undo:
                    _undo.pop()()


def _listeners() -> list["Ledger"]:
    if not hasattr(_local, "ledgers"):
        _local.ledgers = []
    return _local.ledgers


def _replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    original = owner.__dict__[name]
    setattr(owner, name, make(original))
    _undo.append(lambda: setattr(owner, name, original))


def _install() -> None:
    from mixprec_lab.loss_scaling.scaler import _LossScaler

    for cls, names in (
        (torch.amp.GradScaler, ("scale", "unscale_", "step", "update")),
        (_LossScaler, ("scale_loss", "unscale_gradients", "step", "update_scale")),
    ):
        for name, make in zip(names, (_scale, _unscale, _step, _update), strict=True):
            _replace(cls, name, make)
    _replace(clip_grad, "_get_total_norm", _total_norm)
    for module in (clip_grad, torch.nn.utils):
        _replace(module, "clip_grad_value_", _clip_value)
    for cls in (torch.optim.Optimizer, torch.nn.Module):
        _replace(cls, "zero_grad", _zero_grad)
    _replace(torch.autograd, "backward", _backward)
    _replace(LRScheduler, "step", _scheduler)
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: _tell("optimizer_steps", optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, *_: _tell("optimizer_stepped", optimizer)),
    ]
    _undo.extend(handle.remove for handle in handles)


def _tell(what: str, *args: Any) -> None:
    for ledger in list(_listeners()):
        getattr(ledger, what)(*args)


def _scale(original: Callable) -> Callable:
    def scale(scaler: Any, outputs: Any) -> Any:
        result = original(scaler, outputs)
        _tell("scaled", scaler, outputs, result)
        return result

    return scale


def _unscale(original: Callable) -> Callable:
    def unscale(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scaler, optimizer, *args, **kwargs)
        _tell("unscaled", scaler, optimizer)
        return result

    return unscale


def _step(original: Callable) -> Callable:
    def step(scaler: Any, *args: Any, **kwargs: Any) -> Any:
        _tell("scaler_step_begins")
        try:
            return original(scaler, *args, **kwargs)
        finally:
            _tell("scaler_steps", scaler)

    return step


def _update(original: Callable) -> Callable:
    def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scaler, *args, **kwargs)
        _tell("updated", scaler)
        return result

    return update


def _total_norm(original: Callable) -> Callable:
    def total_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = list(tensors)
        result = original(tensors, *args, **kwargs)
        _tell("clipped", tensors, result)
        return result

    return total_norm


def _clip_value(original: Callable) -> Callable:
    def clip_value(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        _tell("clipped", [p.grad for p in parameters if p.grad is not None], None)
        return original(parameters, *args, **kwargs)

    return clip_value


def _zero_grad(original: Callable) -> Callable:
    def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
        _tell("zeroed")
        return original(owner, *args, **kwargs)

    return zero_grad


def _backward(original: Callable) -> Callable:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        _tell("backward", tensors)
        try:
            return original(tensors, *args, **kwargs)
        finally:
            _tell("after_backward")

    return backward


def _scheduler(original: Callable) -> Callable:
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scheduler, *args, **kwargs)
        _tell("scheduler_stepped", scheduler)
        return result

    return step
