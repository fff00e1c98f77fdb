"""The exhibits as Python objects: what they refuse, and what they say, against independent expectations."""

import subprocess
import sys

import pytest
import torch
import traitlets
from widget_page import MAKERS, tensors

from mixprec_lab.exhibits import BitExplorer, NumberLine, StallingSum, Windows
from mixprec_lab.formats import FORMATS, classify
from mixprec_lab.rounding import METHODS, ROUNDING_MODES, accumulate, quantize


@pytest.mark.parametrize("kind", MAKERS)
def test_the_text_output_is_the_same_in_every_run(kind):
    first, second = MAKERS[kind](), MAKERS[kind]()
    assert repr(first) == repr(second) and type(first).__name__ in repr(first)
    assert first.name == second.name and len(repr(first)) < 110


def test_the_names_of_links_differ_with_the_start():
    assert BitExplorer().name == BitExplorer().name != BitExplorer("bf16").name


def test_importing_the_package_does_not_load_the_widgets():
    code = "import sys, mixprec_lab, mixprec_lab.exhibits; sys.exit('anywidget' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (BitExplorer, {"format": "fp99"}), (BitExplorer, {"text": "0,1"}), (BitExplorer, {"code": 2**16}),
        (BitExplorer, {"rounding": "stochastic"}), (BitExplorer, {"overflow": "wrap"}), (BitExplorer, {"name": "a b"}),
        (Windows, {"source": "nothing"}), (Windows, {"scale": 25}), (Windows, {"spread": 0}),
        (StallingSum, {"addend": "0"}), (StallingSum, {"addend": "inf"}), (StallingSum, {"count": 0}),
        (StallingSum, {"count": 20_001}), (StallingSum, {"method": "sort"}), (StallingSum, {"format": "e4m3"}),
        (NumberLine, {"x": "nan"}), (NumberLine, {"first": "e8m0"}), (NumberLine, {"rounding": "even"}),
        (NumberLine, {"zoom": 17}),
    ],
)  # fmt: skip
def test_wrong_state_is_refused_and_changes_nothing(make, changes):
    exhibit = make()
    ((key, value),) = changes.items()
    before = getattr(exhibit, key)
    with pytest.raises(traitlets.TraitError):
        setattr(exhibit, key, value)
    assert getattr(exhibit, key) == before


def test_refusals_say_what_was_expected_and_got():
    with pytest.raises(traitlets.TraitError, match=r"expected format to be one of fp32, .*got 'fp99'"):
        BitExplorer().format = "fp99"
    with pytest.raises(traitlets.TraitError, match="expected a number as text, got 'x'"):
        BitExplorer(text="x")


def test_code_and_text_of_the_bit_explorer_agree():
    bits = BitExplorer("fp16", 0.1)
    assert bits.code == 0x2E66 and bits.bits.value == 0.0999755859375
    bits.code = 0x7C00
    assert bits.text == "inf"
    bits.text = "-0"
    assert bits.code == 0x8000
    bits.format = "bf16"
    assert bits.code == 0x8000
    bits.text = "nan"
    bits.code = 0x7FFF
    assert bits.text == "nan"
    bits.format = "fp4_e2m1"
    assert (bits.text, bits.code) == ("0", 0)
    with pytest.raises(traitlets.TraitError, match="has a code for, got nan"):
        bits.text = "nan"
    assert (bits.text, bits.code) == ("0", 0)


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        ({"text": "65520"}, "value", "65504"),
        ({"text": "65520", "overflow": "native"}, "value", "inf"),
        ({"text": "65520"}, "bf16-value", "65536"),
        ({"text": "65520"}, "fp8_e4m3-outcome", "held at the largest"),
        ({"text": "65520", "overflow": "native"}, "fp8_e4m3-outcome", "becomes NaN"),
        ({"text": "1e-8"}, "fp16-outcome", "flushed to zero"),
        ({"text": "2^-24"}, "class", "subnormal"),
        ({"text": "0.1"}, "power", "819 × 2^-13"),
        ({"text": "0.1"}, "exponent", "01011 = 11, scale 2^-4"),
        ({"text": "0.1"}, "below", "0.09991455078125"),
        ({"text": "0.1"}, "above", "0.10003662109375"),
        ({"text": "0.1"}, "fp16-error", "0.000244"),
        ({"text": "-1e6", "format": "fp8_e4m3", "overflow": "native"}, "code", "0xFF (255)"),
        ({"text": "1"}, "gap", "2^-10"),
        ({"text": "-1", "format": "e8m0"}, "class", "NaN"),
        ({"format": "fp32", "text": "2^-149"}, "value", "1.401298464324817e-45 (rounded)"),
    ],
)
def test_the_bit_explorer_says(arguments, field, text):
    assert BitExplorer(**arguments).result()[field] == text


