"""The scaler simulator: its JavaScript against ``simulate_scaler``, stories by hand, spikes by mouse and keyboard."""

import json
import math
import random

import pytest
import torch
import traitlets
from conftest import run_node
from widget_page import assert_page_is_python, said

from mixprec_lab.exhibits import ScalerSimulator
from mixprec_lab.exhibits.scaler_simulator import BATCH_SIZES, INFINITE, OVERRIDES, PRESET, STEPS, TITLES
from mixprec_lab.loss_scaling import simulate_scaler

KIND = "scaler-simulator"
EDGES = [
    {"drift": 24, "noise": 4, "init_scale": "1", "window": "10", "backoff_factor": "0.25"},
    {"drift": -24, "noise": 0, "init_scale": "2^32", "min_scale": "none", "window": "10"},
    {"drift": 24, "noise": 0, "min_scale": "1", "hysteresis": "1", "spikes": "0:40:50", "backoff_factor": "0.25"},
    {"spikes": "0:41:1,599:41:50", "noise": 0, "init_scale": "2^4"},
    {"spikes": "599:40:1", "step": 5999, "steps": "2000"},
    {"spikes": "5999:1:1", "step": 5999, "steps": "6000", "window": "2000"},
    {"spikes": "", "noise": 0, "drift": 0, "min_scale": "none", "backoff_factor": "0.8"},
]


def states(number: int) -> list[dict]:
    """Random states and those at the edges, complete."""
    draw, shown = random.Random(0), ScalerSimulator()
    keys = ("steps", "seed", "drift", "noise", "spikes", *OVERRIDES, "batch_size", "step", "height", "length")
    start = {key: getattr(shown, key) for key in keys}

    def spikes(steps: int) -> str:
        at = sorted(draw.sample(range(steps), draw.randint(0, 24)))
        return ",".join(f"{t}:{draw.choice([1, 8, 20, 40, INFINITE])}:{draw.choice([1, 2, 7, 50])}" for t in at)

    drawn = []
    for _ in range(number):
        steps = draw.choice(STEPS[:2])
        drawn.append(
            start
            | {"steps": steps, "seed": draw.randint(0, 20), "drift": draw.randint(-24, 24), "noise": draw.randint(0, 4)}
            | {"spikes": spikes(int(steps)), "batch_size": draw.choice(BATCH_SIZES), "step": draw.randrange(int(steps))}
            | {key: draw.choice([PRESET, *texts]) for key, texts in OVERRIDES.items()}
        )
    return drawn + [start | edge for edge in EDGES]


def doubles(values: list) -> list[float]:
    """JSON has no infinity, and writes a whole double as an integer, to the digits that it needs."""
    return [float(v) for v in values]


def test_javascript_makes_the_stream_the_scales_and_the_texts_of_python_to_the_last_bit(tmp_path):
    shown, wanted = ScalerSimulator(), states(60)
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    run_node("states.mjs", tmp_path, {"kind": KIND, "traits": {"rules": shown.rules}, "states": wanted})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    ended = 0
    for state, answer in zip(wanted, answers, strict=True):
        shown = ScalerSimulator(**state)
        assert answer["texts"] == shown.result(), state
        stream = shown.stream()
        assert doubles(answer["stream"]) == stream, state
        for run, name in zip(answer["runs"], TITLES, strict=True):
            expected = simulate_scaler(shown.rule(name), stream, "fp16", int(state["batch_size"]))
            assert doubles(run["before"]) == list(expected.scale_before)
            assert doubles(run["after"]) == list(expected.scale_after)
            assert run["left"] == list(expected.hysteresis_left)
            assert run["overflow"] == list(map(int, expected.overflow))
            assert run["endedAt"] == expected.ended_at
            ended += expected.ended_at is not None
    assert ended > 5  # the states reach "already at minimum"


def test_torchs_own_rule_gives_the_same_scales():
    shown = ScalerSimulator(noise=2, drift=6, seed=3, spikes="100:12:3,101:41:1,300:20:5")
    scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    before, skipped = [], 0
    for amax in shown.stream():
        before.append(float(scale))
        overflow = torch.tensor(amax * float(scale), dtype=torch.float64).half().isinf().float()
        skipped += int(overflow)
        torch._amp_update_scale_(scale, tracker, overflow, 2.0, 0.5, 50)
    run = shown.runs()["torch"]
    assert list(run.scale_before) == before and run.skipped == skipped > 8
    assert shown.result()["torch-skipped"].startswith(f"{skipped} (")


def test_a_quiet_stream_grows_every_window_and_is_skipped_when_it_is_too_large():
    # 2^-2 times 2^17 is 2^15, the top binade of FP16; times 2^18 it is 2^16 > 65504.
    shown = ScalerSimulator("", noise=0, window="100")
    assert set(shown.stream()) == {0.25}
    words = shown.result()
    # torch: 2^16, 2^17 from step 100, 2^18 from step 200 overflows at once, so again after every 100 clean steps
    assert words["torch-skipped"] == "4 (0.67 %)" and words["torch-last"] == "2^17"
    assert [t for t, over in enumerate(shown.runs()["torch"].overflow) if over] == [200, 301, 402, 503]
    shown.step = 200
    assert shown.result()["torch-now"] == "2^18: skipped, falls to 2^17"
    shown.step = 99
    assert shown.result()["torch-now"] == "2^16: taken, grows to 2^17"
    # Megatron begins at 2^32 with hysteresis 2: one step of patience, then one step down each, from 2^32 to 2^17
    first = shown.runs()["megatron"]
    assert list(first.scale_before[:4]) == [2.0**32, 2.0**32, 2.0**31, 2.0**30]


