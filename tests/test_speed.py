"""Rooflines, casts and Amdahl by hand; benchmarks on a clock that the tests move; the simulated GPU."""

import dataclasses
import itertools
import json
import math
import statistics
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mixprec_lab.speed import (
    DEVICES,
    DTYPE_BYTES,
    PARTS,
    PUBLISHED,
    RECIPES,
    Device,
    SimulatedGPU,
    Spread,
    UnequalWork,
    amdahl,
    amdahl_fraction,
    benchmark,
    cache_bytes,
    cast_cost,
    describe,
    difference,
    expected_fp8_speedup,
    expected_speedup,
    get_device,
    identify,
    products,
    roofline,
    rotating,
    timer_for,
)

ROOT = Path(__file__).parents[1]
#: 1000 FLOP/s and 10 bytes/s in BF16, twice the FLOP/s in FP8: numbers that can be checked by hand
TOY = Device("toy", "Toy", {"fp32": 100.0, "bf16": 1000.0, "fp8": 2000.0}, 10.0)


# -- devices -----------------------------------------------------------------------------------------------------------


def test_the_table_agrees_with_the_published_rates_of_the_book():
    table = json.loads((ROOT / "book" / "data" / "published_peak_rates.json").read_text("utf-8"))
    titles = {"V100 SXM2 (2017)": "v100", "A100 (2020)": "a100", "H100 SXM, H200 (2022)": "h100", "L40S (2023)": "l40s",
              "MI300X (2023)": "mi300x", "B200 (2024)": "b200"}  # fmt: skip
    for title, rates in table["rows"].items():
        device = DEVICES[titles[title]]
        published = {c.lower(): r * 1e12 for c, r in zip(table["columns"], rates, strict=True) if r is not None}
        assert device.peak == published, title
    assert DEVICES["h200"].peak == DEVICES["h100"].peak


def test_rates_follow_from_clock_and_units():
    assert DEVICES["h100"].rate("bf16") == pytest.approx(1830e6 * 512 * 2 * 528, rel=1e-3)
    assert DEVICES["a100"].rate("bf16") == pytest.approx(1410e6 * 256 * 2 * 432, rel=1e-3)


def test_ridge_is_where_arithmetic_and_memory_meet():
    assert DEVICES["h100"].ridge("bf16") == 989e12 / 3.35e12
    assert TOY.ridge("fp8") == 200


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H200 NVL", "h200_nvl"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA B200", "b200"), ("NVIDIA L40S", "l40s"), ("AMD Instinct MI300X", "mi300x"),
    ],
)  # fmt: skip
def test_a_reported_name_finds_its_device(reported, name):
    assert identify(reported) is DEVICES[name]


@pytest.mark.parametrize("reported", ["NVIDIA GB200", "NVIDIA H100 NVL", "Intel(R) Xeon(R) Processor", "NVIDIA L40"])
def test_devices_outside_of_the_table_are_not_guessed(reported):
    assert identify(reported) is None


def test_unknown_devices_dtypes_and_rates_are_named():
    with pytest.raises(KeyError, match="expected a Device or one of v100, a100.*got 'abacus'"):
        get_device("abacus")
    with pytest.raises(KeyError, match=r"that A100 SXM 80GB multiplies \(fp32, tf32, fp16, bf16\), got 'fp8'"):
        DEVICES["a100"].rate("fp8")
    with pytest.raises(ValueError, match="dtypes among .*got int3"):
        Device("x", "X", {"int3": 1.0}, 1.0)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive rate for bandwidth"):
            Device("x", "X", {"bf16": 1.0}, wrong)


# -- roofline ----------------------------------------------------------------------------------------------------------


