"""How long a matrix product must take: its arithmetic over the peak rate or its bytes over the bandwidth, the larger.

A product of (M, K) by (K, N) does 2MKN operations on at least MK + KN + MN elements (Williams, Waterman and Patterson,
Roofline, CACM 2009).  Training does three of that size: the output, the gradient of the input, the gradient of the
weight.  FP8 halves the first time, and adds passes over memory that BF16 does not need: every operand is read, scaled
and written again.  ``expected_fp8_speedup`` puts the two together.
"""

import functools
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from mixprec_lab.speed.devices import DTYPE_BYTES, Device, get_device

#: How a tensor becomes FP8: reads of the source, and copies written where both layouts are needed or one suffices.
#: delayed: the scale is known, so one pass casts and collects the next amax.  current: one pass for amax, one to cast.
#: block: a tile of 128 stays on the chip between the two, so one read; an FP32 scale for each 1 x 128 tile.
#: none: operands come quantized (what "kernel only" benchmarks time).
RECIPES: Mapping[str, tuple[int, float]] = MappingProxyType({
    "none": (0, 0.0), "delayed": (1, 1.0), "current": (2, 1.0), "block": (1, 1.0 + 4 / 128),
})  # fmt: skip
PARTS = ("arithmetic", "memory", "casts", "launches")


def _sizes(m: int, k: int, n: int) -> None:
    for name, size in (("M", m), ("K", k), ("N", n)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"expected {name} to be a whole number of at least 1, got {size!r}")


def _share(**efficiencies: float) -> None:
    for name, value in efficiencies.items():
        if not 0 < value <= 1:
            raise ValueError(f"expected {name} to be above 0 and at most 1, got {value!r}")


def products(m: int, k: int, n: int, training: bool = False) -> tuple[tuple[int, int, int], ...]:
    """The products of a linear layer: (M, K, N); in training also dgrad (M, N, K) and wgrad (K, M, N)."""
    _sizes(m, k, n)
    return ((m, k, n), (m, n, k), (k, m, n)) if training else ((m, k, n),)


@dataclass(frozen=True)
class Roofline:
    """The least time of a product, or of the three products of training, on a device.  Times in seconds."""

    flops: int
    bytes: float  #: each input read once, each output written once
    intensity: float  #: FLOP per byte
    ridge: float  #: FLOP per byte at which the device turns from memory to arithmetic
    compute_time: float
    memory_time: float
    time: float  #: the sum over the products of the larger of the two
    bound: str  #: "compute" or "memory": which of the two sums is larger

    @property
    def attainable(self) -> float:
        """FLOP/s that the bound leaves."""
        return self.flops / self.time

    def as_dict(self) -> dict[str, Any]:
        """The fields and ``attainable``, by name."""
        return asdict(self) | {"attainable": self.attainable}


def roofline(
    m: int,
    k: int,
    n: int,
    dtype: str = "bf16",
    device: str | Device = "h100",
    *,
    training: bool = False,
    compute_efficiency: float = 1.0,
    memory_efficiency: float = 1.0,
) -> Roofline:
    """The roofline bound of a (M, K) by (K, N) product of ``dtype``; all three products of a step if ``training``.

    Outputs have 4 bytes an element for fp32 and tf32 and 2 for all others.  The efficiencies are the shares of the
    published rate and bandwidth that are reached: 1 gives a bound that no kernel beats.  Raises ValueError for sizes
    below 1 and efficiencies outside (0, 1], KeyError for a device or dtype that is not in the table.
    """
    device = get_device(device)
    _share(compute_efficiency=compute_efficiency, memory_efficiency=memory_efficiency)
    rate, bandwidth = device.rate(dtype) * compute_efficiency, device.bandwidth * memory_efficiency
    width, out = DTYPE_BYTES[dtype], 4 if dtype in ("fp32", "tf32") else 2
    shapes = products(m, k, n, training)
    flops = [2 * a * b * c for a, b, c in shapes]
    moved = [width * (a * b + b * c) + out * a * c for a, b, c in shapes]
    compute, memory = sum(flops) / rate, sum(moved) / bandwidth
    slower = (max(f / rate, b / bandwidth) for f, b in zip(flops, moved, strict=True))
    time = functools.reduce(operator.add, slower)  # left to right, as JavaScript does; sum() differs between Pythons
    bound = "compute" if compute >= memory else "memory"
    return Roofline(sum(flops), sum(moved), sum(flops) / sum(moved), rate / bandwidth, compute, memory, time, bound)


