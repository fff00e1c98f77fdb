"""Rounding: the quantizer against gfloat, ml_dtypes, torch and a table, tolerance zero; sums with exact stories."""

import math

import numpy as np
import pytest
import torch
from oracles import (
    DETERMINISTIC_MODES,
    GFLOAT_FORMATS,
    NUMPY_TYPES,
    code_values,
    gfloat_round,
    same,
    table_round,
)
from test_formats import grid, random_patterns

from mixprec_lab.formats import FORMATS, FloatFormat, all_values, decode, encode
from mixprec_lab.rounding import (
    METHODS,
    ROUNDING_MODES,
    accumulate,
    dot,
    fake_quantize,
    quantize,
    relative_error,
    running_sum,
    sqnr_db,
    ulp,
)

SIGNED = [name for name in sorted(NUMPY_TYPES) if name != "e8m0"]
E3M4 = FloatFormat("e3m4", 3, 4)
SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])


def assert_same(got, expected, x) -> None:
    got = got.double().numpy() if isinstance(got, torch.Tensor) else got
    bad = ~same(got, expected)
    assert not bad.any(), f"{bad.sum()} differ: x {x[bad][:4]}, got {got[bad][:4]}, expected {expected[bad][:4]}"


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("mode", DETERMINISTIC_MODES)
@pytest.mark.parametrize("overflow", ["saturate", "native"])
def test_every_value_midpoint_and_quarter_point(name, mode, overflow):
    x = grid(name)
    expected = table_round(x, name, mode, overflow == "saturate")
    if not FORMATS[name].has_negative_zero:
        expected += 0.0
    assert_same(quantize(torch.tensor(x), name, mode, overflow), expected, x)
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    exact = single == x
    got = quantize(torch.tensor(single), name, mode, overflow).double().numpy()
    assert_same(got[exact], expected[exact], x[exact])


@pytest.mark.parametrize("name", list(GFLOAT_FORMATS))
@pytest.mark.parametrize("mode", DETERMINISTIC_MODES)
def test_random_bit_patterns_against_gfloat(name, mode):
    x = torch.cat([random_patterns(150_000), random_patterns(150_000, 1).clamp(-1e4, 1e4) * 1e-3, SPECIAL])
    for overflow in ("saturate", "native"):
        if overflow == "native" and FORMATS[name].specials == "none":
            continue  # gfloat refuses it: there is no code to overflow to
        expected = gfloat_round(x.double().numpy(), name, mode, overflow == "saturate")
        assert_same(quantize(x, name, mode, overflow), expected, x.numpy())
        assert_same(quantize(x.double(), name, mode, overflow), expected, x.numpy())


@pytest.mark.parametrize("name", ["fp8_e4m3", "bf16"])
@pytest.mark.parametrize("mode", DETERMINISTIC_MODES)
def test_ten_million_random_bit_patterns(name, mode):
    # One format for each of the two bit tricks behind nearest_even; the other modes share one path.
    for seed in range(5):
        x = random_patterns(2_000_000, seed=10 + seed)
        expected = gfloat_round(x.double().numpy(), name, mode, saturate=False)
        assert_same(quantize(x, name, mode, "native"), expected, x.numpy())


@pytest.mark.parametrize("name", [n for n in SIGNED if FORMATS[n].has_nan])
def test_ten_million_random_bit_patterns_against_ml_dtypes(name):
    for seed in range(5):
        x = random_patterns(2_000_000, seed=20 + seed)
        with np.errstate(all="ignore"):
            expected = x.numpy().astype(NUMPY_TYPES[name][0]).astype(np.float64)
        assert_same(quantize(x, name, overflow="native"), expected, x.numpy())


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2"])
def test_torch_casts_agree(name):
    x = random_patterns(2_000_000, seed=3)
    assert_same(quantize(x, name, overflow="native"), x.to(FORMATS[name].torch_dtype).double().numpy(), x.numpy())


