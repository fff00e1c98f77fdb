"""The exercises of the chapter ``memory``."""

from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.checks._verdict import Case, check
from mixprec_lab.memory import GPUS, saved_bytes, training_memory


def sharded_states(function: Callable[[int, int, int], int]) -> None:
    """``memory``: bytes of weights, gradients, masters and moments on one GPU, by ZeRO stage; 16 a parameter in all.

    The counts divide by the number of GPUs, so that no shard is padded.
    """
    runs = [(8_000_000, stage, gpus) for stage in (0, 1, 2, 3) for gpus in (2, 64)]

    def case(parameters: int, stage: int, gpus: int) -> Case:
        memory = training_memory(parameters, "bf16_master", zero_stage=stage, world_size=gpus)
        return (parameters, stage, gpus), memory.states

    check(function, (case(*run) for run in runs))


def adapter_states(function: Callable[[int, int, int], int]) -> None:
    """``memory``: bytes that stay from step to step with FP32 adapters under Adam on a frozen base of so many bits."""
    bases = {32: "fp32", 16: "bf16", 8: "fp8_e4m3"}
    runs = [(8_000_000, 40_000, bits) for bits in bases]
    check(function, ((r, training_memory(r[0], "autocast", adapters=r[1], base=bases[r[2]]).states) for r in runs))


def largest_batch(function: Callable[[str, str], int]) -> None:
    """``memory``: the most sequences of 2048 tokens that fit; checked by trying every batch size from 1 on."""

    def case(model: str, gpu: str) -> Case:
        batch = 0
        while training_memory(model, "autocast", sequence=2048, batch=batch + 1).total <= GPUS[gpu].capacity:
            batch += 1
        return (model, gpu), batch

    check(function, (case(*run) for run in (("gpt2", "t4"), ("gpt2_medium", "rtx4090"), ("gpt2_xl", "h100"))))


class _Views(nn.Module):
    """Two layers that read views of one tensor, a third of it each: the backward pass keeps all of it, once."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(8, 4, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x[:, :8]) * self.right(x[:, 8:16])


def saved_once(function: Callable[[Callable, nn.Module], int]) -> None:
    """``memory``: what a forward pass saves beyond the parameters, every storage once and with all its bytes."""
    models = {
        "one linear layer": (nn.Linear(8, 4), torch.ones(5, 8)),
        "two views of one tensor": (_Views(), torch.ones(5, 24)),
        "a deep model": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh()), torch.ones(5, 8)),
    }

    def count(name: str) -> int | None:
        model, x = models[name]
        return function(lambda: model(x), model)

    def case(name: str) -> Case:
        model, x = models[name]
        saved = saved_bytes(lambda: model(x), model)
        return (name,), saved.activations + saved.casts

    count.__name__ = "count"
    check(count, (case(name) for name in models))
