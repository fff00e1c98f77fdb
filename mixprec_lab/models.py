"""The small seeded networks and data that every page uses: real images, real training, seconds on a CPU."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Digits(NamedTuple):
    """scikit-learn's handwritten digits, split once and for all."""

    train_images: torch.Tensor  #: (1437, 1, 8, 8), float32 in [0, 1]
    train_labels: torch.Tensor  #: (1437,), int64
    test_images: torch.Tensor  #: (360, 1, 8, 8)
    test_labels: torch.Tensor  #: (360,)


def digits(device: torch.device | str = "cpu") -> Digits:
    """1,797 grey images of 8 x 8 pixels in ten classes, shuffled with seed 0; needs scikit-learn, no download."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order].to(device) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)[order].to(device)
    return Digits(images[:1437], labels[:1437], images[1437:], labels[1437:])


def convnet(seed: int = 0) -> nn.Sequential:
    """A convolutional classifier of 8 x 8 images: two convolutions, two linear layers, 13,170 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, 40), nn.ReLU(),
            nn.Linear(40, 10),
        )  # fmt: skip


def autoencoder(seed: int = 0) -> nn.Sequential:
    """A bottleneck for flat 8 x 8 images: 64, 48, 16, 48, 64 units, tanh between them, 7,856 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 48), nn.Tanh(),
            nn.Linear(48, 16), nn.Tanh(),
            nn.Linear(16, 48), nn.Tanh(),
            nn.Linear(48, 64),
        )  # fmt: skip


class Attention(nn.Module):
    """Self-attention with every operator in sight: logits, softmax and the weighted sum are calls of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> the same shape."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        logits = (query * query.shape[-1] ** -0.5) @ key.mT  # scaled first: the product is what overflows in FP16
        return self.out((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: ``x + attention(norm1(x))``, then ``x + contract(gelu(expand(norm2(x))))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.expand = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.contract(nn.functional.gelu(self.expand(self.norm2(x))))


class Transformer(nn.Module):
    """A classifier of 8 x 8 images that reads the eight rows as tokens."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, 8, 8) -> logits (batch, 10)."""
        x = self.embed(images.flatten(0, 1)) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def transformer(seed: int = 0, width: int = 32, heads: int = 2, depth: int = 2) -> Transformer:
    """A small pre-norm transformer for the digits: two blocks of width 32, two heads, 18,026 parameters.

    ``width`` must be a multiple of ``heads``.  The global generator is left alone.
    """
    if width % heads:
        raise ValueError(f"expected width to be a multiple of heads, got {width} and {heads}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(width, heads, depth)


def train(
    model: nn.Module,
    data: Digits,
    steps: int = 200,
    *,
    batch_size: int = 64,
    learning_rate: float = 0.05,
    seed: int = 0,
    after_backward: Callable[[int, nn.Module], None] | None = None,
) -> list[float]:
    """Train in FP32 by SGD with momentum 0.9 on seeded batches; the loss of every step comes back.

    ``after_backward(step, model)`` is called when the gradients of a step are ready and before they are used.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        batch = torch.randint(len(data.train_labels), (batch_size,), generator=generator)
        loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        if after_backward:
            after_backward(step, model)
        optimizer.step()
        losses.append(loss.item())
    return losses


def recorded_gradients(model: nn.Module, data: Digits, batch_size: int = 256) -> dict[str, torch.Tensor]:
    """Gradients of one batch, no step taken: ``"weights"`` (all parameters) and ``"activations"`` (all layer outputs).

    Both are flat float32 tensors.  Existing ``.grad`` fields are left alone.
    """
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for layer in model.children()]
    try:
        logits = model(data.train_images[:batch_size])
    finally:
        for hook in hooks:
            hook.remove()
    loss = nn.functional.cross_entropy(logits, data.train_labels[:batch_size])
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters + outputs)
    flat = [g.detach().flatten() for g in gradients]
    return {"weights": torch.cat(flat[: len(parameters)]), "activations": torch.cat(flat[len(parameters) :])}
