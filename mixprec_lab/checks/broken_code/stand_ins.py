"""Stand-ins for what a machine may lack: a counter of host reads, Transformer Engine, a timer, and no GPU at all.

``HostReads`` counts the calls that make the host wait for a GPU.  They are the same calls on a CPU, where they cost
nothing.  ``transformer_engine`` keeps the contracts of the real package that the museum's rooms depend on (2.9 and
later: names, defaults, ignored arguments, the dtype rule, the deprecation) and computes in plain torch.
"""

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mixprec_lab.speed import SimulatedGPU

_READS = frozenset({"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"})


class HostReads(TorchFunctionMode):
    """A context that counts, in ``count``, the reads of tensors by the host: each is a wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += getattr(function, "__name__", "") in _READS
        return function(*args, **(kwargs or {}))


def without_gpu() -> AbstractContextManager:
    """A context in which torch finds no GPU, so that a symptom is the same on every machine."""
    return patch("torch.cuda.is_available", return_value=False)


class DelayedScaling:
    """A recipe as ``transformer_engine.common.recipe.DelayedScaling`` takes it: unknown arguments are ignored."""

    def __init__(
        self, margin: int = 0, amax_history_len: int = 1024, amax_compute_algo: str = "max", **ignored: object
    ) -> None:
        self.margin, self.amax_history_len, self.amax_compute_algo = margin, amax_history_len, amax_compute_algo


class Linear(nn.Linear):
    """A layer with FP32 parameters that refuses inputs of another dtype, as ``te.Linear`` does outside autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias``; TypeError if the dtype of ``x`` is not that of the weight."""
        if x.dtype != self.weight.dtype:
            raise TypeError(
                "Data types for parameters must match when outside of autocasted region. "
                f"Found input dtype: {x.dtype} and 'weight' dtype: {self.weight.dtype}"
            )
        return super().forward(x)


@contextlib.contextmanager
def autocast(enabled: bool = True, recipe: DelayedScaling | None = None) -> Iterator[DelayedScaling | None]:
    """A context that gives the recipe in force, or None."""
    yield (recipe or DelayedScaling()) if enabled else None


def fp8_autocast(enabled: bool = True, fp8_recipe: DelayedScaling | None = None) -> Any:
    """The same context under its old name, with a DeprecationWarning."""
    warnings.warn("fp8_autocast is deprecated, use autocast(enabled=..., recipe=...)", DeprecationWarning, stacklevel=2)
    return autocast(enabled, fp8_recipe)


def _module(name: str, **members: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


transformer_engine = _module(
    "transformer_engine",
    common=_module(
        "transformer_engine.common", recipe=_module("transformer_engine.common.recipe", DelayedScaling=DelayedScaling)
    ),
    pytorch=_module("transformer_engine.pytorch", Linear=Linear, autocast=autocast, fp8_autocast=fp8_autocast),
)


def timer(gpu: SimulatedGPU, repeats: int = 20) -> Callable[..., float]:
    """``time(*kernels)``: nanoseconds of one round of all ``kernels`` on ``gpu``, warmed up and synchronized."""
    if repeats < 1:
        raise ValueError(f"expected at least 1 repeat, got {repeats}")

    def time(*kernels: Callable[[], None]) -> float:
        if not kernels:
            raise ValueError("expected at least 1 kernel, got none")
        for kernel in kernels:
            kernel()
        gpu.synchronize()
        start = gpu.perf_counter_ns()
        for _ in range(repeats):
            for kernel in kernels:
                kernel()
        gpu.synchronize()
        return (gpu.perf_counter_ns() - start) / repeats

    return time
