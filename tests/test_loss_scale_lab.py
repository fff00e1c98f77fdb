"""The loss-scale lab: shares against ``classify``, limits against brute force, page against Python, its controls."""

import copy
import json
import random

import pytest
import torch
from conftest import run_node
from torch import nn
from widget_page import SAMPLES, assert_page_is_python, gradients, said

from mixprec_lab import models
from mixprec_lab.exhibits import LossScaleLab
from mixprec_lab.exhibits._base import es_module
from mixprec_lab.formats import FORMATS, classify
from mixprec_lab.loss_scaling import MagnitudeHistogram, record_gradients

SCALES = range(-8, 41)
NAMES = ("fp16", "bf16", "fp8_e5m2", "fp8_e4m3")
FATES = ("zero", "flushed", "subnormal", "normal", "overflowed", "invalid")


def counts(x: torch.Tensor, fmt: str, k: int) -> list[int]:
    """Elements by fate, from ``classify``."""
    s = classify(x, fmt, 2.0**k)
    shares = (s.zero, s.flushed, s.subnormal, s.normal, s.overflowed, s.infinite + s.nan)
    return [round(share * x.numel()) for share in shares]


def limit_by_search(x: torch.Tensor, fmt: str) -> int:
    """log2 of the largest S that overflows nothing, one power after the other."""
    return max(k for k in range(-400, 400) if classify(x, fmt, 2.0**k).overflowed == 0)


@pytest.mark.parametrize("fmt", NAMES)
@pytest.mark.parametrize("tensor", gradients()["early"])
def test_every_share_is_the_one_of_classify(tensor, fmt):
    exhibit, x = LossScaleLab(gradients(), tensor=tensor, format=fmt), gradients()["early"][tensor]
    for k in SCALES:
        assert exhibit.shares(k) == classify(x, fmt, 2.0**k)


@pytest.mark.parametrize("fmt", NAMES)
@pytest.mark.parametrize("stage", gradients())
@pytest.mark.parametrize("tensor", ["cloud", "edges", "tiny"])
def test_the_largest_safe_scale_is_the_one_that_a_search_finds(tensor, stage, fmt):
    exhibit = LossScaleLab(gradients(), stage, tensor, fmt)
    assert exhibit.largest_safe_scale() == limit_by_search(gradients()[stage][tensor], fmt)


@pytest.mark.parametrize("tensor", ["zeros", "broken"])
def test_where_no_scale_decides_there_is_no_largest_safe_one(tensor):
    exhibit = LossScaleLab(gradients(), tensor=tensor)
    assert exhibit.largest_safe_scale() is None
    assert exhibit.result()["t2-safe"] == "any" and exhibit.result()["t4-safe"] == "none"
    expected = {"zeros": "Every element is zero", "broken": "3 elements inf or NaN already"}[tensor]
    assert exhibit.result()["verdict"].startswith(expected)


SMALL = {"a": torch.tensor([2.0**-30, 2.0**-20, -(2.0**-10), 0.0]), "b": torch.tensor([1.0, 3.0, 0.0])}
HEAD = "The largest safe S in FP16 is 2^25: it flushes 0 % of the elements; S = 1 flushes 25.00 %."
SAFE = "The largest S that is safe for all 2 tensors is 2^14."


@pytest.mark.parametrize(
    ("state", "field", "text"),
    [
        ({}, "verdict", f"{HEAD} S = 2^0 leaves 25 binades of head-room and flushes 25.00 %."),
        ({"log2_scale": 24}, "verdict", f"{HEAD} S = 2^24 leaves 1 binade of head-room and flushes 0 %."),
        ({"log2_scale": 27}, "verdict", f"{HEAD} S = 2^27 is 2 binades too large: 1 of 4 elements overflow."),
        ({}, "stage", f"{SAFE} At S = 2^0, none overflows, and the most is flushed in a (25.00 %)."),
        ({"log2_scale": 26}, "stage", f"{SAFE} At S = 2^26, 2 of 2 overflow, and nothing is flushed."),
        ({"tensor": "b", "log2_scale": 15}, "overflowed-now", "33.33 %"),
        ({"tensor": "b", "log2_scale": 15}, "overflowed-count", "1"),
        ({"log2_scale": 5}, "subnormal-count", "1"),
        ({}, "zero-one", "25.00 %"),
        ({}, "t1-safe", "2^14"),
        ({}, "score", ""),
        ({"phase": "revealed", "guess": 25, "expected": 0}, "score",
         "Your S = 2^25 is the largest safe one. You expected it to flush 0 %; it flushes 0 %."),
        ({"format": "bf16", "phase": "revealed", "guess": 40, "expected": 0}, "score",
         "Your S = 2^40 is safe, and so is any that the slider offers: up to 2^137. "
         "You expected it to flush 0 %; it flushes 0 %."),
        ({"phase": "revealed", "guess": 3, "expected": 50}, "score",
         "Your S = 2^3 is 22 binades below the largest safe one, 2^25. "
         "You expected it to flush 50 %; it flushes 25.00 %."),
        ({"phase": "revealed", "guess": 26, "expected": 1}, "score",
         "Your S = 2^26 is 1 binade above the largest safe one, 2^25: it overflows. You expected it to flush 1 %; it "
         "flushes 0 %."),
    ],
)  # fmt: skip
def test_it_says_what_follows_by_hand(state, field, text):
    exhibit = LossScaleLab(SMALL)
    for key, value in state.items():
        setattr(exhibit, key, value)
    assert exhibit.result()[field] == text