def test_roofline_by_hand():
    r = roofline(4, 8, 2, "bf16", TOY)
    assert r.flops == 2 * 4 * 8 * 2 == 128
    assert r.bytes == 2 * (4 * 8 + 8 * 2) + 2 * 4 * 2 == 112
    assert (r.compute_time, r.memory_time, r.time) == (0.128, 11.2, 11.2)
    assert (r.intensity, r.ridge, r.bound) == (128 / 112, 100, "memory")
    assert r.attainable == 128 / 11.2 and r.as_dict()["attainable"] == r.attainable
    assert roofline(4, 8, 2, "fp8", TOY).bytes == 4 * 8 + 8 * 2 + 2 * 4 * 2
    assert roofline(4, 8, 2, "fp32", TOY).bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2)


def test_training_is_the_sum_of_three_products():
    shapes = products(64, 96, 32, training=True)
    assert shapes == ((64, 96, 32), (64, 32, 96), (96, 64, 32))
    whole, parts = roofline(64, 96, 32, "fp8", "h100", training=True), [roofline(*s, "fp8", "h100") for s in shapes]
    assert whole.flops == sum(p.flops for p in parts) == 6 * 64 * 96 * 32
    assert whole.bytes == sum(p.bytes for p in parts)
    assert whole.time == pytest.approx(sum(p.time for p in parts), rel=1e-15)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_square_product_turns_compute_bound_where_its_intensity_passes_the_ridge(dtype):
    device = DEVICES["h100"]
    # 2 n^3 / ((2 w + 2) n^2) = ridge  =>  n = ridge (w + 1), the output having 2 bytes
    n = device.ridge(dtype) * (DTYPE_BYTES[dtype] + 1)
    assert roofline(math.floor(n), math.floor(n), math.floor(n), dtype, device).bound == "memory"
    assert roofline(math.ceil(n), math.ceil(n), math.ceil(n), dtype, device).bound == "compute"


@pytest.mark.parametrize("shape", list(itertools.product((1, 64, 4096), repeat=3)))
def test_no_product_beats_the_data_sheet_or_the_memory(shape):
    for device, dtype in ((d, t) for d in DEVICES.values() for t in d.peak):
        r = roofline(*shape, dtype, device)
        assert r.attainable <= device.rate(dtype) * (1 + 1e-12) and r.time >= r.bytes / device.bandwidth
        half = roofline(*shape, dtype, device, compute_efficiency=0.5, memory_efficiency=0.5)
        assert half.time == pytest.approx(2 * r.time, rel=1e-12)


def test_wrong_sizes_and_efficiencies_are_refused():
    for shape, name in (((0, 1, 1), "M"), ((1, 2.0, 1), "K"), ((1, 1, True), "N")):
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number"):
            roofline(*shape)
    for wrong in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="expected compute_efficiency to be above 0"):
            roofline(1, 1, 1, compute_efficiency=wrong)
        with pytest.raises(ValueError, match="expected memory_efficiency"):
            expected_fp8_speedup(16, 16, 16, memory_efficiency=wrong)
    with pytest.raises(KeyError, match="multiplies"):
        expected_fp8_speedup(16, 16, 16, "a100")
    with pytest.raises(ValueError, match="launch"):
        expected_fp8_speedup(16, 16, 16, launch=-1.0)


# -- casts and expected speed-ups --------------------------------------------------------------------------------------


def test_cast_traffic_by_hand():
    elements = 4 * 8 + 8 * 2 + 4 * 2
    for recipe, transposes, read, written, kernels in [
        ("delayed", False, 2, 1, 3), ("delayed", True, 2, 2, 3), ("current", True, 4, 2, 6),
        ("current", False, 4, 1, 6), ("block", True, 2, 2 + 8 / 128, 3), ("none", True, 0, 0, 0),
    ]:  # fmt: skip
        cost = cast_cost(4, 8, 2, recipe, transposes=transposes)
        found = cost.elements, cost.read, cost.written, cost.kernels
        assert found == (elements, read * elements, written * elements, kernels), recipe
        assert cost.bytes == (read + written) * elements
    assert cast_cost(4, 8, 2, "current", source=4).read == 8 * elements
    with pytest.raises(KeyError, match="one of none, delayed, current, block, got 'static'"):
        cast_cost(1, 1, 1, "static")


