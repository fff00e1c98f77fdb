"""A benchmark for the impatient: products of square matrices in every format of a device, in seconds."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mixprec_lab.device import named, pick
from mixprec_lab.fp8 import why_not
from mixprec_lab.speed.linear import _precision
from mixprec_lab.speed.timing import BenchmarkResult, benchmark

#: Two products of one pair of matrices, with operands rounded to FP8 and not at all, differ by about 0.04 of the norm.
TOLERANCE = 0.1


@dataclass(frozen=True)
class QuickBench:
    """Times of one product by format, where, when and with what."""

    size: int
    date: str
    torch: str
    result: BenchmarkResult

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {"size": self.size, "date": self.date, "torch": self.torch, **self.result.as_dict()}

    def __str__(self) -> str:
        head = f"{self.result.device}, torch {self.torch}, {self.date}"
        lines = [f"one product of two {self.size} x {self.size} matrices, median [quartiles] of {self._rounds} rounds"]
        for arm in self.result.arms:
            s, r = arm.seconds, self.result.ratio(arm.name)
            time = f"{s.median * 1e3:9.3f} ms [{s.low * 1e3:.3f}, {s.high * 1e3:.3f}]"
            ratio = f"{r.median:5.2f} times FP32 [{r.low:.2f}, {r.high:.2f}]"
            lines.append(f"  {arm.name:4}  {time}  {arm.teraflops:8.3f} TFLOP/s  {ratio}")
        return "\n".join([head, *lines, "casts are not timed; a busy machine shows in the quartiles"])

    @property
    def _rounds(self) -> int:
        return len(self.result.arms[0].rounds)


def quick_bench(device: str | None = None, size: int | None = None, rounds: int = 7) -> QuickBench:
    """Products of two ``size`` x ``size`` matrices in the formats that ``device`` multiplies, FP32 first.

    ``device`` defaults to ``mixprec_lab.device.pick()``, ``size`` to 512 on a CPU and 4096 on a GPU.  Operands are cast
    before the clock starts.  Raises ValueError for a device that is not here, a size that is no multiple of 16 (FP8
    products need that), and fewer than 3 rounds.
    """
    where = pick().device if device is None else named(device)
    size = size if size is not None else 4096 if where.type == "cuda" else 512
    if size < 16 or size % 16:
        raise ValueError(f"expected a size that is a positive multiple of 16, got {size}")
    generator = torch.Generator(where).manual_seed(0)
    a, b = (torch.randn(size, size, device=where, generator=generator) for _ in range(2))
    number = max(1, min(20, 2**28 // size**3))
    arms, flops = _arms(a, b), 2.0 * size**3
    result = benchmark(arms, tolerance=TOLERANCE, rounds=rounds, number=number, device=where, flops=flops)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return QuickBench(size, date, torch.__version__, result)


def _arms(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    def plain(dtype: torch.dtype, precision: str = "highest") -> Callable[[], torch.Tensor]:
        left, right = a.to(dtype), b.to(dtype)

        def product() -> torch.Tensor:
            with _precision(precision):
                return left @ right

        return product

    arms = {"fp32": plain(torch.float32), "bf16": plain(torch.bfloat16), "fp16": plain(torch.float16)}
    if a.device.type != "cuda":
        return arms
    if torch.cuda.get_device_capability(a.device) >= (8, 0) and torch.version.hip is None:
        arms["tf32"] = plain(torch.float32, "high")
    return arms | ({} if why_not("scaled_mm", a.device) else {"fp8": _fp8(a, b)})


def _fp8(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    left, right = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
