"""Same tensor, two formats: errors and losses against torch's own casts, JavaScript against Python, known figures."""

import json
import random

import pytest
import torch
import traitlets
from conftest import run_node
from widget_page import said

from mixprec_lab.exhibits import SameTensorTwoFormats

KEYS = ("tensor", "scale", "outliers", "size")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS, ACTIVATIONS, GRADIENTS = ("weights: normal", "activations: Student's t", "gradients: log2 |x| normal")


def own() -> dict[str, torch.Tensor]:
    """Tensors with ties, edges, zeros and more elements than the page carries."""
    edges = [65504.0, 65519.99, 65520.0, 2049.0, 257.0, 1.0, 0.0, 3.0e38, *(2.0**-k for k in (14, 15, 24, 25, 140))]
    large = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    return {"edges": torch.tensor(edges + [-e for e in edges]), "zeros": torch.zeros(3), "large": large}


def states(exhibit: SameTensorTwoFormats, number: int) -> list[dict]:
    draw = random.Random(0)
    names = [record["name"] for record in exhibit.tensors.values()]
    return [
        {"tensor": draw.choice(names), "scale": draw.randint(-28, 12), "outliers": draw.choice([0, 1, 7, 64]),
         "size": draw.randint(1, 16)}
        for _ in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("tensors", [None, own()], ids=["distributions", "own"])
def test_javascript_says_what_python_says(tensors, tmp_path):
    shown = SameTensorTwoFormats(tensors)
    traits = {key: getattr(shown, key) for key in ("formats", "tensors")}
    wanted = states(shown, 150)
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    run_node("states.mjs", tmp_path, {"kind": "same-tensor", "traits": traits, "states": wanted})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    for state, words in zip(wanted, answers, strict=True):
        for key in KEYS:
            setattr(shown, key, state[key])
        assert words == shown.result(), state


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", [-28, -18, -6, 0, 12])
def test_shares_and_errors_are_those_of_torchs_casts(name, scale):
    shown = SameTensorTwoFormats(tensor=GRADIENTS, scale=scale, outliers=5, size=16)
    x, said_ = shown.values().float(), shown.result()
    cast = x.to(DTYPES[name])
    rounded, least = cast.double(), torch.finfo(DTYPES[name]).smallest_normal
    counts = {
        "flushed": int((rounded == 0).sum()),
        "subnormal": int(((rounded > 0) & (rounded < least)).sum()),
        "overflowed": int(rounded.isinf().sum()),
    }
    for part, count in counts.items():
        share = 100 * count / x.numel()
        assert said_[f"{name}-{part}"] == ("0 %" if count == 0 else f"{share:.2f} %")
    errors = ((rounded - x.double()).abs() / x.double())[rounded.isfinite()]
    assert float(said_[f"{name}-worst"]) == pytest.approx(float(errors.max()), rel=6e-3)
    assert float(said_[f"{name}-median"]) == pytest.approx(float(errors.median()), rel=6e-3)


def test_normal_weights_lose_eight_times_less_in_fp16():
    shown = SameTensorTwoFormats().result()
    assert shown["verdict"] == "Neither format loses a value. The median error of FP16 is 8 times smaller."
    assert float(shown["bf16-rms"]) / float(shown["fp16-rms"]) == pytest.approx(8, rel=0.05)


def test_small_gradients_are_lost_in_fp16_only_and_a_scale_saves_them():
    words = SameTensorTwoFormats(tensor=GRADIENTS).result()
    assert words["verdict"].startswith("FP16 loses 4.00 %, BF16 0 %.")
    assert words["verdict"].endswith("Multiplied by 2^20 first, FP16 would lose 0 %.")
    # 0.0356 * 2^20 = 37,300 fits below 65504, and twice that does not
    assert words["summary"].endswith("the largest is 0.0356.") and 0.0356 * 2**20 < 65504 < 0.0356 * 2**21


def test_outliers_leave_the_other_errors_alone_until_they_overflow():
    plain, fits, over = (
        SameTensorTwoFormats(tensor=WEIGHTS, scale=2, outliers=n, size=size).result()
        for n, size in ((0, 8), (3, 12), (3, 16))
    )
    assert float(fits["fp16-median"]) == pytest.approx(float(plain["fp16-median"]), rel=0.02)
    assert fits["fp16-overflowed"] == "0 %" and over["fp16-overflowed"] == "0.29 %"  # 3 of 1027
    assert over["bf16-overflowed"] == "0 %"


def test_a_large_tensor_is_thinned_and_says_so():
    shown = SameTensorTwoFormats({"large": own()["large"]})
    kept = shown.values()
    assert shown.scale == 0 and kept.numel() == 1024
    assert "1024 of 5000 magnitudes, evenly spaced in order" in shown.result()["summary"]
    magnitude = own()["large"].abs().double()
    assert float(kept[0]) == float(magnitude.min()) and float(kept[-1]) == float(magnitude.max())


def test_outliers_are_spread_over_the_binade_they_begin_in():
    shown = SameTensorTwoFormats({"one": torch.ones(4)}, outliers=4, size=3, scale=2)
    assert shown.values()[4:].tolist() == [32 * (1 + q) for q in (0.125, 0.375, 0.625, 0.875)]


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({}, ValueError, "at least one tensor"),
        ({"a": torch.empty(0)}, ValueError, "expected 'a' to hold finite numbers"),
        ({"a": torch.tensor([1.0, torch.nan])}, ValueError, "expected 'a' to hold finite numbers"),
        ({"a": torch.tensor([1e300], dtype=torch.float64)}, ValueError, "infinity in FP32"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "floating-point tensor, got torch.int64"),
        ({"a": [1.0]}, TypeError, "floating-point tensor, got list"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_shown_are_refused(tensors, error, words):
    with pytest.raises(error, match=words):
        SameTensorTwoFormats(tensors)


@pytest.mark.parametrize(("key", "value"), [("tensor", "nothing"), ("scale", 13), ("outliers", 65), ("size", 0)])
def test_a_state_out_of_range_is_refused(key, value):
    with pytest.raises(traitlets.TraitError):
        SameTensorTwoFormats(**{key: value})


def test_choosing_a_tensor_sets_its_typical_scale(pages):
    visit = pages([SameTensorTwoFormats(name="same")])
    visit.page.get_by_label("Tensor", exact=True).select_option(GRADIENTS)
    assert visit.page.get_by_label("Scale", exact=True).input_value() == "-18"
    assert said(visit) == SameTensorTwoFormats(tensor=GRADIENTS).result()


def test_the_two_formats_are_told_apart_by_shape_as_well_as_by_colour(pages):
    visit = pages([SameTensorTwoFormats(name="same")])
    marks = visit.page.locator("svg[role=img] > g > path")
    ends = [marks.nth(i).get_attribute("stroke-linecap") for i in range(marks.count())]
    assert ends == ["round", "butt"]
