"""What block scaling costs and saves: published figures reproduced, the report, the random Hadamard transform."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from block_oracle import mx_block

from mixprec_lab.block_scaling import (
    SCHEMES,
    block_quantize,
    block_report,
    get_scheme,
    hadamard_matrix,
    quantize_blocks,
    random_hadamard,
    random_signs,
    undo_random_hadamard,
)
from mixprec_lab.rounding import sqnr_db

MILLION = 1 << 20


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_up(name: str):
    return replace(get_scheme(name), rule="round_up")


# -- published figures (shared/facts.md, section 5) --------------------------------------------------------------------


def test_floor_saturates_one_value_in_118_and_round_up_none():
    x = normal(MILLION)
    floor, up = block_report(x, "mxfp8"), block_report(x, round_up("mxfp8"))
    assert floor.saturated == pytest.approx(0.0085, abs=1e-4) and floor.saturated_blocks == pytest.approx(
        0.168, abs=2e-3
    )
    assert floor.relative_rms == pytest.approx(0.0293, abs=1e-4)
    assert up.saturated == up.saturated_blocks == 0 and up.relative_rms == pytest.approx(0.0265, abs=1e-4)


def with_outliers(k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A million normal values, every 4096th multiplied by ``k``; and which ones were not."""
    x, plain = normal(MILLION), torch.ones(MILLION, dtype=torch.bool)
    plain[::4096] = False
    return torch.where(plain, x, k * x), plain


E5M2 = replace(get_scheme("per_tensor"), name="e5m2", element="fp8_e5m2")
OUTLIERS = [
    (1, (0.011, 0.015), (0.0264, 0), (0.0526, 0), (0.0257, 0), (0.0266, 0)),
    (1e2, (0.57, 0.68), (0.0265, 0.0005), (0.0527, 0), (0.0257, 0), (0.0266, 0)),
    (1e4, (1.0, 1.0), (0.0353, 0.044), (0.0529, 0), (0.0258, 0.0004), (0.0266, 0.0002)),
    (1e5, (1.0, 1.0), (0.317, 0.417), (0.0527, 0), (0.0334, 0.004), (0.0306, 0.0015)),
    (1e6, (1.0, 1.0), (1.0, 1.0), (0.0527, 0.0003), (0.133, 0.022), (0.076, 0.006)),
]  # fmt: skip


@pytest.mark.parametrize("row", OUTLIERS, ids=lambda row: f"{row[0]:g}")
def test_a_float_shrugs_off_an_outlier_that_kills_an_integer(row):
    k, *expected = row
    x, plain = with_outliers(k)
    schemes = ("int8", "per_tensor", E5M2, "tile_1x128", round_up("mxfp8"))
    for scheme, (rms, flushed) in zip(schemes, expected, strict=True):
        found = block_report(x, scheme, where=plain)
        assert found.relative_rms == pytest.approx(rms, rel=0.04), scheme
        assert found.flushed == pytest.approx(flushed, rel=0.15, abs=6e-5), scheme


def test_bits_per_value_count_the_scales():
    bits = {name: block_report(torch.ones(256, 256), name).bits_per_value for name in SCHEMES}
    assert (bits["mxfp8"], bits["mxfp6"], bits["mxfp4"]) == (8.25, 6.25, 4.25)
    assert bits["nvfp4"] == 4.5 + 32 / 256**2 and bits["tile_1x128"] == 8 + 32 / 128
    assert bits["block_128x128"] == 8 + 32 / 128**2 and bits["per_row"] == 8 + 32 / 256
    assert bits["per_tensor"] == bits["int8"] == 8 + 32 / 256**2
    assert block_report(torch.ones(1, 33), "mxfp8").bits_per_value == 8 + 16 / 33  # the short block has a scale too


