"""The exercises of the chapter ``nan_debugging``."""

import math
from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.checks._verdict import check


class _Bad(nn.Module):
    """Returns its input divided by ``divisor``."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.divisor


def first_bad_module(function: Callable[[nn.Module, torch.Tensor], str]) -> None:
    """``nan_debugging``: the path of the first module, in the order of calls, whose output is not finite."""

    def hunt(position: int | None) -> object:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Tanh()]
        if position is not None:
            layers.insert(position, _Bad(0.0))
        model = nn.Sequential(*layers)
        found = function(model, torch.randn(8, 4))
        left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return f"{found!r}, {left} hooks left" if isinstance(found, str) else found

    cases = [((0,), "'0', 0 hooks left"), ((2,), "'2', 0 hooks left"), ((None,), "'', 0 hooks left")]
    check(hunt, cases)


def safe_log(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``nan_debugging``: log where x > 0 and 0 elsewhere, with gradients 1 / x and 0."""

    def value_and_gradient(values: list[float]) -> object:
        x = torch.tensor(values, requires_grad=True)
        y = function(x)
        if not isinstance(y, torch.Tensor):
            return y
        y.sum().backward()
        return _words(y), _words(x.grad)

    def told(values: list[float]) -> object:
        x = torch.tensor(values, dtype=torch.float64)
        good = x > 0
        safe = torch.where(good, x, torch.ones_like(x))
        zero = torch.zeros_like(x)
        return _words(torch.where(good, safe.log(), zero)), _words(torch.where(good, 1 / safe, zero))

    def safe_log(values: list[float]) -> object:
        return _joined(value_and_gradient(values))

    check(safe_log, [((v,), _joined(told(v))) for v in _VALUES])


_VALUES = ([1.0, 2.0, 0.5], [0.0, 4.0], [-1.0, 0.0, 1e-20])


def _joined(parts: object) -> object:
    return f"values {parts[0]}, gradients {parts[1]}" if isinstance(parts, tuple) else parts


def _words(x: torch.Tensor) -> str:
    return " ".join(f"{v:.4g}" for v in x.detach().double().tolist())


def masked_softmax(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """``nan_debugging``: softmax over the visible entries; a row without any gives zeros; gradients are finite."""

    def rows(visible: list[list[int]]) -> object:
        mask = torch.tensor(visible, dtype=torch.bool)
        logits = torch.arange(mask.numel(), dtype=torch.float32).reshape(mask.shape).div(2).requires_grad_()
        weights = function(logits, mask)
        if not isinstance(weights, torch.Tensor):
            return weights
        (weights * torch.arange(mask.shape[1])).sum().backward()
        finite = bool(logits.grad.isfinite().all())
        return f"{' | '.join(_words(row) for row in weights)}; gradients {'finite' if finite else 'not finite'}"

    def told(visible: list[list[int]]) -> str:
        lines = []
        for i, row in enumerate(visible):
            terms = [math.exp((i * len(row) + j) / 2 - (i * len(row) + len(row)) / 2) * v for j, v in enumerate(row)]
            total = sum(terms)
            lines.append(" ".join(f"{t / total if total else 0.0:.4g}" for t in terms))
        return f"{' | '.join(lines)}; gradients finite"

    check(rows, [((v,), told(v)) for v in ([[1, 1], [1, 0]], [[1, 1, 0], [0, 0, 0]], [[0, 0], [0, 0]])])


def rms_norm(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``nan_debugging``: x / sqrt(mean(x**2) + 1e-6) of an FP16 row, in FP16, right for every finite row."""

    def row(values: list[float]) -> object:
        got = function(torch.tensor([values], dtype=torch.float16))
        if not isinstance(got, torch.Tensor):
            return got
        return _words(got[0]) if got.dtype == torch.float16 else f"a tensor of {got.dtype}"

    def told(values: list[float]) -> str:
        x = torch.tensor(values, dtype=torch.float16).double()
        return _words((x / (x.square().mean() + 1e-6).sqrt()).half())

    cases = ([1.0, -2.0, 2.0, 4.0], [300.0, 400.0, -300.0, 0.0], [6e4, -6e4, 6e4, 6e4], [0.0, 0.0, 0.0, 0.0])
    check(row, [((v,), told(v)) for v in cases])


def guarded_step(function: Callable[[torch.optim.Optimizer, list[nn.Parameter], float], bool]) -> None:
    """``nan_debugging``: clip to a norm and step, or leave the step out if a gradient is not finite."""

    def step(gradients: list[float]) -> object:
        p = nn.Parameter(torch.zeros(len(gradients)))
        optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.9)
        p.grad = torch.tensor(gradients)
        taken = function(optimizer, [p], 1.0)
        if taken is None or taken is ...:
            return None
        return f"weights {_words(p)}, step taken {bool(taken)}, momentum {'kept' if optimizer.state else 'empty'}"

    cases = [
        (([3.0, 4.0],), "weights -0.6 -0.8, step taken True, momentum kept"),
        (([0.25, 0.0],), "weights -0.25 0, step taken True, momentum kept"),
        (([math.inf, 1.0],), "weights 0 0, step taken False, momentum empty"),
        (([math.nan, 1.0],), "weights 0 0, step taken False, momentum empty"),
    ]
    check(step, cases)
