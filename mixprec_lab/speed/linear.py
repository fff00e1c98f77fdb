"""``benchmark_fp8_vs_bf16``: one linear layer, forward and backward, in every format that this device multiplies.

All arms get the same input, the same weight and the same output gradient, hand back the output and both gradients, and
are compared before they are timed.  Every arm is named by what it does, emulation included.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.fp8 import CurrentScaling, DelayedScaling, FP8Linear, Recipe, why_not
from mixprec_lab.speed.rooflines import products
from mixprec_lab.speed.timing import BenchmarkResult, Timer, benchmark, cache_bytes, rotating

#: Relative.  E4M3 operands and E5M2 gradients are off by about 4 % and 7 % of the norm on normal data.
TOLERANCE = 0.12
FP8_RECIPES: Mapping[str, Recipe] = {
    "delayed": DelayedScaling(), "current": CurrentScaling(), "rows": CurrentScaling(granularity="row"),
}  # fmt: skip
Inputs = Mapping[Any, Any]
Step = Callable[[Inputs], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Arm:
    """What an arm does, in words and in the terms of a record."""

    dtype: str
    casts: bool  #: whether its time contains conversions of its operands
    recipe: str = "none"
    backend: str = "torch"

    @property
    def emulated(self) -> bool:
        """Whether the products of this dtype run in another one."""
        return self.backend == "emulated"


@dataclass(frozen=True)
class LinearBenchmark:
    """The arms of one shape, their times, and why others are missing."""

    shape: tuple[int, int, int]
    result: BenchmarkResult
    arms: Mapping[str, Arm]
    skipped: Mapping[str, str]

    def rows(self) -> list[dict[str, Any]]:
        """One row an arm, as a record holds it; ``ratio`` is against BF16."""
        size = " x ".join(map(str, self.shape))
        rows = []
        for name, arm in self.arms.items():
            times = self.result[name]
            rows.append({
                "name": f"{name}, {size}", "shape": list(self.shape), "seconds": asdict(times.seconds),
                "ratio": asdict(self.result.ratio(name)), "teraflops": times.teraflops, "emulated": arm.emulated,
                "difference": self.result.differences[name], **asdict(arm),
            })  # fmt: skip
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Shape, rows and reasons as plain values."""
        return {"shape": list(self.shape), "rows": self.rows(), "skipped": dict(self.skipped)}


def benchmark_fp8_vs_bf16(
    m: int,
    k: int,
    n: int,
    *,
    device: torch.device | str = "cpu",
    rounds: int = 15,
    warmup: int = 3,
    recipes: Mapping[str, Recipe] = FP8_RECIPES,
    backends: Sequence[str] = ("scaled_mm", "transformer_engine"),
    rotate: int | None = None,
    timer: Timer | None = None,
    seed: int = 0,
) -> LinearBenchmark:
    """Forward and backward of a (m, k) by (k, n) linear layer in BF16, FP32, TF32, FP16 and FP8, as far as they run.

    ``bf16`` has operands in BF16, ``bf16 with casts`` FP32 ones that are cast in each call, as autocast does with
    FP32 weights.  FP8 arms take BF16 operands and quantize in each call, by every recipe and every one of ``backends``
    that runs on CUDA; elsewhere by emulation, which says nothing about the speed of FP8 and is marked so.
    ``fp8 products`` times products of quantized operands alone.  TF32 and FP16 are timed on CUDA only.  Input sets
    rotate until they take ``rotate`` bytes, by default twice the last cache on CUDA (on a CPU: two sets).

    Raises ValueError for sizes that are no multiples of 16, which FP8 units need; UnequalWork if an arm's output or
    gradients are not those of BF16 within 12 %, the rounding of FP8.
    """
    products(m, k, n)
    if m % 16 or k % 16 or n % 16:
        raise ValueError(f"expected sizes that are multiples of 16, which FP8 units need, got {m}, {k}, {n}")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weight = (normal(n, k) / k**0.5).bfloat16()
    steps, arms, skipped = _steps(weight, recipes, backends, device)
    scaled = "fp8 products" in steps
    quantized = _quantized_weight(weight) if scaled else None

    def make() -> tuple[Inputs]:
        return (_inputs(normal(m, k), normal(m, n), quantized, device),)

    least = rotate if rotate is not None else (2 * cache_bytes(device) if device.type == "cuda" else 0)
    inputs = rotating(make, least, most=16)
    for _ in range(2):  # delayed scales start at 1 and need a look at the data
        for step in steps.values():
            step(*inputs[0])
    result = benchmark(steps, tolerance=TOLERANCE, inputs=inputs, rounds=rounds, warmup=warmup, device=device,
                       flops=6.0 * m * k * n, timer=timer)  # fmt: skip
    return LinearBenchmark((m, k, n), result, arms, skipped)