@pytest.mark.parametrize("height", [1, 40, INFINITE])
def test_a_spike_lasts_its_length_and_multiplies_by_its_height(height):
    plain_, spiked = (ScalerSimulator(spikes).stream() for spikes in ("", [(50, height, 7)]))
    for t, (a, b) in enumerate(zip(plain_, spiked, strict=True)):
        factor = (math.inf if height == INFINITE else 2.0**height) if 50 <= t < 57 else 1.0
        assert b == a * factor


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spikes", "1:2"), ("spikes", "5:1:1,5:2:1"), ("spikes", "9:1:1,5:1:1"), ("spikes", "6000:1:1"),
        ("spikes", "1:0:1"), ("spikes", "1:42:1"), ("spikes", "1:1:51"), ("spikes", "1:1:0"), ("spikes", "1:1:1,"),
        ("spikes", ",".join(f"{i}:1:1" for i in range(25))), ("steps", "601"), ("batch_size", "65"),
        ("window", "0"), ("init_scale", "2^5"), ("backoff_factor", "1"), ("hysteresis", "0"), ("min_scale", "2"),
        ("drift", 25), ("noise", 5), ("seed", 21), ("step", 6000), ("height", 42), ("length", 0),
    ],
)  # fmt: skip
def test_a_state_out_of_range_is_refused_and_changes_nothing(key, value):
    shown = ScalerSimulator()
    before = getattr(shown, key)
    with pytest.raises(traitlets.TraitError):
        setattr(shown, key, value)
    assert getattr(shown, key) == before


def test_spikes_are_placed_and_removed_by_keyboard(pages):
    visit = pages([ScalerSimulator("", name="sim")])
    page = visit.page
    step, place, take, clear = (
        page.get_by_label("Step", exact=True),
        *(page.locator(f"[data-action={name}]") for name in ("place", "remove", "clear")),
    )
    assert said(visit)["spikes"] == "No spike yet." and take.is_disabled() and clear.is_disabled()
    page.get_by_label("Height of a spike").press("End")
    page.get_by_label("Length, steps").press("ArrowRight")
    step.press("Home")
    place.press("Enter")
    assert said(visit)["spikes"] == "Spikes: step 0 (x inf, 2 steps)."
    assert_page_is_python(KIND, visit)
    step.press("ArrowRight")
    assert take.is_enabled()  # the second step of the same spike
    step.press("End")
    assert take.is_disabled()
    place.press("Space")
    assert said(visit)["spikes"] == "Spikes: step 0 (x inf, 2 steps), step 599 (x inf, 2 steps)."
    assert_page_is_python(KIND, visit)
    take.press("Enter")
    assert said(visit)["spikes"] == "Spikes: step 0 (x inf, 2 steps)."
    clear.press("Enter")
    assert said(visit)["spikes"] == "No spike yet." and clear.is_disabled()
    assert_page_is_python(KIND, visit)


@pytest.mark.parametrize("width", [1280, 390])
def test_spikes_are_placed_and_removed_by_a_click_on_the_stream(pages, width):
    visit = pages([ScalerSimulator("", name="sim")], width=width)
    drawing = visit.page.locator("svg.mpl-place")
    drawing.scroll_into_view_if_needed()
    across = drawing.bounding_box()["width"] - 90
    for share in (0.25, 0.75):
        drawing.click(position={"x": 80 + share * across + 0.5, "y": 120})
    steps = [int(part.split()[0]) for part in said(visit)["spikes"].split("step ")[1:]]
    assert len(steps) == 2 and steps == pytest.approx([150, 450], abs=2)
    assert_page_is_python(KIND, visit)
    drawing.click(position={"x": 80 + 0.25 * across + 1, "y": 60})
    assert said(visit)["spikes"] == f"Spikes: step {steps[1]} (x 2^8, 1 step)."
    drawing.click(position={"x": 20, "y": 60})  # on the axis: nothing
    assert said(visit)["spikes"] == f"Spikes: step {steps[1]} (x 2^8, 1 step)."
    assert_page_is_python(KIND, visit)


def test_no_more_spikes_than_fit(pages):
    full = [(20 * i, 3, 1) for i in range(24)]
    visit = pages([ScalerSimulator(full, step=0, name="sim")])
    place = visit.page.locator("[data-action=place]")
    assert said(visit)["spikes"].endswith("No more fit.") and place.is_enabled()  # the spike here may change its height
    visit.page.get_by_label("Step", exact=True).press("End")
    assert place.is_disabled()


def test_a_shorter_run_brings_the_step_back_inside(pages):
    visit = pages([ScalerSimulator(steps="2000", step=1500, name="sim")])
    visit.page.get_by_label("Steps", exact=True).select_option("600")
    assert visit.page.get_by_label("Step", exact=True).input_value() == "599"
    assert said(visit)["at"].startswith("At step 599 ")
    assert_page_is_python(KIND, visit)


def test_the_rules_are_told_apart_by_dashes_as_well_as_by_colour(pages):
    visit = pages([ScalerSimulator(name="sim")])
    lines = visit.page.locator("svg.mpl-place > path[stroke-width='2.5']")
    dashes = [lines.nth(i).get_attribute("stroke-dasharray") for i in range(lines.count())]
    assert len(dashes) == 3 == len(set(dashes))