@dataclass(frozen=True)
class CastCost:
    """What it takes to make FP8 operands: bytes read and written, and kernels launched."""

    elements: int
    read: float
    written: float
    kernels: int

    @property
    def bytes(self) -> float:
        """Read and written together."""
        return self.read + self.written


def cast_cost(m: int, k: int, n: int, recipe: str = "delayed", *, transposes: bool = True, source: int = 2) -> CastCost:
    """The traffic of quantizing input (M, K), weight (K, N) and output gradient (M, N) once each.

    ``source``: bytes of an element before.  ``transposes``: both layouts are written, as Hopper needs them (cuBLAS
    takes FP8 operands in one layout, "TN", before Blackwell).  ``recipe`` is a key of ``RECIPES``; KeyError, with
    the names, for another.  Kernels: one for each read of each tensor.
    """
    _sizes(m, k, n)
    if recipe not in RECIPES:
        raise KeyError(f"expected recipe to be one of {', '.join(RECIPES)}, got {recipe!r}")
    reads, width = RECIPES[recipe]
    elements = m * k + k * n + m * n
    copies = 2 if transposes else 1
    return CastCost(elements, float(reads * source * elements), copies * width * elements, 3 * reads)


@dataclass(frozen=True)
class Split:
    """The time of a linear layer's three products by what it is spent on, in seconds.

    ``memory`` is the part that products wait for memory beyond their arithmetic.
    """

    arithmetic: float
    memory: float
    casts: float
    launches: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.arithmetic + self.memory + self.casts + self.launches

    @property
    def bound(self) -> str:
        """The largest part; the first of ``PARTS`` among equals."""
        return max(PARTS, key=lambda part: getattr(self, part))


@dataclass(frozen=True)
class Expected:
    """What a model expects of one dtype against another in one linear layer, forward and backward."""

    before: Split
    after: Split
    ratio: float  #: time before over time after: above 1, the new dtype is faster


def expected_speedup(
    m: int,
    k: int,
    n: int,
    before: str,
    after: str,
    device: str | Device = "h100",
    recipe: str = "none",
    *,
    before_efficiency: float = 1.0,
    after_efficiency: float = 1.0,
    memory_efficiency: float = 1.0,
    launch: float = 0.0,
    transposes: bool | None = None,
) -> Expected:
    """How much faster ``after`` makes the three products of a linear layer than ``before``, casts to FP8 included.

    Efficiencies are shares of the published rates (see ``roofline``); ``launch`` is a cost in seconds of every kernel:
    three products in either dtype, and the casts.  ``transposes`` defaults to what the device needs.  With
    efficiencies 1 and ``launch`` 0 this bounds what large layers reach.  What it leaves out makes it too kind: kernels
    that do not fill the chip, slower kernels of a finer scaling, the work of the host.

    Raises what ``roofline`` and ``cast_cost`` raise; ValueError for a negative ``launch``, and for a recipe other than
    "none" where ``after`` is not fp8.
    """
    device = get_device(device)
    if not launch >= 0:
        raise ValueError(f"expected launch to be a time in seconds of at least 0, got {launch!r}")
    cast = cast_cost(m, k, n, recipe, transposes=device.transposes if transposes is None else transposes)
    if cast.kernels and after != "fp8":
        raise ValueError(f"expected recipe 'none' for {after}, got {recipe!r}: recipes are ways to make FP8 operands")

    def split(dtype: str, efficiency: float, casts: float, kernels: int) -> Split:
        r = roofline(m, k, n, dtype, device, training=True, compute_efficiency=efficiency,
                     memory_efficiency=memory_efficiency)  # fmt: skip
        return Split(r.compute_time, max(r.time - r.compute_time, 0.0), casts, launch * kernels)

    first = split(before, before_efficiency, 0.0, 3)
    second = split(after, after_efficiency, cast.bytes / (device.bandwidth * memory_efficiency), 3 + cast.kernels)
    return Expected(first, second, first.total / second.total)


def expected_fp8_speedup(
    m: int,
    k: int,
    n: int,
    device: str | Device = "h100",
    recipe: str = "current",
    *,
    bf16_efficiency: float = 1.0,
    fp8_efficiency: float = 1.0,
    **losses: Any,
) -> Expected:
    """``expected_speedup`` from bf16 to fp8; ``losses`` are its other keywords."""
    return expected_speedup(m, k, n, "bf16", "fp8", device, recipe, before_efficiency=bf16_efficiency,
                            after_efficiency=fp8_efficiency, **losses)  # fmt: skip
