"""The exhibit 'regimes': JavaScript against the library to the bit, stories by hand, picks by mouse and keyboard."""

import copy
import json
import math
import random

import pytest
import traitlets
from conftest import run_node
from regime_record import small_record, wide_record
from widget_page import assert_page_is_python, said

from mixprec_lab.exhibits import RegimeComparison
from mixprec_lab.exhibits._base import es_module
from mixprec_lab.plots import REGIME_STYLES
from mixprec_lab.regimes import REGIMES, VARIANTS, differences, runs_of, unpaired_interval
from mixprec_lab.speed import BrokenRecord

KIND = "regimes"


def states(record: dict, number: int) -> list[dict]:
    draw, names = random.Random(1), [r["name"] for r in record["regimes"]]
    runs = record["runs"]
    seeds, evaluations = len({r["seed"] for r in runs}), len(runs[0]["steps"])
    return [
        {"task": draw.choice(list(record["tasks"])), "baseline": draw.choice(names),
         "shown": ",".join(draw.sample(names, draw.randint(0, len(names)))),
         "interval": draw.choice(["paired", "unpaired"]), "seeds": draw.randint(2, seeds),
         "at": draw.randrange(evaluations)}
        for _ in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("make", [small_record, wide_record])
def test_javascript_gives_the_gaps_and_the_texts_of_python(tmp_path, make):
    asked = states(make(), 120)
    (tmp_path / "module.mjs").write_text(es_module("regimes"), "utf-8")
    traits = {"data": RegimeComparison(make()).data}
    run_node("states.mjs", tmp_path, {"kind": KIND, "traits": traits, "states": asked})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    lost = 0
    for state, answer in zip(asked, answers, strict=True):
        exhibit = RegimeComparison(make(), **state)
        assert answer["texts"] == exhibit.result(), state
        for name, gap in answer["gaps"].items():
            found = exhibit.gap(name)
            lost += found is None
            assert gap == found if gap is None else [float(x) for x in gap] == list(found), (state, name)
    assert lost > 0


def test_javascript_sums_as_math_fsum_does(tmp_path):
    draw = random.Random(2)
    sums = [[draw.gauss(0, 1) * 2.0 ** draw.randint(-60, 60) for _ in range(draw.randint(1, 12))] for _ in range(500)]
    sums += [[], [0.1] * 10, [1.0, 2.0**-53, 2.0**-106], [1.0, 2.0**-53, -(2.0**-106)], [1e16, 1.0, -1e16], [-0.0]]
    source = es_module("regimes") + "\nexport const answer = (list) => String(fsum(list));\n"
    (tmp_path / "module.mjs").write_text(source.replace("export function fsum", "function fsum"), "utf-8")
    (tmp_path / "sums.json").write_text(json.dumps(sums), "utf-8")
    code = (
        "import {answer} from './module.mjs'; import {readFileSync, writeFileSync} from 'node:fs';"
        "writeFileSync('out.json', JSON.stringify(JSON.parse(readFileSync('sums.json')).map(answer)));"
    )
    (tmp_path / "run.mjs").write_text(code, "utf-8")
    import subprocess

    subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True, timeout=60)
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [float(x) for x in found] == [math.fsum(values) for values in sums]


@pytest.mark.parametrize("task", ["text", "images"])
def test_at_the_last_step_its_gaps_are_the_librarys(task):
    record = small_record()
    runs = [r for r in runs_of(record) if r.task == task]
    exhibit = RegimeComparison(record, task=task)
    for (_, name), expected in differences(runs).items():
        assert exhibit.gap(name) == (expected.mean, expected.low, expected.high)
    exhibit.interval = "unpaired"
    ends = [[r.final for r in runs if r.regime == name] for name in ("fp32", "bf16_nearest")]
    assert exhibit.gap("bf16_nearest")[1:] == unpaired_interval(*ends)


def story() -> dict:
    """Two regimes, three seeds: losses 1, 2, 3 against 1.5, 2.5, 3.5, and 2 steps."""
    record = copy.deepcopy(small_record())
    record["regimes"], record["speed"] = record["regimes"][:2], None
    record["tasks"].pop("text")
    record["runs"] = [
        r | {"held_out": [9.0, 5.0, r["seed"] + 1 + (0.5 if r["regime"] != "fp32" else 0)]}
        for r in record["runs"]
        if r["task"] == "images" and r["regime"] in ("fp32", "fp16_unscaled") and r["seed"] < 3
    ]
    return record


def test_a_story_by_hand():
    exhibit = RegimeComparison(story())
    texts = exhibit.result()
    assert (texts["fp32-loss"], texts["fp32-gap"]) == ("2", "baseline")
    assert (texts["fp16_unscaled-loss"], texts["fp16_unscaled-gap"]) == ("2.5", "+500.000 [+500.000, +500.000]")
    assert (texts["fp32-bytes"], texts["fp32-speed"]) == ("10", "\u2014")
    assert texts["verdict"] == (
        "a model on images, step 100, 3 seeds, paired: of 1 picked, 1 can be told from FP32, 0 cannot. "
        "The widest gap: FP16, unscaled, +500.000 [+500.000, +500.000] thousandths."
    )
    assert "Speed was not measured." in texts["source"] and "2026-11-26" in texts["source"]
    exhibit.interval = "unpaired"  # the seeds spread by 1, and the pairs are forgotten
    half = 2.7764451051978  # the quantile of four degrees of freedom
    low, high = (1000 * (0.5 + sign * half * math.sqrt(2 / 3)) for sign in (-1, 1))
    assert exhibit.result()["fp16_unscaled-gap"] == f"+500.000 [{low:+.3f}, {high:+.3f}]"
    exhibit.baseline = "fp16_unscaled"
    assert exhibit.result()["fp32-gap"] == f"-500.000 [{-high:+.3f}, {-low:+.3f}]"
    exhibit.at = 1
    assert exhibit.result()["fp32-gap"] == "0.000 [0.000, 0.000]"
    exhibit.shown = ""
    assert exhibit.result()["verdict"] == "Pick at least one regime beside FP16, unscaled."


