"""The networks and the batches of the healthy runs: what each has that could look like a fault is its reason to be."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint

from mixprec_lab.nan_debugging.faults._networks import LossOf, classification, regression
from mixprec_lab.nan_debugging.faults._run import Probe, Run

STEPS = 200


def images(seed: int, samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(samples, 1, 8, 8) noisy copies of ten patterns, and which of them each is."""
    generator = torch.Generator().manual_seed(seed + 4000)
    labels = torch.randint(10, (samples,), generator=generator)
    patterns = torch.rand(10, 1, 8, 8, generator=generator)
    return patterns[labels] + 0.3 * torch.randn(samples, 1, 8, 8, generator=generator), labels


def batches(seed: int, samples: int, size: int) -> Callable[[int], torch.Tensor]:
    """Indices of the batch of a step, drawn anew for every step."""
    return lambda i: torch.randint(samples, (size,), generator=torch.Generator().manual_seed(seed * STEPS + i))


def regress(model: nn.Module, seed: int) -> LossOf:
    """The mean square error of ``model`` on a batch of 32 of 256 samples, drawn anew for every step."""
    (x, y), batch = regression(seed, 256), batches(seed, 256, 32)
    return lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)])


def classify(model: nn.Module, seed: int) -> LossOf:
    """The cross-entropy of ``model`` on such batches."""
    (x, y), batch = classification(seed, 256), batches(seed, 256, 32)
    return lambda i: F.cross_entropy(model(x[batch(i)]), y[batch(i)])


def see(model: nn.Module, seed: int) -> LossOf:
    """The cross-entropy of ``model`` on batches of 16 images."""
    (x, y), batch = images(seed), batches(seed, 64, 16)
    return lambda i: F.cross_entropy(model(x[batch(i)]), y[batch(i)])


def then(run: Run, after: Callable[[int], object], scheduler: LRScheduler | None = None) -> Run:
    """The same run with ``after(i)`` at the end of each step."""
    train = run.step

    def step(i: int, probe: Probe) -> None:
        train(i, probe)
        after(i)

    run.step, run.scheduler = step, scheduler
    return run


class Gan(nn.Module):
    """A generator and a discriminator, with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


class Reader(nn.Module):
    """An LSTM over the eight rows of an image, and a linear head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(images.squeeze(1))[0][:, -1])


class Bag(nn.Module):
    """The mean embedding of a sequence, in front of a linear head."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(500, 16, sparse=sparse), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(ids).mean(1))


class Tied(nn.Module):
    """Embedding and output layer share one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.emb(ids)).relu())


class Causal(nn.Module):
    """One head of self-attention; the mask of -inf is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.qkv, self.head = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)
        self.register_buffer("mask", torch.full((12, 12), -torch.inf).triu(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.emb(ids)).chunk(3, -1)
        return self.head(((query / 4) @ key.mT + self.mask).softmax(-1) @ value)


class Branched(nn.Module):
    """Two heads, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return (self.left if left else self.right)(self.body(x).relu())


class ZeroInit(nn.Module):
    """A residual branch whose last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer, self.head = (nn.Linear(16, 16) for _ in range(4))
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(self.inner(x).relu()))[:, :4]


class Checkpointed(nn.Module):
    """The inner part runs forward again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Averaged(nn.Module):
    """A layer, and a moving average of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.ema = nn.Linear(16, 4), nn.Linear(16, 4).requires_grad_(False)
        self.ema.load_state_dict(self.net.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)
