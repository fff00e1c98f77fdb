"""Block quantization against a scalar reading of the specifications, and the properties that follow from them."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from block_oracle import ELEMENTS, mx_block, nvfp4, scaled_block

from mixprec_lab.block_scaling import (
    INT8,
    SCALE_RULES,
    SCHEMES,
    BlockScheme,
    block_quantize,
    block_scales,
    get_scheme,
    quantize_blocks,
)
from mixprec_lab.formats import FORMATS

POWERS = [name for name, scheme in SCHEMES.items() if scheme.powers_of_two]
MX_RULES = ("floor", "round_up", "even")


def mx(element: str, rule: str = "floor", block: int = 32) -> BlockScheme:
    return replace(get_scheme("mxfp8"), name=f"mx_{element}_{rule}", element=element, rule=rule, block=(1, block))


def spread(*shape: int, seed: int = 0, width: float = 8.0) -> torch.Tensor:
    """Normal values times random powers of two, so that every block holds many binades."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp2(torch.randint(-int(width), int(width), shape, generator=generator).float())


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, zero's sign too; NaN equals NaN."""
    equal = (got == expected) & (got.signbit() == expected.signbit())
    return got.shape == expected.shape and bool((equal | (got.isnan() & expected.isnan())).all())


# -- against the scalar reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_blocks_are_those_of_the_specification(element, rule):
    x = spread(300, 32, width=12)
    expected = torch.tensor([mx_block(block, element, rule) for block in x.tolist()])
    assert torch.equal(quantize_blocks(x, mx(element, rule)), expected)


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("element", ["fp8_e4m3", "fp4_e2m1"])
def test_every_exponent_of_the_largest_value_gives_the_scale_of_the_specification(element, rule):
    fractions = [1.0, 1.25, 1.5 - 2**-23, 1.5, 1.75 - 2**-23, 1.75, 1.875 - 2**-23, 1.875, 2 - 2**-23]
    largest = [f * 2.0**e for e in range(-149, 128) for f in fractions if (f * 2.0**e / 2.0**-149).is_integer()]
    x = torch.tensor(largest).unsqueeze(1) * torch.tensor([1.0, -0.7, 0.31, 0.01])
    expected = torch.tensor([mx_block(block, element, rule) for block in x.tolist()], dtype=torch.float64)
    assert torch.equal(quantize_blocks(x, mx(element, rule, block=4)), expected.float())
    assert len(largest) > 9 * 254


@pytest.mark.parametrize(("name", "element"), [("per_row", "fp8_e4m3"), ("tile_1x128", "fp8_e4m3")])
def test_rows_and_tiles_with_fp32_scales_round_as_float32_does(name, element):
    x = spread(40, 128)
    expected = torch.tensor([scaled_block(row, element) for row in x.tolist()])
    assert torch.equal(quantize_blocks(x, name), expected)


@pytest.mark.parametrize(("name", "element"), [("per_tensor", "fp8_e4m3"), ("int8", "int8")])
def test_one_scale_serves_the_whole_tensor(name, element):
    x = spread(3, 50, 7)
    expected = torch.tensor(scaled_block(x.flatten().tolist(), element)).view_as(x)
    assert torch.equal(quantize_blocks(x, name), expected)


def test_square_blocks_share_a_scale_in_both_directions():
    x = spread(256, 384)
    got = quantize_blocks(x, "block_128x128")
    for i in range(0, 256, 128):
        for j in range(0, 384, 128):
            block = x[i : i + 128, j : j + 128]
            expected = scaled_block(block.flatten().tolist(), "fp8_e4m3")
            assert torch.equal(got[i : i + 128, j : j + 128].flatten(), torch.tensor(expected))


@pytest.mark.parametrize("width", [1.0, 8.0, 14.0])
def test_nvfp4_has_e4m3_scales_under_an_fp32_scale(width):
    x = spread(200, 16, width=width)
    assert np.array_equal(quantize_blocks(x, "nvfp4").numpy().reshape(-1), nvfp4(x.numpy().reshape(-1)))


def test_scales_and_elements_survive_torchs_and_ml_dtypes_own_types():
    x = spread(64, 64)
    for name, scheme in SCHEMES.items():
        stored = block_quantize(x, name)
        scales = stored.packed_scales()
        assert torch.equal(scales.float(), stored.scales)
        if scheme.element not in (FORMATS["fp6_e3m2"], FORMATS["fp4_e2m1"], INT8):
            assert torch.equal(stored.packed().float(), stored.elements)
    assert block_quantize(x, "mxfp8").packed_scales().dtype == torch.float8_e8m0fnu
    assert block_quantize(x, "nvfp4").packed_scales().dtype == torch.float8_e4m3fn
    integers = block_quantize(x, "int8")
    assert integers.packed().dtype == torch.int8 and torch.equal(integers.packed().float(), integers.elements)
    elements = block_quantize(x, "mxfp6").elements.numpy()
    assert np.array_equal(elements.astype(ml_dtypes.float6_e3m2fn).astype(np.float32), elements)


