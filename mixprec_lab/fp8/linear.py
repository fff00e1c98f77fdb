"""``FP8Linear``: ``nn.Linear`` with quantized operands, behind three backends."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed, nn

from mixprec_lab.fp8.backends import choose_backend, transformer_engine
from mixprec_lab.fp8.products import MULTIPLE, FP8Products, Way
from mixprec_lab.fp8.recipes import ROLES, DelayedScaling, Recipe
from mixprec_lab.fp8.scaling import DelayedQuantizer
from mixprec_lab.fp8.te import TELinear


class FP8Linear(nn.Module):
    """``x @ weight.T + bias``, and both products of its backward pass, with operands in FP8 and sums in FP32.

    ``recipe``: ``DelayedScaling()``, ``CurrentScaling()``, ``FixedScaling()`` or your own (see ``recipes``).
    ``backend``: "emulated" runs on every device with operands that are exact, in plain matrix products; "scaled_mm"
    calls ``torch._scaled_mm`` on FP8 matrix units (on a CPU: a slow reference); "transformer_engine" calls
    ``te.Linear``; "auto" takes the best that runs.  ``chosen`` says which it is and why.

    ``weight`` (out_features, in_features) and ``bias`` stay in ``dtype``, float32 by default: they are the master
    weights, and FP8 copies are made for each call.  Input (..., in_features) may be float32, float16 or bfloat16; the
    output has its dtype, or autocast's where that is on.  Emulated products run in ``product_dtype``: float32, or
    bfloat16, which holds FP8 operands exactly, is faster on BF16 matrix units, and rounds what comes out to 8 bits.

    FP8 matrix units take dimensions that are multiples of 16, so that features that are not raise ValueError here too,
    and so does a number of rows that is not where a gradient will be needed; ``pad=True`` fills up with zeros instead.

    Under delayed scaling the state moves at the next call in training mode, or, with ``auto_update = False``, when
    ``update_scales`` is called: once a step, and activation checkpointing then recomputes the same values.  In
    evaluation mode the state is read and left alone.  It is part of ``state_dict()``.

    Values out of range saturate, infinities too; NaN stays NaN.  Second derivatives are not available.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        recipe: Recipe | None = None,
        backend: str = "emulated",
        *,
        pad: bool = False,
        product_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(f"expected sizes of at least 1, got {in_features} and {out_features}")
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._take(linear, recipe, backend, pad, product_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        recipe: Recipe | None = None,
        backend: str = "emulated",
        *,
        pad: bool = False,
        product_dtype: torch.dtype = torch.float32,
    ) -> "FP8Linear":
        """An FP8 twin of ``linear`` that holds the very same parameters: optimizers built on them keep working."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        self = cls.__new__(cls)
        self._take(linear, recipe, backend, pad, product_dtype)
        self.train(linear.training)
        return self

    def _take(self, linear: nn.Linear, recipe: Recipe | None, backend: str, pad: bool, product_dtype: Any) -> None:
        super().__init__()
        recipe = DelayedScaling() if recipe is None else recipe
        if not callable(getattr(recipe, "quantizer", None)):
            raise TypeError(f"expected a recipe such as DelayedScaling(), got {type(recipe).__name__}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, size in (("in_features", self.in_features), ("out_features", self.out_features)):
            if size % MULTIPLE and not pad:
                raise ValueError(
                    f"expected {name} to be a multiple of {MULTIPLE}, which FP8 matrix units need, got {size}: "
                    f"choose another size, keep nn.Linear, or fill up with zeros by pad=True"
                )
        if product_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"expected product_dtype to be torch.float32 or torch.bfloat16, got {product_dtype}")
        self.chosen = choose_backend(backend, linear.weight.device)
        if self.chosen.name not in recipe.backends:
            raise ValueError(f"{recipe} runs on {', '.join(recipe.backends)}, got backend {self.chosen.name!r}")
        self.recipe, self.pad, self.product_dtype, self.auto_update = recipe, pad, product_dtype, True
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.quantizers = nn.ModuleDict()
        self._te: TELinear | None = None
        if self.chosen.name == "transformer_engine":
            self._te = TELinear(transformer_engine(), self, recipe)
        else:
            self.quantizers.update({role: recipe.quantizer(role) for role in ROLES})
            self.quantizers.to(linear.weight.device)
            for quantizer in self.quantizers.values():
                quantizer.dtype = product_dtype

    @property
    def backend(self) -> str:
        """The backend that runs."""
        return self.chosen.name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        self._check(x)
        out_dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            out_dtype = torch.get_autocast_dtype(x.device.type)
        if self._te is not None:
            return self._te(self, x, out_dtype)
        if self.training and self.auto_update:
            update_scales(self)
        way = Way(self.quantizers, self.backend, self.training, out_dtype, self.product_dtype)
        rows = x.reshape(-1, self.in_features)
        return FP8Products.apply(rows, self.weight, self.bias, way).view(*x.shape[:-1], self.out_features)

    def _check(self, x: torch.Tensor) -> None:
        if not (isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)):
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"expected a float32, float16 or bfloat16 tensor, got {got}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}), got {tuple(x.shape)}")
        rows = x.numel() // self.in_features
        differentiated = torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad)
        if rows % MULTIPLE and differentiated and not self.pad:
            raise ValueError(
                f"expected a number of rows that is a multiple of {MULTIPLE}, which the product for the weight's "
                f"gradient sums over, got {rows}: change the batch, or fill up with zeros by pad=True"
            )

    def extra_repr(self) -> str:
        """Sizes, recipe and backend."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"recipe={self.recipe}, backend={self.backend}"
        )

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._te is not None:
            destination[prefix + "_extra_state"] = self._te.state()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        """As always; Transformer Engine's state lies where ``te.Linear`` itself keeps it."""
        key = prefix + "_extra_state"
        rest = {name: value for name, value in state_dict.items() if name != key or self._te is None}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if self._te is None:
            return
        if key in state_dict:
            self._te.load(state_dict[key])
        elif strict:
            missing.append(key)


def update_scales(module: nn.Module) -> int:
    """Move the delayed scales of every ``FP8Linear`` in ``module`` by what they staged; their number comes back.

    Where ``torch.distributed`` is initialized and the recipe says ``reduce_amax``, the staged amaxes of all ranks are
    compared first, in one call: every rank must call this with the same layers.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, FP8Linear)]
    delayed = [(layer, q) for layer in layers for q in layer.quantizers.values() if isinstance(q, DelayedQuantizer)]
    _reduce([q for layer, q in delayed if layer.recipe.reduce_amax])
    for _, q in delayed:
        q.update()
    return len(delayed)


def _reduce(quantizers: Iterable[DelayedQuantizer]) -> None:
    """The largest staged amax of all ranks, in place; NaN travels as infinity, which freezes the scale alike."""
    quantizers = list(quantizers)
    if not quantizers or not (distributed.is_available() and distributed.is_initialized()):
        return
    staged = torch.stack([q.amax_history[0] for q in quantizers]).nan_to_num(nan=torch.inf, posinf=torch.inf)
    distributed.all_reduce(staged, distributed.ReduceOp.MAX)
    for q, value in zip(quantizers, staged.unbind(), strict=True):
        q.amax_history[0] = value
