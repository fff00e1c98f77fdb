"""Which linear layers of a model become FP8 layers, and why the others do not."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from mixprec_lab.fp8.linear import FP8Linear
from mixprec_lab.fp8.products import MULTIPLE
from mixprec_lab.fp8.recipes import Recipe


class Conversion(NamedTuple):
    """What ``convert_linears`` did, by the names of the layers."""

    converted: tuple[str, ...]
    kept: dict[str, str]  #: name -> the reason why it stayed ``nn.Linear``

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} of {len(self.converted) + len(self.kept)} linear layers in FP8"]
        return "\n".join(lines + [f"  {name} kept: {reason}" for name, reason in self.kept.items()])


def convert_linears(
    model: nn.Module,
    recipe: Recipe | None = None,
    backend: str = "emulated",
    *,
    skip: Iterable[str] = (),
    keep_first_and_last: bool = True,
    pad: bool = False,
    product_dtype: torch.dtype = torch.float32,
) -> Conversion:
    """Replace the ``nn.Linear`` modules of ``model``, at any depth, by ``FP8Linear`` with the same parameters.

    Kept are: layers that ``skip`` names (as in ``named_modules()``, with all that is inside them); the first and the
    last linear layer in the order of registration, which read the data and make the logits, unless
    ``keep_first_and_last`` is False; subclasses of ``nn.Linear``, and layers with hooks (also those of a monitor: make
    it afterwards) or a forward of their own, whose meaning a swap would lose; those inside of an
    ``nn.TransformerEncoderLayer``, whose fast path reads weights and calls no layer; and layers whose sizes are no
    multiples of 16, unless ``pad``.  A layer that is registered twice becomes one.

    Raises KeyError for a name that is no module, TypeError if the model itself is the linear layer, ValueError if
    no layer can be converted; the model is changed only when nothing is in the way.
    """
    if isinstance(model, nn.Linear):
        raise TypeError("expected a model that holds linear layers, got a linear layer: use FP8Linear.from_linear")
    reasons = _reasons(model, {skip} if isinstance(skip, str) else set(skip), keep_first_and_last, pad)
    kept = {name: reason for name, reason in reasons.items() if reason}
    if len(kept) == len(reasons):
        told = "; ".join(f"{name}: {reason}" for name, reason in kept.items()) or "it has none"
        raise ValueError(f"expected a linear layer that can be converted, got none ({told})")
    settings = {"pad": pad, "product_dtype": product_dtype}
    twins = {
        layer: FP8Linear.from_linear(layer, recipe, backend, **settings)
        for name, layer in _linears(model).items()
        if name not in kept
    }
    for module in list(model.modules()):
        for child_name, child in list(module._modules.items()):
            if child in twins:
                setattr(module, child_name, twins[child])
    return Conversion(tuple(name for name in reasons if name not in kept), kept)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _reasons(model: nn.Module, skip: set[str], keep_ends: bool, pad: bool) -> dict[str, str]:
    """For each linear layer the reason to keep it, empty if there is none."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := skip - known:
        names = ", ".join(sorted(known - {""}))
        raise KeyError(f"expected names of modules to skip, got {', '.join(sorted(unknown))}; the names are {names}")
    linears = _linears(model)
    names = list(linears)
    reasons = {name: _unfit(layer, pad) for name, layer in linears.items()}
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer):
            inside, why = {id(m) for m in parent.modules()}, "nn.TransformerEncoderLayer reads its weights past it"
            reasons |= {name: why for name in names if id(linears[name]) in inside}
    ends = {names[-1]: "the last layer makes the logits", names[0]: "the first layer reads the data"} if names else {}
    for name in names:
        if any(name == s or name.startswith(s + ".") for s in skip):
            reasons[name] = "asked for"
        elif keep_ends and name in ends:
            reasons[name] = ends[name]
    return reasons


def _unfit(layer: nn.Linear, pad: bool) -> str:
    sizes = (layer.in_features, layer.out_features)
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is more than an nn.Linear"
    if "forward" in vars(layer) or {name for name, _ in layer.named_parameters()} - {"weight", "bias"}:
        return "its forward or its parameters were changed"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks"
    if any(size % MULTIPLE for size in sizes) and not pad:
        return f"{sizes[0]} x {sizes[1]} are not both multiples of {MULTIPLE}"
    return ""
