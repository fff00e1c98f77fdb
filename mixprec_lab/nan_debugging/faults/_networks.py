"""Networks, problems and the two ordinary training loops that most faults share."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.nan_debugging.faults._run import Probe, Run, seeded

LossOf = Callable[[int], torch.Tensor]


def chain(seed: int, **modules: Callable[[], nn.Module]) -> nn.Sequential:
    """A Sequential of named modules, each made by its factory, in order, from one seed."""
    with seeded(seed):
        return nn.Sequential(OrderedDict((name, make()) for name, make in modules.items()))


def linear(inputs: int, outputs: int, gain: float = 1.0) -> Callable[[], nn.Linear]:
    """A factory of linear layers whose weights are ``gain`` times torch's."""

    def make() -> nn.Linear:
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.mul_(gain)
        return layer

    return make


def mlp(seed: int, inputs: int = 16, hidden: int = 32, outputs: int = 4) -> nn.Sequential:
    """fc1, relu, fc2."""
    return chain(seed, fc1=linear(inputs, hidden), relu=nn.ReLU, fc2=linear(hidden, outputs))


def regression(seed: int, samples: int = 32, inputs: int = 16, outputs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal inputs and smooth targets of unit size that a small network can learn."""
    generator = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(samples, inputs, generator=generator)
    teacher = torch.randn(inputs, outputs, generator=generator) / inputs**0.5
    return x, torch.tanh(x @ teacher)


def classification(
    seed: int, samples: int = 32, inputs: int = 16, classes: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal inputs and the index of the largest of their targets."""
    x, y = regression(seed, samples, inputs, classes)
    return x, y.argmax(1)


def tokens(seed: int, batch: int = 8, length: int = 12, vocabulary: int = 20) -> torch.Tensor:
    """(batch, length) ids of a vocabulary, int64."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed + 2000))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: LossOf, steps: int = 8) -> Run:
    """The loop without a scaler: zero, loss, backward, step."""

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        loss = loss_of(i)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        optimizer.step()

    return Run(model, [optimizer], step, steps)


def amp(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: LossOf, steps: int = 8, scale: float = 2.0**10
) -> Run:
    """The FP16 loop of torch's documentation: autocast, scale, backward, unscale, step, update."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(i)
        probe.loss(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        probe.gradients()
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, steps, scaler)


def adam(model: nn.Module, lr: float = 1e-2) -> torch.optim.Adam:
    """Adam over the whole model."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    """SGD over the whole model."""
    return torch.optim.SGD(model.parameters(), lr=lr)
