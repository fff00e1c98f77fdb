"""What the tests of master weights and of 16-bit optimizers share: a small network, its loss, comparisons of states."""

import torch
from torch import nn

from mixprec_lab.master_weights import MasterWeightOptimizer

HALVES = (torch.float16, torch.bfloat16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Two linear layers, a norm, and a head tied to the first layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner, self.outer, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)
            self.tied = nn.Linear(6, 8, bias=False)
        self.tied.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.norm(self.outer(torch.tanh(self.inner(x)))))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 6, generator=seeded(100 + step))
    return model(x.to(dtype)).float().square().mean()


def groups_of(model: nn.Module, **rest: float) -> list[dict]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], **rest},
    ]


def agree(optimizer: MasterWeightOptimizer) -> bool:
    """Whether every parameter of the model is its master, rounded by torch's own cast."""
    names = dict(optimizer.model.named_parameters())
    masters = optimizer.named_masters()
    return all(torch.equal(names[name], master.detach().to(names[name].dtype)) for name, master in masters.items())


def train_with_masters(model: nn.Module, optimizer: MasterWeightOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        optimizer.scale_loss(loss_of(model, step)).backward()
        optimizer.step()


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def same_state(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b
