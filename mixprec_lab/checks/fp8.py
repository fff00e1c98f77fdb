"""The exercises of the chapter ``fp8``."""

import math
from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.checks._verdict import check
from mixprec_lab.fp8 import CurrentScaling, DelayedScaling, FP8Linear

INF = math.inf


def delayed_scale(function: Callable[[list[float], float], float]) -> None:
    """``fp8``: the next E4M3 scale from the amaxes of the last steps, newest last, and the present scale."""
    cases = [
        (([7.0], 1.0), 64.0),
        (([3.5, 14.0, 7.0], 1.0), 32.0),
        (([0.0, 0.0], 64.0), 64.0),
        (([7.0, INF], 32.0), 32.0),
        (([7.0, math.nan, 3.5], 32.0), 64.0),
    ]
    check(function, cases)


def saturating_cast(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``fp8``: float32 to ``torch.float8_e5m2`` so that nothing becomes infinite and NaN stays NaN."""

    def cast(values: list[float]) -> object:
        got = function(torch.tensor(values))
        if not isinstance(got, torch.Tensor):
            return got
        return _words(got) if got.dtype == torch.float8_e5m2 else f"a tensor of {got.dtype}"

    cases = [
        (([1.0, -3.0, 0.3],), _words(torch.tensor([1.0, -3.0, 0.3125]))),
        (([57344.0, 60000.0, 61440.0, 1e9],), _words(torch.full((4,), 57344.0))),
        (([-INF, INF],), _words(torch.tensor([-57344.0, 57344.0]))),
        (([math.nan, 2.0],), _words(torch.tensor([math.nan, 2.0]))),
    ]
    check(cast, cases)


def _words(x: torch.Tensor) -> str:
    return ", ".join(f"{v:g}" for v in x.float().tolist())


def fp8_product(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """``fp8``: ``x @ w.T`` with both operands in E4M3, one current scale each, unscaled once."""
    g = torch.Generator().manual_seed(0)
    cases = []
    for size_x, size_w in ((1.0, 0.02), (1e-4, 3.0), (2.0**-10, 2.0**12)):
        x, w = size_x * torch.rand(4, 32, generator=g), size_w * torch.rand(3, 32, generator=g)
        a, b = (CurrentScaling().quantizer("input")(t).along(1) for t in (x, w))
        cases.append(((x, w), (a.values.double() @ b.values.double().T) / (a.scale.double() * b.scale.double())))
    check(function, cases, relative=1e-5)  # positive operands: no sum cancels


def convert(function: Callable[[nn.Module], nn.Module]) -> None:
    """``fp8``: every ``nn.Linear`` of a nested model in FP8, and an optimizer built before that goes on training it."""

    def trains(nested: bool) -> object:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        model = nn.Sequential(nn.Linear(16, 32), inner if nested else nn.Linear(32, 32))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model = function(model)
        if not isinstance(model, nn.Module):
            return model
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.randn(16, 16)).square().mean().backward()
        optimizer.step()
        moved = sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | FP8Linear)]
        return _converted(sum(isinstance(m, FP8Linear) for m in layers), len(layers), moved, len(before))

    check(trains, [((False,), _converted(2, 2, 4, 4)), ((True,), _converted(3, 3, 6, 6))])


def _converted(done: int, layers: int, moved: int, parameters: int) -> str:
    return f"{done} of {layers} layers in FP8, {moved} of {parameters} parameters moved"


def resumed_scale(function: Callable[[nn.Module], dict]) -> None:
    """``fp8``: a checkpoint of a model after which the next step runs at the scales it would have had."""

    def next_outputs(steps: int) -> object:
        torch.manual_seed(steps)
        layer, fresh = (FP8Linear(16, 16, recipe=DelayedScaling(amax_history_len=4)) for _ in range(2))
        for step in range(steps):
            layer(torch.randn(16, 16) * 3.0**step)
        saved = function(layer)
        if not isinstance(saved, dict):
            return saved
        fresh.load_state_dict(saved, strict=False)
        x = torch.randn(16, 16) * 3.0**steps
        with torch.no_grad():
            layer(x)
            fresh(x)
        return _scales(fresh)

    def expected(steps: int) -> str:
        torch.manual_seed(steps)
        layer, _ = (FP8Linear(16, 16, recipe=DelayedScaling(amax_history_len=4)) for _ in range(2))
        for step in range(steps):
            layer(torch.randn(16, 16) * 3.0**step)
        with torch.no_grad():
            layer(torch.randn(16, 16) * 3.0**steps)
        return _scales(layer)

    check(next_outputs, [((steps,), expected(steps)) for steps in (1, 3, 6)])


def _scales(layer: FP8Linear) -> str:
    return ", ".join(f"{role} scale {float(layer.quantizers[role].scale):.6g}" for role in ("input", "weight"))


