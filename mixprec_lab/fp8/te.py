"""The third backend: ``te.Linear`` of Transformer Engine, on the parameters of an ``FP8Linear``."""

from typing import Any

import torch
from torch import nn

from mixprec_lab.fp8.backends import TransformerEngine
from mixprec_lab.fp8.recipes import DelayedScaling, Recipe

_FORMATS = {"hybrid": "HYBRID", "e4m3": "E4M3"}


class TELinear:
    """A ``te.Linear`` that is no submodule: it shares its owner's parameters and keeps scaling state of its own.

    Calls run in an ``autocast`` region of their own, unless one is open already: then its recipe holds.
    """

    def __init__(self, te: TransformerEngine, owner: nn.Module, recipe: Recipe) -> None:
        self._te, self.recipe = te, te_recipe(te, recipe)
        weight = owner.weight
        self._layer = te.pytorch.Linear(
            owner.in_features,
            owner.out_features,
            bias=owner.bias is not None,
            params_dtype=weight.dtype,
            device=weight.device,
        )
        self._share(owner)

    def __call__(self, owner: nn.Module, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """(..., in_features) -> (..., out_features) in ``out_dtype``; rows are filled up with zeros where asked for."""
        if self._layer.weight is not owner.weight or self._layer.training != owner.training:
            self._share(owner)
        rows = x.reshape(-1, owner.in_features)
        missing = -len(rows) % 16 if owner.pad else 0
        padded = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        with torch.autocast(x.device.type, dtype=out_dtype, enabled=out_dtype != torch.float32), self._region():
            output = self._layer(padded.to(out_dtype))
        return output[: len(rows)].view(*x.shape[:-1], owner.out_features)

    def _region(self) -> Any:
        return self._te.pytorch.autocast(enabled=True, recipe=self.recipe)

    def _share(self, owner: nn.Module) -> None:
        self._layer.weight = owner.weight
        if owner.bias is not None:
            self._layer.bias = owner.bias
        self._layer.train(owner.training)

    def state(self) -> Any:
        """The scaling state, as Transformer Engine saves it."""
        return self._layer.get_extra_state()

    def load(self, state: Any) -> None:
        """Take a saved scaling state back."""
        self._layer.set_extra_state(state)


def te_recipe(te: TransformerEngine, recipe: Recipe) -> Any:
    """Transformer Engine's recipe that means the same."""
    fmt = getattr(te.recipe.Format, _FORMATS[recipe.fp8_format])
    if isinstance(recipe, DelayedScaling):
        return te.recipe.DelayedScaling(
            margin=recipe.margin,
            fp8_format=fmt,
            amax_history_len=recipe.amax_history_len,
            amax_compute_algo=recipe.amax_compute_algo,
            reduce_amax=recipe.reduce_amax,
        )
    return te.recipe.Float8CurrentScaling(fp8_format=fmt)
