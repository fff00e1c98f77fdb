"""The experiment of the chapter: one small transformer, trained in BF16 or in FP8, one seed at a time."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from mixprec_lab.device import one_thread
from mixprec_lab.fp8.recipes import Recipe
from mixprec_lab.fp8.trainer import FP8Trainer
from mixprec_lab.models import Digits, transformer


class Trained(NamedTuple):
    """What a training run comes to."""

    test_loss: float
    test_accuracy: float
    losses: list[float]  #: of every training step


@one_thread()
def train_transformer(
    data: Digits,
    seed: int,
    recipe: Recipe | None = None,
    *,
    steps: int = 120,
    learning_rate: float = 3e-3,
    width: int = 32,
    depth: int = 2,
    keep_first_and_last: bool = True,
) -> Trained:
    """The digits transformer after ``steps`` of AdamW, batch 32, clipping at 1.

    Under BF16 autocast (``recipe`` None), or by an ``FP8Trainer`` with emulated products, the rest being the same.
    ``seed`` decides initial weights and the order of the data: runs of one seed are pairs.
    """
    model, order = transformer(seed, width=width, depth=depth), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    trainer = None
    if recipe is not None:
        trainer = FP8Trainer(
            model, optimizer, backend="emulated", recipe=recipe, keep_first_and_last=keep_first_and_last, pad=True
        )
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(data.train_labels), (32,), generator=order)
        images, labels = data.train_images[batch], data.train_labels[batch]
        loss = trainer.train_step(images, labels).loss if trainer else _bf16_step(model, optimizer, images, labels)
        losses.append(float(loss))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = (trainer.predict(data.test_images) if trainer else model(data.test_images)).float()
    accuracy = float((logits.argmax(1) == data.test_labels).double().mean())
    return Trained(float(F.cross_entropy(logits, data.test_labels)), accuracy, losses)


def _bf16_step(model, optimizer, images, labels) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()
