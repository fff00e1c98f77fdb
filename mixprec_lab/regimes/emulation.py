"""Matrix products in arithmetic that a CPU does not have: TF32 operands, or partial sums in BF16."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.rounding import quantize

_ATEN = torch.ops.aten
_WORDS = ("mm", "linear", "conv", "attention", "einsum", "dot", "mv", "lstm", "gru", "rnn")
CHUNK = 8  #: products that are added exactly before a short sum is rounded


class EmulatedProducts(TorchDispatchMode):
    """While active, forward and backward products of matrices and convolutions run in emulated arithmetic.

    ``operands="tf32"`` rounds both operands of every product to TF32, sums stay FP32.  ``sums=torch.bfloat16`` adds
    ``CHUNK`` products at a time and rounds the partial sum each time; then convolutions raise.  ``seen`` counts the
    products by operator.  RuntimeError for an operator that multiplies and is not known here: nothing runs unrounded.
    """

    def __init__(self, operands: str | None = None, sums: torch.dtype | None = None) -> None:
        if (operands is None) == (sums is None):
            raise ValueError(f"expected either operands or sums, got {operands!r} and {sums!r}")
        super().__init__()
        self.operands, self.sums = operands, sums
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        emulation = _EMULATIONS.get(func)
        if emulation is None:
            if any(word in name for word in _WORDS) and name not in _HARMLESS:
                raise RuntimeError(f"expected a product that can be emulated, got {func}: write it as mm or bmm")
            return func(*args, **kwargs)
        self.seen[name] = self.seen.get(name, 0) + 1
        return emulation(self, func, args, kwargs)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as an operand."""
        return quantize(x, self.operands) if self.operands else x

    def product(self, a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """``a @ b``, summed as asked for, on top of ``start``."""
        if self.sums is None:
            total = torch.matmul(self.round(a), self.round(b))
            return total if start is None else total + start
        a, b = a.float(), b.float()
        total = torch.zeros((), dtype=torch.float32) if start is None else start.float()
        for at in range(0, a.shape[-1], CHUNK):
            total = (total + torch.matmul(a[..., at : at + CHUNK], b[..., at : at + CHUNK, :])).to(self.sums).float()
        return total


def _mm(mode: EmulatedProducts, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b = args
    return mode.product(a, b).to(a.dtype)


def _addmm(mode: EmulatedProducts, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    bias, a, b = args
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        raise RuntimeError(f"expected addmm with beta and alpha 1, got {kwargs}")
    return mode.product(a, b, bias).to(a.dtype)


def _convolution(mode: EmulatedProducts, func: Any, args: tuple, kwargs: dict) -> Any:
    if mode.sums is not None:
        raise RuntimeError("expected products of matrices, got a convolution: short sums are emulated for those only")
    count = 3 if func is _ATEN.convolution_backward.default else 2
    operands = [mode.round(x) for x in args[:count]]
    return func(*operands, *args[count:], **kwargs)


_EMULATIONS: dict[Any, Callable] = {
    _ATEN.mm.default: _mm,
    _ATEN.bmm.default: _mm,
    _ATEN.addmm.default: _addmm,
    _ATEN.convolution.default: _convolution,
    _ATEN.convolution_backward.default: _convolution,
}
_HARMLESS = ("convert_element_type",)
