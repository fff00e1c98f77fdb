"""Training with FP8 products: ``FP8Trainer``."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mixprec_lab.fp8.backends import choose_backend
from mixprec_lab.fp8.conversion import Conversion, convert_linears
from mixprec_lab.fp8.linear import FP8Linear, update_scales
from mixprec_lab.fp8.recipes import DelayedScaling, Recipe
from mixprec_lab.untouched import evaluating

_COUNTS = ("micro_steps", "steps", "skipped_steps")


class FP8Step(NamedTuple):
    """What one call of ``train_step`` did."""

    loss: torch.Tensor  #: float32, detached, on the device of the model
    grad_norm: torch.Tensor | None  #: before clipping; None in mid-accumulation
    stepped: bool  #: whether the weights were updated


def apply_model(model: nn.Module, inputs: Any) -> Any:
    """``model(**inputs)`` for a dict, ``model(*inputs)`` for a tuple, else ``model(inputs)``."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class FP8Trainer:
    """``model``, trained by ``optimizer`` with its linear layers in FP8 and the rest under BF16 autocast.

    ``convert_to_fp8`` swaps the layers; the first ``train_step`` calls it if you have not.  Parameters stay the same
    float32 tensors, so that ``optimizer`` may be built before or after.  ``backend`` is "auto" or one of ``BACKENDS``;
    ``chosen`` says which one runs and why.  ``recipe`` defaults to ``DelayedScaling()``; ``skip``,
    ``keep_first_and_last`` and ``pad`` are those of ``convert_linears``.

    A step is: forward and loss under autocast, backward outside of it, and after every ``accumulation_steps`` calls
    clipping to a total norm of ``max_norm`` (None: not clipped) and the optimizer; then, once a step, the scales move.
    The loss is not scaled: that is what the scale of each tensor is for.  ``autocast_dtype`` None switches autocast
    off, and everything but the FP8 products then runs in float32.

    Overflow saturates and costs no step.  A step whose gradient norm is inf or NaN is left out and counted in
    ``skipped_steps``.

    Raises TypeError and ValueError for arguments that cannot work: parameters in 16 bits (they would be their own
    masters, and lose updates), an optimizer of another model, numbers out of range; RuntimeError for a backend that
    does not run here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], torch.Tensor] = nn.functional.cross_entropy,
        *,
        backend: str = "auto",
        recipe: Recipe | None = None,
        skip: Iterable[str] = (),
        keep_first_and_last: bool = True,
        pad: bool = False,
        max_norm: float | None = 1.0,
        accumulation_steps: int = 1,
        autocast_dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        self.device = _checked_device(model, optimizer)
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"expected max_norm to be positive and finite, or None, got {max_norm!r}")
        if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(
                f"expected accumulation_steps to be a whole number of at least 1, got {accumulation_steps!r}"
            )
        if autocast_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"expected autocast_dtype to be torch.bfloat16 or None, got {autocast_dtype}: FP16 would need loss "
                f"scaling, see MixedPrecisionTrainer"
            )
        self.chosen = choose_backend(backend, self.device)
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.recipe = DelayedScaling() if recipe is None else recipe
        self.max_norm, self.accumulation_steps, self.autocast_dtype = max_norm, accumulation_steps, autocast_dtype
        self.micro_steps = self.steps = self.skipped_steps = 0
        self.conversion: Conversion | None = None  #: which layers were converted, and why the others were not
        names = (skip,) if isinstance(skip, str) else tuple(skip)
        self._settings = {"skip": names, "keep_first_and_last": keep_first_and_last, "pad": pad}

    def __repr__(self) -> str:
        state = "not converted yet" if self.conversion is None else str(self.conversion).splitlines()[0]
        return f"FP8Trainer({type(self.model).__name__} on {self.device}, {self.recipe}, {state}, {self.chosen})"

    def convert_to_fp8(self) -> Conversion:
        """Swap the linear layers, once; what was converted and what not comes back.  See ``convert_linears``."""
        if self.conversion is None:
            self.conversion = convert_linears(self.model, self.recipe, self.chosen.name, **self._settings)
            for layer in self._layers():
                layer.auto_update = False
        return self.conversion

    def train_step(self, inputs: Any, targets: Any) -> FP8Step:
        """Forward, backward, and after every ``accumulation_steps`` calls one update.

        ``inputs`` is one argument, several if it is a tuple, named ones if it is a dict.  The model is put into
        training mode.  Raises ValueError if the loss is not a scalar.
        """
        self.convert_to_fp8()
        self.model.train()
        with self._autocast():
            loss = self.loss_fn(apply_model(self.model, inputs), targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"expected loss_fn to return a scalar, got {got}")
        if self.micro_steps % self.accumulation_steps == 0:
            self.optimizer.zero_grad()
        (loss.float() / self.accumulation_steps).backward()
        self.micro_steps += 1
        norm, stepped = self._update() if self.micro_steps % self.accumulation_steps == 0 else (None, False)
        return FP8Step(loss.detach().float(), norm, stepped)

    @torch.no_grad()
    def predict(self, inputs: Any) -> Any:
        """The model's output in evaluation mode, a tensor in float32; modes are restored, no scale moves."""
        self.convert_to_fp8()
        with evaluating(self.model), self._autocast():
            outputs = apply_model(self.model, inputs)
        return outputs.float() if isinstance(outputs, torch.Tensor) else outputs

    def scales(self) -> dict[str, float]:
        """The present delayed scales, by layer and operand; empty for recipes without.  Reads from the device."""
        return {
            f"{name}.{role}": float(q.scale)
            for name, layer in self.model.named_modules()
            if isinstance(layer, FP8Linear)
            for role, q in layer.quantizers.items()
            if hasattr(q, "amax_history")
        }

    def _layers(self) -> list[FP8Linear]:
        return [m for m in self.model.modules() if isinstance(m, FP8Linear)]

    def _autocast(self) -> torch.autocast:
        dtype = self.autocast_dtype or torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.autocast_dtype is not None)

    def _update(self) -> tuple[torch.Tensor, bool]:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        stepped = bool(norm.isfinite())
        if stepped:
            if self.max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
            self.optimizer.step()
            self.steps += 1
        else:
            self.skipped_steps += 1
        update_scales(self.model)
        return norm, stepped

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume at a step needs, scaling state included; by reference, as in torch: copy to keep.

        Raises RuntimeError in mid-accumulation: gradients are no part of it.
        """
        if self.micro_steps % self.accumulation_steps:
            raise RuntimeError("expected to be at the end of a step, got mid-accumulation: save after the update")
        self.convert_to_fp8()
        counts = {name: getattr(self, name) for name in _COUNTS}
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"recipe": repr(self.recipe), "counts": counts, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved.

        Raises ValueError for the state of another recipe or for other keys, and what model and optimizer raise for
        their parts; nothing has changed then.
        """
        expected = {"recipe", "counts", "model", "optimizer"}
        if set(state) != expected or state["recipe"] != repr(self.recipe):
            got = f"recipe {state.get('recipe')} and keys {sorted(state)}"
            raise ValueError(f"expected recipe {self.recipe} and keys {sorted(expected)}, got {got}")
        counts = state["counts"]
        if set(counts) != set(_COUNTS) or not all(type(n) is int and n >= 0 for n in counts.values()):
            raise ValueError(f"expected counts of {', '.join(_COUNTS)} as whole numbers, got {counts}")
        self.convert_to_fp8()
        before = copy.deepcopy(self.model.state_dict())
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception:
            self.model.load_state_dict(before)
            raise
        for name, count in counts.items():
            setattr(self, name, count)


def _checked_device(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.device:
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        got = f"{type(model).__name__} and {type(optimizer).__name__}"
        raise TypeError(f"expected an nn.Module and a torch.optim.Optimizer, got {got}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("expected an optimizer whose step() takes no closure, got LBFGS")
    parameters = list(model.parameters())
    devices = {p.device for p in parameters}
    if len(devices) != 1:
        raise ValueError(f"expected a model with parameters on one device, got {sorted(map(str, devices))}")
    narrow = {str(p.dtype) for p in parameters if p.is_floating_point() and p.dtype != torch.float32}
    if narrow:
        raise ValueError(
            f"expected float32 parameters, which are the master weights, got {', '.join(sorted(narrow))}: convert the "
            f"model with .float(), the layers make their FP8 copies themselves"
        )
    known = set(parameters)
    for group in optimizer.param_groups:
        if not known.issuperset(group["params"]):
            raise ValueError("expected an optimizer built on the parameters of the model, got one with others")
    return devices.pop()