@pytest.mark.parametrize("scale", [-24, -3, 0, 7, 24])
@pytest.mark.parametrize("source", ["gradients", "edges"])
def test_recorded_shares_are_exact(source, scale):
    exhibit = Windows.from_tensors(tensors(), source=source, scale=scale)
    x = tensors()[source]
    for name in exhibit.formats:
        s = classify(x, name, 2.0**scale)
        expected = (s.zero, s.flushed, s.subnormal, s.normal, s.overflowed)
        assert exhibit.shares(FORMATS[name]) == pytest.approx(expected, abs=1e-12)


def test_shares_of_the_model_distribution_are_those_of_a_sample():
    exhibit = Windows(centre=-20, spread=3, scale=2)
    log2 = torch.randn(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 - 18
    for name in ("fp16", "fp8_e5m2", "fp8_e4m3"):
        s = classify(torch.exp2(log2), name)
        expected = (s.flushed, s.subnormal, s.normal, s.overflowed)
        assert exhibit.shares(FORMATS[name])[1:] == pytest.approx(expected, abs=0.004)


def test_the_numbers_of_the_stalling_sum_are_the_known_ones():
    assert StallingSum("1e-7", 5000, "fp16").result()["verdict"].startswith("Stalls after 2048 additions")
    bf16 = StallingSum("1", 1000, "bf16").result()
    assert bf16["total"] == "256" and bf16["verdict"].startswith("Stalls after 256 additions at 256")
    assert "flushed to zero" in StallingSum("1e-8", 10, "fp16").result()["verdict"]
    assert StallingSum("1000", 100, "fp16").result()["verdict"].endswith("leave the range of FP16: the sum is inf.")
    assert StallingSum("100", 9, "fp8_e4m3", "kahan").result()["verdict"].endswith("FP8 E4M3: the sum is nan.")
    assert StallingSum("1", 1000, "bf16", "fp32").result()["total"] == "1000"
    assert StallingSum("1", 1000, "bf16", "pairwise").result()["error"] == "0"


def test_stochastic_rounding_of_the_stalling_sum_stays_near_the_exact_sum():
    totals = [float(StallingSum("1", 1000, "bf16", "stochastic", seed=s).sums()[-1]) for s in range(21)]
    assert len(set(totals)) > 5 and sum(totals) / 21 == pytest.approx(1000, rel=0.03)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "stochastic"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8_e4m3"])
def test_the_last_partial_sum_is_accumulate(name, method):
    values = torch.full((150,), 0.3, dtype=torch.float64)
    total = float(StallingSum("0.3", 150, name, method).sums()[-1])
    assert total == pytest.approx(float(accumulate(values, name, method)), rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("mode", ROUNDING_MODES[:5])
@pytest.mark.parametrize("x", ["0.1", "-0.3", "1", "0", "-0", "500", "-1e9", "0.0001"])
def test_all_of_an_interval_of_the_number_line_rounds_to_its_value(x, mode):
    exhibit = NumberLine(x, ("fp8_e4m3", "fp4_e2m1"), mode)
    said = exhibit.result()
    for prefix, name in (("first", "fp8_e4m3"), ("second", "fp4_e2m1")):
        low, high = (float(end) for end in said[f"{prefix}-interval"].split(" to "))
        value, top = float(said[f"{prefix}-value"]), FORMATS[name].largest * 4
        low, high = max(low, -top), min(high, top)
        inside = torch.linspace(low, high, 101, dtype=torch.float64)[1:-1]
        assert bool((quantize(inside, name, mode) == value).all())
        assert low <= float(x) <= high or abs(float(x)) > top
        outside = torch.tensor([low - (high - low) / 50, high + (high - low) / 50], dtype=torch.float64)
        moved = quantize(outside, name, mode) != value
        assert bool((moved | (outside.abs() >= top)).all())
