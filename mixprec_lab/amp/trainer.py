"""One training step in mixed precision, in the one order that works.

Forward pass and loss under autocast; backward outside of it, on the scaled loss; and once a window is full: unscale,
look, clip, step or skip, move the scale, and tell the scheduler only if a step was taken.  Nothing is read from the
device that torch's own scaler does not read.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from mixprec_lab.amp.policy import dtype_name
from mixprec_lab.amp.scaling import scaling_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHUNK = 1024  # scales are kept on the device, so many to a tensor


class StepResult(NamedTuple):
    """What ``train_step`` returns: two 0-dim tensors on the device, detached and not read."""

    loss: torch.Tensor  #: of this micro-batch, neither scaled nor divided
    scale: torch.Tensor  #: the loss scale that its gradients carry; 1 without a scaler


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The 16-bit dtype to train in on ``device``, and the reason.

    BF16 where the hardware computes in it, FP16 on older CUDA devices (torch would emulate BF16 there, slowly, and
    call it supported), BF16 on the CPU.  ValueError for other devices.
    """
    if device.type == "cpu":
        return torch.bfloat16, "BF16 on a CPU: FP32's range, so no loss scaling"
    if device.type != "cuda":
        raise ValueError(f"expected a CPU or CUDA device, got {device}")
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    name = torch.cuda.get_device_name(device)
    if native:
        return torch.bfloat16, f"{name} computes in BF16: FP32's range, so no loss scaling"
    return torch.float16, f"{name} has no BF16 arithmetic: FP16 with loss scaling"