def test_lost_runs_are_told_and_not_compared():
    exhibit = RegimeComparison(small_record(), task="images")
    texts = exhibit.result()
    assert texts["mxfp8-loss"] == "lost in 2" and texts["mxfp8-gap"] == "\u2014" and texts["mxfp8-bytes"] == "0"
    assert "1 cannot be compared: a loss was lost." in texts["verdict"]
    exhibit.seeds = 2  # the first two seeds were not lost
    assert exhibit.gap("mxfp8") is not None and "lost" not in exhibit.result()["verdict"]


def test_emulated_speed_is_marked():
    texts = RegimeComparison(small_record()).result()
    assert texts["mxfp8-speed"].endswith("*") and not texts["bf16_nearest-speed"].endswith("*")
    assert texts["fp32-speed"] == "1" and "* emulated" in texts["source"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("task", "sound"), ("baseline", "fp99"), ("shown", "fp32,fp32"), ("shown", "fp32,"), ("shown", "nothing"),
     ("interval", "both"), ("seeds", 1), ("seeds", 5), ("at", -1), ("at", 3)],
)  # fmt: skip
def test_wrong_state_is_refused_and_changes_nothing(key, value):
    exhibit = RegimeComparison(small_record())
    before = getattr(exhibit, key)
    with pytest.raises(traitlets.TraitError):
        setattr(exhibit, key, value)
    assert getattr(exhibit, key) == before


def test_what_is_no_set_of_runs_is_refused():
    with pytest.raises(BrokenRecord, match="expected"):
        RegimeComparison({**small_record(), "kind": "measured"})
    with pytest.raises(TypeError, match="RegimeComparison has no colour"):
        RegimeComparison(small_record(), colour="red")
    record = copy.deepcopy(small_record())
    for run in record["runs"]:
        if run["task"] == "text":
            run |= {"steps": [0, 10], "held_out": run["held_out"][:2], "training": run["training"][:2]}
    with pytest.raises(ValueError, match="evaluated equally often"):
        RegimeComparison(record)
    record["runs"][0] |= {"steps": [0, 5, 10], "held_out": [1.0] * 3, "training": [1.0] * 3}
    with pytest.raises(ValueError, match="after the same steps"):
        RegimeComparison(record)


def test_every_regime_has_a_line_of_its_own():
    assert set(REGIME_STYLES) == {*REGIMES, *VARIANTS}
    assert len(set(REGIME_STYLES.values())) == len(REGIME_STYLES)


def test_regimes_are_picked_by_mouse_and_keyboard(pages):
    visit = pages([RegimeComparison(small_record(), shown="fp32,mxfp8", name="every")])
    page = visit.page
    box = page.locator("[data-regime=bf16_nearest]")
    assert not box.is_checked() and page.locator("[data-regime=fp32]").is_disabled()
    page.get_by_text("BF16 weights, nearest", exact=True).last.click()
    assert box.is_checked() and "of 2 picked" in said(visit)["verdict"]
    assert_page_is_python(KIND, visit)
    box.focus()
    page.keyboard.press("Space")
    assert not box.is_checked() and "of 1 picked" in said(visit)["verdict"]
    page.locator("[data-action=none]").press("Enter")
    assert said(visit)["verdict"] == "Pick at least one regime beside FP32."
    assert_page_is_python(KIND, visit)
    page.locator("[data-action=all]").press("Enter")
    assert "of 3 picked" in said(visit)["verdict"]
    page.get_by_label("Baseline", exact=True).select_option("mxfp8")
    assert page.locator("[data-regime=mxfp8]").is_disabled() and page.locator("[data-regime=fp32]").is_enabled()
    assert_page_is_python(KIND, visit)


@pytest.mark.parametrize("width", [1280, 720, 390])
def test_the_page_keeps_its_height_whatever_is_chosen(pages, width):
    visit = pages([RegimeComparison(small_record(), name="every")], width=width)
    height = "document.querySelector('.mpl-exhibit').getBoundingClientRect().height"
    heights = {visit.page.evaluate(height)}
    for key in ("seeds", "at"):
        for press in ("Home", "End"):
            visit.page.locator(f"input[name={key}]").press(press)
            heights.add(visit.page.evaluate(height))
    for label, value in (("Task", "images"), ("Interval", "unpaired"), ("Baseline", "mxfp8")):
        visit.page.get_by_label(label, exact=True).select_option(value)
        heights.add(visit.page.evaluate(height))
    visit.page.locator("[data-action=none]").click()
    heights.add(visit.page.evaluate(height))
    assert len(heights) == 1, heights
    assert not visit.page.evaluate("document.documentElement.scrollWidth > innerWidth")