def _inputs(x: torch.Tensor, g: torch.Tensor, weight: Any, device: torch.device) -> Inputs:
    """The same values in every dtype: input, to be differentiated, and output gradient; in FP8 if there is a weight."""
    x, g = x.bfloat16(), g.bfloat16()
    dtypes = [torch.bfloat16, torch.float32] + ([torch.float16] if device.type == "cuda" else [])
    found: dict[Any, Any] = {d: (x.to(d).requires_grad_(), g.to(d)) for d in dtypes}
    if weight is not None:
        found["fp8"] = (*_both_layouts(x, torch.float8_e4m3fn), *weight, *_both_layouts(g, torch.float8_e5m2))
    return found


def _steps(
    weight: torch.Tensor, recipes: Mapping[str, Recipe], backends: Sequence[str], device: torch.device
) -> tuple[dict[str, Step], dict[str, Arm], dict[str, str]]:
    steps: dict[str, Step] = {"bf16": _plain(weight, torch.bfloat16)}
    arms, skipped = {"bf16": Arm("bf16", casts=False)}, {}

    def add(name: str, step: Step, arm: Arm) -> None:
        steps[name], arms[name] = step, arm

    add("fp32", _plain(weight, torch.float32), Arm("fp32", casts=False))
    add("bf16 with casts", _cast_each_call(weight), Arm("bf16", casts=True))
    if device.type == "cuda":
        add("tf32", _tf32(_plain(weight, torch.float32)), Arm("tf32", casts=False))
        add("fp16", _plain(weight, torch.float16), Arm("fp16", casts=False))
    else:
        skipped["tf32"] = skipped["fp16"] = f"timed on CUDA only, this is {device}"
    skipped |= {b: reason for b in backends if (reason := _no_backend(b, device))}
    real = [b for b in backends if b not in skipped]
    for backend in real or (["emulated"] if device.type != "cuda" else []):
        for name, recipe in recipes.items():
            if backend in recipe.backends:
                add(f"fp8 {name}, {backend}", _fp8(weight, recipe, backend),
                    Arm("fp8", casts=True, recipe=name, backend=backend))  # fmt: skip
    if "scaled_mm" in real:
        add("fp8 products", _products_only, Arm("fp8", casts=False, backend="scaled_mm"))
    return steps, arms, skipped


def _no_backend(backend: str, device: torch.device) -> str | None:
    if backend == "scaled_mm" and device.type != "cuda":
        return "on a CPU it is a reference loop, which would be timed for its own sake"
    return why_not(backend, device)


def _differentiated(layer: Callable[[torch.Tensor], torch.Tensor], weight: nn.Parameter, dtype: torch.dtype) -> Step:
    def step(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        x, g = inputs[dtype]
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, weight), g)

    return step


def _plain(weight: torch.Tensor, dtype: torch.dtype) -> Step:
    own = nn.Parameter(weight.to(dtype))
    return _differentiated(lambda x: F.linear(x, own), own, dtype)


def _cast_each_call(weight: torch.Tensor) -> Step:
    own = nn.Parameter(weight.float())

    def step(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        x, g = inputs[torch.float32]
        y = F.linear(x.bfloat16(), own.bfloat16())
        return y, *torch.autograd.grad(y, (x, own), g.bfloat16())

    return step


def _fp8(weight: torch.Tensor, recipe: Recipe, backend: str) -> Step:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")  # draws nothing from the global generator
    linear.weight = nn.Parameter(weight.clone())
    layer = FP8Linear.from_linear(linear, recipe, backend, product_dtype=torch.bfloat16)
    return _differentiated(layer, layer.weight, torch.bfloat16)


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32(step: Step) -> Step:
    def with_tf32(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with _precision("high"):
            return step(inputs)

    return with_tf32


def _both_layouts(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x`` in FP8, its transposed copy, and the scale that undoes the scaling."""
    largest = torch.finfo(dtype).max
    scale = largest / x.float().abs().amax()
    quantized = (x.float() * scale).clamp(-largest, largest).to(dtype)
    return quantized, quantized.t().contiguous(), 1 / scale


def _quantized_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _both_layouts(weight, torch.float8_e4m3fn)


def _products_only(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The three products on operands that are quantized already, each in the one layout that Hopper takes."""
    x, x_t, x_scale, w, w_t, w_scale, g, g_t, g_scale = inputs["fp8"]

    def product(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)

    return product(x, w, x_scale, w_scale), product(g, w_t, g_scale, w_scale), product(g_t, x_t, g_scale, x_scale)
