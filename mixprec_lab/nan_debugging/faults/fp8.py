"""Faults of FP8: a stale scale, gradients without one, dimensions that a GPU refuses.

Values are clamped to the largest of the format before the cast: torch 2.12 changed what the cast does beyond it.
"""

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.nan_debugging.faults._networks import chain, linear, plain, regression, sgd
from mixprec_lab.nan_debugging.faults._run import Run, fault

E4M3, LARGEST = torch.float8_e4m3fn, 448.0


def _cast(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """``x`` as E4M3 with ``scale`` sees it, back in x's dtype."""
    return ((x * scale).clamp(-LARGEST, LARGEST).to(E4M3).to(x.dtype)) / scale


class _Quantizer(nn.Module):
    """E4M3 with one scale from the largest value of the last 16 calls, or one a row from this call; gradients pass."""

    def __init__(self, current: bool) -> None:
        super().__init__()
        self.current = current
        self.register_buffer("amax_history", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        amax = x.detach().abs().amax()
        known = self.amax_history.amax() if self.amax_history.any() else amax
        self.amax_history = torch.cat([amax[None], self.amax_history[:-1]])
        if self.current:
            known = x.detach().abs().amax(-1, keepdim=True)
        return x + (_cast(x, LARGEST / known) - x).detach()


@fault(
    "Delayed scaling: a spike of one step saturates, and in the 16 steps after it everything underflows",
    "fp8_stale_amax", "forward", step=20, silent=True, modules=("quantizer",), operations=("amax", "float8", "to_copy"),
    cure="scale by the current tensor, a shorter history, or blocks",
)  # fmt: skip
def stale_amax(seed: int, repaired: bool) -> Run:
    model = chain(seed, quantizer=lambda: _Quantizer(repaired), squash=nn.Tanh, fc=linear(16, 4))
    x, y = regression(seed)
    spiked = x.clone()
    spiked[3, 0] = 1e6
    return plain(model, sgd(model), lambda i: F.mse_loss(model(spiked if i == 20 else x), y), 40)


class _GradientCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, scaled: bool) -> torch.Tensor:
        ctx.scaled = scaled
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _cast(grad, LARGEST / grad.abs().amax() if ctx.scaled else 1.0), None


class _Grad(nn.Module):
    """Identity whose gradient goes through E4M3."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _GradientCast.apply(x, self.scaled)


@fault(
    "Gradients cast to E4M3 without a scale: most are below 2**-10 and become zero",
    "fp8_grad_underflow", "backward", silent=True,
    modules=("grad",), operations=("float8", "underflow", "to_copy", "GradientCast"),
    cure="scale the gradient by its largest value before the cast, and use E5M2 for gradients",
)  # fmt: skip
def gradients_in_e4m3(seed: int, repaired: bool) -> Run:
    model = chain(seed, fc=linear(16, 4), grad=lambda: _Grad(repaired))
    x, y = regression(seed, 1024)
    return plain(model, sgd(model, 1.0), lambda i: F.mse_loss(model(x), y))


class _ScaledMM(torch.autograd.Function):
    """x @ weight.T by torch._scaled_mm with scales of 1; the backward pass is exact."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        one = torch.ones(())
        return torch._scaled_mm(x.to(E4M3), weight.to(E4M3).t(), one, one, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class _Fp8Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ScaledMM.apply(F.pad(x, (0, self.weight.shape[1] - x.shape[1])), self.weight)


@fault(
    "An FP8 product over 18 columns: a CPU computes it, CUDA wants multiples of 16 and raises",
    "fp8_alignment", "forward", silent=True, modules=("fc",), operations=("_scaled_mm",),
    cure="pad the dimensions to multiples of 16 (of 32 for MXFP8)",
)  # fmt: skip
def fp8_alignment(seed: int, repaired: bool) -> Run:
    inputs = 32 if repaired else 18
    model = chain(seed, fc=lambda: _Fp8Linear(inputs, 16))
    x, y = regression(seed, inputs=18, outputs=16)
    return plain(model, sgd(model), lambda i: F.mse_loss(model(x), y))
