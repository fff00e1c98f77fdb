"""The numbers of the exhibits' JavaScript are those of the package: code by code, bit by bit, in one node process."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from conftest import run_node

from mixprec_lab.exhibits import _text
from mixprec_lab.exhibits._base import describe, es_module
from mixprec_lab.formats import FORMATS, all_values, decode, encode, neighbours
from mixprec_lab.rounding import OVERFLOW_POLICIES, ROUNDING_MODES, quantize, ulp

SMALL = [name for name, f in FORMATS.items() if f.bits <= 16]
MODES = ROUNDING_MODES[:5]
SPECIALS = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324, 1.7976931348623157e308, 2.0**-149, 2.0**-150]
TEXTS = [
    "0.1", "65520", "-0", "+3", ".5", "5.", "1e-8", "1E+3", "2^-24", "-2^3", "2**10", "1.5*2^-3", "3x2^4",
    "-1.25\xb72^-14", "0x1p-3", "-0x1.8p+1", "0xff", "0x.8", "inf", "-inf", "+Infinity", "nan", "-NaN", "\u22122.5",
    "1e400", "0,1", "1e", "2^", "0x", "0x1p", "0x12345678901234", "2^5000", "__", "1_0", "--1", "<b>x</b>",
    "infinite", ".",
]  # fmt: skip


@cache
def inputs(name: str) -> np.ndarray:
    """Every value of a format up to 16 bits, the points at 1/4, 1/2, 3/4 of every gap, beyond the ends, random FP32."""
    fmt = FORMATS[name]
    generator = np.random.default_rng(fmt.bits)
    with np.errstate(invalid="ignore"):  # signalling NaNs among the patterns
        random = generator.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32).astype(np.float64)
    ends = np.array([fmt.largest, fmt.overflow_threshold, fmt.smallest, fmt.smallest_normal])
    near = np.concatenate([k * ends for k in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)])
    near = np.concatenate([near, np.nextafter(near, 0), np.nextafter(near, np.inf)])
    parts = [random, near, -near, np.array(SPECIALS)]
    if fmt.bits <= 16:
        grid = all_values(fmt).numpy()
        parts += [grid] + [grid[:-1] + share * np.diff(grid) for share in (0.25, 0.5, 0.75)]
    return np.concatenate(parts)


def decimals() -> np.ndarray:
    """Numbers to print: values of formats, halves of digits, random doubles of every size."""
    generator = np.random.default_rng(0)
    random = generator.integers(0, 2**64, 4000, dtype=np.uint64).view(np.float64)
    halves = (2 * np.arange(500) + 1) / 2 ** generator.integers(1, 30, 500)
    powers = 2.0 ** np.arange(-160, 130)
    return np.concatenate([random, -halves, halves, powers, powers * 3, np.array(SPECIALS), np.arange(-50.0, 50) / 7])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory):
    """``node(name)`` -> the doubles that JavaScript wrote under that name; ``node.answers`` -> its texts."""
    folder = tmp_path_factory.mktemp("numerics")

    source = es_module("bit_explorer").replace("export default { render };", "").replace("\nexport ", "\n")
    wanted = "encode decode quantize neighbours ulp mulberry32 parseNumber shortest significant powerForm exactDecimal"

    (folder / "module.mjs").write_text(f"{source}\nexport {{ {wanted.replace(' ', ', ')}, percent }};\n", "utf-8")
    for name in FORMATS:
        inputs(name).tofile(folder / f"{name}.x")
    decimals().tofile(folder / "numbers")
    described = {name: describe(fmt) for name, fmt in FORMATS.items()}
    job = {"formats": described, "modes": MODES, "policies": OVERFLOW_POLICIES, "texts": [*TEXTS, "", " 7 "]}
    run_node("numerics.mjs", folder, job)

    def read(name: str) -> np.ndarray:
        return np.fromfile(folder / name, dtype=np.float64)

    read.answers = json.loads((folder / "answers.json").read_text("utf-8"))
    return read


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit: the sign of zero counts, one NaN is as good as another."""
    got, expected = (np.where(np.isnan(v), np.nan, v).astype(np.float64) for v in (got, expected))
    different = np.flatnonzero(got.view(np.int64) != expected.view(np.int64))
    assert different.size == 0, f"{different.size} differ, first at {different[0]}: {got[different[0]]!r}"


@pytest.mark.parametrize("name", SMALL)
def test_every_code_decodes_to_the_same_value(node, name):
    values = decode(torch.arange(2 ** FORMATS[name].bits), name)
    assert_same(node(f"{name}.values"), values.numpy())


@pytest.mark.parametrize("name", SMALL)
def test_every_value_encodes_to_its_code(node, name):
    fmt = FORMATS[name]
    codes = torch.arange(2**fmt.bits)
    values = decode(codes, fmt)
    expected = codes.double().masked_fill(values.isnan(), fmt.nan_code if fmt.has_nan else math.nan)
    assert_same(node(f"{name}.again"), expected.numpy())