def test_a_prediction_is_asked_for_without_a_number_that_answers_it():
    shown = LossScaleLab(gradients(), phase="predict", log2_scale=12).result()
    answers = {text for key, text in shown.items() if key not in ("verdict", "device", "score")}
    assert answers == {"?"} and "Reveal" in shown["verdict"] and shown["score"] == ""


@pytest.mark.parametrize(
    ("recordings", "error", "words"),
    [
        ({}, ValueError, "at least one recording"),
        ({"a": {}}, ValueError, "expected 1 to 64 tensors in 'a', got 0"),
        ({"a": {f"w{i}": torch.ones(1) for i in range(65)}}, ValueError, "got 65: choose some layers"),
        ({"a": {"w": torch.ones(1)}, "b": {"v": torch.ones(1)}}, ValueError, "the same tensors in 'a' and 'b'"),
        ({"a": {"v": torch.ones(1), "w": torch.ones(1)}, "b": {"w": torch.ones(1), "v": torch.ones(1)}}, ValueError,
         "another order"),
        ({"a": {"w": torch.empty(0)}}, ValueError, "at least one element"),
        ({"a": {"w": [1.0]}}, TypeError, "expected 'w' of 'a' to be a tensor or a MagnitudeHistogram, got list"),
        ({"a": torch.ones(1), "b": 3}, TypeError, "expected 'a' to hold tensors or histograms by name, got Tensor"),
        ({"a": torch.ones(1, dtype=torch.int64)}, TypeError, "floating-point tensor"),
        ({"a": MagnitudeHistogram.of(torch.ones(1), formats=["fp32"])}, ValueError, "made for|no threshold"),
    ],
)  # fmt: skip
def test_recordings_that_cannot_be_shown_are_refused(recordings, error, words):
    with pytest.raises(error, match=words):
        LossScaleLab(recordings)


def test_a_format_without_a_sign_is_refused():
    with pytest.raises(ValueError, match="sign and a zero"):
        LossScaleLab(SMALL, formats=["fp16", "e8m0"])


def small_batch() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(16, 1, 8, 8, generator=generator)
    return models.convnet(), images, torch.arange(16) % 10


def test_a_model_is_recorded_as_record_gradients_does_and_left_alone():
    model, images, labels = small_batch()
    before = copy.deepcopy(model.state_dict())
    exhibit = LossScaleLab.from_model(model, images, labels, nn.functional.cross_entropy, "cpu", log2_scale=4)
    record = record_gradients(model, images, labels, nn.functional.cross_entropy)
    assert exhibit.device == "Recorded on cpu." and exhibit.stage == "this batch" and exhibit.log2_scale == 4
    names = exhibit.recordings["names"]
    assert names[:2] == ["0 Conv2d: weights", "0 Conv2d: activations"] and len(names) == 8
    for i, name in enumerate(names):
        layer, kind = name.split(" ")[0], name.split(": ")[1]
        expected = getattr(record, kind)[layer].shares("fp16", 4)
        exhibit.tensor = name
        assert exhibit.shares() == expected
        assert exhibit.recordings["tensors"][0][i]["total"] == getattr(record, kind)[layer].total
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_can_be_chosen_by_name():
    model, images, labels = small_batch()
    exhibit = LossScaleLab.from_model(model, images, labels, nn.functional.cross_entropy, layers=["8", "1"])
    assert exhibit.recordings["names"] == ["8 Linear: weights", "8 Linear: activations", "1 ReLU: activations"]
    with pytest.raises(KeyError, match=r"expected layers with a recorded gradient .*got 9"):
        LossScaleLab.from_model(model, images, labels, nn.functional.cross_entropy, layers=["9"])