@pytest.mark.parametrize("mode", DETERMINISTIC_MODES)
def test_tf32_and_custom_formats_against_the_codec(mode):
    # encode() is checked against ml_dtypes elsewhere; it knows nothing of blocks, float32 tricks or modes.
    odd = FloatFormat("e8m3", 8, 3, bias=128, specials="nan_all_ones")
    for fmt in (FORMATS["tf32"], E3M4, FloatFormat("e6m9", 6, 9), odd):
        x = torch.cat([random_patterns(200_000), torch.randn(100_000, generator=torch.Generator().manual_seed(1))])
        x = x[x.isfinite() & (x.abs() < fmt.largest)]
        nearest = decode(encode(x, fmt), fmt).numpy()
        got = quantize(x, fmt, mode, "native").double().numpy()
        v = x.double().numpy()
        if mode == "nearest_even":
            assert_same(got, nearest, v)
        else:
            gap = ulp(x, fmt).numpy()
            assert (np.abs(got - v) <= gap).all()
            assert same(got, decode(encode(torch.tensor(got), fmt), fmt).numpy()).all()
            low = {"up": got >= v, "down": got <= v, "toward_zero": np.abs(got) <= np.abs(v)}
            assert low.get(mode, np.abs(got - v) <= gap / 2).all()


@pytest.mark.parametrize("mode", DETERMINISTIC_MODES)
def test_e8m0_has_no_sign_and_no_zero(mode):
    positive = code_values("e8m0")[:-1]
    x = np.concatenate([positive, positive[:-1] * 1.25, positive[:-1] * 1.5, positive[:-1] * 1.75])
    expected = table_round(x, "e8m0", mode, saturate=True)
    assert_same(quantize(torch.tensor(x), "e8m0", mode), expected, x)
    assert_same(quantize(torch.tensor(x, dtype=torch.float32), "e8m0", mode), expected, x)
    odd = torch.tensor([-1.0, 0.0, -0.0, math.inf, math.nan, 2.0**-140])
    assert_same(quantize(odd, "e8m0", mode), np.array([np.nan, *[2.0**-127] * 2, 2.0**127, np.nan, 2.0**-127]), odd)
    beyond = quantize(torch.tensor([2.0**130], dtype=torch.float64), "e8m0", mode, "native")
    assert beyond == 2.0**127 if mode in ("toward_zero", "down") else beyond.isnan()
    native = quantize(odd, "e8m0", mode, "native").double().numpy()
    assert_same(native, np.array([np.nan] * 5 + [2.0**-127]), odd)


@pytest.mark.parametrize("name", [*SIGNED, "tf32"])
@pytest.mark.parametrize("mode", ROUNDING_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(name, mode, dtype):
    fmt = FORMATS[name]
    zero, minus, inf, minus_inf, nan = quantize(SPECIAL.to(dtype), name, mode)
    assert zero == 0 and not zero.signbit() and minus == 0 and bool(minus.signbit()) == fmt.has_negative_zero
    assert (inf.item(), minus_inf.item()) == (fmt.largest, -fmt.largest) and nan.isnan()
    _, _, inf, minus_inf, nan = quantize(SPECIAL.to(dtype), name, mode, "native").tolist()
    expected = math.inf if fmt.has_inf else math.nan if fmt.has_nan else fmt.largest
    assert_same(np.array([inf, minus_inf]), np.array([expected, -expected]), SPECIAL[2:4])
    assert math.isnan(nan)


@pytest.mark.parametrize("name", [*SIGNED, "tf32", "e8m0"])
@pytest.mark.parametrize("mode", ROUNDING_MODES)
def test_values_of_the_format_never_move(name, mode):
    values = all_values(name) if name != "tf32" else all_values(name)[::37]
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(quantize(values.to(dtype), name, mode).double(), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_rounded_exactly(dtype):
    codes = torch.arange(2**16).to(torch.uint16).view(dtype)
    for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1"):
        for mode in DETERMINISTIC_MODES:
            got = quantize(codes, name, mode)
            assert got.dtype == dtype
            assert_same(got, quantize(codes.double(), name, mode).numpy(), codes)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "bf16", "fp16", "fp4_e2m1"])
def test_stochastic_goes_to_a_neighbour(name):
    x = torch.cat([random_patterns(300_000, 5), torch.randn(300_000, generator=torch.Generator().manual_seed(5))])
    x = x[x.isfinite()]
    y = quantize(x, name, "stochastic", generator=torch.Generator().manual_seed(0))
    low, high = quantize(x, name, "down"), quantize(x, name, "up")
    assert ((y == low) | (y == high)).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.03125, 0.25, 0.5, 0.9])
