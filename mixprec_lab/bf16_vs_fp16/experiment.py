"""The experiment of the chapter: one small transformer, trained in FP32 or by ``BF16Trainer``, one seed at a time."""

from typing import Any

import torch
from torch.nn import functional as F

from mixprec_lab.bf16_vs_fp16.trainer import BF16Trainer, Update
from mixprec_lab.device import one_thread
from mixprec_lab.models import Digits, transformer


@one_thread()
def transformer_loss(
    data: Digits,
    seed: int,
    update: Update | None = None,
    *,
    steps: int = 60,
    learning_rate: float = 5e-3,
    **settings: Any,
) -> float:
    """Test loss after ``steps`` of AdamW with clipping at 1, in FP32 (``update`` None) or by a ``BF16Trainer``.

    ``seed`` decides initial weights, data order and stochastic rounding, so that runs of one seed are pairs that differ
    in ``update`` and the trainer's ``settings`` alone.
    """
    model, order = transformer(seed, width=16, depth=1).to(data.train_images.device), _seeded(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    generator = {"generator": _seeded(seed)} if update == "stochastic" else {}
    trainer = BF16Trainer(model, optimizer, update=update, **generator, **settings) if update else None
    for _ in range(steps):
        batch = torch.randint(len(data.train_labels), (32,), generator=order)
        images, labels = data.train_images[batch], data.train_labels[batch]
        if trainer:
            trainer.train_step(images, labels)
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        outputs = trainer.predict(data.test_images) if trainer else model(data.test_images)
    return float(F.cross_entropy(outputs, data.test_labels))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
