"""Formats: every code of every format against independent libraries, tolerance zero; published values; bad input."""

import itertools
import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import NUMPY_TYPES, code_values, same, table_round

from mixprec_lab.formats import (
    FORMATS,
    FloatFormat,
    PrecisionAnalyzer,
    all_values,
    analyze_gradient_distribution,
    bits_of,
    bits_of_code,
    classify,
    compare_precision_formats,
    decode,
    encode,
    get_format,
    neighbours,
    text_table,
)

SMALL = sorted(NUMPY_TYPES)
SIGNED = [name for name in SMALL if name != "e8m0"]

# IEEE 754-2019 table 3.5; OFP8 1.0 table 1; OCP MX 1.0 tables 1-5; Noune et al. (FNUZ).
PUBLISHED = {  # largest, smallest normal, smallest subnormal, binades
    "fp32": (3.4028234663852886e38, 2.0**-126, 2.0**-149, 277),
    "tf32": ((2 - 2.0**-10) * 2.0**127, 2.0**-126, 2.0**-136, 264),
    "fp16": (65504.0, 2.0**-14, 2.0**-24, 40),
    "bf16": ((2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 261),
    "fp8_e4m3": (448.0, 2.0**-6, 2.0**-9, 18),
    "fp8_e5m2": (57344.0, 2.0**-14, 2.0**-16, 32),
    "fp8_e4m3fnuz": (240.0, 2.0**-7, 2.0**-10, 18),
    "fp8_e5m2fnuz": (57344.0, 2.0**-15, 2.0**-17, 33),
    "fp6_e3m2": (28.0, 0.25, 0.0625, 9),
    "fp6_e2m3": (7.5, 1.0, 0.125, 6),
    "fp4_e2m1": (6.0, 1.0, 0.5, 4),
    "e8m0": (2.0**127, 2.0**-127, None, 255),
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_limits(name):
    fmt = FORMATS[name]
    assert (fmt.largest, fmt.smallest_normal, fmt.smallest_subnormal, fmt.binades) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "total", "finite", "distinct", "infinite", "nan"),
    [("fp16", 65536, 63488, 63487, 2, 2046), ("bf16", 65536, 65280, 65279, 2, 254), ("fp8_e4m3", 256, 254, 253, 0, 2),
     ("fp8_e5m2", 256, 248, 247, 2, 6), ("fp8_e4m3fnuz", 256, 255, 255, 0, 1), ("e8m0", 256, 255, 255, 0, 1)],
)  # fmt: skip
def test_published_code_counts(name, total, finite, distinct, infinite, nan):
    assert tuple(FORMATS[name].counts) == (total, finite, distinct, infinite, nan)


@pytest.mark.parametrize("name", SMALL)
def test_code_counts_are_what_the_codes_decode_to(name):
    values = code_values(name)
    finite = values[np.isfinite(values)]
    expected = (len(values), len(finite), len(np.unique(finite)), np.isinf(values).sum(), np.isnan(values).sum())
    assert tuple(FORMATS[name].counts) == expected


@pytest.mark.parametrize(("name", "digits"), [("fp32", 7.22), ("fp16", 3.31), ("bf16", 2.41), ("fp8_e4m3", 1.20)])
def test_decimal_digits(name, digits):
    assert FORMATS[name].decimal_digits == pytest.approx(digits, abs=0.005)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.torch_dtype and n != "e8m0"])
def test_torch_finfo_agrees(name):
    fmt, info = FORMATS[name], torch.finfo(FORMATS[name].torch_dtype)
    assert (fmt.largest, fmt.smallest_normal) == (info.max, info.tiny)
    one = torch.tensor(1.0, dtype=torch.float64)
    if name != "fp8_e5m2fnuz":  # torch 2.13 reports an eps of 0.125 there, but the value after 1 is 1.25
        assert fmt.eps == info.eps
    assert fmt.eps == float(decode(encode(one, fmt) + 1, fmt)) - 1


@pytest.mark.parametrize("name", SMALL)
def test_every_code_decodes_as_in_ml_dtypes(name):
    expected = code_values(name)
    assert same(decode(torch.arange(len(expected)), name).numpy(), expected).all()


@pytest.mark.parametrize("name", [n for n in SMALL if FORMATS[n].torch_dtype])
def test_every_code_decodes_as_in_torch(name):
    fmt = FORMATS[name]
    codes = torch.arange(2**fmt.bits).to(torch.uint8 if fmt.bits == 8 else torch.uint16)
    expected = codes.view(fmt.torch_dtype).double().numpy()
    assert same(decode(codes, fmt).numpy(), expected).all()