@pytest.mark.parametrize("name", FORMATS)
def test_every_input_encodes_to_the_same_code(node, name):
    fmt, x = FORMATS[name], torch.from_numpy(inputs(name))
    expected = torch.full_like(x, math.nan)
    representable = ~x.isnan() if not fmt.has_nan else torch.ones_like(x, dtype=torch.bool)
    expected[representable] = encode(x[representable], fmt).double()
    assert_same(node(f"{name}.codes"), expected.numpy())


@pytest.mark.parametrize("name", SMALL)
def test_neighbours_are_the_adjacent_values_of_the_sorted_list(node, name):
    fmt = FORMATS[name]
    grid = all_values(fmt).numpy()
    if fmt.has_inf:
        grid = np.concatenate([[-np.inf], grid, [np.inf]])
    values = decode(torch.arange(2**fmt.bits), fmt).numpy()
    known = ~np.isnan(values)
    at = np.searchsorted(grid, values[known])
    padded = np.concatenate([[np.nan], grid, [np.nan]]) + 0.0
    assert_same(node(f"{name}.below")[known], padded[at])
    assert_same(node(f"{name}.above")[known], padded[at + 2])
    pairs = zip(node(f"{name}.below"), node(f"{name}.above"), values, strict=True)
    for below, above, value in list(pairs)[:: max(1, values.size // 256)]:
        if not math.isnan(value):
            assert [math.nan if v is None else v for v in neighbours(value, fmt)] == pytest.approx(
                [below, above], rel=0, abs=0, nan_ok=True
            )


@pytest.mark.parametrize("name", SMALL)
def test_gaps_are_the_same(node, name):
    assert_same(node(f"{name}.ulp"), ulp(decode(torch.arange(2 ** FORMATS[name].bits), name), name).numpy())


@pytest.mark.parametrize("policy", OVERFLOW_POLICIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_input_rounds_to_the_same_value(node, name, mode, policy):
    assert_same(node(f"{name}.{mode}.{policy}"), quantize(torch.from_numpy(inputs(name)), name, mode, policy).numpy())


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.signed])
def test_stochastic_rounding_moves_away_from_zero_iff_the_draw_lies_below_the_fraction(node, name):
    fmt, x = FORMATS[name], inputs(name)
    finite = np.abs(x) <= fmt.largest
    v, draw = x[finite], (np.arange(x.size) % 8 / 8)[finite]
    inner = quantize(torch.from_numpy(v), fmt, "toward_zero").numpy()
    step = ulp(torch.from_numpy(v), fmt).numpy()
    fraction = (np.abs(v) - np.abs(inner)) / step
    expected = np.copysign(np.abs(inner) + (draw < fraction) * step, v)
    expected = expected if fmt.has_negative_zero else expected + 0.0
    assert_same(node(f"{name}.stochastic")[finite], np.clip(expected, -fmt.largest, fmt.largest))


def test_numbers_are_read_alike(node):
    def read(text: str) -> str:
        try:
            return _text.shortest(_text.parse_number(text))
        except ValueError as error:
            return str(error)

    assert node.answers["parsed"] == [read(text) for text in [*TEXTS, "", " 7 "]]


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("2^-24", 2.0**-24), ("-1.25·2^-14", -1.25 * 2.0**-14), ("0x1p-3", 0.125), ("-0x1.8p+1", -3.0),
     ("-0", -0.0), ("\u22122.5", -2.5), ("inf", math.inf)],
)  # fmt: skip
def test_texts_mean_what_they_say(text, value):
    got = _text.parse_number(text)
    assert got == value and math.copysign(1, got) == math.copysign(1, value)


@pytest.mark.parametrize("text", ["", "0,1", "1e", "2^", "<b>", "1e400", "0x", "one"])
def test_other_texts_are_refused_with_an_explanation(text):
    with pytest.raises(ValueError, match="write|Type a number"):
        _text.parse_number(text)


@pytest.mark.parametrize(
    ("key", "to_text"),
    [
        ("shortest", _text.shortest),
        ("significant", lambda v: _text.significant(v, 7)),
        ("power", _text.power_form),
        ("exact", _text.exact_decimal),
        ("percent", lambda v: _text.percent(math.fmod(abs(v), 1) if math.isfinite(v) else math.nan)),
    ],
)
def test_numbers_are_written_alike(node, key, to_text):
    assert node.answers[key] == [to_text(float(v)) for v in decimals()]


def test_shortest_reads_back_and_power_form_is_exact():
    for v in map(float, decimals()):
        if math.isfinite(v):
            assert float(_text.shortest(v)) == v
            if 2.0**-160 < abs(v) < 2.0**130:
                odd, _, exponent = _text.power_form(v).replace(" × 2^", "|").partition("|")
                value = 2.0 ** int(odd.split("^")[1]) * (-1 if odd[0] == "-" else 1) if "^" in odd else float(odd)
                assert value * 2.0 ** int(exponent or 0) == v


def test_random_draws_are_the_same_and_follow_the_published_sequence(node):
    from mixprec_lab.exhibits import stalling_sum

    draws = stalling_sum._mulberry32(7)
    assert node.answers["draws"] == [next(draws) for _ in range(1000)]
    assert 0.45 < sum(node.answers["draws"]) / 1000 < 0.55