def test_an_expected_speedup_by_hand():
    # arithmetic 6*4*8*2 = 384 FLOP: 0.384 s and 0.192 s; memory decides: BF16 3*112 bytes, FP8 per product 32+16+16 ...
    found = expected_fp8_speedup(4, 8, 2, TOY, "delayed", launch=2.0)
    fp8_bytes = (32 + 16 + 2 * 8) + (8 + 16 + 2 * 32) + (32 + 8 + 2 * 16)
    assert found.before.total == pytest.approx(33.6 + 3 * 2.0)
    assert found.after.total == pytest.approx(fp8_bytes / 10 + 3 * 56 / 10 + 6 * 2.0)
    assert found.after.casts == 3 * 56 / 10 and found.after.launches == 12 and found.before.casts == 0
    assert found.ratio == found.before.total / found.after.total
    assert found.before.bound == "memory" and [p for p in PARTS if getattr(found.before, p) > 0] == [
        "arithmetic", "memory", "launches"]  # fmt: skip


def test_large_products_approach_the_ratio_of_the_rates_and_small_ones_lose():
    ratios = [expected_fp8_speedup(n, n, n, "h100", "current").ratio for n in (256, 1024, 4096, 16384, 2**20)]
    assert ratios == sorted(ratios) and ratios[0] < 1 < ratios[-2] < ratios[-1]
    assert ratios[-1] == pytest.approx(1979 / 989, rel=0.01)


def test_what_a_recipe_reads_and_writes_orders_the_recipes():
    for transposes in (False, True):
        order = [expected_fp8_speedup(4096, 4096, 4096, "h100", r, transposes=transposes).ratio
                 for r in ("current", "block", "delayed", "none")]  # fmt: skip
        assert order == sorted(order) and len(set(order)) == 4
    with_copies, without = (expected_fp8_speedup(4096, 4096, 4096, "h100", transposes=t).ratio for t in (True, False))
    assert with_copies < without
    assert expected_fp8_speedup(4096, 4096, 4096, "h100").ratio == with_copies  # Hopper needs both layouts
    assert expected_fp8_speedup(4096, 4096, 4096, "b200") == expected_fp8_speedup(4096, 4096, 4096, "b200",
                                                                                  transposes=False)  # fmt: skip


def test_any_two_dtypes_can_be_compared_and_only_fp8_is_cast():
    large = (2**18,) * 3
    for device, before, after, ratio in (("a100", "fp32", "bf16", 16), ("a100", "fp32", "tf32", 8),
                                         ("v100", "fp32", "fp16", 125 / 15.7)):  # fmt: skip
        assert expected_speedup(*large, before, after, device).ratio == pytest.approx(ratio, rel=1e-12)
    with pytest.raises(ValueError, match="expected recipe 'none' for tf32, got 'current'"):
        expected_speedup(16, 16, 16, "fp32", "tf32", "a100", "current")
    same = expected_speedup(4096, 4096, 4096, "bf16", "fp8", "h100", "delayed", before_efficiency=0.5, launch=1e-6)
    assert same == expected_fp8_speedup(4096, 4096, 4096, "h100", "delayed", bf16_efficiency=0.5, launch=1e-6)


def modelled(point, **efficiencies) -> float:
    runs = [expected_fp8_speedup(*shape, point.device, point.recipe, **efficiencies) for shape in point.shapes]
    return sum(r.before.total for r in runs) / sum(r.after.total for r in runs)


def test_a_bound_without_losses_is_no_lower_than_what_was_published():
    points = [p for p in PUBLISHED if p.shapes]
    assert len(points) == 6 and all(modelled(p) > p.ratio for p in points)


