"""The process group that a job works in: gloo on CPUs, NCCL where every process has a GPU of its own."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from mixprec_lab import device, models

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Group:
    """This process's place among the others."""

    rank: int
    size: int
    device: torch.device
    reason: str  #: why this device and this backend

    def everywhere(self, value: object) -> list:
        """``value`` of every rank, in their order; any picklable object."""
        values: list = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def agree(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether ``tensors`` are the same on every rank: dtype, shape and every bit."""
        digest = hashlib.sha256()
        for t in tensors:
            t = t.detach().cpu().contiguous()
            digest.update(f"{t.dtype} {tuple(t.shape)}".encode() + t.view(-1).view(torch.uint8).numpy().tobytes())
        return len(set(self.everywhere(digest.hexdigest()))) == 1


@contextlib.contextmanager
def process_group(timeout: float = 60.0) -> Iterator[Group]:
    """The group of all processes that ``torchrun`` or ``launch`` started; it is left when the block ends.

    Every process takes a CUDA device of its own and NCCL where there are enough of them, else the CPU and gloo;
    ``MIXPREC_DEVICE=cpu`` asks for the latter.  A collective that waits longer than ``timeout`` seconds raises.
    Inside of another such block it is the same group.  RuntimeError outside of a launch.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"expected a process of a distributed job, found no {', '.join(missing)} in the environment: start it by "
            f"mixprec_lab.scaling_out.launch(function, processes=2) or by torchrun"
        )
    chosen, reason = _choose(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if distributed.is_initialized():
        yield Group(distributed.get_rank(), distributed.get_world_size(), chosen, reason)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Group(distributed.get_rank(), distributed.get_world_size(), chosen, reason)
    except BaseException as error:
        error.failed_at = time.time()  # the others fail when this rank leaves the group, which may take a while
        raise
    finally:
        distributed.destroy_process_group()


def _choose(local_rank: int, local_size: int) -> tuple[torch.device, str]:
    """The device of the process ``local_rank`` among ``local_size`` on this machine, and why."""
    picked = device.pick()
    if picked.device.type != "cuda":
        return picked.device, f"{picked.reason}; gloo carries the messages"
    if torch.cuda.device_count() < local_size:
        return torch.device("cpu"), (
            f"{torch.cuda.device_count()} GPU for {local_size} processes, and NCCL wants one for each, so this runs on "
            f"the CPU; gloo carries the messages"
        )
    return torch.device("cuda", local_rank), f"{picked.reason}; NCCL carries the messages"


def digits_of(group: Group, data: Sequence[torch.Tensor] | None = None) -> models.Digits:
    """The digits on this rank's device: ``data``, the tensors of ``models.digits()``, or read from scikit-learn."""
    return models.Digits(*(t.to(group.device) for t in data or models.digits()))
