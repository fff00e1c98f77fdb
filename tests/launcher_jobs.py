"""Functions that ``test_scaling_out_jobs`` launches to see the launcher itself; they import as little as they can."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import distributed

from mixprec_lab.scaling_out import process_group, wire


def sums(sizes: list[int]) -> dict[str, torch.Tensor]:
    """Real sums over all ranks by dtype and size."""
    with process_group() as group:
        return {f"{name} {size}": total for size in sizes for name, total in wire.sums(group, size).items()}


def raises(rank: int) -> None:
    """``rank`` raises while the others wait for it."""
    with process_group() as group:
        print("before the error")
        if group.rank == rank:
            raise ZeroDivisionError("the cause")
        distributed.all_reduce(torch.ones(1))


def dies() -> None:
    """The last rank is killed while the others wait for it."""
    with process_group() as group:
        if group.rank == group.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.all_reduce(torch.ones(1))


def waits_for_ever(folder: str) -> None:
    """Say where the process is, then sleep."""
    Path(folder, str(os.getpid())).touch()
    print("asleep", flush=True)
    time.sleep(600)


def returns_a_path() -> object:
    """Something that cannot travel."""
    return {"value": [Path()]}
