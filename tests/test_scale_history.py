"""The scale history: its JavaScript against ``simulate_scaling``, stories by hand, jumps by mouse and keyboard."""

import json
import math
import random

import pytest
import traitlets
from conftest import run_node
from widget_page import assert_page_is_python, said

from mixprec_lab.exhibits import ScaleHistory
from mixprec_lab.exhibits.scale_history import ALGORITHMS, HISTORIES, INFINITE, RECIPES, SHAPES, STEPS
from mixprec_lab.fp8 import CurrentScaling, FixedScaling, simulate_scaling

KIND = "scale-history"
KEYS = (
    *("recipe", "history", "algorithm", "margin", "format", "shape", "steps"),
    *("level", "drift", "noise", "seed", "jumps", "step", "height", "length"),
)
EDGES = [
    {"jumps": "", "level": -20, "drift": -16, "noise": 8, "recipe": "fixed"},
    {"jumps": "", "level": 8, "drift": 16, "noise": 8, "margin": -2},
    {"jumps": "0:21:256", "step": 255},  # no step without an infinity
    {"jumps": "0:21:1,1:20:1,2:-20:1", "history": "1024", "step": 3},
    {"jumps": "10:21:1,20:21:5", "history": "4", "step": 14, "algorithm": "most_recent"},
    {"jumps": "10:21:1", "recipe": "current", "step": 10},
    {"jumps": ",".join(f"{i}:20:200" for i in range(12)), "step": 11},  # held at 2^60
    {"jumps": ",".join(f"{i}:-20:200" for i in range(12)), "margin": 6, "step": 11},  # held at 2^-60
    # x * scale rounds in float32 onto a tie, or stands on the edge of overflow: without that rounding others clip.
    {"jumps": "", "level": 0, "shape": "normal", "drift": -15, "history": "4"},
    {"jumps": "", "level": 0, "shape": "normal", "drift": 12, "steps": "256", "algorithm": "most_recent"},
    {"jumps": "", "level": 0, "shape": "normal", "drift": -12, "algorithm": "most_recent", "format": "fp8_e5m2"},
    {"jumps": "", "level": 0, "drift": 16, "history": "4", "format": "fp8_e5m2"},
    {"jumps": "63:1:1,64:2:1,127:3:1,128:4:1,255:5:1", "steps": "64", "step": 200},
]


def states(number: int) -> list[dict]:
    """Random states and those at the edges, complete."""
    draw, shown = random.Random(0), ScaleHistory()
    start = {key: getattr(shown, key) for key in KEYS}

    def jumps(steps: int) -> str:
        at = sorted(draw.sample(range(steps), draw.randint(0, 12)))
        heights = [-20, -7, -1, 0, 1, 3, 12, 20, INFINITE]
        return ",".join(f"{t}:{draw.choice(heights)}:{draw.choice([1, 2, 9, 80, 256])}" for t in at)

    drawn = []
    for _ in range(number):
        steps = draw.choice(STEPS)
        drawn.append(
            start
            | {"recipe": draw.choice([*RECIPES, "delayed"]), "history": draw.choice(HISTORIES), "steps": steps}
            | {"algorithm": draw.choice(ALGORITHMS), "margin": draw.randint(-2, 6), "shape": draw.choice([*SHAPES])}
            | {"format": draw.choice(["fp8_e4m3", "fp8_e5m2"]), "level": draw.randint(-20, 8)}
            | {"drift": draw.randint(-16, 16), "noise": draw.randint(0, 8), "seed": draw.randint(0, 20)}
            | {"jumps": jumps(int(steps)), "step": draw.randrange(int(steps))}
        )
    return drawn + [start | edge for edge in EDGES]


def doubles(values: list[str]) -> list[float]:
    return [float(v.replace("Infinity", "inf")) for v in values]


def test_javascript_computes_the_stream_the_scales_the_shares_and_the_texts_of_python(tmp_path):
    shown, wanted = ScaleHistory(), states(60)
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    traits = {"data": shown.data, "formats": shown.formats}
    run_node("states.mjs", tmp_path, {"kind": KIND, "traits": traits, "states": wanted})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    frozen = 0
    for state, answer in zip(wanted, answers, strict=True):
        shown = ScaleHistory(**state)
        texts, run = shown.result(), simulate_scaling(shown.rule(), shown.stream(), shape=SHAPES[state["shape"]])
        assert answer["texts"] == texts, state
        for key in ("amax", "scale", "clipped", "flushed"):
            assert doubles(answer[key]) == getattr(run, key), (key, state)
        assert doubles(answer["sqnr"]) == pytest.approx(run.sqnr_db, abs=1e-9, nan_ok=True)
        frozen += "kept because" in texts["now-origin"]
    assert frozen > 5  # the states reach the trap


