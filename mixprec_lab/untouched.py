"""Run a model once and leave it as it was: for what looks at somebody else's model, or at its own in mid-training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` may draw random numbers and write its buffers; afterwards both are as before.

    The random state is that of the CPU and of the CUDA devices that hold parameters.  A buffer gets its values back, in
    the same tensor, even if the module had put another one in its place.  Parameters and ``.grad`` are not looked
    after: use ``torch.autograd.grad``, which writes neither.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, values in buffers:
                    module._buffers[name] = buffer.copy_(values)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
