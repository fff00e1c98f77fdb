"""Which device this process computes on, and why: one decision, made once, said aloud."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """A device and the reason it was taken."""

    device: torch.device
    reason: str

    def __str__(self) -> str:
        return f"{self.device}: {self.reason}"


def pick() -> Choice:
    """The device to compute on: ``MIXPREC_DEVICE`` if set, else CUDA if it answers, else the CPU.

    Raises ValueError if ``MIXPREC_DEVICE`` names a device that this machine or torch does not have.
    """
    wanted = os.environ.get("MIXPREC_DEVICE")
    if wanted:
        return Choice(_probe(wanted), f"set by MIXPREC_DEVICE={wanted}")
    if torch.cuda.is_available():
        return Choice(torch.device("cuda"), f"CUDA answers ({torch.cuda.get_device_name()})")
    return Choice(torch.device("cpu"), "torch sees no CUDA device, so everything runs on the CPU")


def named(name: torch.device | str) -> torch.device:
    """The device that ``name`` means, with its number; ValueError if this machine or torch does not have it."""
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"expected a device of this machine (cpu, cuda, cuda:1, ...), got {name!r}: {error}"
        ) from None


def _probe(name: str) -> torch.device:
    try:
        return named(name)
    except ValueError as error:
        raise ValueError(
            f"expected MIXPREC_DEVICE to name a device of this machine (cpu, cuda, cuda:1, ...), got {name!r}: "
            f"unset it, or install a torch build for that device"
        ) from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one CPU thread; afterwards on as many as before.

    For work on small tensors: on a busy machine the threads of a thousand tiny operators wait for each other ten times
    as long as they work.  It also makes results independent of the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
