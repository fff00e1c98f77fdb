"""How a step goes with each kind of loss scaler: unscale, clip, step or skip, update."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch


class LossScaler(Protocol):
    """What a scaler needs to have: ``mixprec_lab.loss_scaling.DynamicLossScaler`` and its relatives do."""

    def scale_loss(self, outputs: Any) -> Any: ...
    def unscale_gradients(self, target: Any) -> Any: ...
    def step(self, optimizer: Any, *, update: bool) -> bool: ...
    def update_scale(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


_METHODS = ("scale_loss", "unscale_gradients", "step", "update_scale", "state_dict", "load_state_dict")
Step = Callable[[torch.optim.Optimizer, Callable[[], None]], bool]


def loop_of(scaler: "LossScaler | torch.amp.GradScaler | None") -> tuple[Callable[[torch.Tensor], torch.Tensor], Step]:
    """How to scale a loss, and the function ``(optimizer, clip) -> stepped`` that makes one whole step.

    The scale is updated even if clipping or stepping raises, so that training can go on after it.  TypeError for an
    unknown scaler.
    """
    if scaler is None:
        return _same, _plain
    if isinstance(scaler, torch.amp.GradScaler):
        return scaler.scale, partial(_with_grad_scaler, scaler)
    missing = [method for method in _METHODS if not callable(getattr(scaler, method, None))]
    if missing:
        raise TypeError(
            f"expected a torch.amp.GradScaler, a mixprec_lab.loss_scaling scaler or None, got "
            f"{type(scaler).__name__}, which has no {', '.join(missing)}"
        )
    return scaler.scale_loss, partial(_with_loss_scaler, scaler)


def _same(loss: torch.Tensor) -> torch.Tensor:
    return loss


def _plain(optimizer: torch.optim.Optimizer, clip: Callable[[], None]) -> bool:
    clip()
    optimizer.step()
    return True


def _with_loss_scaler(scaler: LossScaler, optimizer: torch.optim.Optimizer, clip: Callable[[], None]) -> bool:
    scaler.unscale_gradients(optimizer)
    try:
        clip()
        return scaler.step(optimizer, update=False)
    finally:
        scaler.update_scale()


def _with_grad_scaler(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, clip: Callable[[], None]) -> bool:
    scaler.unscale_(optimizer)
    before = scaler.get_scale()
    try:
        clip()
        scaler.step(optimizer)
    finally:
        scaler.update()
    return scaler.get_scale() >= before  # its step() returns None whether it stepped or not; a skip always backs off


def clip_gradients(parameters: list[torch.Tensor], max_norm: float, *, may_skip: bool) -> torch.Tensor:
    """Scale the gradients of ``parameters`` down, in place, to a total L2 norm of at most ``max_norm``.

    The norm before comes back.  With an infinite or NaN gradient it is not finite, and dividing by it would spread the
    damage to all others: they are left alone if a scaler ``may_skip`` the step.  Else, and if finite gradients overflow
    the norm, RuntimeError.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if bool(norm.isfinite()):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
    if may_skip and not all(bool(g.isfinite().all()) for g in gradients):
        return norm
    raise RuntimeError(
        f"the total norm of the gradients is {norm.item()}, so they cannot be clipped to {max_norm:g}: no step was "
        f"taken. Look for the first NaN or inf in data, loss or weights; in FP16 give a scaler, which skips such steps"
    )
