"""The exhibit 'will it be faster': its numbers are ``expected_speedup``'s, and JavaScript's are the same to the bit."""

import dataclasses
import json
import random

import pytest
import traitlets
from conftest import run_node
from test_plots import contrast
from widget_page import assert_page_is_python, said

from mixprec_lab.exhibits import WillItBeFaster
from mixprec_lab.exhibits._base import es_module
from mixprec_lab.exhibits.will_it_be_faster import LAYOUTS, PAIRS
from mixprec_lab.plots import PART_COLOURS
from mixprec_lab.speed import DEVICES, PARTS, PUBLISHED, RECIPES, PublishedPoint, amdahl, expected_fp8_speedup

SIDES = ("before", "after")


def random_state(draw: random.Random) -> dict[str, object]:
    return {
        "m": draw.randint(4, 17), "k": draw.randint(4, 17), "n": draw.randint(4, 17),
        "device": draw.choice(list(DEVICES)), "pair": draw.choice([PAIRS[0], *PAIRS]),
        "recipe": draw.choice(list(RECIPES)), "layouts": draw.choice(LAYOUTS), "before": draw.randint(5, 100),
        "after": draw.randint(5, 100), "bandwidth": draw.randint(5, 100), "launch": draw.choice([0, 0, 1, 23, 100]),
        "share": draw.randint(0, 100),
    }  # fmt: skip


def test_javascript_gives_the_times_and_the_texts_of_python(tmp_path):
    draw = random.Random(0)
    states = [random_state(draw) for _ in range(400)]
    (tmp_path / "module.mjs").write_text(es_module("will_it_be_faster"), "utf-8")
    traits = {"tables": WillItBeFaster().tables}
    run_node("states.mjs", tmp_path, {"kind": "will-it-be-faster", "traits": traits, "states": states})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    absent = 0
    for state, answer in zip(states, answers, strict=True):
        exhibit = WillItBeFaster(**state)
        assert answer["texts"] == exhibit.result(), state
        found = exhibit.expected()
        absent += found is None
        if found is None:
            assert answer["found"] is None
            continue
        assert answer["found"]["ratio"] == found.ratio, state
        for side in SIDES:
            split = getattr(found, side)
            assert answer["found"][side] == dataclasses.asdict(split) | {"total": split.total}
    assert 0 < absent < len(states) / 2


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        ({}, "ceiling", "2.001 times"), ({"device": "a100", "pair": "fp32 to bf16"}, "ceiling", "16 times"),
        ({"device": "v100", "pair": "fp32 to fp16"}, "ceiling", "7.962 times"),
        ({"device": "a100"}, "verdict",
         "The table has no FP8 rate for A100 SXM 80GB: choose another device or pair."),
        ({"device": "a100"}, "after-casts", "—"), ({"share": 0}, "step",
         "1 times, if 0 % of the step before is such layers"),
        ({"recipe": "none"}, "after-casts", "0 ms"), ({}, "before-casts", "0 ms"),
        ({"m": 4, "k": 4, "n": 4, "launch": 100, "recipe": "delayed"}, "after-launches", "0.06 ms"),
        ({}, "point-0-ratio", "0.8"), ({}, "point-7-model", "—"),
        ({"pair": "fp32 to tf32"}, "point-0-model", "—"),
    ],
)  # fmt: skip
def test_the_exhibit_says(arguments, field, text):
    assert WillItBeFaster(**arguments).result()[field] == text


def test_its_ratio_is_the_models_and_the_step_is_amdahls():
    exhibit = WillItBeFaster("h200", m=10, k=11, n=10, recipe="delayed", layouts="one", before=72, after=68,
                             bandwidth=45, launch=20, share=40)  # fmt: skip
    expected = expected_fp8_speedup(1024, 2048, 1024, "h200", "delayed", bf16_efficiency=0.72, fp8_efficiency=0.68,
                                    memory_efficiency=0.45, launch=2e-6, transposes=False)  # fmt: skip
    assert exhibit.expected().ratio == pytest.approx(expected.ratio, rel=1e-12)
    step = float(exhibit.result()["step"].split()[0])
    assert step == pytest.approx(amdahl(0.4, expected.ratio), rel=1e-3)


def test_points_of_ones_own_stand_beside_the_model():
    mine = PublishedPoint("mine", "h100", "delayed", "layer", 1.25, "", ((512, 512, 512),))
    exhibit = WillItBeFaster(points=[*PUBLISHED, mine])
    words = exhibit.result()
    assert words[f"point-{len(PUBLISHED)}-ratio"] == "1.25"
    modelled = expected_fp8_speedup(512, 512, 512, "h100", "delayed").ratio
    assert float(words[f"point-{len(PUBLISHED)}-model"]) == pytest.approx(modelled, rel=5e-3)


@pytest.mark.parametrize(
    "changes",
    [{"m": 3}, {"k": 18}, {"n": -1}, {"device": "abacus"}, {"pair": "fp8 to bf16"}, {"recipe": "static"},
     {"layouts": "three"}, {"before": 0}, {"after": 101}, {"bandwidth": 4}, {"launch": -1}, {"share": 101}],
)  # fmt: skip
def test_wrong_state_is_refused_and_changes_nothing(changes):
    exhibit = WillItBeFaster()
    ((key, value),) = changes.items()
    before = getattr(exhibit, key)
    with pytest.raises(traitlets.TraitError):
        setattr(exhibit, key, value)
    assert getattr(exhibit, key) == before
    with pytest.raises(TypeError, match="WillItBeFaster has no colour"):
        WillItBeFaster(colour="red")


def test_parts_have_colours_that_show_in_both_themes():
    assert list(PART_COLOURS) == list(PARTS)
    for theme, page in ((0, "#ffffff"), (1, "#14181e")):
        colours = [pair[theme] for pair in PART_COLOURS.values()]
        assert len(set(colours)) == len(PARTS) and all(contrast(colour, page) >= 2.4 for colour in colours)


def test_controls_without_effect_are_off(pages):
    visit = pages([WillItBeFaster(name="faster")])
    lists = [visit.page.get_by_label(label, exact=True) for label in ("FP8 scaling", "FP8 copies")]
    assert all(field.is_enabled() for field in lists)
    visit.page.get_by_label("Formats", exact=True).select_option(PAIRS[1])
    assert all(field.is_disabled() for field in lists)
    assert_page_is_python("will-it-be-faster", visit)


def test_the_page_keeps_its_height_while_a_slider_moves(pages):
    for width in (1280, 720, 390):
        visit = pages([WillItBeFaster(name="faster")], width=width)
        height = "document.querySelector('.mpl-exhibit').getBoundingClientRect().height"
        heights = {visit.page.evaluate(height)}
        for key in ("m", "launch", "share"):
            field = visit.page.locator(f"input[name={key}]")
            for press in ("Home", "End"):
                field.focus()
                visit.page.keyboard.press(press)
                heights.add(visit.page.evaluate(height))
        for device in ("a100", "b200", "v100"):
            visit.page.get_by_label("Device", exact=True).select_option(device)
            heights.add(visit.page.evaluate(height))
        assert len(heights) == 1, (width, heights)
        assert said(visit)["verdict"].startswith("The table has no BF16 and FP8 rate for V100")