class MixedPrecisionTrainer:
    """Trains ``model`` by ``optimizer`` in mixed precision on ``torch.amp``; parameters stay FP32.

    ``loss_fn(output, targets)`` must return a scalar and is called under autocast.  ``dtype`` is torch.float16,
    torch.bfloat16, or None for ``choose_dtype``; ``reason`` says why.  ``device`` defaults to the parameters'.
    ``scaler`` is a ``torch.amp.GradScaler`` or a scaler of ``mixprec_lab.loss_scaling``; None means a GradScaler for
    FP16 and none for BF16.

    ``max_norm`` clips the gradients of the optimizer's parameters, unscaled, to that norm; ``grad_norm`` is then the
    norm of the last step before clipping, a tensor that is not read.  ``on_gradients(model)`` is called once a step
    with unscaled gradients, before they are clipped.  ``accumulation_steps`` micro-batches make one step, on the mean
    of their losses; ``flush()`` steps on an unfinished window.  ``scheduler.step()`` is called after each step that
    was taken, not after skipped ones; with a fused optimizer under a scaler the skip is decided on the device, and a
    scheduler costs the one read per step that other optimizers cost anyway.

    Raises TypeError and ValueError for arguments that cannot work: no trainable parameter, parameters in 16 bits or on
    two devices, an optimizer that holds parameters of another model, or that needs a closure, a scaler that is
    switched off, and numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        scaler: Any = None,
        max_norm: float | None = None,
        accumulation_steps: int = 1,
        scheduler: Any = None,
        on_gradients: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.device = _checked_device(model, optimizer, loss_fn, device)
        if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(
                f"expected accumulation_steps to be a whole number of at least 1, got {accumulation_steps!r}"
            )
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"expected max_norm to be positive and finite, or None, got {max_norm!r}")
        if dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(
                f"expected dtype to be torch.float16, torch.bfloat16 or None, got {dtype}: those are what autocast "
                f"lowers to; to train in FP32 use no autocast"
            )
        self.dtype, self.reason = (dtype, "asked for") if dtype else choose_dtype(self.device)
        self.model, self.optimizer, self.loss_fn, self.scheduler = model, optimizer, loss_fn, scheduler
        self.max_norm, self.accumulation_steps, self.on_gradients = max_norm, accumulation_steps, on_gradients
        self.grad_norm: torch.Tensor | None = None  #: norm of the last step's gradients before clipping
        self._scaling = scaling_for(self.dtype, self.device, scaler)
        self._pending = 0  # micro-batches in the open window
        self._windows = 0  # windows that ended in a step or a skip
        self._skipped = 0  # skips that the host knows of
        self._skipped_on_device: torch.Tensor | None = None  # and those that only the device knows of
        self._scales: list[torch.Tensor] = []
        self._called, self._found_inf = False, None
        optimizer.register_step_pre_hook(self._note_step)

    def __repr__(self) -> str:
        scaler = getattr(self._scaling, "scaler", None)
        return (
            f"MixedPrecisionTrainer({type(self.model).__name__} on {self.device}, {dtype_name(self.dtype)} "
            f"({self.reason}), {type(scaler).__name__ if scaler else 'no scaler'})"
        )

    @property
    def scaler(self) -> Any:
        """The scaler in use, None if the loss is not scaled."""
        return getattr(self._scaling, "scaler", None)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite.  May read from the device."""
        return self._skipped + (0 if self._skipped_on_device is None else int(self._skipped_on_device))

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer took.  May read from the device."""
        return self._windows - self.skipped_steps

    @property
    def scales(self) -> torch.Tensor:
        """The loss scale at each step so far, taken or skipped: (steps,), float32, on the CPU.  Reads the device."""
        return torch.cat(self._scales)[: self._windows].cpu() if self._scales else torch.empty(0)

    def train_step(self, inputs: Any, targets: Any) -> StepResult:
        """Forward, backward and, if the window is full, the step: the loss and the scale, as tensors.

        ``inputs`` is a tensor, a tuple (``model(*inputs)``) or a dict (``model(**inputs)``), on the model's device and
        in the dtypes it has: integer ids stay integers.  Raises TypeError for other inputs and for a loss that is no
        floating-point tensor, ValueError for a loss that is not a scalar or does not depend on the parameters; the
        window is then as it was before.
        """
        if not isinstance(inputs, torch.Tensor | tuple | dict):
            raise TypeError(f"expected inputs to be a tensor, a tuple or a dict, got {type(inputs).__name__}")
        with torch.autocast(self.device.type, dtype=self.dtype):
            output = self._forward(inputs)
            loss = _checked_loss(self.loss_fn(output, targets))
        if self._pending == 0:
            self.optimizer.zero_grad()
            self.model.zero_grad()
        scale = self._scaling.present(self.device)
        share = loss if self.accumulation_steps == 1 else loss / self.accumulation_steps
        self._scaling.scale(share).backward()
        self._pending += 1
        if self._pending == self.accumulation_steps:
            self._finish_window(scale)
        return StepResult(loss.detach(), scale)

    def flush(self) -> bool:
        """Step on the micro-batches of an unfinished window, on the mean of *their* losses; False if there are none."""
        if self._pending == 0:
            return False
        self._finish_window(self._scaling.present(self.device), self.accumulation_steps / self._pending)
        return True

    def analyze_gradient_scale(self) -> "Figure":
        """A figure: the loss scale over the steps on a log2 axis, and how often it moved by how many powers of two.

        The last point is the scale of the step to come, so that the last move is in it.  Reads from the device.
        """
        from mixprec_lab.plots.amp import gradient_scale

        present = self._scaling.present(self.device).cpu()
        return gradient_scale(torch.cat([self.scales, present[None]]))

    def _forward(self, inputs: Any) -> Any:
        if isinstance(inputs, torch.Tensor):
            return self.model(inputs)
        return self.model(**inputs) if isinstance(inputs, dict) else self.model(*inputs)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the model, and those of a loss function that has some."""
        yield from self.model.named_parameters(prefix="model")
        if isinstance(self.loss_fn, nn.Module):
            yield from self.loss_fn.named_parameters(prefix="loss_fn")

    def _finish_window(self, scale: torch.Tensor, correction: float = 1.0) -> None:
        """Everything between the last backward pass and the next window, in order."""
        self._pending = 0
        graded = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not graded:
            raise RuntimeError("no gradient reached the optimizer's parameters: does the loss depend on them?")
        self._called, self._found_inf = False, None
        try:
            if self.max_norm is not None or self.on_gradients is not None or correction != 1:
                self._scaling.unscale(self.optimizer)
                self._prepare(graded, correction)
            self._scaling.step(self.optimizer)
        except BaseException:
            self._scaling.abandon()  # or the next window's gradients would pass for unscaled ones
            raise
        self._record(scale)

    def _prepare(self, graded: list[nn.Parameter], correction: float) -> None:
        """Everything between unscaling and the step."""
        if correction != 1:
            torch._foreach_mul_([p.grad for p in graded], correction)
        if self.on_gradients is not None:
            self.on_gradients(self.model)
        if self.max_norm is not None:
            self.grad_norm = _clip(graded, self.max_norm)

    def _note_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """A hook: the scaler did call ``optimizer.step``; a fused one may still skip, by a flag on the device."""
        self._called, self._found_inf = True, getattr(optimizer, "found_inf", None)

    def _record(self, scale: torch.Tensor) -> None:
        place = self._windows % _CHUNK
        if place == 0:
            self._scales.append(torch.empty(_CHUNK, device=self.device))
        self._scales[-1][place].copy_(scale)
        self._windows += 1
        taken = self._called
        if not taken:
            self._skipped += 1
        elif self._found_inf is not None:
            skipped = self._found_inf > 0
            if self.scheduler is not None:
                taken = not bool(skipped)
            before = 0 if self._skipped_on_device is None else self._skipped_on_device
            self._skipped_on_device = before + skipped.long()
        if self.scheduler is not None and taken:
            self.scheduler.step()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of everything a bit-exact continuation needs; training goes on without changing it.

        Model, optimizer, scaler, scheduler, torch's generators (CPU, and the device's), counters, and the gradients
        of an unfinished window.  Not in it: the order of your data, and the generators of Python and NumPy.
        """
        gradients = {n: p.grad for n, p in self._named_parameters() if p.grad is not None} if self._pending else {}
        return copy.deepcopy({
            "dtype": dtype_name(self.dtype), "device": self.device.type, "accumulation_steps": self.accumulation_steps,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "loss_fn": self.loss_fn.state_dict() if isinstance(self.loss_fn, nn.Module) else None,
            "scaler": self._scaling.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "pending": self._pending, "gradients": gradients, "windows": self._windows, "skipped": self.skipped_steps,
            "scales": self.scales,
        })  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved.

        Raises ValueError for a state with other keys, of another dtype, device or ``accumulation_steps``, with or
        without a scaler or a scheduler where this trainer has it otherwise, and whatever model and optimizer raise
        for a state that does not fit them.  After an error the trainer is what it was before the call.
        """
        before = self.state_dict()
        self._check_state(state, before)
        try:
            self._load(state)
        except Exception:
            self._load(before)
            raise

    def _check_state(self, state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or set(state) != set(mine):
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"expected the state of a MixedPrecisionTrainer with the keys {sorted(mine)}, got {got}")
        for key in ("dtype", "device", "accumulation_steps"):
            if state[key] != mine[key]:
                raise ValueError(f"expected a state with {key} {mine[key]!r} as in this trainer, got {state[key]!r}")
        for key in ("scaler", "scheduler"):
            if bool(state[key]) != bool(mine[key]):
                expected, got = ("with", "without") if mine[key] else ("without", "with")
                raise ValueError(f"expected a state {expected} a {key} as in this trainer, got one {got}")

    def _load(self, state: Mapping[str, Any]) -> None:
        state = copy.deepcopy(dict(state))
        self.model.load_state_dict(state["model"])
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.load_state_dict(state["loss_fn"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaling.load_state_dict(state["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for name, parameter in self._named_parameters():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self._pending, self._windows, self._skipped = state["pending"], state["windows"], state["skipped"]
        self._skipped_on_device = None
        chunks = state["scales"].to(self.device).split(_CHUNK) if state["windows"] else ()
        self._scales = [nn.functional.pad(chunk, (0, _CHUNK - len(chunk))) for chunk in chunks]
        torch.set_rng_state(state["rng"])
        if state["device_rng"] is not None:
            torch.cuda.set_rng_state(state["device_rng"], self.device)


def _checked_device(model: Any, optimizer: Any, loss_fn: Any, device: torch.device | str | None) -> torch.device:
    """The device of the parameters, if model, optimizer and device fit together."""
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer) or not callable(loss_fn):
        got = ", ".join(type(x).__name__ for x in (model, optimizer, loss_fn))
        raise TypeError(f"expected a torch.nn.Module, a torch.optim.Optimizer and a function, got {got}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "expected an optimizer that steps without a closure, got LBFGS: GradScaler cannot skip inside one"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("expected a model with parameters that require a gradient, got none")
    narrow = sorted({dtype_name(p.dtype) for p in model.parameters() if p.dtype.itemsize < 4 and p.is_floating_point()})
    if narrow:
        raise ValueError(
            f"expected FP32 parameters, got some in {', '.join(narrow)}: do not call half() or bfloat16() on a model "
            f"that autocast runs; its gradients could not be unscaled and its updates would be lost"
        )
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"expected all parameters on one device, got {', '.join(sorted(map(str, devices)))}")
    found = devices.pop()
    if device is not None and torch.empty(0, device=device).device != found:
        raise ValueError(
            f"expected a model on {device}, got its parameters on {found}: move it with model.to({device!r})"
        )
    known = {id(p) for p in model.parameters()}
    known |= {id(p) for p in loss_fn.parameters()} if isinstance(loss_fn, nn.Module) else set()
    foreign = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"expected an optimizer of this model's parameters, got {foreign} that are not: build the optimizer from "
            f"model.parameters() after the model is final"
        )
    return found


def _checked_loss(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
        got = loss.dtype if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TypeError(f"expected loss_fn to return a floating-point tensor, got {got}")
    if loss.ndim:
        raise ValueError(f"expected a scalar loss, got shape {tuple(loss.shape)}: reduce it with mean() or sum()")
    if not loss.requires_grad:
        raise ValueError("expected a loss that depends on the parameters, got one without a gradient")
    return loss


def _clip(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    if any(p.grad.layout != torch.strided for p in parameters):
        raise ValueError("clipping needs dense gradients, got sparse ones: build the Embedding with sparse=False")
    return nn.utils.clip_grad_norm_(parameters, max_norm)
