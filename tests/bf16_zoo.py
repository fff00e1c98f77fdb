"""Small models, data and optimizers for the tests of BF16 training."""

import torch
from torch import nn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def mlp(seed: int = 0) -> nn.Sequential:
    return build(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), seed)


def batches(count: int, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = seeded(1)
    return [
        (torch.randn(size, 8, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def adamw(model: nn.Module, **settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **({"lr": 1e-2} | settings))
