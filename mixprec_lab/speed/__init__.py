"""A narrower format makes arithmetic faster, and arithmetic is one of four things that a training step waits for.

The data sheet gives the ratio of the rates: 2 from BF16 to FP8.  A product of matrices reaches it only where it has
enough operations for each byte it moves (``roofline``), a layer only after its operands have been cast (``cast_cost``,
``expected_fp8_speedup``), and a step only in the share of its time that such layers take (``amdahl``).  Whether any of
it happened is a matter of timing (``benchmark``): both arms must do the same work, warmed up, synchronised and often.
"""

from mixprec_lab.speed.amdahl import amdahl, amdahl_fraction
from mixprec_lab.speed.devices import DEVICES, DTYPE_BYTES, Device, get_device, identify
from mixprec_lab.speed.linear import Arm, LinearBenchmark, benchmark_fp8_vs_bf16
from mixprec_lab.speed.published import PUBLISHED, PublishedPoint, measured_points
from mixprec_lab.speed.records import BrokenRecord, load_all, validate
from mixprec_lab.speed.rooflines import (
    PARTS,
    RECIPES,
    CastCost,
    Expected,
    Roofline,
    Split,
    cast_cost,
    expected_fp8_speedup,
    expected_speedup,
    products,
    roofline,
)
from mixprec_lab.speed.simulated import SimulatedGPU
from mixprec_lab.speed.timing import (
    ArmTimes,
    BenchmarkResult,
    Spread,
    UnequalWork,
    benchmark,
    cache_bytes,
    describe,
    difference,
    rotating,
    timer_for,
)

__all__ = [
    "DEVICES",
    "DTYPE_BYTES",
    "PARTS",
    "PUBLISHED",
    "RECIPES",
    "Arm",
    "ArmTimes",
    "BenchmarkResult",
    "BrokenRecord",
    "CastCost",
    "Device",
    "Expected",
    "LinearBenchmark",
    "PublishedPoint",
    "Roofline",
    "SimulatedGPU",
    "Split",
    "Spread",
    "UnequalWork",
    "amdahl",
    "amdahl_fraction",
    "benchmark",
    "benchmark_fp8_vs_bf16",
    "cache_bytes",
    "cast_cost",
    "describe",
    "difference",
    "expected_fp8_speedup",
    "expected_speedup",
    "get_device",
    "identify",
    "load_all",
    "measured_points",
    "products",
    "roofline",
    "rotating",
    "timer_for",
    "validate",
]
