"""The rooms of the theme "repair": checkpoints that forget, and cures that harm."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.checks._verdict import check
from mixprec_lab.checks.broken_code._told import told

Optimizer = torch.optim.Optimizer


def _step(optimizer: Optimizer, parameters: list[nn.Parameter], gradient: float) -> None:
    for p in parameters:
        p.grad = torch.full_like(p, gradient)
    optimizer.step()


def moving_checkpoint(function: Callable[[Optimizer], dict]) -> None:
    """``broken_code``: a checkpoint of an optimizer does not follow the training."""

    def momentum(steps: int) -> object:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.5)
        _step(optimizer, [weight], 1.0)

        def words(saved: dict) -> float:
            for _ in range(steps):
                _step(optimizer, [weight], 1.0)
            return saved["state"][0]["momentum_buffer"].item()

        return told(function(optimizer), words)

    check(momentum, [((0,), 1.0), ((5,), 1.0)])


def _normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def no_buffers(function: Callable[[nn.Module], dict[str, torch.Tensor]]) -> None:
    """``broken_code``: a snapshot brings back parameters and buffers."""

    def restored(batches: int) -> object:
        model = _normed()
        before = copy.deepcopy(model.state_dict())

        def words(saved: dict) -> str:
            with torch.no_grad():
                for _ in range(batches):
                    model(torch.randn(8, 2))
                for p in model.parameters():
                    p.add_(1.0)
            model.load_state_dict(saved, strict=False)
            back = sum(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            return f"{back} of {len(before)} tensors are back"

        return told(function(model), words)

    check(restored, (((batches,), "7 of 7 tensors are back") for batches in (1, 5)))


def live_copy(function: Callable[[nn.Module], dict[str, torch.Tensor]]) -> None:
    """``broken_code``: copies of the parameters that hold no graph and do not follow the training."""

    def kept(weight: float) -> object:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, weight)

        def words(saved: dict) -> str:
            with torch.no_grad():
                layer.weight.add_(1.0)
            return f"{saved['weight'].item():.6g}, requires a gradient: {saved['weight'].requires_grad}"

        return told(function(layer), words)

    check(kept, (((w,), f"{w:.6g}, requires a gradient: False") for w in (0.5, 2.0)))


def private_scale(function: Callable[[torch.amp.GradScaler, float], torch.amp.GradScaler]) -> None:
    """``broken_code``: a scaler that goes on at another scale, whether it has been used or not."""

    def scale_of(used: bool, scale: float) -> object:
        weight = nn.Parameter(torch.zeros(1))
        optimizer, scaler = torch.optim.SGD([weight], lr=0.5), torch.amp.GradScaler("cpu")

        def step(scaler: torch.amp.GradScaler) -> str:
            scaler.scale(weight.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            return f"scale {scaler.get_scale():.6g}"

        if used:
            step(scaler)
        return told(function(scaler, scale), step)

    check(scale_of, (((used, scale), f"scale {scale:.6g}") for used, scale in ((True, 2048.0), (False, 1024.0))))


def raised_scale(function: Callable[[float], float]) -> None:
    """``broken_code``: a scale that is reset to 2048, and never raised by it."""
    check(function, (((scale,), min(scale, 2048.0)) for scale in (65536.0, 64.0, 2048.0, 1.0)))


def punished_rate(function: Callable[[float, list[str]], float]) -> None:
    """``broken_code``: the learning rate is halved for a loss that is not finite, not for a skipped step."""

    def rate(*events: str) -> object:
        return function(0.5, list(events))

    runs = (("ok", "skipped", "ok"), ("skipped",) * 4, ("ok", "bad loss", "skipped", "bad loss"), ("bad loss",))
    check(rate, ((run, 0.5 / 2 ** run.count("bad loss")) for run in runs))


def zeroed_step(function: Callable[[Optimizer, list[nn.Parameter]], bool]) -> None:
    """``broken_code``: a step that leaves weights and state alone where a gradient is not finite."""

    def weight_after(*gradients: float) -> object:
        weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
        optimizer = torch.optim.SGD(weights, lr=0.25, momentum=0.5)
        taken = []
        for gradient in gradients:
            weights[0].grad, weights[1].grad = torch.ones(1), torch.full((1,), gradient)
            taken.append(function(optimizer, weights))
            if taken[-1] is None or taken[-1] is ...:
                return None
        return f"taken {[bool(t) for t in taken]}, weights {[w.item() for w in weights]}"

    cases = [
        ((1.0,), "taken [True], weights [0.75, 0.75]"),
        ((1.0, math.nan), "taken [True, False], weights [0.75, 0.75]"),
        ((math.inf, 1.0), "taken [False, True], weights [0.75, 0.75]"),
    ]
    check(weight_after, cases)


def half_a_checkpoint(
    function: Callable[[nn.Module, Optimizer, torch.amp.GradScaler, torch.optim.lr_scheduler.StepLR], dict],
) -> None:
    """``broken_code``: a checkpoint with model, optimizer, scaler, scheduler and the state of torch's generator."""

    def fresh() -> tuple:
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return (model, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1),
                torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5))  # fmt: skip

    def train(model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, scheduler: object) -> str:
        noise = torch.rand(1, 1)
        scaler.scale(model(noise).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        rate = optimizer.param_groups[0]["lr"]
        return f"scale {scaler.get_scale():.6g}, rate {rate:.6g}, weight {model.weight.item():.4f}"

    def resumed(steps: int) -> object:
        torch.manual_seed(steps)
        run = fresh()
        for _ in range(steps):
            train(*run)

        def words(saved: dict) -> str:
            saved, again = copy.deepcopy(saved), fresh()
            torch.manual_seed(99)
            for part, key in zip(again, ("model", "optimizer", "scaler", "scheduler"), strict=True):
                part.load_state_dict(saved[key])
            torch.set_rng_state(saved["rng"])
            return train(*again)

        return told(function(*run), words)

    def uninterrupted(steps: int) -> str:
        torch.manual_seed(steps)
        run = fresh()
        return [train(*run) for _ in range(steps + 1)][-1]

    with torch.random.fork_rng():
        check(resumed, (((steps,), uninterrupted(steps)) for steps in (1, 3)))


def poisoned_state(function: Callable[[nn.Module, Optimizer, dict], object]) -> None:
    """``broken_code``: a rollback after which the next step is finite."""

    def weight_after(gradient: float) -> object:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
        _step(optimizer, [model.weight], 1.0)
        good = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        _step(optimizer, [model.weight], gradient)

        def words(_: object) -> str:
            _step(optimizer, [model.weight], 1.0)
            return f"weight {model.weight.item():.6g}"

        return told(function(model, optimizer, good), words)

    check(weight_after, (((g,), "weight 0.375") for g in (math.nan, math.inf, 7.0)))