def test_stochastic_is_unbiased(name, dtype, share):
    fmt, n = FORMATS[name], 2**18
    generator = torch.Generator().manual_seed(7)
    for low in (1.0, -1.75, fmt.smallest_normal, 3 * fmt.smallest_subnormal, 0.0):
        gap = float(ulp(torch.tensor(low), fmt))
        x = torch.full((n,), low + share * gap, dtype=dtype)
        p = (float(x[0]) - low) / gap
        ups = int((quantize(x, fmt, "stochastic", generator=generator) != low).sum())
        # A 5 sigma bound: 120 such checks fail together once in 15,000 runs, and the seed is fixed.
        assert abs(ups - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1, (low, p, ups / n)


def test_stochastic_follows_the_generator():
    x = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    draws = [quantize(x, "fp8_e4m3", "stochastic", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantize(x, "fp8_e4m3", "stochastic", generator=torch.Generator().manual_seed(1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, draws[0])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4), (70_000,), (300_001,)])
@pytest.mark.parametrize("mode", ROUNDING_MODES)
def test_any_shape(shape, mode):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = quantize(x, E3M4, mode)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(quantize(y, E3M4, mode), y)


def test_strides_do_not_matter():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    expected = quantize(x, "fp8_e4m3")
    assert torch.equal(quantize(x.T, "fp8_e4m3"), expected.T)
    assert torch.equal(quantize(x[::3, 5::7], "fp8_e4m3"), expected[::3, 5::7])
    assert torch.equal(quantize(torch.ones(1).expand(10, 3), "fp8_e4m3"), torch.ones(10, 3))
    assert torch.equal(x, torch.randn(64, 96, generator=torch.Generator().manual_seed(0))), "the input changed"


def test_out_receives_the_result():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(100_000).to(dtype)
        out = torch.full_like(x, math.nan)
        assert quantize(x, "fp8_e4m3", out=out) is out
        assert torch.equal(out, quantize(x, "fp8_e4m3"))


def test_result_carries_no_gradient():
    assert not quantize(torch.ones(3, requires_grad=True), "fp16").requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize(torch.ones(3).int(), "fp16"), TypeError, "int32"),
        (lambda: quantize(torch.ones(3, dtype=torch.complex64), "fp16"), TypeError, "complex64"),
        (lambda: quantize(torch.ones(3).to(torch.float8_e5m2), "fp16"), TypeError, "float8_e5m2"),
        (lambda: quantize([1.0], "fp16"), TypeError, "list"),
        (lambda: quantize(torch.ones(3).to_sparse(), "fp16"), TypeError, "sparse"),
        (lambda: quantize(torch.ones(3), "fp17"), KeyError, "fp17"),
        (lambda: quantize(torch.ones(3), "fp16", "nearest"), ValueError, "nearest_even"),
        (lambda: quantize(torch.ones(3), "fp16", overflow="inf"), ValueError, "saturate, native"),
        (lambda: quantize(torch.ones(3).bfloat16(), "fp16"), ValueError, "cannot hold the values of FP16"),
        (lambda: quantize(torch.ones(3).half(), "bf16"), ValueError, "call .float()"),
        (lambda: quantize(torch.ones(3), "fp16", out=torch.ones(4)), ValueError, "expected out"),
        (lambda: quantize(torch.ones(3), "fp16", out=torch.ones(3).double()), ValueError, "expected out"),
        (lambda: quantize(torch.ones(3, 3), "fp16", out=torch.ones(3, 3).T), ValueError, "contiguous"),
        (lambda: quantize(torch.ones(3), "fp16", out=torch.ones(3, requires_grad=True)), ValueError, "detach"),
        (lambda: (lambda x: quantize(x, "fp16", out=x))(torch.ones(3)), ValueError, "shares memory"),
        (lambda: accumulate(torch.ones(3), "fp16", "fast"), ValueError, "naive, pairwise"),
        (lambda: accumulate(torch.tensor(1.0), "fp16"), ValueError, "0-dim"),
        (lambda: accumulate(torch.ones(3).int(), "fp16"), TypeError, "floating-point"),
        (lambda: accumulate(torch.ones(3), "e8m0"), ValueError, "no zero"),
        (lambda: dot(torch.ones(3), torch.ones(4), "fp16"), ValueError, "one shape"),
        (lambda: dot(torch.ones(3), torch.ones(3), "fp16", block=0), ValueError, "block"),
        (lambda: dot(torch.ones(3), torch.ones(3), "fp16", "e8m0"), ValueError, "no zero"),
        (lambda: sqnr_db(torch.ones(0), torch.ones(0)), ValueError, "empty"),
        (lambda: sqnr_db(torch.ones(2), torch.ones(3)), ValueError, "one shape"),
        (lambda: relative_error(torch.ones(2), [1.0]), TypeError, "approximation"),
        (lambda: ulp(3, "fp16"), TypeError, "floating-point"),
    ],
)
def test_bad_input_gets_a_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3", "fp4_e2m1"])
def test_ulp_is_the_gap_to_the_next_value(name):
    values = all_values(name)
    positive = values[values >= 0]
    assert torch.equal(ulp(positive[:-1], name), positive.diff())
    assert torch.equal(ulp(-positive[:-1], name), positive.diff())
    inf, nan, beyond = ulp(torch.tensor([-math.inf, math.nan, 3.4e38]), name)
    assert inf == math.inf and nan.isnan() and beyond >= positive.diff()[-1]