@pytest.mark.parametrize("fp8_format", ["e4m3", "e5m2"])
def test_current_scaling_never_clips(fp8_format):
    draw = random.Random(0)  # largest / amax rounds, and so does amax * scale: not always to the largest or below
    run = simulate_scaling(CurrentScaling(fp8_format), [2.0 ** draw.uniform(-20, 20) for _ in range(300)])
    assert set(run.clipped) == {0.0}


@pytest.mark.parametrize(("fp8_format", "edge", "on_it"), [("e4m3", 464.0, False), ("e5m2", 61440.0, True)])
def test_a_value_is_clipped_where_rounding_would_leave_the_format(fp8_format, edge, on_it):
    below, above = edge * (1 - 2.0**-20), edge * (1 + 2.0**-20)
    run = simulate_scaling(FixedScaling(fp8_format), [below, edge, above])
    assert [share > 0 for share in run.clipped] == [False, on_it, True]


def test_the_format_and_the_recipe_are_those_of_the_library():
    shown = ScaleHistory(recipe="delayed", history="64", algorithm="most_recent", margin=3, format="fp8_e5m2")
    rule = shown.rule()
    assert (rule.margin, rule.amax_history_len, rule.amax_compute_algo) == (3, 64, "most_recent")
    assert rule.quantizer("input").format.name == "fp8_e5m2"
    for recipe, kind in (("current", CurrentScaling), ("fixed", FixedScaling)):
        assert isinstance(ScaleHistory(recipe=recipe).rule(), kind)


def test_on_a_quiet_stream_the_scale_is_right_from_the_second_step_on():
    shown = ScaleHistory("", level=-3)
    run = shown.run()
    assert run.amax == [0.125] * 128 and run.scale == [1.0] + [448 * 8.0] * 127
    assert set(run.clipped) == {0.0} and len(set(run.sqnr_db[1:])) == 1
    shown.step = 0
    words = shown.result()  # 2^-3 of 448, which is 1.75 x 2^8: log2(448) + 3 = 11.8 binades too low
    assert words["at"].startswith("Step 0: the amax is 11.8 binades below ") and words["now-limit"] == "448"
    assert words["now-origin"] == "1, where it starts" and words["clipped"] == "0 %"
    shown.step = 1
    assert shown.result()["at"] == "Step 1: the amax is the largest value that fits."
    shown.margin = 2
    assert shown.result()["at"].startswith("Step 1: the amax is 2.0 binades below ")


@pytest.mark.parametrize(
    ("level", "amax", "limit", "scale"),
    [(0, "1", "1", "448"), (-8, "2^-8", "2^-8", "1.75 x 2^16"), (-20, "2^-20", "2^-20", "1.75 x 2^28")],
)
def test_sizes_are_written_as_one_reads_them(level, amax, limit, scale):
    words = ScaleHistory("", level=level, step=9).result()
    assert (words["now-amax"], words["now-limit"], words["now-scale"]) == (amax, limit, scale)


@pytest.mark.parametrize(("history", "stuck"), [("1", 1), ("4", 4), ("16", 16), ("1024", 67)])
def test_after_a_jump_of_one_step_the_scale_is_stuck_for_the_length_of_the_history(history, stuck):
    run = ScaleHistory("60:6:1", level=0, history=history).run()
    assert [t for t in range(128) if run.clipped[t]] == [60]
    assert [t for t in range(128) if run.scale[t] == 448 / 64] == list(range(61, 61 + stuck))
    assert set(run.scale) == {1.0, 448.0, 448 / 64}


def test_most_recent_follows_at_once_and_clips_the_step_after_a_drop():
    run = ScaleHistory("60:-6:1", level=0, algorithm="most_recent").run()
    assert [t for t in range(128) if run.clipped[t]] == [61]  # the drop itself was one step of a scale too low
    assert run.scale[60:63] == [448.0, 448.0 * 64, 448.0]
    assert not any(ScaleHistory("60:-6:1", level=0, algorithm="max").run().clipped)