def test_two_fp4_values_share_a_byte_the_first_in_the_low_half():
    stored = block_quantize(torch.tensor([[6.0, -1.5, 0.5, 0.0]]), mx("fp4_e2m1", block=4))
    packed = stored.packed()
    assert packed.dtype == torch.float4_e2m1fn_x2 and packed.shape == (1, 2)
    codes = stored.elements.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)[0] & 0xF
    assert packed.view(torch.uint8)[0].tolist() == [codes[0] | codes[1] << 4, codes[2] | codes[3] << 4]
    with pytest.raises(ValueError, match="even last dimension"):
        block_quantize(torch.ones(3), "mxfp4").packed()
    with pytest.raises(ValueError, match="torch has no dtype for FP6 E3M2"):
        block_quantize(torch.ones(4), "mxfp6").packed()


# -- axes, shapes, ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "block_128x128"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis_is_the_last_one_after_moving_it(name, axis):
    x = spread(40, 36, 33)
    expected = quantize_blocks(x.movedim(axis, -1).contiguous(), name).movedim(-1, axis)
    assert torch.equal(quantize_blocks(x, name, axis), expected)


CUT = [name for name, scheme in SCHEMES.items() if scheme.block_size]


@pytest.mark.parametrize("name", CUT)
def test_a_short_block_at_the_end_is_what_it_is_when_filled_with_zeros(name):
    x, (rows, columns) = spread(150, 300), SCHEMES[name].block
    full = torch.zeros(-(-150 // rows) * rows, -(-300 // columns) * columns)
    full[:150, :300] = x
    assert torch.equal(quantize_blocks(x, name), quantize_blocks(full, name)[:150, :300])
    assert block_quantize(x, name).scales.shape == (-(-150 // rows), -(-300 // columns))


@pytest.mark.parametrize("name", [n for n in CUT if not SCHEMES[n].second_level])
def test_blocks_know_nothing_of_each_other(name):
    x, (rows, columns) = spread(150, 300), SCHEMES[name].block
    got = quantize_blocks(x, name)
    for i in range(0, 150, max(rows, 25)):
        for j in range(0, 300, columns):
            piece = slice(i, i + rows), slice(j, j + columns)
            assert torch.equal(got[piece], quantize_blocks(x[piece], name))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_shape_comes_back_and_the_parts_give_the_whole(name):
    flat = name != "block_128x128"
    for shape in [(), (0,), (5,), (3, 0), (0, 4), (2, 3, 40), (2, 130, 257)]:
        if len(shape) < 2 and not flat:
            continue
        x = spread(*shape)
        stored = block_quantize(x, name)
        assert stored.shape == x.shape and torch.equal(stored.dequantize(), quantize_blocks(x, name))
        assert stored.scales.dim() == x.dim()
        assert math.isnan(stored.bits_per_value) == (x.numel() == 0)


def test_batches_of_matrices_are_quantized_one_by_one():
    x = spread(3, 200, 140)
    for axis in (-1, -2):
        expected = torch.stack([quantize_blocks(m, "block_128x128", axis) for m in x])
        assert torch.equal(quantize_blocks(x, "block_128x128", axis), expected)


def test_blocks_that_are_not_square_follow_the_axis():
    scheme = replace(get_scheme("block_128x128"), name="wide", block=(2, 16))
    x = spread(32, 48)
    assert block_quantize(x, scheme).scales.shape == (16, 3)
    assert block_quantize(x, scheme, 0).scales.shape == (2, 24)
    assert torch.equal(quantize_blocks(x, scheme, 0), quantize_blocks(x.T.contiguous(), scheme).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_dtype_stays_and_the_result_is_the_float32_one_rounded_once(name, dtype):
    x = spread(130, 130, width=3).to(dtype)
    got = quantize_blocks(x, name)
    assert got.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(got, quantize_blocks(x.float(), name).to(dtype))
    elif name in POWERS:
        assert torch.equal(got.float(), quantize_blocks(x.float(), name))


def test_the_input_is_not_touched_and_strides_do_not_matter():
    x = spread(64, 96)
    before = x.clone()
    assert torch.equal(quantize_blocks(x.T, "mxfp8"), quantize_blocks(x.T.contiguous(), "mxfp8"))
    assert torch.equal(x, before)
    assert not quantize_blocks(x.requires_grad_(), "mxfp8").requires_grad


# -- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_quantization_is_idempotent(element, rule):
    once = quantize_blocks(spread(500, 32), mx(element, rule))
    assert torch.equal(quantize_blocks(once, mx(element, rule)), once)


@pytest.mark.parametrize("name", ["per_tensor", "per_row", "tile_1x128", "block_128x128", "int8"])
def test_with_fp32_scales_a_second_time_moves_values_by_the_rounding_of_the_scale_at_most(name):
    once = quantize_blocks(spread(300, 256), name)
    assert torch.allclose(quantize_blocks(once, name), once, rtol=2.0**-22, atol=0)


def test_nvfp4_is_idempotent_unless_the_scale_of_a_block_is_subnormal():
    once = quantize_blocks(spread(500, 32, width=1), "nvfp4")
    assert torch.allclose(quantize_blocks(once, "nvfp4"), once, rtol=2.0**-22, atol=0)
    x = torch.full((32,), 3.1 * 2.0**-9)  # the second block wants 0.517 times the smallest scale, and gets all of it
    x[:16] = 6 * 448.0
    once = quantize_blocks(x, "nvfp4")
    twice = quantize_blocks(once, "nvfp4")  # now it wants just half of it, a tie that goes to zero
    assert (once[31], twice[31]) == (3 * 2.0**-9, 0)


@pytest.mark.parametrize("name", SCHEMES)
def test_signs_play_no_part(name):
    x = spread(128, 256)
    assert same(quantize_blocks(-x, name), -quantize_blocks(x, name))


@pytest.mark.parametrize("k", [-60, -1, 3, 60])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_power_of_two_goes_through_unchanged(name, k):
    x = spread(128, 256)
    assert torch.equal(quantize_blocks(x * 2.0**k, name), quantize_blocks(x, name) * 2.0**k)


@pytest.mark.parametrize("name", SCHEMES)
def test_transposing_commutes_with_quantizing_only_where_blocks_are_square(name):
    x = spread(256, 256)
    commutes = torch.equal(quantize_blocks(x, name).T, quantize_blocks(x.T, name))
    rows, columns = SCHEMES[name].block
    assert commutes == (rows == columns)
    assert torch.equal(quantize_blocks(x, name).T, quantize_blocks(x.T, name, axis=0))


@pytest.mark.parametrize("element", ELEMENTS)
def test_round_up_never_saturates_and_wastes_less_than_a_binade(element):
    amax = torch.exp2(torch.linspace(-20, 20, 9001))
    scaled = amax / block_scales(amax, mx(element, "round_up"))
    largest = FORMATS[element].largest
    assert bool((scaled <= largest).all()) and bool((scaled > largest / 2).all())


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scales_stay_in_the_range_of_their_format(rule):
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-127, 1.0, 3.0e38])
    scales = block_scales(amax, mx("fp8_e4m3", rule))
    assert bool(((scales >= 2.0**-127) & (scales <= 2.0**127)).all())
    assert scales[0] == 2.0**-127
    wide = block_scales(amax, replace(get_scheme("per_row"), rule=rule))
    assert wide[0] == 2.0**-126 and bool((1 / wide).isfinite().all())


def test_powers_of_two_may_be_kept_in_fp32_as_transformer_engine_does():
    scheme = replace(get_scheme("tile_1x128"), name="tile_pow2", rule="round_up")
    x = spread(10, 256)
    stored = block_quantize(x, scheme)
    assert bool((torch.frexp(stored.scales)[0] == 0.5).all()) and stored.bits_per_value == 8.25
    assert torch.equal(stored.dequantize(), quantize_blocks(x, replace(mx("fp8_e4m3", "round_up"), block=(1, 128))))


# -- special values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_value_that_is_not_finite_makes_its_block_nan_and_no_other(name, bad):
    x = spread(256, 256)
    x[3, 40] = bad
    got = quantize_blocks(x, name)
    rows, columns = SCHEMES[name].block
    hit = torch.zeros(256, 256, dtype=torch.bool)
    if SCHEMES[name].second_level or rows is None:
        hit[:] = True
    else:
        wide = columns or 256
        hit[:rows, 40 // wide * wide : 40 // wide * wide + wide] = True
        if rows == 1:
            hit[:], hit[3, 40 // wide * wide : 40 // wide * wide + wide] = False, True
    assert torch.equal(got.isnan(), hit)
    stored = block_quantize(x, name)
    assert bool(stored.packed_scales().float().isnan().any())
    assert stored.tensor_scale is None or bool(stored.tensor_scale.isnan())


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros_with_their_signs(name):
    x = torch.zeros(128, 256)
    x[::2] = -0.0
    assert same(quantize_blocks(x, name), x)
    x[64:] = 1.0
    assert same(quantize_blocks(x, name)[:64], x[:64])


def test_a_block_far_below_the_tensors_largest_value_is_flushed_by_nvfp4_and_kept_by_mxfp4():
    x = torch.ones(64)
    x[0], x[32:] = 1e5, 0.01
    stored = block_quantize(x, "nvfp4")
    assert stored.scales[0] == 448 and stored.scales[2:].tolist() == [0, 0]
    assert stored.dequantize()[32:].tolist() == [0.0] * 32
    assert quantize_blocks(x, "mxfp4")[32:].tolist() == pytest.approx([0.01] * 32, rel=0.2)
    edge = 6 * 2.0**-10 * float(stored.tensor_scale)  # half of the smallest E4M3 scale: the tie goes to zero
    for value, kept in ((edge, False), (edge * 1.01, True)):
        x[32:] = value
        assert bool((block_quantize(x, "nvfp4").scales[2:] > 0).all()) == kept


def test_a_float16_value_may_round_up_beyond_the_largest_and_becomes_infinite():
    x = torch.tensor([65504.0], dtype=torch.float16)
    assert quantize_blocks(x, "mxfp8").item() == 448 * 2.0**7
    assert quantize_blocks(x, mx("fp8_e4m3", "round_up")).item() == math.inf
    assert quantize_blocks(x.float(), mx("fp8_e4m3", "round_up")).item() == 65536


def test_stochastic_rounding_is_unbiased_where_nearest_is_not_and_seeded():
    x = torch.full((16, 4096), 0.3)
    x[:, ::16] = 6.0
    generator = torch.Generator().manual_seed(0)
    got = quantize_blocks(x, "nvfp4", rounding="stochastic", generator=generator)
    small = got[x < 1] / got.max() * 6
    assert set(small.unique().tolist()) <= {0.0, 0.5}
    assert float(small.mean()) == pytest.approx(0.3, abs=5 * 0.25 / math.sqrt(small.numel()))
    assert float(quantize_blocks(x, "nvfp4")[x < 1].unique()) == pytest.approx(0.5, rel=1e-6)
    again = quantize_blocks(x, "nvfp4", rounding="stochastic", generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, again)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "arguments", "error", "words"),
    [
        (torch.ones(4), {"scheme": "mxfp9"}, KeyError, "got 'mxfp9'; the names are per_tensor, per_row"),
        (torch.ones(4), {"scheme": 3}, KeyError, "expected a scheme name or a BlockScheme, got 3"),
        (torch.ones(4, dtype=torch.int8), {"scheme": "mxfp8"}, TypeError, "got torch.int8 torch.strided: call .float"),
        ([1.0], {"scheme": "mxfp8"}, TypeError, "got list"),
        (torch.ones(4).to_sparse(), {"scheme": "mxfp8"}, TypeError, "torch.sparse_coo"),
        (torch.ones(4), {"scheme": "mxfp8", "axis": 1}, ValueError, "from -1 to 0, got 1"),
        (torch.ones(4, 4), {"scheme": "mxfp8", "axis": 1.0}, ValueError, "got 1.0"),
        (torch.ones(4), {"scheme": "block_128x128"}, ValueError, r"two dimensions or more .* \(4,\)"),
        (torch.ones(2, 4, 4), {"scheme": "block_128x128", "axis": 0}, ValueError, "axis -1 or -2"),
        (torch.ones(4), {"scheme": "mxfp8", "rounding": "odd"}, ValueError, "expected rounding to be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(x, arguments, error, words):
    with pytest.raises(error, match=words):
        quantize_blocks(x, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"block": (0, 32)}, ValueError, "positive integers or None"),
        ({"block": (1.0, 32)}, ValueError, "positive integers or None"),
        ({"block": (2, None)}, ValueError, "expected"),
        ({"block": (None, 32)}, ValueError, "all rows"),
        ({"rule": "mean"}, ValueError, "expected rule to be one of nearest, floor, round_up, even, got 'mean'"),
        ({"second_level": True}, ValueError, "got E8M0 scales with rule 'floor'"),
        ({"element": "fp9"}, KeyError, "fp9"),
        ({"element": "e8m0"}, ValueError, "a sign and a zero, got E8M0"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        replace(get_scheme("mxfp8"), **changes)


def test_schemes_are_a_read_only_table_in_the_order_of_the_course():
    names = "per_tensor, per_row, tile_1x128, block_128x128, mxfp8, mxfp6, mxfp4, nvfp4, int8"
    assert ", ".join(SCHEMES) == names
    with pytest.raises(TypeError):
        SCHEMES["own"] = SCHEMES["mxfp8"]
    bits = {name: scheme.bits_per_value for name, scheme in SCHEMES.items()}
    assert (bits["mxfp8"], bits["mxfp6"], bits["mxfp4"], bits["nvfp4"]) == (8.25, 6.25, 4.25, 4.5)
    assert bits["tile_1x128"] == 8.25 and bits["block_128x128"] == 8 + 32 / 128**2 and bits["per_row"] == 8