@pytest.mark.parametrize("name", [*SMALL, "tf32"])
def test_every_code_survives_decode_and_encode(name):
    codes = torch.arange(2 ** FORMATS[name].bits)
    values = decode(codes, name)
    numbers = ~values.isnan()
    assert torch.equal(encode(values[numbers], name), codes[numbers])
    assert (encode(values[~numbers], name) == FORMATS[name].nan_code).all() if (~numbers).any() else True


def grid(name: str) -> np.ndarray:
    """Every value, every midpoint and quarter point between neighbours and beyond the ends, both signs, in float64."""
    values = code_values(name)
    positive = np.unique(np.abs(values[np.isfinite(values)]))
    extended = np.append(positive, [2 * positive[-1] - positive[-2], 4 * positive[-1]])
    gaps = np.diff(extended)
    points = np.concatenate([extended, *(extended[:-1] + gaps * share for share in (0.25, 0.5, 0.75))])
    tiny = positive[positive > 0][0]
    points = np.concatenate([points, tiny * np.array([0.25, 0.5, 0.5 + 2**-20, 0.75]), [2.0**-1000]])
    return np.concatenate([points, -points])


@pytest.mark.parametrize("name", SIGNED)
def test_encode_rounds_every_point_between_neighbours_to_nearest_even(name):
    x = grid(name)
    got = decode(encode(torch.tensor(x), name), name).numpy()
    expected = table_round(x, name, "nearest_even", saturate=False)
    if not FORMATS[name].has_negative_zero:
        expected += 0.0
    assert same(got, expected).all(), x[~same(got, expected)][:5]


