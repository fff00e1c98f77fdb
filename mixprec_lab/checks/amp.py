"""The exercises of the chapter ``amp``."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mixprec_lab.amp import trace_autocast
from mixprec_lab.amp.policy import dtype_name
from mixprec_lab.checks._verdict import check

Pair = tuple[torch.Tensor, torch.Tensor]


def fresh_casts(
    function: Callable[[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor, int], list[float]],
) -> None:
    """``amp``: a loop under autocast whose forward passes see the weights that the optimizer wrote."""

    def losses_of(start: float, target: float, steps: int) -> object:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, start)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
        losses = function(layer, optimizer, torch.ones(1, 1), torch.full((1, 1), target), steps)
        return None if losses is None or losses is ... else listed(losses)

    def listed(losses: list[float]) -> str:
        return "losses " + ", ".join(f"{float(loss):g}" for loss in losses)

    # (w - t)^2 by gradient descent at rate 1/4 halves the distance each step: exact in BF16 for these numbers
    cases = [
        ((start, target, steps), listed([(target - start) ** 2 / 4**k for k in range(steps)]))
        for start, target, steps in ((0.0, 2.0, 4), (3.0, -1.0, 3))
    ]
    check(losses_of, cases)


def logits_loss(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """``amp``: binary cross entropy of logits, allowed by CUDA's lists and right where the sigmoid saturates."""

    class Probe(nn.Module):
        def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Any:
            self.loss = function(logits, targets)
            return self.loss

    def under_cuda_lists(logits: list[float], targets: list[float]) -> Any:
        probe = Probe()
        inputs = torch.tensor(logits, dtype=torch.float16), torch.tensor(targets)
        trace_autocast(probe, inputs, torch.float16, "cuda", backward=False)
        return probe.loss

    def exact(logits: list[float], targets: list[float]) -> float:
        n = len(logits)
        return sum(max(x, 0) - x * t + math.log1p(math.exp(-abs(x))) for x, t in zip(logits, targets, strict=True)) / n

    cases = [([2.0, -1.0, 0.0], [1.0, 0.0, 1.0]), ([12.0, 1.0], [0.0, 1.0]), ([-200.0, 0.5], [1.0, 0.0])]
    check(under_cuda_lists, [(case, exact(*case)) for case in cases], relative=1e-6)


def accumulated_step(
    function: Callable[[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, list[Pair]], torch.Tensor],
) -> None:
    """``amp``: one step, clipped to norm 1, on the mean of the squared errors of several micro-batches."""

    def after_one_step(*rows: tuple[float, float]) -> object:
        layer = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
        norm = function(layer, optimizer, scaler, [(torch.tensor([row]), torch.ones(1, 1)) for row in rows])
        if norm is None or norm is ...:
            return None
        return told(float(norm), *layer.weight.flatten().tolist(), scaler.get_scale())

    def told(norm: float, x: float, y: float, scale: float) -> str:
        return f"norm {norm:.4f}, weight ({x + 0.0:.4f}, {y + 0.0:.4f}), scale {scale:g}"

    # at weights of zero and targets of one the gradient of a micro-batch x is -2 x: exact in FP16
    cases = [
        (((-6.0, 0.0), (0.0, -8.0)), told(10.0, -0.6, -0.8, 1024)),
        (((0.25, 0.0), (0.25, 0.5)), told(math.hypot(0.5, 0.5), 0.5, 0.5, 1024)),
        (((2.0, 4.0), (1000.0, 0.0)), told(math.inf, 0.0, 0.0, 512)),
    ]
    check(after_one_step, cases)


def snapshot(
    function: Callable[[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler], dict[str, dict[str, Any]]],
) -> None:
    """``amp``: a checkpoint under the keys model, optimizer and scaler from which a run continues bit for bit."""

    def pieces() -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.125, momentum=0.5)
        return layer, optimizer, torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)

    def run(layer: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (layer(torch.ones(1, 1)).float() - 2).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    def told(layer: nn.Module, scaler: torch.amp.GradScaler) -> str:
        return f"weight {layer.weight.item():.6f}, scale {scaler.get_scale():g}"

    def continued(before: int, after: int) -> object:
        first = pieces()
        run(*first, before)
        state = function(*first)
        if state is None or state is ...:
            return None
        run(*first, after)  # training goes on, and must not change what was saved
        second = pieces()
        for name, piece in zip(("model", "optimizer", "scaler"), second, strict=True):
            piece.load_state_dict(state[name])
        run(*second, after)
        return told(second[0], second[2])

    def uninterrupted(steps: int) -> str:
        layer, optimizer, scaler = pieces()
        run(layer, optimizer, scaler, steps)
        return told(layer, scaler)

    check(continued, [((a, b), uninterrupted(a + b)) for a, b in ((4, 3), (2, 2))])


def fp16_tools(function: Callable[[str], tuple[AbstractContextManager, torch.amp.GradScaler]]) -> None:
    """``amp``: an autocast region in FP16 and a scaler, both of which work on the device that was asked for."""

    def tools_on(device: str) -> object:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tools = function(device)
        if tools is None or tools is ...:
            return None
        region, scaler = tools
        with region:
            product = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
        return told(dtype_name(product.dtype), scaler.get_scale(), len(caught))

    def told(dtype: str, scale: float, warned: int) -> str:
        return f"product in {dtype}, scale {scale:g}, {warned} warnings"

    check(tools_on, [(("cpu",), told("fp16", 65536, 0))])
