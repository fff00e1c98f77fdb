"""The precision chooser: its JavaScript applies the rules as ``recommend`` does, for every pair; mouse and keys."""

import itertools
import json

import pytest
import traitlets
from conftest import run_node
from widget_page import assert_page_is_python, said

from mixprec_lab.bf16_vs_fp16 import HARDWARE, TASKS, recommend
from mixprec_lab.exhibits import PrecisionChooser
from mixprec_lab.exhibits.precision_chooser import PARTS, PRIORITIES


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[tuple[dict, dict]]:
    """Every state, and every text of it from JavaScript."""
    folder, shown = tmp_path_factory.mktemp("chooser"), PrecisionChooser()
    states = [
        dict(zip(("hardware", "task", "priority"), values, strict=True))
        for values in itertools.product(HARDWARE, TASKS, PRIORITIES)
    ]
    traits = {key: getattr(shown, key) for key in ("formats", "tables", "parts")}
    (folder / "module.mjs").write_text(shown._esm, "utf-8")
    run_node("states.mjs", folder, {"kind": "precision-chooser", "traits": traits, "states": states})
    return list(zip(states, json.loads((folder / "answers.json").read_text("utf-8")), strict=True))


def test_javascript_says_what_python_says_for_every_pair_and_priority(answers):
    shown = PrecisionChooser()
    for state, words in answers:
        for key, value in state.items():
            setattr(shown, key, value)
        assert words == shown.result(), state


def test_every_decision_of_recommend_is_shown_with_its_reason_and_source(answers):
    for state, words in answers:
        decisions = recommend(**state).decisions()
        assert {field for field, _ in decisions} <= set(PARTS)
        reasons = sorted(text for key, text in words.items() if key.endswith("-reason"))
        assert reasons == sorted(d.reason for _, d in decisions)
        sources = sorted(text for key, text in words.items() if key.endswith("-source"))
        assert sources == sorted(f"{d.source.title}, {d.date}" for _, d in decisions)


@pytest.mark.parametrize(
    ("state", "verdict"),
    [
        (("V100", "gan"), "NVIDIA V100, GAN: training in FP16, with dynamic loss scaling. It has no BF16 units."),
        (("H100", "llm"), "NVIDIA H100, LLM pre-training: training in BF16, without loss scaling."),
        (("H100", "rl"), "NVIDIA H100, RL fine-tuning: training in FP16, with dynamic loss scaling."),
        (("tpu_v4", "vit"), "Google TPU v4, vision transformer: training in BF16, without loss scaling."),
        (("T4", "serving"), "NVIDIA T4, inference: inference in FP16. It has no BF16 units."),
    ],
)
def test_the_verdict_by_hand(state, verdict):
    assert PrecisionChooser(*state).result()["verdict"] == verdict


def test_what_the_other_priority_changes_is_said_from_both_sides():
    first, second = (PrecisionChooser("a100", "llm", p).result()["changes"] for p in PRIORITIES)
    assert first == "With speed first: Optimizer state: bf16 moments instead of FP32; TF32: on instead of off."
    assert second == "With stability first: Optimizer state: FP32 instead of bf16 moments; TF32: off instead of on."


def test_unknown_names_are_refused_with_close_matches():
    with pytest.raises(KeyError, match="did you mean h100"):
        PrecisionChooser("h10")
    with pytest.raises(KeyError, match="unknown task 'dancing'"):
        PrecisionChooser("h100", "dancing")
    with pytest.raises(KeyError, match="unknown hardware 'auto'"):
        PrecisionChooser("auto")
    with pytest.raises(traitlets.TraitError, match="expected priority to be one of stability, speed, got 'luck'"):
        PrecisionChooser(priority="luck")


def test_the_map_shows_every_pair_and_answers_to_mouse_and_arrow_keys(pages):
    visit = pages([PrecisionChooser(name="choose")])
    page, cells = visit.page, visit.page.locator("svg.mpl-pick [data-row]")
    letters = {"fp32": "32", "fp16": "F", "bf16": "B"}
    expected = [letters[recommend(h, task).forward.value] for h, task in itertools.product(HARDWARE, TASKS)]
    assert cells.evaluate_all("cells => cells.map(c => c.textContent)") == expected
    page.locator("[data-row='1'][data-column='8']").click()
    assert said(visit)["verdict"].startswith("NVIDIA V100, GAN: ")
    assert_page_is_python("precision-chooser", visit)
    page.locator("svg.mpl-pick").focus()
    walk = {"ArrowUp": "NVIDIA P100, GAN", "ArrowLeft": "NVIDIA P100, speech", "ArrowRight": "NVIDIA P100, GAN"}
    for key, start in walk.items():
        page.keyboard.press(key)
        assert said(visit)["verdict"].startswith(start)
    for _ in HARDWARE:
        page.keyboard.press("ArrowDown")
    for _ in TASKS:
        page.keyboard.press("ArrowRight")
    assert said(visit)["verdict"].startswith("Apple silicon (MPS), inference: ")
    assert_page_is_python("precision-chooser", visit)


def test_sources_that_have_an_address_are_links(pages):
    visit = pages([PrecisionChooser("h100", "llm", name="choose")])
    urls = visit.page.locator(".mpl-reasons a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    expected = [d.source.url for _, d in recommend("h100", "llm").decisions() if d.source.url]
    assert urls == expected and len(urls) > 8
