"""A sharded run that is stopped, saved, and taken up again, by as many ranks or by fewer (a job for one rank or more).

    torchrun --nproc-per-node 2 -m mixprec_lab.scaling_out.checkpoints FOLDER          # train, save, train on
    torchrun --nproc-per-node 2 -m mixprec_lab.scaling_out.checkpoints FOLDER resume   # load, train on

``torch.distributed.checkpoint`` writes each shard where it lies and cuts them anew for whoever loads them.  Into the
checkpoint go the model with its FP8 scales and amax histories, the optimizer, the loss scaler and the step.  What is
not a ``DTensor`` is written by one rank for all, so it must be the same on all of them: scales from one rank's own
amax would be replaced by another rank's.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from mixprec_lab import models
from mixprec_lab.fp8 import DelayedScaling, convert_linears, update_scales
from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.scaling_out.group import Group, digits_of, process_group
from mixprec_lab.scaling_out.sharded import WIDTH, loss_of, shard


class Training:
    """A transformer with FP8 linears under FSDP2, AdamW, a loss scaler, and the number of steps taken."""

    def __init__(self, group: Group, data: models.Digits) -> None:
        self.group, self.data, self.steps = group, data, 0
        model = models.transformer(**WIDTH).to(group.device)
        convert_linears(model, DelayedScaling())
        self.model = shard(model, group)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scaler = DynamicLossScaler(scale_window=3)

    def train(self, steps: int) -> None:
        """Take ``steps`` further steps, each on its own seeded batch."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.scaler.scale_loss(loss_of(self.model, self.group, self.data, self.steps)).backward()
            self.scaler.step(self.optimizer)
            update_scales(self.model)
            self.steps += 1

    def save(self, folder: Path) -> None:
        """Write everything into ``folder``; all ranks together."""
        checkpoint.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Continue where ``folder`` was written, whatever the number of ranks then."""
        state = self._state()
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict(), "steps": self.steps}

    def whole(self) -> dict[str, Any]:
        """The state without shards: tensors by name, gathered, and the scaler's numbers."""
        state = self._state()
        flat = {f"{part}.{k}": v for part in ("model", "optimizer") for k, v in _flat(state[part]).items()}
        tensors = {k: _full(v) for k, v in flat.items() if isinstance(v, torch.Tensor)}
        scaler = {k: v for k, v in state["scaler"].items() if not isinstance(v, dict)}
        return {"tensors": tensors, "scaler": scaler, "steps": self.steps}


def _flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in state.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _full(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()


def run(folder: str, steps: int = 4, more: int = 4, data: list[torch.Tensor] | None = None) -> dict[str, Any]:
    """Train, save into ``folder``, train on; the whole state when it was saved and at the end."""
    with process_group() as group:
        training = Training(group, digits_of(group, data))
        training.train(steps)
        training.save(Path(folder))
        saved = training.whole()
        training.train(more)
        _tell("saved and trained on", training)
        return {"saved": saved, "end": training.whole()}


def resume(folder: str, more: int = 4, data: list[torch.Tensor] | None = None) -> dict[str, Any]:
    """Load ``folder`` into a new training, train on; the whole state when it was loaded and at the end."""
    with process_group() as group:
        training = Training(group, digits_of(group, data))
        training.load(Path(folder))
        loaded = training.whole()
        training.train(more)
        _tell("loaded and trained on" if more else "loaded", training)
        return {"loaded": loaded, "end": training.whole()}


def _tell(what: str, training: Training) -> None:
    own = sum(p.to_local().numel() for p in training.model.parameters())
    scale = math.log2(training.scaler.scale)
    print(f"{what}: step {training.steps}, {own:,} parameters here, scale 2^{scale:.0f}")


def differing(state: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what two whole states do not share bit for bit."""
    a, b = state["tensors"], other["tensors"]
    names = [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or not _same(a[k], b[k])]
    return names + [k for k in ("scaler", "steps") if state[k] != other[k]]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["resume"]):
        sys.exit(f"expected FOLDER or FOLDER resume, got {' '.join(sys.argv[1:]) or 'nothing'}")
    (resume if sys.argv[2:] else run)(sys.argv[1])
