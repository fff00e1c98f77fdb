"""The loss scale and the autocast dtype of your own training loop, turned at an exhibit."""

from dataclasses import dataclass
from typing import Any

import torch
import traitlets as t

from mixprec_lab.formats import get_format


@dataclass(frozen=True)
class Setting:
    """What the knobs said when they were read."""

    scale: float  #: the loss scale, a power of two
    dtype: torch.dtype  #: for ``torch.autocast``


class TrainingKnobs(t.HasTraits):
    """Two traits, ``log2_scale`` (-8 to 40) and ``format``, that stay equal to those of ``exhibit``.

    ``exhibit`` is a ``LossScaleLab`` or anything else with these two traits; ``unlink()`` separates them.  A loop reads
    them once a step, because a slider can move between two of its lines::

        knobs = TrainingKnobs(lab)
        for images in batches:
            now = knobs.read()
            scaler = StaticLossScaler(now.scale)
            with torch.autocast("cpu", now.dtype):
                loss = loss_fn(model(images), images)
            scaler.scale_loss(loss).backward()
            scaler.step(optimizer)

    JupyterLab 4.4 and later, with ipykernel 7, hands what a slider says to a running cell; elsewhere it waits for the
    cell to end, so run the loop in a ``threading.Thread``.
    """

    log2_scale = t.Int(0, min=-8, max=40)
    format = t.Unicode("fp16")

    def __init__(self, exhibit: Any) -> None:
        super().__init__()
        self._links = [t.link((exhibit, key), (self, key)) for key in ("log2_scale", "format")]

    def read(self) -> Setting:
        """Scale and dtype now; ValueError for a format that autocast has not."""
        fmt = get_format(self.format)
        if fmt.name not in ("fp16", "bf16"):
            raise ValueError(f"expected FP16 or BF16, as autocast has, got {fmt.title}: offer the exhibit only those")
        return Setting(2.0**self.log2_scale, fmt.torch_dtype)

    def unlink(self) -> None:
        """Leave the exhibit; the knobs keep their last values."""
        for link in self._links:
            link.unlink()
        self._links = []
