"""What a checkpoint loses when it moves to the other 16-bit format: looked at before the move, not after it."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.formats import FloatFormat, FormatLike, RangeShares, classify, get_format, text_table


@dataclass(frozen=True)
class ConversionReport:
    """Fate of every weight tensor in ``format``, and the largest values that a forward pass made."""

    format: FloatFormat
    weights: dict[str, RangeShares]
    largest_weight: dict[str, float]
    activations: dict[str, float]  #: "module: operator" -> largest finite magnitude; empty without inputs

    @property
    def overflowing(self) -> list[str]:
        """Weights with values that become infinite, and operators whose results would."""
        limit = self.format.overflow_threshold
        return [n for n, s in self.weights.items() if s.overflowed] + [
            n for n, largest in self.activations.items() if largest >= limit
        ]

    @property
    def flushed(self) -> float:
        """The largest share of non-zero weights that becomes zero, over all tensors."""
        return max(s.flushed for s in self.weights.values())

    @property
    def safe(self) -> bool:
        """Whether nothing overflows: necessary for the move, not sufficient for the quality after it."""
        return not self.overflowing

    @property
    def headroom(self) -> float:
        """How many times larger the largest value of all could be before it overflows."""
        largest = max(*self.largest_weight.values(), *self.activations.values(), 0.0)
        return self.format.overflow_threshold / largest if largest else float("inf")

    def __str__(self) -> str:
        ranked = sorted((self.largest_weight | self.activations).items(), key=lambda item: -item[1])
        limit = self.format.overflow_threshold
        rows = [
            (n, f"{v:.4g}", "OVERFLOWS" if v >= limit else f"{limit / v:.3g}x" if v else "-") for n, v in ranked[:8]
        ]
        verdict = "nothing overflows" if self.safe else f"{len(self.overflowing)} would overflow"
        head = f"to {self.format.title}: {verdict}; at most {self.flushed:.2%} of a weight tensor flushed to zero"
        return head + "\n" + text_table(["largest values", "magnitude", "head-room"], rows)


def check_conversion(
    model: nn.Module | Mapping[str, torch.Tensor], target: FormatLike = "fp16", *inputs: Any
) -> ConversionReport:
    """What ``target`` would make of the weights of ``model`` (a module or a state dict) and, with ``inputs``, of its
    intermediate results.

    ``inputs`` are the arguments of one forward pass, which runs in the dtypes the model has now: every operator's
    largest finite result is recorded, those of products inside your own ``forward`` too.  Infinities are left out, so
    that masks of minus infinity do not alarm.  A batch is a sample: take a large and unusual one, and leave head-room.

    Raises TypeError for inputs with a state dict, which cannot run, and for a target without infinity (use
    ``formats.classify`` for those); ValueError if there are no floating-point weights.
    """
    fmt = get_format(target)
    if not fmt.has_inf:
        raise TypeError(f"expected a format that overflows to infinity, got {fmt.title}: use formats.classify")
    if inputs and not isinstance(model, nn.Module):
        raise TypeError("inputs need a module to run through: a state dict has no forward pass")
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    weights = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not weights:
        raise ValueError("expected floating-point weights, got none")
    activations = _largest_results(model, inputs) if inputs else {}
    shares = {name: classify(t, fmt) for name, t in weights.items()}
    return ConversionReport(fmt, shares, {name: _largest(t) for name, t in weights.items()}, activations)


def _largest(t: torch.Tensor) -> float:
    finite = t.detach().float()
    return float(torch.where(finite.isfinite(), finite.abs(), 0.0).max())


class _Watch(TorchDispatchMode):
    """Keeps the largest finite magnitude of every floating-point result, by module and operator."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack, self.largest = stack, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel():
            key = f"{self.stack[-1]}: {func.overloadpacket.__name__}"
            self.largest[key] = max(_largest(result), self.largest.get(key, 0.0))
        return result


def _largest_results(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, float]:
    stack = [""]
    with _module_names(model, stack), torch.no_grad(), _Watch(stack) as watch:
        model(*inputs)
    return watch.largest


@contextlib.contextmanager
def _module_names(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Inside, the last entry of ``stack`` is the name of the module that runs."""

    def leave(_module: nn.Module, _args: tuple, _output: Any) -> None:  # what a hook returns would replace the output
        stack.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _m, _a, n=name: stack.append(n or "model")))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
