"""What is learned: a task as a value, and the two of the chapter."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.loss_scaling.experiment import pixel_loss
from mixprec_lab.models import autoencoder, digits
from mixprec_lab.regimes.gpt import encoded, gpt

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss.  A seed decides initial weights and batches, nothing else does.

    ``model(seed)`` is a fresh FP32 model, ``batches(seed)`` at least ``steps`` pairs (inputs, targets), ``loss(output,
    targets)`` a scalar to train on, ``metric(output, targets)`` what is reported of ``held_out``, in FP32; None means
    the loss itself.  The optimizer is AdamW with a cosine schedule after ten warm-up steps and gradients clipped at 1.
    ``wide`` names the linear layers that low-bit recipes leave alone; None leaves the first and the last.

    Raises ValueError for fewer than two steps, a learning rate that is not positive, and more ``evaluations`` than
    steps.
    """

    name: str
    title: str
    model: Callable[[int], nn.Module] = field(repr=False)
    batches: Callable[[int], Iterable[Batch]] = field(repr=False)
    loss: Loss = field(repr=False)
    held_out: Batch = field(repr=False)
    steps: int
    metric: Loss | None = field(default=None, repr=False)
    metric_title: str = "loss"
    learning_rate: float = 3e-3
    eps: float = 1e-8
    weight_decay: float = 0.01
    wide: tuple[str, ...] | None = None
    evaluations: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 2:
            raise ValueError(f"expected at least two steps, got {self.steps!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a positive learning rate, got {self.learning_rate!r}")
        if not isinstance(self.evaluations, int) or not 1 <= self.evaluations <= self.steps:
            raise ValueError(f"expected 1 to {self.steps} evaluations, got {self.evaluations!r}")

    def settings(self) -> dict[str, Any]:
        """What a stored result must have been made with, as plain values."""
        keys = ("name", "steps", "metric_title", "learning_rate", "eps", "weight_decay", "evaluations")
        return {key: getattr(self, key) for key in keys} | {"wide": None if self.wide is None else list(self.wide)}


_CONTEXT, _TEXT_BATCH, _IMAGE_BATCH = 32, 16, 64
_ELEMENTS = _IMAGE_BATCH * 3 * 1024 * 1024  # of a batch of large images: what the mean is taken over


def _token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _windows(ids: torch.Tensor, starts: torch.Tensor) -> Batch:
    windows = ids[starts[:, None] + torch.arange(_CONTEXT + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def text(quick: bool = True, device: torch.device | str = "cpu") -> Task:
    """A character GPT on the prose of this book: 111,948 parameters, cross-entropy a character in nats.

    The last tenth of the text is held out.  ``quick``: 60 steps instead of 150.
    """
    ids = encoded()
    edge = len(ids) * 9 // 10
    steps = 60 if quick else 150

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(edge - _CONTEXT, (_TEXT_BATCH,), generator=generator)
            yield tuple(t.to(device) for t in _windows(ids[:edge], starts))

    held_out = _windows(ids[edge:], torch.arange(0, len(ids) - edge - _CONTEXT - 1, _CONTEXT))
    return Task(
        "text", "GPT on text", lambda seed: gpt(seed).to(device), batches, _token_loss,
        tuple(t.to(device) for t in held_out), steps, metric_title="nats per character", wide=("head",),
    )  # fmt: skip


def images(quick: bool = True, device: torch.device | str = "cpu") -> Task:
    """An autoencoder on scikit-learn's digits: 7,856 parameters, mean squared error of a pixel.

    The training loss is divided by the number of elements of a batch of 1024 x 1024 colour images, so that every output
    gets the gradient it would get there: 1e-9, far below FP16's range (see ``loss_scaling.experiment``).  ``quick``:
    100 steps instead of 300.
    """
    try:
        data = digits(device)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected scikit-learn, whose digits this task learns, got no such module: pip install scikit-learn"
        ) from error
    train, test = data.train_images.flatten(1), data.test_images.flatten(1)
    steps = 100 if quick else 300

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = train[torch.randint(len(train), (_IMAGE_BATCH,), generator=generator).to(train.device)]
            yield chosen, chosen

    return Task(
        "images", "autoencoder on digits", lambda seed: autoencoder(seed).to(device), batches, pixel_loss(_ELEMENTS),
        (test, test), steps, metric=F.mse_loss, metric_title="squared error of a pixel", eps=1e-12, weight_decay=0.0,
        wide=("0", "6"),
    )  # fmt: skip


TASKS: dict[str, Callable[..., Task]] = {"text": text, "images": images}


def get_task(x: "str | Task", quick: bool = True, device: torch.device | str = "cpu") -> Task:
    """The task that ``x`` names, or ``x`` itself.  KeyError, listing the names, for anything else."""
    if isinstance(x, Task):
        return x
    if not isinstance(x, str) or x not in TASKS:
        raise KeyError(f"expected the name of a task or a Task, got {x!r}; the names are {', '.join(TASKS)}")
    return TASKS[x](quick, device)
