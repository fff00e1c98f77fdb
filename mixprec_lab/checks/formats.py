"""The exercises of the chapter ``formats``."""

from collections.abc import Callable

import torch

from mixprec_lab.checks._verdict import check
from mixprec_lab.formats import decode


def flushed_share(function: Callable[[torch.Tensor], float]) -> None:
    """``formats``: the share of a tensor's non-zero values that FP16 turns into zero."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(10_000, generator=generator) * std for std in (1e-5, 1e-7, 1e-8)]
    samples.append(torch.tensor([0.0, 2.0**-25, 2.0**-24, -1e-9, 1.0]))
    cases = [((g,), float(((g != 0) & (g.half() == 0)).sum() / (g != 0).sum())) for g in samples]
    check(function, cases, relative=1e-6)


def decode_e4m3(function: Callable[[int], float]) -> None:
    """``formats``: the value of every E4M3 code, NaN included."""
    values = decode(torch.arange(256), "fp8_e4m3").tolist()
    check(function, [((code,), values[code]) for code in (0x38, 0x7E, 0x01, 0x08, 0xC0, 0x7F, *range(256))])


def first_lost_integer(function: Callable[[int], int]) -> None:
    """``formats``: the smallest positive integer that a format with so many stored mantissa bits cannot hold."""
    check(function, [((m,), 2 ** (m + 1) + 1) for m in (7, 10, 3, 2, 1, 23)])


def reports_overflow(function: Callable[[float, str], str]) -> None:
    """``formats``: 'flushed', 'overflow' or 'fine' for a number and a format."""
    expected = {
        ("fp16", 1e-10): "flushed", ("fp16", 1e5): "overflow", ("fp16", 1e-5): "fine", ("fp16", -1e5): "overflow",
        ("bf16", 1e-10): "fine", ("bf16", 1e-42): "flushed", ("bf16", 3.4e38): "overflow", ("fp16", 0.0): "fine",
        ("fp8_e4m3", 1e3): "overflow", ("fp8_e4m3", 1e-4): "flushed", ("fp8_e5m2", 1e-4): "fine",
    }  # fmt: skip
    check(function, [((value, name), verdict) for (name, value), verdict in expected.items()])