# -- the report against counting by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_errors_are_those_of_the_round_trip(name):
    x = normal(130, 150) * torch.logspace(-3, 3, 150)
    found, error = block_report(x, name), (quantize_blocks(x, name) - x).double()
    assert found.sqnr_db == sqnr_db(x, quantize_blocks(x, name))
    assert found.relative_rms == pytest.approx(float(error.norm() / x.double().norm()), rel=1e-12)
    assert found.max_error == float(error.abs().max())
    assert found.flushed == float(((x != 0) & (quantize_blocks(x, name) == 0)).double().mean())


def test_shares_of_a_small_tensor_counted_by_hand():
    x = torch.tensor([[1.0, 1.9, 2.0**-20, 0.0], [1.0, 0.5, 0.25, 0.0]])
    scheme = replace(get_scheme("mxfp8"), block=(1, 4))  # scale 2^-8: largest 1.75, smallest 2^-17, ties to zero
    found = block_report(x, scheme)
    assert (found.saturated, found.saturated_blocks, found.flushed) == (1 / 8, 1 / 2, 1 / 8)
    assert found.max_error == pytest.approx(0.15)
    where = torch.tensor([[True, False, True, True], [False] * 4])
    found = block_report(x, scheme, where=where)
    assert (found.saturated, found.saturated_blocks, found.flushed, found.max_error) == (0, 0, 1 / 3, 2.0**-20)
    by_column = block_report(x, scheme, axis=0)  # 2^-20 has a neighbour of 0.25 now, and lies below its smallest too
    assert (by_column.saturated, by_column.saturated_blocks, by_column.flushed) == (1 / 8, 1 / 4, 1 / 8)


def test_saturated_is_what_the_specifications_block_clamps():
    x = normal(200, 32)
    clamped = sum(
        abs(v) > 1.75 * 2.0 ** math.floor(math.log2(max(map(abs, block)))) for block in x.tolist() for v in block
    )
    assert block_report(x, "mxfp8").saturated == clamped / x.numel()
    exact = torch.tensor([mx_block(block, "fp8_e4m3") for block in x.tolist()])
    assert block_report(x, "mxfp8").max_error == float((exact.double() - x.double()).abs().max())


def test_the_rounding_of_an_fp32_scale_is_no_saturation():
    x = normal(4096, 16)
    scaled = x / block_quantize(x, "per_row").scales
    assert bool((scaled.abs() > 448).any()) and block_report(x, "per_row").saturated == 0


def test_a_flushed_block_is_flushed_and_not_saturated():
    x = torch.ones(2, 16)
    x[0], x[1] = 6 * 448.0, 2.0**-12
    found = block_report(x, "nvfp4")
    assert (found.flushed, found.saturated, found.saturated_blocks) == (0.5, 0, 0)


def test_a_perfect_copy_and_a_broken_tensor():
    perfect = block_report(torch.ones(4, 32), "mxfp8")
    assert (perfect.sqnr_db, perfect.relative_rms, perfect.max_error) == (math.inf, 0, 0)
    broken = block_report(torch.tensor([1.0, math.nan]), "mxfp8")
    assert math.isnan(broken.sqnr_db) and math.isnan(broken.relative_rms) and math.isnan(broken.max_error)