def test_efficiencies_read_off_one_machine_explain_others_except_blocks():
    losses = {"bf16_efficiency": 0.72, "fp8_efficiency": 0.68, "memory_efficiency": 0.45}
    points = [p for p in PUBLISHED if p.shapes and p.recipe != "block" and "small" not in p.title]
    assert len(points) == 4
    for point in points:
        assert modelled(point, **losses) == pytest.approx(point.ratio, rel=0.03), point.title
    (block,) = [p for p in PUBLISHED if p.recipe == "block"]
    assert modelled(block, **losses) > 1.15 * block.ratio  # its products are slower, which counting bytes cannot see


def test_published_points_name_devices_recipes_and_sources_that_exist():
    bibliography = (ROOT / "book" / "references.bib").read_text("utf-8")
    for point in PUBLISHED:
        assert point.device in DEVICES and point.recipe in RECIPES and point.ratio > 0
        assert f"{{{point.citation}," in bibliography
        assert bool(point.shapes) == (point.scope != "training")


# -- Amdahl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [Fraction(1, 7), Fraction(1, 2), Fraction(9, 10)])
@pytest.mark.parametrize("speedup", [Fraction(1, 3), Fraction(8, 5), Fraction(2), Fraction(100)])
def test_amdahl_is_the_ratio_of_times(fraction, speedup):
    exact = 1 / ((1 - fraction) + fraction / speedup)
    assert amdahl(float(fraction), float(speedup)) == pytest.approx(float(exact), rel=1e-15)
    assert amdahl_fraction(float(exact), float(speedup)) == pytest.approx(float(fraction), rel=1e-12)


def test_amdahls_ends():
    assert amdahl(0, 5) == 1 and amdahl(1, 5) == 5 and amdahl(0.5, 1) == 1
    assert amdahl(0.75, math.inf) == 4 and amdahl(1, math.inf) == math.inf
    assert amdahl_fraction(1, 2) == 0 and amdahl_fraction(2, 2) == 1 and amdahl_fraction(4, math.inf) == 0.75
    assert amdahl_fraction(0.8, 0.5) == pytest.approx(0.25)


def test_amdahl_says_what_is_wrong():
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected fraction to be a share"):
            amdahl(wrong, 2)
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="expected speedup to be above 0"):
            amdahl(0.5, wrong)
        with pytest.raises(ValueError, match="expected overall to be above 0"):
            amdahl_fraction(wrong, 2)
    with pytest.raises(ValueError, match="other than 1"):
        amdahl_fraction(1.2, 1)
    for overall, speedup in ((1.5, 1.4), (0.9, 2), (1.1, 0.5)):
        with pytest.raises(ValueError, match="cannot explain it alone"):
            amdahl_fraction(overall, speedup)


# -- benchmark ---------------------------------------------------------------------------------------------------------


class Story:
    """Arms whose calls take scripted seconds, a timer that believes them, and a diary of the calls."""

    def __init__(self, **costs: list[float]) -> None:
        self.costs, self.diary, self.now = {k: itertools.cycle(v) for k, v in costs.items()}, [], 0.0
        self.arms = {name: self._arm(name) for name in costs}
        self.timed = False

    def _arm(self, name):
        def arm(*inputs):
            self.diary.append((name, inputs))
            self.now += next(self.costs[name]) if self.timed else 1000.0  # warm-up calls are slow and do not count
            return torch.ones(2)

        return arm

    def timer(self, call):
        self.timed = True
        start = self.now
        call()
        self.timed = False
        return self.now - start


def test_medians_quartiles_and_paired_ratios_are_exact():
    slow, fast = [8.0, 16.0, 8.0, 80.0, 8.0], [4.0, 4.0, 4.0, 40.0, 2.0]
    story = Story(slow=slow, fast=fast)
    result = benchmark(story.arms, tolerance=0, rounds=5, warmup=2, timer=story.timer, flops=16e12)
    assert result["slow"].rounds == tuple(slow) and result["fast"].rounds == tuple(fast)
    assert result["slow"].seconds == Spread(8, 8, 16) and result["slow"].seconds.iqr == 8
    assert result["slow"].teraflops == 2 and result["fast"].teraflops == 4
    # paired: 2, 4, 2, 2, 4, so the hiccup that hit both in round 4 cancels
    assert result.ratio("fast") == Spread(2, 2, 4) and result.ratio("slow", "fast").median == 0.5
    assert result.differences == {"slow": 0, "fast": 0}