def random_patterns(n: int, seed: int = 0) -> torch.Tensor:
    """``n`` float32 values with uniformly random bits: every binade, NaN payloads and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("name", SIGNED)
def test_encode_agrees_with_ml_dtypes_on_random_bit_patterns(name):
    x = random_patterns(1_000_000)
    x = x if FORMATS[name].has_nan else x[~x.isnan()]
    with np.errstate(all="ignore"):
        expected = x.numpy().astype(NUMPY_TYPES[name][0]).astype(np.float64)
    assert same(decode(encode(x, name), name).numpy(), expected).all()


def test_e8m0_codes():
    # torch ignores the sign and maps 0 to 2**-127; ml_dtypes gives NaN for both, and so do we.
    cases = {1.0: 127, 1.5: 128, 3.0: 129, 0.75: 127, 2.0**-127: 0, 2.0**-140: 0, 2.0**127: 254}
    cases |= {1.49 * 2.0**127: 254, math.inf: 255, 0.0: 255, -1.0: 255, math.nan: 255}
    assert encode(torch.tensor(list(cases)), "e8m0").tolist() == list(cases.values())
    positive = random_patterns(1_000_000).abs()
    # torch 2.13 and ml_dtypes 0.6 send (2**-127, 1.5 * 2**-127) to 2**-126, though 2**-127 is nearer.
    quirk = (positive > 2.0**-127) & (positive < 1.5 * 2.0**-127)
    assert (encode(positive[quirk], "e8m0") == 0).all() and quirk.any()
    positive = positive[(positive > 0) & ~quirk]
    assert torch.equal(encode(positive, "e8m0"), positive.to(torch.float8_e8m0fnu).view(torch.uint8).long())


@pytest.mark.parametrize(
    ("fmt", "scalar"),
    [
        (FloatFormat("e3m4", 3, 4), ml_dtypes.float8_e3m4),
        (FloatFormat("e4m3", 4, 3), ml_dtypes.float8_e4m3),
        (FloatFormat("e4m3b11fnuz", 4, 3, bias=11, specials="nan_negative_zero"), ml_dtypes.float8_e4m3b11fnuz),
    ],
)
def test_a_format_of_your_own_is_a_format(fmt, scalar):
    expected = np.arange(256, dtype=np.uint8).view(scalar).astype(np.float64)
    assert same(decode(torch.arange(256), fmt).numpy(), expected).all()
    x = random_patterns(300_000, seed=1)
    with np.errstate(all="ignore"):
        expected = x.numpy().astype(scalar).astype(np.float64)
    assert same(decode(encode(x, fmt), fmt).numpy(), expected).all()


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [*itertools.product(range(2, 9), (1, 2, 5, 11, 20, 23))])
def test_any_split_round_trips(exponent_bits, mantissa_bits):
    fmt = FloatFormat("custom", exponent_bits, mantissa_bits)
    codes = torch.randint(0, 2**fmt.bits, (20_000,), generator=torch.Generator().manual_seed(0))
    values = decode(codes, fmt)
    numbers = ~values.isnan()
    assert torch.equal(encode(values[numbers], fmt), codes[numbers])


def test_float64_input_is_rounded_once():
    # FP32 would round this onto the midpoint of two BF16 values first, and the tie would go down.
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert decode(encode(x, "bf16"), "bf16").item() == 1 + 2.0**-7


def test_published_rounding_edges():
    def through(x, name):
        return float(decode(encode(x, name), name))

    assert through(65519.99, "fp16") == 65504.0 and through(65520.0, "fp16") == math.inf
    assert through(2.0**-25, "fp16") == 0.0 and through(2.0**-25 * 1.0000001, "fp16") == 2.0**-24
    assert through(torch.finfo(torch.float32).max, "bf16") == math.inf and through(2.0**-134, "bf16") == 0.0
    assert through(464.0, "fp8_e4m3") == 448.0 and math.isnan(through(464.001, "fp8_e4m3"))
    assert through(61440.0, "fp8_e5m2") == math.inf


def test_encode_keeps_shape_and_takes_any_float():
    assert encode(torch.zeros(2, 0, 3), "fp16").shape == (2, 0, 3)
    assert encode(1.5, "fp16").shape == ()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert int(encode(torch.tensor(0.5, dtype=dtype), "fp8_e4m3")) == 0x30
    assert torch.equal(encode(torch.ones(4, 4, requires_grad=True).T, "bf16"), torch.full((4, 4), 0x3F80))


@pytest.mark.parametrize("name", SIGNED)
def test_neighbours_enclose_every_point(name):
    values = np.unique(code_values(name)[np.isfinite(code_values(name))]) + 0.0
    sample = range(len(values) - 1) if len(values) < 300 else range(0, len(values) - 1, 997)
    for i in sample:
        low, high = float(values[i]), float(values[i + 1])
        assert neighbours(low, name)[1] == high and neighbours(high, name)[0] == low
        assert neighbours(low + (high - low) / 3, name) == (low, high)


def test_neighbours_at_the_ends():
    assert neighbours(65504, "fp16") == (65472.0, math.inf) and neighbours(1e30, "fp16") == (65504.0, math.inf)
    assert neighbours(math.inf, "fp16") == (65504.0, None) and neighbours(-math.inf, "fp16") == (None, -65504.0)
    assert neighbours(448, "fp8_e4m3") == (416.0, None) and neighbours(-1e9, "fp4_e2m1") == (None, -6.0)
    assert neighbours(-0.0, "fp16") == (-(2.0**-24), 2.0**-24)
    assert neighbours(0.0, "e8m0") == (None, 2.0**-127) and neighbours(3.0, "e8m0") == (2.0, 4.0)
    assert neighbours(1.0, "e8m0") == (0.5, 2.0)
    with pytest.raises(ValueError, match="NaN has no neighbours"):
        neighbours(math.nan, "fp16")


@pytest.mark.parametrize(
    ("x", "name", "pattern", "kind"),
    [(1.0, "fp16", "0 01111 0000000000", "normal"), (-0.0, "fp16", "1 00000 0000000000", "zero"),
     (2.0**-24, "fp16", "0 00000 0000000001", "subnormal"), (math.inf, "fp16", "0 11111 0000000000", "infinity"),
     (448.0, "fp8_e4m3", "0 1111 110", "normal"), (math.nan, "fp8_e4m3", "0 1111 111", "nan"),
     (2.0, "e8m0", "10000000", "normal"), (-6.0, "fp4_e2m1", "1 11 1", "normal")],
)  # fmt: skip
def test_bits_of(x, name, pattern, kind):
    bits = bits_of(x, name)
    assert (bits.pattern, bits.kind) == (pattern, kind)
    assert bits_of_code(bits.code, name) == bits or kind == "nan"
    assert int(pattern.replace(" ", ""), 2) == bits.code


@pytest.mark.parametrize("name", SMALL)
def test_all_values_are_the_distinct_finite_ones(name):
    codes = code_values(name)
    assert np.array_equal(all_values(name).numpy(), np.unique(codes[np.isfinite(codes)]))


def test_get_format_takes_names_dtypes_and_formats():
    assert get_format("bf16") is get_format(torch.bfloat16) is get_format(FORMATS["bf16"])
    own = FloatFormat("own", 5, 2)
    assert get_format(own) is own and own.torch_dtype is None
    with pytest.raises(KeyError, match=r"float16.*fp32, tf32, fp16"):
        get_format("float16")
    with pytest.raises(KeyError, match="torch.int8"):
        get_format(torch.int8)
    with pytest.raises(KeyError):
        get_format(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"exponent_bits": 9, "mantissa_bits": 3}, "1 to 8 exponent bits"),
     ({"exponent_bits": 4, "mantissa_bits": 24}, "0 to 23 mantissa bits"),
     ({"exponent_bits": 4, "mantissa_bits": 0}, "specials='none'"),
     ({"exponent_bits": 4, "mantissa_bits": 3, "specials": "inf"}, "expected specials"),
     ({"exponent_bits": 4, "mantissa_bits": 3, "bias": -120}, "outside the range of FP32"),
     ({"exponent_bits": 4, "mantissa_bits": 3, "bias": 150}, "outside the range of FP32"),
     ({"exponent_bits": 8, "mantissa_bits": 3, "signed": False}, "power-of-two scale")],
)  # fmt: skip
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FloatFormat("bad", **arguments)


def test_bad_codes_and_tensors_are_refused():
    with pytest.raises(TypeError, match="integer tensor"):
        decode(torch.tensor([1.0]), "fp16")
    with pytest.raises(TypeError, match="integer tensor"):
        decode([1, 2], "fp16")
    for code in (-1, 256):
        with pytest.raises(ValueError, match=r"codes of FP8 E4M3 in \[0, 256\)"):
            decode(torch.tensor([0, code]), "fp8_e4m3")
    with pytest.raises(TypeError, match="floating-point"):
        encode(torch.tensor([1, 2]), "fp16")
    with pytest.raises(ValueError, match="no code for NaN"):
        encode(torch.tensor([1.0, math.nan]), "fp4_e2m1")
    with pytest.raises(ValueError, match="neighbours"):
        all_values("fp32")


def test_descriptors_are_json():
    for fmt in FORMATS.values():
        assert json.loads(json.dumps(fmt.as_dict()))["largest"] == fmt.largest


@pytest.mark.parametrize("name", SIGNED)
def test_classify_counts_what_encode_does(name):
    fmt = FORMATS[name]
    x = torch.tensor(grid(name))
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)])
    shares = classify(x, name)
    finite = x[x.isfinite()]
    codes = encode(finite, name)
    values = decode(codes, name)
    beyond = ~values.isfinite() if fmt.has_nan else finite.abs() >= fmt.overflow_threshold
    n = x.numel()
    assert shares.zero * n == pytest.approx(int((x == 0).sum()))
    assert shares.flushed * n == pytest.approx(int(((values == 0) & (finite != 0)).sum()))
    assert shares.overflowed * n == pytest.approx(int(beyond.sum()))
    small = (values != 0) & (values.abs() < fmt.smallest_normal)
    assert shares.subnormal * n == pytest.approx(int(small.sum()))
    assert (shares.infinite * n, shares.nan * n) == pytest.approx((2, 1))
    assert sum(vars(shares).values()) == pytest.approx(1)


def test_classify_scale_moves_the_window():
    x = torch.tensor([2.0**-30, 2.0**-20, 1.0, 0.0])
    assert classify(x, "fp16").flushed == 0.25 and classify(x, "fp16", scale=2.0**10).flushed == 0
    assert classify(x, "fp16", scale=2.0**16).overflowed == 0.25


@pytest.mark.parametrize(
    ("x", "name", "scale", "error"),
    [(torch.zeros(0), "fp16", 1.0, ValueError), (torch.ones(3), "e8m0", 1.0, ValueError),
     (torch.ones(3), "fp16", 0.0, ValueError), (torch.ones(3), "fp16", math.inf, ValueError),
     (torch.ones(3), "fp16", math.nan, ValueError), (torch.ones(3).int(), "fp16", 1.0, TypeError),
     ([1.0], "fp16", 1.0, TypeError), (torch.ones(3), "half", 1.0, KeyError)],
)  # fmt: skip
def test_classify_refuses(x, name, scale, error):
    with pytest.raises(error):
        classify(x, name, scale)


def test_the_note_s_gradients_are_subnormal_not_lost():
    shares = analyze_gradient_distribution().shares["fp16"]
    assert shares.flushed == pytest.approx(0.0024, abs=2e-4) and shares.subnormal == pytest.approx(0.9976, abs=2e-4)


def test_compare_precision_formats_prints_what_it_returns(capsys):
    comparison = compare_precision_formats(["fp32", "fp16", "bf16"], torch.tensor([1e-5, 1e-9]))
    assert capsys.readouterr().out.strip() == str(comparison)
    row = str(comparison).splitlines()[3].split()
    assert row == ["FP16", "16", "5.960464e-08", "6.103516e-05", "6.550400e+04", "9.765625e-04", "3.3"]
    assert comparison.gradients.shares["fp16"].flushed == 0.5
    assert compare_precision_formats(["fp16"], show=False) and capsys.readouterr().out == ""


def test_precision_analyzer_tells_underflow_from_overflow():
    results = PrecisionAnalyzer().test_overflow_underflow(show=False)
    outcome = {(r.value, r.format.name): r.outcome for r in results}
    assert outcome[1e-10, "fp16"] == "flushed to zero" and outcome[1e-10, "bf16"] == "normal"
    assert outcome[1e-5, "fp16"] == "subnormal" and outcome[1e5, "fp16"] == "overflow to inf"
    values = {(r.value, r.format.name): r.result.value for r in results}
    assert values[1e5, "bf16"] == 99840.0  # really converted
    fp8 = PrecisionAnalyzer(["fp8_e4m3"]).test_overflow_underflow([1000.0, 0.0, math.inf], show=False)
    assert [r.outcome for r in fp8] == ["overflow to nan", "zero", "nan"]


def test_precision_analyzer_accumulates_in_the_format():
    fp32, fp16, bf16 = PrecisionAnalyzer().gradient_accumulation_error(show=False)
    assert fp32.relative_error < 1e-5 and fp32.stalled_after is None
    assert (fp16.increment_error, fp16.relative_error) == pytest.approx((0.1921, 0.1921), abs=1e-4)
    assert (bf16.total, bf16.stalled_after) == (2.0**-15, 273)
    long = PrecisionAnalyzer(["fp16"]).gradient_accumulation_error(5000, show=False)[0]
    assert (long.total, long.stalled_after) == (2.0**-12, 2048)
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        total = total + torch.tensor(1e-7, dtype=torch.bfloat16)
    assert total.item() == bf16.total


@pytest.mark.parametrize(("steps", "increment"), [(0, 1e-7), (10, 0.0), (10, math.inf), (10, math.nan)])
def test_precision_analyzer_refuses(steps, increment):
    with pytest.raises(ValueError, match="steps >= 1"):
        PrecisionAnalyzer().gradient_accumulation_error(steps, increment)


def test_text_table_aligns():
    assert text_table(["a", "bb"], [["x", 1], ["yyy", 22]]) == "a    bb\n---  --\nx     1\nyyy  22"


class TestClaimsAboutOtherLibraries:
    """What the chapter says of torch and ml_dtypes, read from the installed versions."""

    @pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12), reason="E4M3 casts saturate from torch 2.12 on"
    )
    def test_torch_e4m3_cast_saturates(self):
        x = torch.tensor([464.0, 480.0, 1e9, math.inf, -math.inf])
        assert x.to(torch.float8_e4m3fn).float().tolist() == [448.0, 448.0, 448.0, 448.0, -448.0]
        assert torch.tensor(math.nan).to(torch.float8_e4m3fn).isnan()

    def test_torch_e5m2_cast_overflows_and_fnuz_gives_nan(self):
        assert torch.tensor(61440.0).to(torch.float8_e5m2).item() == math.inf
        assert torch.tensor(1e9).to(torch.float8_e4m3fnuz).isnan()

    def test_ml_dtypes_e4m3_cast_gives_nan(self):
        x = np.array([464.0, 465.0, np.inf], np.float32)
        with np.errstate(all="ignore"):
            got = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert got[0] == 448 and np.isnan(got[1:]).all()

    def test_e4m3_gave_up_infinity_for_seven_values(self):
        won = set(all_values("fp8_e4m3").tolist()) - set(all_values(FloatFormat("ieee", 4, 3)).tolist())
        assert sorted(v for v in won if v > 0) == [256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0]
