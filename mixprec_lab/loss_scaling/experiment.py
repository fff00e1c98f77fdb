"""A training run whose gradients are too small for FP16 because its loss is a mean over many pixels.

The gradient of a mean squared error with respect to one output is ``2 * error / elements``.  FP16 turns it into zero
where ``|error| <= elements * 2**-26``, whatever the network.  Real images have that many elements; the digits have 64.
So the loss here is the sum of the squared errors divided by the number of elements of a batch of *large* images: every
output gets the gradient that it would get there, and a laptop can train.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from mixprec_lab.device import one_thread
from mixprec_lab.loss_scaling.scaler import DynamicLossScaler, StaticLossScaler
from mixprec_lab.models import Digits, autoencoder

Scaler = DynamicLossScaler | StaticLossScaler
PixelLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pixel_loss(elements: int) -> PixelLoss:
    """``loss(outputs, images)``: the squared errors, summed and divided by ``elements``; a scalar, in FP32.

    ``elements`` is that of the batch whose mean this would be, such as ``32 * 3 * 1024 * 1024``; ValueError below 1.
    """
    if elements < 1:
        raise ValueError(f"expected at least one element, got {elements}")

    def loss(outputs: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return (outputs.float() - images).square().sum() / elements

    return loss


@dataclass(frozen=True)
class PixelRun:
    """A trained autoencoder and how it got there."""

    model: nn.Sequential = field(repr=False)
    errors: list[float] = field(repr=False)  #: mean squared error of a pixel before each step
    unexplained: float  #: squared error on the test images over that of the mean training image
    skipped: int  #: steps that the scaler skipped


def train_on_pixels(
    data: Digits,
    seed: int = 0,
    *,
    elements: int,
    dtype: torch.dtype | None = None,
    scaler: Scaler | None = None,
    steps: int = 200,
) -> PixelRun:
    """Train ``models.autoencoder(seed)`` with ``pixel_loss(elements)``: Adam, learning rate 0.003, batches of 64.

    ``dtype`` is what autocast computes in, None FP32 throughout; the weights are FP32 in any case.  ``scaler`` None
    leaves the loss alone.  One CPU thread works: the matrices are small, and then the result does not depend on the
    number of cores.  Adam's ``eps`` is 1e-12, because the usual 1e-8 is as large as these gradients and would blur what
    this experiment is about.
    """
    model = autoencoder(seed).to(data.train_images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-12)
    loss_fn, train = pixel_loss(elements), data.train_images.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    errors = []
    with one_thread():
        for _ in range(steps):
            images = train[torch.randint(len(train), (64,), generator=generator)]
            with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = model(images)
            loss = loss_fn(outputs, images)
            optimizer.zero_grad()
            backward_and_step(optimizer, loss, scaler)
            errors.append(loss.item() * elements / images.numel())
    return PixelRun(model, errors, unexplained(model, data), scaler.skipped if scaler else 0)


def backward_and_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, scaler: Scaler | None) -> None:
    """The backward pass and the optimizer's step, through ``scaler`` if there is one; gradients are not cleared."""
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale_loss(loss).backward()
        scaler.step(optimizer)


@torch.no_grad()
def unexplained(model: nn.Module, data: Digits) -> float:
    """Squared error of ``model`` on the test images over that of the mean training image: 0 is perfect, 1 is blind."""
    images = data.test_images.flatten(1)
    blind = (images - data.train_images.flatten(1).mean(0)).square().mean()
    return float((model(images) - images).square().mean() / blind)