def test_arms_take_turns_and_start_the_rounds_in_turn():
    story = Story(a=[1.0], b=[1.0], c=[1.0])
    benchmark(story.arms, tolerance=None, rounds=4, warmup=1, timer=story.timer)
    assert "".join(name for name, _ in story.diary) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_inputs_rotate_and_every_arm_of_a_round_gets_the_same():
    story = Story(a=[1.0], b=[1.0])
    inputs = [(torch.zeros(1),), (torch.ones(1),)]
    benchmark(story.arms, tolerance=None, rounds=4, warmup=0, inputs=inputs, timer=story.timer)
    assert [int(i[0]) for _, i in story.diary] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_number_repeats_within_a_round_and_divides():
    story = Story(a=[1.0, 3.0], b=[2.0])
    result = benchmark(story.arms, tolerance=None, rounds=3, warmup=0, number=2, timer=story.timer)
    assert result["a"].rounds == (2.0,) * 3 and result["b"].rounds == (2.0,) * 3


def test_unequal_work_is_found_before_anything_is_timed():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def never(call):
        raise AssertionError("timed")

    rounded = {"fp32": lambda: x @ x, "bf16": lambda: (x.bfloat16() @ x.bfloat16()).float()}
    with pytest.raises(UnequalWork, match=r"'bf16' to compute what 'fp32' does within 1e-06, got a relative diff"):
        benchmark(rounded, tolerance=1e-6, timer=never)
    with pytest.raises(UnequalWork, match=r"shapes \[\(64, 64\)\], got \[\(64, 32\)\]"):
        benchmark({"whole": lambda: x, "half": lambda: x[:, :32]}, tolerance=1.0, timer=never)
    with pytest.raises(UnequalWork, match=r"expected results of shapes"):
        benchmark({"both": lambda: (x, x), "forward": lambda: x}, tolerance=1.0, timer=never)
    with pytest.raises(UnequalWork, match="difference of inf"):
        benchmark({"fine": lambda: x, "broken": lambda: x * math.nan}, tolerance=1.0, timer=never)
    with pytest.raises(TypeError, match="return its results, or pass tolerance=None"):
        benchmark({"a": lambda: None, "b": lambda: None}, tolerance=1.0, timer=never)


def test_difference_is_relative_and_takes_the_worst():
    a = torch.tensor([3.0, 4.0])
    assert difference(a, a) == 0 and difference((a, 2 * a), (a, a)) == 1.0
    assert difference(torch.zeros(2), torch.zeros(2)) == 0 and difference(a, torch.zeros(2)) == math.inf


def test_an_arm_that_raises_ends_the_benchmark():
    def broken():
        raise TypeError("half and float")

    with pytest.raises(TypeError, match="half and float"):
        benchmark({"bf16": lambda: torch.ones(1), "fp8": broken}, tolerance=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": int}}, "at least two arms"), ({"rounds": 2}, "rounds to be a whole number of at least 3"),
        ({"warmup": -1}, "warmup"), ({"number": 0}, "number"), ({"number": 1.5}, "number"),
        ({"inputs": []}, "got none"),
        ({"flops": {"a": 1.0}}, "got none for b"), ({"device": "meta"}, "a cpu or cuda device, got meta"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"arms": {"a": int, "b": int}, "tolerance": None, "rounds": 3} | changes
    arms = arguments.pop("arms")
    with pytest.raises(ValueError, match=message):
        benchmark(arms, **arguments)


def test_results_are_plain_values_for_json():
    story = Story(a=[2.0], b=[1.0])
    found = json.loads(json.dumps(benchmark(story.arms, tolerance=0, rounds=3, timer=story.timer).as_dict()))
    assert found["rounds"] == 3 and found["warmup"] == 3 and found["device"] == describe("cpu")
    assert found["arms"]["b"] == {
        "seconds": {"low": 1.0, "median": 1.0, "high": 1.0}, "teraflops": None, "difference": 0.0,
        "ratio": {"low": 2.0, "median": 2.0, "high": 2.0},
    }  # fmt: skip
    with pytest.raises(KeyError, match="one of a, b, got 'c'"):
        benchmark(story.arms, tolerance=0, rounds=3, timer=story.timer)["c"]


def test_quartiles_are_those_of_numpy():
    import numpy as np

    draw = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 4, 15, 30):
        values = torch.rand(n, generator=draw, dtype=torch.float64).tolist()
        spread = Spread.of(values)
        assert [spread.low, spread.median, spread.high] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
        assert spread.median == statistics.median(values)
    with pytest.raises(ValueError, match="got none"):
        Spread.of([])


