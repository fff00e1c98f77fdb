"""Timing that survives a second look: warmed up, synchronised, interleaved, repeated, and of the same work."""

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Timer = Callable[[Callable[[], object]], float]


class UnequalWork(ValueError):
    """The arms of a benchmark do not compute the same thing, so their times cannot be compared."""


def describe(device: torch.device | str) -> str:
    """The device in words: what CUDA reports, or the CPU's model and the number of threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8")) if info.exists() else None
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def timer_for(device: torch.device | str) -> Timer:
    """A function that returns the seconds a call takes on ``device``: CUDA events there, the host's clock on a CPU.

    On CUDA it waits for earlier work before it starts and for the last kernel before it stops.  Raises ValueError for
    other device types: an asynchronous device under a host clock gives the time to *launch*.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _host_seconds
    if device.type != "cuda":
        raise ValueError(f"expected a cpu or cuda device, got {device}: pass a timer that waits for {device.type}")

    def event_seconds(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    return event_seconds


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, between neighbours linearly; ValueError for no values."""
    if not values:
        raise ValueError("expected at least one value, got none")
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of ``values``."""
        return cls(*quartiles(values))

    @property
    def iqr(self) -> float:
        """Upper minus lower quartile."""
        return self.high - self.low


@dataclass(frozen=True)
class ArmTimes:
    """Seconds of one call of one arm, round by round."""

    name: str
    rounds: tuple[float, ...]
    flops: float | None = None

    @property
    def seconds(self) -> Spread:
        """Median and quartiles."""
        return Spread.of(self.rounds)

    @property
    def teraflops(self) -> float | None:
        """10**12 operations a second at the median; None if the operations of a call were not given."""
        return None if self.flops is None else self.flops / self.seconds.median / 1e12


@dataclass(frozen=True)
class BenchmarkResult:
    """What ``benchmark`` measured; the first arm is the one that ratios are against."""

    device: str
    warmup: int
    arms: tuple[ArmTimes, ...]
    differences: Mapping[str, float | None]  #: of each arm's outputs from the first arm's; None where not compared

    def __getitem__(self, name: str) -> ArmTimes:
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(f"expected one of {', '.join(a.name for a in self.arms)}, got {name!r}")

    def ratio(self, name: str, baseline: str | None = None) -> Spread:
        """How many times as fast ``name`` is as ``baseline``: baseline time over its time, round by round."""
        base, arm = self.arms[0] if baseline is None else self[baseline], self[name]
        return Spread.of([b / a for a, b in zip(arm.rounds, base.rounds, strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        arms = {
            a.name: {"seconds": asdict(a.seconds), "teraflops": a.teraflops, "difference": self.differences[a.name],
                     "ratio": asdict(self.ratio(a.name))}
            for a in self.arms
        }  # fmt: skip
        return {"device": self.device, "warmup": self.warmup, "rounds": len(self.arms[0].rounds), "arms": arms}


def _tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return [t for part in output for t in _tensors(part)]
    raise TypeError(
        f"expected an arm to return tensors to compare, got {type(output).__name__}: return its results, or pass "
        f"tolerance=None"
    )


def difference(got: object, expected: object) -> float:
    """The largest relative distance ``|got - expected| / |expected|`` (2-norms, float64) over pairs of tensors.

    Both are a tensor or nested tuples of tensors.  NaN or inf in ``got`` gives inf.  Raises UnequalWork where number
    or shapes differ.
    """
    pairs = _tensors(got), _tensors(expected)
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        shapes = [[tuple(t.shape) for t in side] for side in pairs]
        raise UnequalWork(f"expected results of shapes {shapes[1]}, got {shapes[0]}")
    worst = 0.0
    for a, b in zip(*pairs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        distance, size = float((a - b).norm()), float(b.norm())
        if math.isfinite(distance):
            worst = max(worst, distance / size if size else math.inf if distance else 0.0)
        else:
            worst = math.inf
    return worst


def compare(arms: Mapping[str, Callable[..., object]], inputs: tuple, tolerance: float) -> dict[str, float]:
    """How far every arm's results are from the first arm's on ``inputs``; UnequalWork beyond ``tolerance``."""
    first = None
    found = {}
    for name, arm in arms.items():
        output = arm(*inputs)
        first = output if first is None else first
        found[name] = difference(output, first)
        if not found[name] <= tolerance:
            raise UnequalWork(
                f"expected {name!r} to compute what {next(iter(arms))!r} does within {tolerance:g}, got a relative "
                f"difference of {found[name]:.3g}: give every arm the same inputs, shapes and passes"
            )
    return found


def benchmark(
    arms: Mapping[str, Callable[..., object]],
    *,
    tolerance: float | None,
    inputs: Sequence[tuple] = ((),),
    rounds: int = 15,
    warmup: int = 3,
    number: int = 1,
    device: torch.device | str = "cpu",
    flops: float | Mapping[str, float] | None = None,
    timer: Timer | None = None,
) -> BenchmarkResult:
    """Times of ``arms``, interleaved: every round times every arm once, and each round starts with another arm.

    Before any timing the results of all arms on the first inputs are compared (``tolerance``, relative; None: there is
    nothing to compare).  Round i calls ``arm(*inputs[i % len(inputs)])`` ``number`` times: give several input sets,
    larger together than the last cache (``rotating``), to time memory instead of the cache.  An arm that raises ends
    the benchmark.  ``flops`` are the operations of one call, of all arms or by name.  ``timer`` defaults to
    ``timer_for(device)``.

    Raises ValueError for less than two arms, no inputs, fewer than 3 rounds, a negative warm-up or a ``number`` below
    1; UnequalWork, a ValueError, where results differ.
    """
    if len(arms) < 2:
        raise ValueError(f"expected at least two arms to compare, got {len(arms)}")
    if not inputs:
        raise ValueError("expected at least one tuple of inputs, got none: pass ((),) for arms without arguments")
    for name, value, least in (("rounds", rounds, 3), ("warmup", warmup, 0), ("number", number, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"expected {name} to be a whole number of at least {least}, got {value!r}")
    known = flops if isinstance(flops, Mapping) else dict.fromkeys(arms, flops)
    if missing := set(arms) - set(known):
        raise ValueError(f"expected flops for every arm, got none for {', '.join(sorted(missing))}")
    timer = timer or timer_for(device)
    differences = dict.fromkeys(arms) if tolerance is None else compare(arms, inputs[0], tolerance)
    for i in range(warmup):
        for arm in arms.values():
            arm(*inputs[i % len(inputs)])
    times = _interleave(arms, inputs, rounds, number, timer)
    measured = tuple(ArmTimes(name, tuple(times[name]), known[name]) for name in arms)
    return BenchmarkResult(describe(device), warmup, measured, differences)


def _interleave(
    arms: Mapping[str, Callable[..., object]], inputs: Sequence[tuple], rounds: int, number: int, timer: Timer
) -> dict[str, list[float]]:
    names, times = list(arms), {name: [] for name in arms}
    for i in range(rounds):
        arguments = inputs[i % len(inputs)]
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timer(_repeat(arms[name], arguments, number)) / number)
    return times


def _repeat(arm: Callable[..., object], arguments: tuple, number: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(number):
            arm(*arguments)

    return call


def cache_bytes(device: torch.device | str) -> int:
    """Bytes of the last cache before memory: L2 on CUDA, the largest cache the kernel reports on a Linux CPU.

    Raises OSError where the system does not say.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text("utf-8").strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    if not sizes:
        raise OSError("expected cache sizes under /sys/devices/system/cpu/cpu0/cache, got none: pass a size yourself")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max(int(s[:-1]) * units[s[-1]] for s in sizes)


def rotating(make: Callable[[], tuple], at_least: int, most: int = 64) -> list[tuple]:
    """Input sets from ``make()`` until they take ``at_least`` bytes together: two sets at least, ``most`` at most."""
    sets: list[tuple] = []
    held = 0
    while len(sets) < 2 or (held < at_least and len(sets) < most):
        sets.append(make())
        held += sum(t.numel() * t.element_size() for t in tree_leaves(sets[-1]) if isinstance(t, torch.Tensor))
    return sets