def test_inputs_follow_the_model_in_tuples_lists_and_dicts():
    class TwoInputs(nn.Linear):
        def forward(self, x, extra):
            return super().forward(x) + extra["shift"]

    inputs = (torch.ones(2, 3), {"shift": torch.ones(4)})
    exhibit = LossScaleLab.from_model(
        TwoInputs(3, 4), inputs, [torch.zeros(2, 4)], lambda y, t: (y - t[0]).square().mean()
    )
    assert exhibit.recordings["names"] == ["TwoInputs: weights", "TwoInputs: activations"]


def test_a_model_without_a_device_is_refused():
    with pytest.raises(ValueError, match="model on one device, got no parameters"):
        LossScaleLab.from_model(nn.ReLU(), torch.ones(1), None, lambda y, t: y.sum())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_model_on_the_cpu_is_recorded_on_the_gpu_and_stays_where_it_is():
    model, images, labels = small_batch()
    exhibit = LossScaleLab.from_model(model, images, labels, nn.functional.cross_entropy)
    assert "cuda" in exhibit.device and next(model.parameters()).device.type == "cpu"
    total = sum(t["total"] for t in exhibit.recordings["tensors"][0])
    here = LossScaleLab.from_model(model, images, labels, nn.functional.cross_entropy, "cpu")
    assert total == sum(t["total"] for t in here.recordings["tensors"][0])


@pytest.fixture(scope="module")
def digits_lab() -> LossScaleLab:
    return LossScaleLab(name="digits")


def test_without_recordings_a_network_is_trained_and_its_gradients_shrink(digits_lab):
    assert digits_lab.recordings["stages"] == ["before training", "after 100 steps", "after 400 steps"]
    assert len(digits_lab.recordings["names"]) == 8
    digits_lab.tensor = "0 Conv2d: activations"
    flushed = []
    for stage in digits_lab.recordings["stages"]:
        digits_lab.stage = stage
        flushed.append(digits_lab.shares(0).flushed)
    assert flushed[0] < 0.01 < flushed[1] < flushed[2]
    assert len(json.dumps(digits_lab.get_state(["recordings"]))) < 100_000


def test_the_name_of_its_links_does_not_depend_on_what_was_recorded():
    halved = {name: x / 2 for name, x in SMALL.items()}
    assert LossScaleLab(SMALL, recorded_on="cpu").name == LossScaleLab(halved, recorded_on="cuda").name