def test_relative_error_and_sqnr():
    x = torch.tensor([1.0, 2.0, 0.0, 0.0, math.inf, math.nan])
    y = torch.tensor([1.5, 2.0, 0.0, 1.0, math.inf, 1.0])
    got = relative_error(x, y)
    assert got[:5].tolist() == [0.5, 0.0, 0.0, math.inf, 0.0] and got[5].isnan()
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.tensor([3e-30, 4e-30]), torch.tensor([3e-30, 4.5e-30])) == pytest.approx(20.0)
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert math.isnan(sqnr_db(torch.zeros(3), torch.zeros(3))) and math.isnan(sqnr_db(x, y))


def test_unit_roundoff_bounds_the_error_in_the_normal_range():
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 15 + 1
    for name in ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2"):
        u = FORMATS[name].unit_roundoff
        assert float(relative_error(x, quantize(x, name)).max()) <= u / (1 + u)


class TestSums:
    @pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
    def test_naive_equals_torch_additions(self, name):
        dtype = FORMATS[name].torch_dtype
        values = torch.randn(700, generator=torch.Generator().manual_seed(0)).to(dtype)
        total, expected = torch.zeros((), dtype=dtype), []
        for v in values:
            total = total + v
            expected.append(float(total))
        assert running_sum(values, name).tolist() == expected

    def test_kahan_equals_torch_additions(self):
        values = torch.randn(500, generator=torch.Generator().manual_seed(1)).bfloat16()
        total, lost = torch.zeros((), dtype=torch.bfloat16), torch.zeros((), dtype=torch.bfloat16)
        for v in values:
            corrected = v - lost
            grown = total + corrected
            lost = (grown - total) - corrected
            total = grown
        assert float(accumulate(values, "bf16", "kahan")) == float(total)

    def test_published_stalls(self):
        v = torch.full((3000,), 1e-7)
        fp16, bf16 = running_sum(v, "fp16"), running_sum(v, "bf16")
        assert (fp16[-1], int((fp16 < fp16[-1]).sum()) + 1) == (2.0**-12, 2048)
        assert (bf16[-1], int((bf16 < bf16[-1]).sum()) + 1) == (2.0**-15, 273)
        uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
        assert float(accumulate(uniform, "bf16")) == 256.0

    def test_the_cures_cure(self):
        values = torch.cat([torch.ones(1), torch.full((1000,), 1e-3)])
        assert float(accumulate(values, "bf16")) == 1.0
        for method in ("pairwise", "kahan", "fp32"):
            assert float(accumulate(values, "bf16", method)) == 2.0
        many = accumulate(values.expand(4000, -1), "bf16", "stochastic", torch.Generator().manual_seed(0))
        assert abs(float(many.mean()) - 2.0) < 5 * float(many.std()) / math.sqrt(4000) + 1e-3

    def test_fp32_rounds_once(self):
        values = torch.rand(1000, generator=torch.Generator().manual_seed(2)).bfloat16()
        total = np.float32(0)
        for v in values.float().numpy():
            total = np.float32(total + v)
        assert float(accumulate(values, "bf16", "fp32")) == float(torch.tensor(total).bfloat16())

    @pytest.mark.parametrize("method", METHODS)
    def test_running_sum_ends_with_accumulate_and_keeps_batches(self, method):
        values = torch.randn(3, 4, 33, generator=torch.Generator().manual_seed(3))
        a = accumulate(values, "fp16", method, torch.Generator().manual_seed(1))
        partial = running_sum(values, "fp16", method, torch.Generator().manual_seed(1))
        assert a.shape == (3, 4) and partial.shape == values.shape and torch.equal(partial[..., -1], a)
        if method != "stochastic":
            assert torch.equal(a[1, 2], accumulate(values[1, 2], "fp16", method))

    @pytest.mark.parametrize("method", METHODS)
    def test_nothing_sums_to_zero_and_overflow_is_native(self, method):
        assert float(accumulate(torch.zeros(0), "fp16", method)) == 0.0
        assert running_sum(torch.zeros(2, 0), "fp16", method).shape == (2, 0)
        big = torch.full((4,), 40_000.0)
        total = accumulate(big, "fp16", method)
        assert total.isnan() if method == "kahan" else total == math.inf
        assert accumulate(torch.tensor([1.0, math.nan]), "fp16", method).isnan()

    def test_dot_matches_fp32_hardware_order(self):
        a, b = (torch.randn(5, 300, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
        total = np.zeros(5, np.float32)
        for i in range(300):
            total = (total + (a[:, i].float() * b[:, i].float()).numpy()).astype(np.float32)
        assert dot(a, b, "bf16").tolist() == total.tolist()

    def test_dot_promotion_limits_the_damage(self):
        a, b = (torch.rand(16, 1024, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        exact = dot(a, b, "fp8_e4m3", "fp32")
        short = FloatFormat("14 bits", 8, 13)
        plain, promoted = (relative_error(exact, dot(a, b, "fp8_e4m3", short, block)).max() for block in (None, 128))
        assert promoted < plain / 5
        assert torch.equal(dot(a, b, "fp8_e4m3", "fp32", block=10**9), exact)
        assert float(dot(torch.ones(3, 0), torch.ones(3, 0), "fp16").sum()) == 0.0


class TestFakeQuantize:
    def test_forward_and_backward_use_their_own_formats(self):
        x = torch.tensor([0.3, 1.7, 1e6, -0.0], requires_grad=True)
        y = fake_quantize(x, "fp8_e4m3", "fp8_e5m2")
        assert torch.equal(y, quantize(x, "fp8_e4m3"))
        y.backward(torch.tensor([1.1, 0.9, 1e9, 0.0]))
        assert torch.equal(x.grad, quantize(torch.tensor([1.1, 0.9, 1e9, 0.0]), "fp8_e5m2"))

    def test_none_leaves_a_direction_alone(self):
        x = torch.tensor([0.3], requires_grad=True)
        fake_quantize(x, None, "fp4_e2m1").backward(torch.tensor([0.9]))
        assert x.grad.item() == 1.0
        x.grad = None
        fake_quantize(x, "fp4_e2m1").backward(torch.tensor([0.9]))
        assert x.grad.item() == pytest.approx(0.9)

    def test_a_linear_layer_trains_through_it(self):
        generator = torch.Generator().manual_seed(0)
        x, w = torch.randn(64, 8, generator=generator), torch.randn(8, generator=generator)
        y, learned = x @ w, torch.zeros(8, requires_grad=True)
        for _ in range(200):
            loss = ((x @ fake_quantize(learned, "fp8_e4m3", "fp8_e5m2") - y) ** 2).mean()
            (grad,) = torch.autograd.grad(loss, learned)
            learned.data -= 0.1 * grad
        assert loss < 0.01 * (y**2).mean()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU tests run the same code")
@pytest.mark.parametrize("name", [*SIGNED, "tf32", "e8m0"])
@pytest.mark.parametrize("mode", DETERMINISTIC_MODES)
def test_cuda_equals_cpu(name, mode):
    x = torch.cat([random_patterns(1_000_000), SPECIAL])
    for overflow in ("saturate", "native"):
        expected = quantize(x, name, mode, overflow).double().numpy()
        assert_same(quantize(x.cuda(), name, mode, overflow).cpu(), expected, x.numpy())


class TestClaimsAboutTorch:
    """Defaults that the chapter prints or states."""

    def test_reduced_precision_reductions_are_allowed(self):
        assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction

    def test_tf32_is_off_for_products(self):
        assert torch.get_float32_matmul_precision() == "highest"