@pytest.mark.parametrize(
    ("history", "algorithm", "frozen"), [("16", "max", 16), ("64", "max", 64), ("64", "most_recent", 1)]
)
def test_one_infinity_freezes_the_scale_while_it_is_in_the_history(history, algorithm, frozen):
    # The scale should fall at step 41, from 448 to 448 / 2^5, because the amax jumps at 40 and stays there.
    shown = ScaleHistory("39:21:1,40:5:88", level=0, history=history, algorithm=algorithm, step=41)
    run = shown.run()
    assert run.scale[1:40] == [448.0] * 39
    assert [t for t in range(40, 128) if run.scale[t] == 448.0] == list(range(40, 40 + frozen))
    assert set(run.scale[40 + frozen :]) == {448 / 32}
    assert [t for t in range(128) if run.clipped[t]] == [39, *range(40, 40 + frozen)]
    assert math.isnan(run.sqnr_db[39]) and "without 1 step with an infinity" in shown.result()["verdict"]
    kept = "amax of step 38, kept because of the infinity at step 39"
    assert shown.result()["now-origin"] == (kept if frozen > 1 else "amax of step 40")


def test_an_infinity_costs_current_scaling_one_step_at_scale_1():
    shown = ScaleHistory("39:21:1", level=-18, recipe="current", shape="normal", step=39)
    run = shown.run()
    assert run.scale[38:41] == [448 * 2.0**18, 1.0, 448 * 2.0**18]
    assert run.flushed[39] == (128 - sum(SHAPES["normal"].abs() == 1)) / 128  # all but the infinities themselves
    assert shown.result()["now-origin"] == "none: 1 for an infinite amax"


@pytest.mark.parametrize("height", [-20, 0, 1, 20, INFINITE])
def test_a_jump_lasts_its_length_and_multiplies_by_its_height(height):
    plain, jumped = (ScaleHistory(jumps).stream() for jumps in ("", [(50, height, 7)]))
    for t, (a, b) in enumerate(zip(plain, jumped, strict=True)):
        factor = (math.inf if height == INFINITE else 2.0**height) if 50 <= t < 57 else 1.0
        assert b == a * factor


def test_overlapping_jumps_add_up_and_stay_within_two_to_the_sixty():
    assert ScaleHistory([(5, 3, 9), (6, -5, 1)], level=0).stream()[4:8] == [1.0, 8.0, 0.25, 8.0]
    tall, deep = ([(i, sign * 20, 200) for i in range(12)] for sign in (1, -1))
    assert max(ScaleHistory(tall).stream()) == 2.0**60 and min(ScaleHistory(deep).stream()) == 2.0**-60


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("jumps", "1:2"), ("jumps", "5:1:1,5:2:1"), ("jumps", "9:1:1,5:1:1"), ("jumps", "256:1:1"),
        ("jumps", "1:22:1"), ("jumps", "1:-21:1"), ("jumps", "1:-0:1"), ("jumps", "1:1:257"), ("jumps", "1:1:0"),
        ("jumps", "1:1:1,"), ("jumps", ",".join(f"{i}:1:1" for i in range(13))), ("steps", "65"), ("history", "2"),
        ("algorithm", "median"), ("recipe", "block"), ("format", "fp16"), ("shape", "uniform"), ("margin", 7),
        ("margin", -3), ("level", 9), ("drift", 17), ("noise", 9), ("seed", 21), ("step", 256), ("height", 22),
        ("height", -21), ("length", 0), ("length", 257),
    ],
)  # fmt: skip
def test_a_state_out_of_range_is_refused_and_changes_nothing(key, value):
    shown = ScaleHistory()
    before = getattr(shown, key)
    with pytest.raises(traitlets.TraitError):
        setattr(shown, key, value)
    assert getattr(shown, key) == before


def test_a_refusal_says_what_jumps_may_be():
    with pytest.raises(traitlets.TraitError, match=r"at most 12 .*height -20 to 20, or 21 for inf.* got '1:99:1'"):
        ScaleHistory("1:99:1")


