"""``benchmark_fp8_vs_bf16``: every arm does the work of a linear layer, says what it is, and is marked if emulated."""

import itertools

import pytest
import torch
from test_speed_records import record

from mixprec_lab.fp8 import CurrentScaling, FixedScaling
from mixprec_lab.speed import PUBLISHED, UnequalWork, benchmark_fp8_vs_bf16, difference, measured_points
from mixprec_lab.speed import linear as linear_module
from mixprec_lab.speed.linear import TOLERANCE


def ticks():
    """A timer without a clock: the call runs, and takes 1, 2, 3, ... seconds."""
    seconds = itertools.count(1)

    def timer(call):
        call()
        return float(next(seconds))

    return timer


@pytest.fixture(scope="module")
def small():
    return benchmark_fp8_vs_bf16(64, 96, 32, rounds=3, warmup=1, timer=ticks())


def test_the_arms_of_a_cpu_and_what_is_missing(small):
    assert list(small.arms) == ["bf16", "fp32", "bf16 with casts", "fp8 delayed, emulated", "fp8 current, emulated",
                                "fp8 rows, emulated"]  # fmt: skip
    assert {name for name, arm in small.arms.items() if arm.emulated} == {n for n in small.arms if "emulated" in n}
    assert set(small.skipped) == {"tf32", "fp16", "scaled_mm", "transformer_engine"}
    assert all(small.skipped.values())
    assert not small.arms["bf16"].casts and small.arms["bf16 with casts"].casts


def test_every_arm_does_the_same_work_within_its_format(small):
    d = small.result.differences
    assert d["bf16"] == 0 and 0 < d["fp32"] < 0.01 and d["bf16 with casts"] < 0.01
    assert all(0.02 < d[name] < TOLERANCE for name in d if name.startswith("fp8"))


def test_rates_count_the_three_products(small):
    for arm in small.result.arms:
        assert arm.flops == 6 * 64 * 96 * 32
        assert arm.teraflops == pytest.approx(arm.flops / arm.seconds.median / 1e12)


def test_rows_are_what_a_record_takes(small):
    rows = small.rows()
    assert [row["name"].rsplit(",", 1)[0] for row in rows] == list(small.arms)
    whole = record(device="Xeon", device_type="cpu")
    whole["sections"]["linear"] = {"status": "ok", "seconds": 1.0, "rows": rows}
    from mixprec_lab.speed import validate

    validate(whole)
    assert rows[0]["ratio"] == {"low": 1.0, "median": 1.0, "high": 1.0} and rows[3]["recipe"] == "delayed"
    assert small.as_dict()["shape"] == [64, 96, 32]


def test_layers_agree_with_float64():
    shape = 48, 64, 32
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(48, 64, generator=generator), torch.randn(48, 32, generator=generator)
    weight = torch.randn(32, 64, generator=generator).bfloat16()
    inputs = linear_module._inputs(x, g, linear_module._quantized_weight(weight), torch.device("cpu"))
    x64, g64, w64 = x.bfloat16().double(), g.bfloat16().double(), weight.double()
    exact = x64 @ w64.T, g64 @ w64, g64.T @ x64
    steps, _, _ = linear_module._steps(weight, {"current": CurrentScaling()}, (), torch.device("cpu"))
    assert difference(steps["fp32"](inputs), exact) < 1e-6 and difference(steps["bf16"](inputs), exact) < 5e-3
    assert difference(steps["fp8 current, emulated"](inputs), exact) < TOLERANCE
    # the arm of FP8 hardware runs on a CPU too, through torch's reference loop
    products = linear_module._products_only(inputs)
    assert [tuple(p.shape) for p in products] == [(48, 32), (48, 64), (32, 64)] and shape[0] == 48
    assert 0.02 < difference(products, exact) < TOLERANCE


def test_a_recipe_that_loses_the_data_is_refused_before_timing():
    def never(call):
        raise AssertionError("timed")

    lost = {"unscaled": FixedScaling(input=2.0**-20)}
    with pytest.raises(UnequalWork, match="'fp8 unscaled, emulated' to compute what 'bf16' does within 0.12"):
        benchmark_fp8_vs_bf16(32, 32, 32, recipes=lost, timer=never)


@pytest.mark.parametrize("shape", [(17, 16, 16), (16, 8, 16), (16, 16, 24), (0, 16, 16)])
def test_sizes_that_fp8_units_do_not_take_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 16|whole number"):
        benchmark_fp8_vs_bf16(*shape)


def test_the_benchmark_leaves_torch_as_it_was():
    before = torch.get_float32_matmul_precision(), torch.get_rng_state()
    benchmark_fp8_vs_bf16(16, 16, 16, rounds=3, timer=ticks())
    assert torch.get_float32_matmul_precision() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    with linear_module._precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before[0]


def test_only_real_fp8_on_known_devices_becomes_a_point(small):
    cpu = record(device="Xeon", device_type="cpu")
    cpu["sections"]["linear"] = {"status": "ok", "seconds": 1.0, "rows": small.rows()}
    assert measured_points({"cpu": cpu}) == ()
    gpu, rows = record(), [dict(row) for row in small.rows()[3:]]
    for row in rows:
        row |= {"emulated": False, "backend": "scaled_mm"}
    products = rows[0] | {"casts": False, "recipe": "none"}
    gpu["sections"]["linear"] = {"status": "ok", "seconds": 1.0, "rows": [*small.rows(), *rows[1:], products]}
    gpu["sections"]["transformer_engine"] = {"status": "ok", "seconds": 1.0, "rows": [small.rows()[0], rows[0]]}
    points = measured_points({"h200": gpu})
    assert [(p.device, p.recipe, p.scope) for p in points] == [
        ("h200", "current", "layer"), ("h200", "none", "kernel"), ("h200", "delayed", "layer")]  # fmt: skip
    assert points[2].ratio == rows[0]["ratio"]["median"] and points[2].shapes == ((64, 96, 32),)
    assert points[2].title == "NVIDIA H200, measured 2026-11-26, delayed scaling" and points[2] not in PUBLISHED
    assert measured_points({"h200": record()}) == ()


@pytest.mark.gpu
def test_real_fp8_arms_run_and_agree_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = benchmark_fp8_vs_bf16(512, 512, 512, device="cuda", rounds=5)
    assert {"tf32", "fp16"} <= set(found.arms)
    if torch.cuda.get_device_capability() >= (8, 9):
        assert "fp8 products" in found.arms and "fp8 current, scaled_mm" in found.arms