def test_the_hosts_clock_times_a_cpu_call():
    x = torch.randn(256, 256)
    work = timer_for("cpu")(lambda: [x @ x for _ in range(50)])
    assert work > timer_for("cpu")(lambda: None) >= 0


def test_rotating_inputs_outgrow_the_cache():
    sets = rotating(lambda: (torch.zeros(1000), "label"), 10_000)
    assert len(sets) == 3 and sets[0][0].data_ptr() != sets[1][0].data_ptr()
    assert len(rotating(lambda: (torch.zeros(10**6),), 1)) == 2
    assert len(rotating(lambda: (torch.zeros(1),), 10**9, most=5)) == 5


def test_the_last_cache_is_at_least_the_systems_second_level():
    found = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index2/size")]
    if not found:
        pytest.skip("this system does not report its caches")
    assert cache_bytes("cpu") >= int(found[0].rstrip("KMG")) * 1024


@pytest.mark.gpu
def test_cuda_events_wait_for_the_kernels():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    time = timer_for("cuda")
    one, many = (min(time(lambda n=n: [x @ x for _ in range(n)]) for _ in range(5)) for n in (1, 20))
    known = identify(describe("cuda"))
    assert many > 10 * one
    if known is not None:
        assert one >= roofline(4096, 4096, 4096, "bf16", known).time / 1.05
    assert cache_bytes("cuda") > 2**20


# -- the simulated GPU -------------------------------------------------------------------------------------------------


def test_a_launch_returns_before_the_kernel_has_run():
    gpu = SimulatedGPU(launch=5, first=100)
    run = gpu.kernel("gemm", 1000)
    run()
    assert gpu.perf_counter_ns() == 105  # the launch and the first call's cost, not the 1000 ns
    gpu.synchronize()
    assert gpu.perf_counter_ns() == 1105
    run()
    run()
    assert gpu.perf_counter_ns() == 1115
    gpu.synchronize()
    assert gpu.perf_counter_ns() == 1110 + 2000
    gpu.synchronize()
    assert gpu.perf_counter_ns() == 3110


def test_kernels_queue_behind_each_other_and_each_name_starts_once():
    gpu = SimulatedGPU(launch=0, first=7)
    a, b, a_again = gpu.kernel("a", 10), gpu.kernel("b", 20), gpu.kernel("a", 5)
    for run in (a, b, a_again):
        run()
    assert gpu.perf_counter_ns() == 14
    gpu.synchronize()
    assert gpu.perf_counter_ns() == 7 + 10 + 20 + 5
    for wrong in ({"launch": -1}, {"first": -1}):
        with pytest.raises(ValueError, match="at least 0 ns"):
            SimulatedGPU(**wrong)
    with pytest.raises(ValueError, match="duration"):
        gpu.kernel("a", -1)


def test_devices_and_points_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEVICES["h100"].bandwidth = 1.0
    with pytest.raises(TypeError):
        DEVICES["h100"].peak["fp4"] = 1.0
