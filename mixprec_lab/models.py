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
