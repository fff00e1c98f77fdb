"""Faults of what is kept in 16 bits between steps: weights, moments, averages, the residual stream."""

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.nan_debugging.faults._networks import (
    adam,
    chain,
    classification,
    linear,
    mlp,
    plain,
    regression,
    sgd,
)
from mixprec_lab.nan_debugging.faults._run import Probe, Run, fault, seeded


def _kept_in(model: nn.Module, dtype: torch.dtype, repaired: bool) -> tuple[nn.Module, torch.dtype]:
    """The model in ``dtype``, or, repaired, in FP32; and the dtype that it is in now."""
    return (model, torch.float32) if repaired else (model.to(dtype), dtype)


@fault(
    "Adam on FP16 weights: eps 1e-8 is 0 there, the second moment underflows, and weights become NaN",
    "eps_underflow", "optimizer", modules=("^optimizer$",), operations=("addcdiv", "div", "optimizer"),
    cure="FP32 weights under autocast; or fused=True, which computes in FP32; or eps of 1e-4",
)  # fmt: skip
def adam_in_fp16(seed: int, repaired: bool) -> Run:
    model, dtype = _kept_in(mlp(seed), torch.float16, repaired)
    x, y = regression(seed)
    x[:, 0] = 0  # a feature that is always off: gradients that are exactly zero
    return plain(model, adam(model), lambda i: F.mse_loss(model(x.to(dtype)).float(), y))


@fault(
    "Adam's second moment in FP16 is zero: with eps 1e-4 the update is not normalised any more",
    "second_moment_underflow", "optimizer", silent=True,
    modules=("^optimizer$", "fc"), operations=("exp_avg_sq", "addcmul", "optimizer"),
    cure="keep the optimizer state in FP32",
)  # fmt: skip
def second_moment_fp16(seed: int, repaired: bool) -> Run:
    model, dtype = _kept_in(mlp(seed), torch.float16, repaired)
    x, y = regression(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-4)
    return plain(model, optimizer, lambda i: 0.01 * F.mse_loss(model(x.to(dtype)).float(), y))


@fault(
    "BF16 weights: an update below half a unit in the last place is lost",
    "update_swamping", "optimizer", silent=True, modules=("fc1", "fc2", "^optimizer$"), operations=("optimizer", "add"),
    cure="FP32 master weights, stochastic rounding, or a compensated sum",
)  # fmt: skip
def updates_lost_bf16(seed: int, repaired: bool) -> Run:
    model, dtype = _kept_in(mlp(seed), torch.bfloat16, repaired)
    x, y = regression(seed)
    return plain(model, sgd(model, 1e-3), lambda i: F.mse_loss(model(x.to(dtype)).float(), y))


@fault(
    "FP16 weights and a small learning rate: updates are rounded away",
    "update_swamping", "optimizer", silent=True, modules=("fc1", "fc2", "^optimizer$"), operations=("optimizer", "add"),
    cure="FP32 master weights, or FP32 weights under autocast",
)  # fmt: skip
def updates_lost_fp16(seed: int, repaired: bool) -> Run:
    model, dtype = _kept_in(mlp(seed), torch.float16, repaired)
    x, y = regression(seed)
    return plain(model, sgd(model, 1e-4), lambda i: F.mse_loss(model(x.to(dtype)).float(), y))


@fault(
    "Weight decay on BF16 weights: 1 - lr * wd rounds to 1",
    "weight_decay_lost", "optimizer", silent=True, modules=("^optimizer$",), operations=("optimizer", "mul", "decay"),
    cure="FP32 master weights",
)  # fmt: skip
def weight_decay_lost(seed: int, repaired: bool) -> Run:
    model, dtype = _kept_in(mlp(seed), torch.bfloat16, repaired)
    x, y = regression(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    return plain(model, optimizer, lambda i: F.mse_loss(model(x.to(dtype)).float(), y))


class _WithAverage(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = nn.Linear(16, 4)
        self.ema = nn.Linear(16, 4).to(dtype).requires_grad_(False)
        self.ema.load_state_dict(self.net.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    @torch.no_grad()
    def update(self) -> None:
        for average, p in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            average.mul_(0.999).add_(p, alpha=0.001)


@fault(
    "A moving average of the weights in BF16 does not move",
    "ema_stagnation", "optimizer", silent=True, modules=("ema",), operations=("ema", "mul", "add"),
    cure="keep the average in FP32",
)  # fmt: skip
def ema_in_bf16(seed: int, repaired: bool) -> Run:
    with seeded(seed):
        model = _WithAverage(torch.float32 if repaired else torch.bfloat16)
    x, y = regression(seed)
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    run = plain(model, optimizer, lambda i: F.mse_loss(model(x), y))
    train = run.step

    def step(i: int, probe: Probe) -> None:
        train(i, probe)
        model.update()

    run.step = step
    return run


@fault(
    "Running statistics of a BatchNorm in BF16 with momentum 0.001 stop short of the batch's",
    "ema_stagnation", "forward", silent=True,
    modules=("norm",), operations=("batch_norm", "running", "ema", "mul", "add"),
    cure="keep BatchNorm in FP32",
)  # fmt: skip
def running_statistics_bf16(seed: int, repaired: bool) -> Run:
    model = chain(seed, fc1=linear(16, 32), norm=lambda: nn.BatchNorm1d(32, momentum=1e-3), fc2=linear(32, 4))
    dtype = torch.float32
    if not repaired:
        model, dtype = model.bfloat16(), torch.bfloat16
    x, y = regression(seed)
    return plain(model, sgd(model), lambda i: F.mse_loss(model(x.to(dtype)).float(), y))


@fault(
    "Adam's second moment in BF16: 0.999 * v rounds back to v, so one spike freezes the step size",
    "second_moment_frozen", "optimizer", step=1, silent=True,
    modules=("^optimizer$",), operations=("exp_avg_sq", "optimizer", "mul"),
    cure="FP32 optimizer state, or FP32 weights",
)  # fmt: skip
def second_moment_frozen(seed: int, repaired: bool) -> Run:
    model, dtype = _kept_in(mlp(seed), torch.bfloat16, repaired)
    x, y = regression(seed)
    spike = (1000.0, 1.0)
    return plain(model, adam(model), lambda i: spike[i > 0] * F.mse_loss(model(x.to(dtype)).float(), y), 30)


class _Stream(nn.Module):
    """Blocks that add little to a large residual stream; the stream keeps the dtype in which it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(linear(16, 16, 0.1)() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x / 256).tanh() / 4
        return x


@fault(
    "A BF16 residual stream: what a block adds is below half a unit of the stream, and is lost",
    "residual_swamping", "forward", silent=True, modules=("blocks",), operations=("add",),
    cure="keep the residual stream in FP32, as autocast does; do not call .bfloat16()",
)  # fmt: skip
def residual_lost_bf16(seed: int, repaired: bool) -> Run:
    model = chain(seed, stream=_Stream, head=linear(16, 4))
    x, y = classification(seed)
    wide = 256 * (x.sign() + x / 8)
    model, dtype = _kept_in(model, torch.bfloat16, repaired)

    def loss_of(i: int) -> torch.Tensor:
        return F.cross_entropy(model.head(model.stream(wide.to(dtype)) / 256).float(), y)

    return plain(model, sgd(model), loss_of)