def test_reports_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one element"):
        block_report(torch.ones(0), "mxfp8")
    with pytest.raises(ValueError, match="at least one element"):
        block_report(torch.ones(3), "mxfp8", where=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boolean tensor of shape \(3,\), got torch.float32 \(3,\)"):
        block_report(torch.ones(3), "mxfp8", where=torch.ones(3))


# -- the random Hadamard transform -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 128])
def test_the_matrix_is_scipys_and_its_own_inverse(size):
    matrix = hadamard_matrix(size, torch.float64)
    assert np.allclose(matrix.numpy(), scipy.linalg.hadamard(size) / math.sqrt(size), rtol=1e-15, atol=0)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_the_transform_is_signs_then_matrix_in_groups_and_can_be_undone(axis):
    x, signs = normal(32, 48).double(), random_signs(16, torch.Generator().manual_seed(1))
    got = random_hadamard(x, signs, axis)
    along = x.movedim(axis, -1)
    groups = [along[:, i : i + 16] * signs @ hadamard_matrix(16, torch.float64) for i in range(0, along.shape[-1], 16)]
    assert torch.allclose(got, torch.cat(groups, -1).movedim(-1, axis), atol=1e-14)
    assert torch.allclose(undo_random_hadamard(got, signs, axis), x, atol=1e-14)
    assert torch.allclose(got.norm(), x.norm())


def test_a_product_does_not_change_when_both_sides_are_transformed():
    a, b = normal(8, 64).double(), normal(64, 5, seed=1).double()
    signs = random_signs(16, torch.Generator().manual_seed(2))
    assert torch.allclose(random_hadamard(a, signs, 1) @ random_hadamard(b, signs, 0), a @ b, atol=1e-12)
    other = random_signs(16, torch.Generator().manual_seed(3))
    assert not torch.allclose(random_hadamard(a, signs, 1) @ random_hadamard(b, other, 0), a @ b, atol=1e-3)


def test_an_outlier_is_spread_evenly_over_its_group():
    spike = torch.zeros(16)
    spike[3] = 100.0
    signs = random_signs(16, torch.Generator().manual_seed(4))
    assert random_hadamard(spike, signs).abs().tolist() == [25.0] * 16


@pytest.mark.parametrize(("name", "gain"), [("mxfp4", 1.8), ("int8", 1.3)])
def test_a_tensor_with_outliers_is_rounded_better_after_the_transform(name, gain):
    x, signs = normal(4096, 64), random_signs(16, torch.Generator().manual_seed(4))
    x[:, 5::16] = 10.0
    transformed = undo_random_hadamard(quantize_blocks(random_hadamard(x, signs), name), signs)
    assert float((quantize_blocks(x, name) - x).norm() / (transformed - x).norm()) > gain


def test_nvfp4_gains_nothing_by_it_where_each_block_has_one_outlier():
    x, signs = normal(4096, 64), random_signs(16, torch.Generator().manual_seed(4))
    x[:, 5::16] = 10.0  # the largest value of a block becomes 6, which is exact up to the rounding of the scale
    transformed = undo_random_hadamard(quantize_blocks(random_hadamard(x, signs), "nvfp4"), signs)
    assert (transformed - x).norm() > (quantize_blocks(x, "nvfp4") - x).norm()


def test_signs_are_signs_and_follow_the_generator():
    signs = random_signs(4096, torch.Generator().manual_seed(0))
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 5 / 64
    assert torch.equal(signs, random_signs(4096, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_stays_and_the_work_is_done_in_float32(dtype):
    x, signs = normal(4, 32).to(dtype), random_signs(16, torch.Generator().manual_seed(1))
    got = random_hadamard(x, signs)
    assert got.dtype == dtype and torch.equal(got, random_hadamard(x.float(), signs).to(dtype))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hadamard_matrix(12), ValueError, "power of two, got 12"),
        (lambda: random_hadamard(torch.ones(20), torch.ones(16)), ValueError, "divides the dimension, got .* for 20"),
        (lambda: random_hadamard(torch.ones(24), torch.ones(12)), ValueError, "power of two, got 12"),
        (lambda: random_hadamard(torch.ones(16).int(), torch.ones(16)), TypeError, "torch.int32"),
        (lambda: random_hadamard(torch.tensor(1.0), torch.ones(1)), TypeError, "with a dimension"),
    ],
)
def test_transforms_that_do_not_fit_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_gives_the_bits_of_the_cpu(name):
    x = normal(256, 256)
    here, there = block_quantize(x, name), block_quantize(x.cuda(), name)
    assert torch.equal(there.elements.cpu(), here.elements) and torch.equal(there.scales.cpu(), here.scales)
    assert torch.equal(there.dequantize().cpu(), here.dequantize())