def test_jumps_are_placed_and_removed_by_keyboard(pages):
    visit = pages([ScaleHistory("", name="scales")])
    page = visit.page
    step, place, take, clear = (
        page.get_by_label("Step", exact=True),
        *(page.locator(f"[data-action={name}]") for name in ("place", "remove", "clear")),
    )
    assert said(visit)["jumps"] == "No jump yet." and take.is_disabled() and clear.is_disabled()
    page.get_by_label("Height of a jump").press("End")
    page.get_by_label("Length, steps").press("ArrowRight")
    step.press("Home")
    place.press("Enter")
    assert said(visit)["jumps"] == "Jumps: step 0 (x inf, 2 steps)."
    assert_page_is_python(KIND, visit)
    step.press("ArrowRight")
    assert take.is_enabled()  # the second step of the same jump
    step.press("End")
    assert take.is_disabled()
    page.get_by_label("Height of a jump").press("Home")
    place.press("Space")
    assert said(visit)["jumps"] == "Jumps: step 0 (x inf, 2 steps), step 127 (x 2^-20, 2 steps)."
    assert_page_is_python(KIND, visit)
    take.press("Enter")
    assert said(visit)["jumps"] == "Jumps: step 0 (x inf, 2 steps)."
    clear.press("Enter")
    assert said(visit)["jumps"] == "No jump yet." and clear.is_disabled()
    assert_page_is_python(KIND, visit)


@pytest.mark.parametrize("width", [1280, 390])
def test_jumps_are_placed_and_removed_by_a_click_on_the_drawing(pages, width):
    visit = pages([ScaleHistory("", name="scales")], width=width)
    drawing = visit.page.locator("svg.mpl-place")
    drawing.scroll_into_view_if_needed()
    across = drawing.bounding_box()["width"] - 76
    for share in (0.25, 0.75):
        drawing.click(position={"x": 66 + share * across + 0.5, "y": 120})
    steps = [int(part.split()[0]) for part in said(visit)["jumps"].split("step ")[1:]]
    assert len(steps) == 2 and steps == pytest.approx([32, 96], abs=1)
    assert_page_is_python(KIND, visit)
    drawing.click(position={"x": 66 + 0.25 * across + 1, "y": 60})
    assert said(visit)["jumps"] == f"Jumps: step {steps[1]} (x 2^8, 1 step)."
    drawing.click(position={"x": 20, "y": 60})  # on the axis: nothing
    assert said(visit)["jumps"] == f"Jumps: step {steps[1]} (x 2^8, 1 step)."
    assert_page_is_python(KIND, visit)


def test_no_more_jumps_than_fit(pages):
    visit = pages([ScaleHistory([(10 * i, 3, 1) for i in range(12)], step=0, name="scales")])
    place = visit.page.locator("[data-action=place]")
    assert said(visit)["jumps"].endswith("No more fit.") and place.is_enabled()  # the jump here may change its height
    visit.page.get_by_label("Step", exact=True).press("End")
    assert place.is_disabled()


def test_a_shorter_run_brings_the_step_back_inside(pages):
    visit = pages([ScaleHistory(steps="256", step=200, name="scales")])
    visit.page.get_by_label("Steps", exact=True).select_option("64")
    assert visit.page.get_by_label("Step", exact=True).input_value() == "63"
    assert said(visit)["at"].startswith("Step 63: ")
    assert_page_is_python(KIND, visit)


def test_the_drawing_shows_clipping_as_the_amax_above_the_line(pages):
    visit = pages([ScaleHistory(name="scales")])
    lines = visit.page.locator("svg.mpl-place > path")
    assert lines.count() == 3  # the limit, the amax, the SQNR
    assert len({lines.nth(i).get_attribute("stroke-dasharray") for i in (0, 1)}) == 2  # not by colour alone
    run = ScaleHistory().run()
    bars = visit.page.locator("svg.mpl-place > rect[fill='var(--mpl-over)']:not([fill-opacity])")
    assert bars.count() == sum(share > 0 for share in run.clipped) == 2
    heights = [float(bars.nth(i).get_attribute("height")) for i in range(2)]
    assert heights == [pytest.approx(32 * share, abs=0.06) for share in run.clipped if share]


def test_an_infinite_step_leaves_a_gap_in_the_lines_and_is_named(pages):
    visit = pages([ScaleHistory("60:21:4", name="scales")])
    lines = visit.page.locator("svg.mpl-place > path")
    assert [lines.nth(i).get_attribute("d").count("M") for i in range(3)] == [1, 2, 2]
    assert visit.page.locator("svg.mpl-place > text", has_text="inf").count() == 1
