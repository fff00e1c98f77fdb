"""Loss scalers behind one face: none, ``torch.amp.GradScaler``, or one of the course's own."""

from typing import Any

import torch

_INTERFACE = ("scale", "scale_loss", "unscale_gradients", "step", "update_scale", "state_dict", "load_state_dict")


class NoScaling:
    """The loss as it is: what BF16 needs."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` itself."""
        return loss

    def present(self, device: torch.device) -> torch.Tensor:
        """The scale as a 0-dim FP32 tensor: one."""
        return torch.ones((), device=device)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to do."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step ``optimizer``."""
        optimizer.step()

    def abandon(self) -> None:
        """Forget that gradients were unscaled, after an exception; nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError unless ``state`` is that of no scaler."""
        if state:
            raise ValueError(f"expected no scaler state (this trainer scales no loss), got {sorted(state)}")


class TorchScaling(NoScaling):
    """``torch.amp.GradScaler``: scale and tracker live on the device, and reading them would be a sync."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` times the scale."""
        return self.scaler.scale(loss)

    def present(self, device: torch.device) -> torch.Tensor:
        """The scale as a 0-dim FP32 tensor, not read."""
        return self.scaler.scale(torch.ones((), device=device))

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, in place."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step ``optimizer`` or skip it, then move the scale."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def abandon(self) -> None:
        """Forget that gradients were unscaled; scale and growth tracker stay."""
        self.scaler.update(self.scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """The scaler's own."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The scaler's own; ValueError for the state of another kind of scaler."""
        if set(state) != set(self.scaler.state_dict()):
            raise ValueError(f"expected the state of a torch.amp.GradScaler, got the keys {sorted(state)}")
        self.scaler.load_state_dict(state)


class OwnScaling(NoScaling):
    """A scaler with the interface of ``mixprec_lab.loss_scaling``: its scale is a Python float."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` times the scale."""
        return self.scaler.scale_loss(loss)

    def present(self, device: torch.device) -> torch.Tensor:
        """The scale as a 0-dim FP32 tensor."""
        return torch.full((), self.scaler.scale, dtype=torch.float32, device=device)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, in place."""
        self.scaler.unscale_gradients(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step ``optimizer`` or skip it, then move the scale."""
        self.scaler.step(optimizer)

    def abandon(self) -> None:
        """Forget that gradients were unscaled; the scaler counts a clean step."""
        self.scaler.update_scale(False)

    def state_dict(self) -> dict[str, Any]:
        """The scaler's own."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The scaler's own, errors included."""
        self.scaler.load_state_dict(state)


def scaling_for(dtype: torch.dtype, device: torch.device, scaler: Any) -> NoScaling:
    """The face of ``scaler``; for None a ``GradScaler`` if ``dtype`` is FP16, and none if it is BF16.

    Raises ValueError for a GradScaler that is switched off (as ``GradScaler("cuda")`` is, with a warning, where there
    is no CUDA device), TypeError for an object with neither interface.
    """
    if scaler is None:
        return TorchScaling(torch.amp.GradScaler(device.type)) if dtype == torch.float16 else NoScaling()
    if isinstance(scaler, torch.amp.GradScaler):
        if not scaler.is_enabled():
            raise ValueError(
                f"expected an enabled GradScaler, got one that is switched off: build it with "
                f'torch.amp.GradScaler("{device.type}"), or leave scaler out'
            )
        return TorchScaling(scaler)
    if all(hasattr(scaler, name) for name in _INTERFACE):
        return OwnScaling(scaler)
    raise TypeError(
        f"expected scaler to be a torch.amp.GradScaler or a scaler of mixprec_lab.loss_scaling, "
        f"got {type(scaler).__name__}"
    )
