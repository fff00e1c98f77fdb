"""The rooms of the theme "fp8": recipes, conversions and layers; Transformer Engine is a stand-in."""

import types
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from mixprec_lab.checks._verdict import check
from mixprec_lab.checks.broken_code._told import told, with_warnings
from mixprec_lab.checks.broken_code.stand_ins import Linear, transformer_engine
from mixprec_lab.fp8 import DelayedScaling
from mixprec_lab.fp8.recipes import format_of

Tensor = torch.Tensor


def wrong_module(function: Callable[[types.ModuleType], object]) -> None:
    """``broken_code``: a recipe of Transformer Engine with a history of 16."""

    def recipe(history: int) -> object:
        return told(function(transformer_engine), lambda r: f"{type(r).__name__} over {r.amax_history_len} steps")

    check(recipe, [((16,), "DelayedScaling over 16 steps")])


def ignored_argument(function: Callable[[types.ModuleType, int], object]) -> None:
    """``broken_code``: a recipe that looks back over as many steps as asked for."""

    def history(steps: int) -> object:
        return told(function(transformer_engine.common.recipe, steps), lambda r: r.amax_history_len)

    check(history, (((steps,), steps) for steps in (16, 64)))


def one_format(function: Callable[[int], DelayedScaling]) -> None:
    """``broken_code``: E4M3 forward and E5M2 for gradients."""

    def formats(history: int) -> object:
        def words(recipe: DelayedScaling) -> str:
            forward, backward = (format_of(recipe.fp8_format, role).name for role in ("input", "grad_output"))
            return f"{forward} forward, {backward} backward, history {recipe.amax_history_len}"

        return told(function(history), words)

    check(formats, [((16,), "fp8_e4m3 forward, fp8_e5m2 backward, history 16")])


def renamed_context(function: Callable[[types.ModuleType, object], AbstractContextManager]) -> None:
    """``broken_code``: FP8 autocast under a recipe, without a warning."""

    def under(history: int) -> object:
        def run() -> object:
            context = function(transformer_engine.pytorch, recipe)
            if context is None or context is ...:
                return context
            with context as active:
                return "this recipe" if active is recipe else "another recipe"

        recipe = transformer_engine.common.recipe.DelayedScaling(amax_history_len=history)
        got, warned = with_warnings(run)
        return told(got, lambda which: f"{which}, {warned} warnings")

    check(under, [((16,), "this recipe, 0 warnings")])


def half_parameters(function: Callable[[int], nn.Module]) -> None:
    """``broken_code``: a layer that trains in FP16 under autocast and torch's scaler."""

    def train(size: int) -> object:
        def words(layer: nn.Module) -> str:
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
            scaler, before = torch.amp.GradScaler("cpu", init_scale=8.0), layer.weight.detach().clone()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = layer(torch.ones(4, size)).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            return f"{layer.weight.dtype} moved by {(before - layer.weight).mean().item():.3g}"

        return told(function(size), words)

    check(train, (((size,), "torch.float32 moved by 0.5") for size in (4, 16)))


def _zoo(depth: int) -> nn.Module:
    """Linear layers at depths 1 to ``depth``."""
    model = nn.Sequential(nn.Linear(4, 4))
    for _ in range(depth - 1):
        model = nn.Sequential(model, nn.GELU(), nn.Linear(4, 4))
    return model


def direct_children(function: Callable[[nn.Module], list[str]]) -> None:
    """``broken_code``: the names of all linear layers, at any depth."""

    def names(depth: int) -> object:
        return told(function(_zoo(depth)), lambda got: ", ".join(sorted(got)))

    check(names, [((1,), "0"), ((2,), "0.0, 2"), ((4,), "0.0.0.0, 0.0.2, 0.2, 2")])


def early_optimizer(function: Callable[[nn.Module, float], torch.optim.Optimizer]) -> None:
    """``broken_code``: a new head, and an optimizer that trains it."""

    def training(lr: float) -> object:
        def words(optimizer: torch.optim.Optimizer) -> str:
            before = [p.detach().clone() for p in model.parameters()]
            model["head"](model["body"](torch.ones(1, 4))).sum().backward()
            optimizer.step()
            moved = sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            return f"head {model['head'].out_features} wide, {moved} of {len(before)} tensors moved"

        model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        nn.init.constant_(model["body"].weight, 0.5)
        return told(function(model, lr), words)

    check(training, [((0.125,), "head 3 wide, 4 of 4 tensors moved")])


def any_shape(function: Callable[[nn.Module], bool]) -> None:
    """``broken_code``: whether a layer can run in FP8: linear, both sizes multiples of 16."""

    def eligible(inputs: int, outputs: int) -> object:
        return told(function(nn.Linear(inputs, outputs, device="meta")), bool)

    sizes = ((64, 32, True), (1024, 1000, False), (100, 64, False), (10, 10, False), (16, 16, True))
    check(eligible, (((i, o), answer) for i, o, answer in sizes))


def swallowed_error(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """``broken_code``: the output of a layer with FP32 parameters, for inputs of any float dtype."""

    def output(dtype: torch.dtype) -> object:
        layer = Linear(2, 1, bias=False)
        nn.init.constant_(layer.weight, 0.5)
        got = function(layer, torch.tensor([1.0, 3.0], dtype=dtype))
        return told(got, lambda y: y if isinstance(y, str) else f"{y.tolist()} in {y.dtype}")

    check(output, (((dtype,), "[2.0] in torch.float32") for dtype in (torch.float32, torch.bfloat16)))