def states(exhibit: LossScaleLab, number: int) -> list[dict]:
    """Random states, and every tensor in every format at S = 1."""
    draw, stages, names = random.Random(0), exhibit.recordings["stages"], exhibit.recordings["names"]
    fixed = [
        {"stage": s, "tensor": n, "format": f, "log2_scale": 0, "phase": "off", "guess": 0, "expected": 0}
        for s in stages for n in names for f in exhibit.formats
    ]  # fmt: skip
    return fixed + [
        {"stage": draw.choice(stages), "tensor": draw.choice(names), "format": draw.choice(list(exhibit.formats)),
         "log2_scale": draw.choice(SCALES), "phase": draw.choice(["off", "predict", "revealed", "revealed"]),
         "guess": draw.choice(SCALES), "expected": draw.randint(0, 100)}
        for _ in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("formats", [None, ["fp32", "tf32", "fp6_e2m3", "fp4_e2m1", "fp8_e4m3fnuz", "fp16"]])
def test_javascript_computes_what_python_computes(formats, tmp_path):
    exhibit = LossScaleLab(gradients(), formats=formats, name="lab")
    traits = {key: getattr(exhibit, key) for key in ("formats", "recordings", "device")}
    job = {"kind": "loss-scale-lab", "traits": traits, "states": states(exhibit, 200)}
    (tmp_path / "module.mjs").write_text(es_module("loss_scale_lab"), "utf-8")
    run_node("states.mjs", tmp_path, job)
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    for state, answer in zip(job["states"], answers, strict=True):
        for key, value in state.items():
            setattr(exhibit, key, value)
        assert answer["texts"] == exhibit.result(), state
        x = gradients()[state["stage"]][state["tensor"]]
        assert answer["fates"] == counts(x, state["format"], state["log2_scale"]), state
        assert_bars_are_counts(answer["bars"], x, state)


def assert_bars_are_counts(bars: list, x: torch.Tensor, state: dict) -> None:
    """Every drawn segment is the number of elements of its binade with its fate."""
    finite = x[x.isfinite() & (x != 0)].double()
    binades = torch.frexp(finite).exponent - 1
    assert [b for b, _ in bars] == binades.unique().tolist()
    for binade, segments in bars:
        assert segments == counts(finite[binades == binade], state["format"], state["log2_scale"])[1:5], (state, binade)


def test_a_prediction_is_hidden_then_judged_and_can_be_left_at_any_time(pages):
    visit = pages([SAMPLES["loss-scale-lab"].make()])
    page, kind = visit.page, "loss-scale-lab"
    predict, reveal = page.locator("[data-action=predict]"), page.locator("[data-action=reveal]")
    assert reveal.is_hidden() and predict.get_attribute("aria-pressed") == "false"
    predict.press("Enter")
    assert said(visit)["flushed-now"] == "?" and predict.get_attribute("aria-pressed") == "true"
    assert_page_is_python(kind, visit)
    page.get_by_label("Loss scale S").fill("12")
    page.get_by_label("Share that you expect it to flush").fill("40")
    assert said(visit)["t0-safe"] == "?"
    reveal.press("Space")
    assert said(visit)["score"].startswith("Your S = 2^12 is ") and "40 %" in said(visit)["score"]
    assert_page_is_python(kind, visit)
    page.get_by_label("Loss scale S").fill("20")  # looking on does not change the guess
    assert said(visit)["score"].startswith("Your S = 2^12 is ")
    page.get_by_label("Tensor", exact=True).select_option("edges")  # a new question hides the answer again
    assert said(visit)["verdict"].startswith("Set S to") and said(visit)["score"] == ""
    assert_page_is_python(kind, visit)
    predict.click()
    assert reveal.is_hidden() and said(visit)["flushed-now"] != "?"
    assert_page_is_python(kind, visit)


def test_the_histogram_can_be_dragged_to_both_ends(pages):
    visit = pages([SAMPLES["loss-scale-lab"].make()])
    drawing = visit.page.locator(".mpl-grab")
    for moved, expected in ((5, "5"), (-3, "2"), (96, "40"), (-96, "-8")):
        drawing.scroll_into_view_if_needed()  # reading the link moves the page
        box = drawing.bounding_box()
        binade, y = (box["width"] - 16) / 96, box["y"] + box["height"] / 2
        visit.page.mouse.move(box["x"] + box["width"] / 2 - moved * binade / 2, y)
        visit.page.mouse.down()
        visit.page.mouse.move(box["x"] + box["width"] / 2 + moved * binade / 2, y, steps=4)
        visit.page.mouse.up()
        assert visit.page.get_by_label("Loss scale S").input_value() == expected
        assert_page_is_python("loss-scale-lab", visit)


def test_what_rounding_does_is_told_by_pattern_as_well_as_by_colour(pages):
    visit = pages([LossScaleLab(gradients(), tensor="edges", name="lab")])
    fills = visit.page.locator("svg[role=img] rect").evaluate_all("rects => rects.map(r => r.getAttribute('fill'))")
    assert len({fill for fill in fills if fill.startswith("url(#")}) == 2
    assert visit.page.locator("svg[role=img]").get_attribute("aria-label").endswith(said(visit)["verdict"])


def test_what_is_hidden_leaves_no_empty_box(pages):
    visit = pages([SAMPLES["loss-scale-lab"].make()])
    verdicts = visit.page.locator(".mpl-say:visible")
    assert verdicts.count() == 2
    visit.page.locator("[data-action=predict]").click()
    assert verdicts.count() == 1 and "Reveal" in verdicts.inner_text()
    visit.page.locator("[data-action=reveal]").click()
    assert verdicts.count() == 3 and all(verdicts.all_inner_texts())


def test_zeros_have_a_bar_as_long_as_their_share(pages):
    visit = pages([LossScaleLab({"w": torch.tensor([0.0, 0.0, 0.0, 1.0])}, name="lab")])
    bar = visit.page.locator(".mpl-share-zero").last
    share = bar.evaluate("bar => bar.offsetWidth / bar.parentElement.clientWidth")
    assert share == pytest.approx(0.75, abs=0.01)
    assert bar.evaluate("bar => getComputedStyle(bar).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_long_names_of_tensors_and_the_sliders_have_the_whole_width_on_a_phone(pages):
    visit = pages([SAMPLES["loss-scale-lab"].make()], width=390)
    visit.page.locator("[data-action=predict]").click()
    drawing = visit.page.locator("svg[role=img]").bounding_box()["width"]
    for label in ("Tensor", "Loss scale S", "Share that you expect it to flush"):
        assert visit.page.get_by_label(label, exact=True).bounding_box()["width"] == pytest.approx(drawing, abs=1)


def test_formats_are_named_in_the_list():
    assert [LossScaleLab(SMALL).formats[name]["title"] for name in NAMES] == [FORMATS[name].title for name in NAMES]
