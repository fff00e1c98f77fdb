"""The clinic: JavaScript says what Python says, scores by hand, a reveal that is the monitor's report, by keyboard."""

import json
import math
import random
from dataclasses import replace

import pytest
import traitlets
from conftest import run_node
from widget_page import assert_page_is_python, said

from mixprec_lab.exhibits import Clinic
from mixprec_lab.exhibits.clinic import WARD
from mixprec_lab.nan_debugging.drawn import DRAWN, SPIKE_STEP, draw
from mixprec_lab.nan_debugging.faults import FAULTS
from mixprec_lab.nan_debugging.records import EXAMINATIONS, FAMILIES, MARKS, PLACES, record

KIND = "clinic"
SMALL = ("nan_in_input", "scaler_calibration", "clip_before_unscale")
REVEALED = ("answer", "report", "cure", "twin", "way")


def states(number: int) -> list[dict]:
    """Random states, and every patient before and after an empty diagnosis."""
    dice, drawn = random.Random(0), []
    for _ in range(number):
        ordered = dice.sample(list(EXAMINATIONS), dice.randint(0, len(EXAMINATIONS)))
        drawn.append(
            {
                "patient": dice.choice([*map(str, range(1, len(WARD) + 1)), *["own"] * 8]),
                "step": dice.randint(0, 60),
                "ordered": ",".join(ordered),
                "diagnosis": dice.choice(["?", *FAMILIES]),
                "place": dice.choice(["?", *PLACES]),
                "phase": dice.choice(["open", "revealed"]),
            }
            | {key: dice.choice(list(options)) for key, options in DRAWN.items()}
        )
    plain = {"step": 255, "ordered": "", "diagnosis": "?", "place": "?"}
    every = [str(i + 1) for i in range(len(WARD))]
    plain |= {key: next(iter(options)) for key, options in DRAWN.items()}
    return drawn + [plain | {"patient": p, "phase": phase} for p in every for phase in ("open", "revealed")]


def test_javascript_says_what_python_says(tmp_path):
    shown, wanted = Clinic(), states(200)
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    traits = {"ward": shown.ward, "drawn": shown.drawn, "choices": shown.choices}
    run_node("states.mjs", tmp_path, {"kind": KIND, "traits": traits, "states": wanted})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    for state, words in zip(wanted, answers, strict=True):
        assert words == Clinic(**state).result(), state


@pytest.mark.parametrize("number", range(1, len(WARD) + 1))
def test_the_reveal_is_the_truth_of_the_record_and_the_monitors_report(number):
    shown, name = Clinic(patient=str(number), phase="revealed"), WARD[number - 1]
    words, known = shown.result(), record(name)
    assert shown.record is known and words["report"] == known.results["cheap"].text
    for key in EXAMINATIONS:
        assert words[f"exam-{key}"] == f"It {MARKS[known.results[key].mark]}.\n{known.results[key].text}"
    if name in FAULTS:
        fault = FAULTS[name]
        assert words["answer"].startswith(fault.title) and f"class is {fault.fault_class};" in words["answer"]
        assert f"step {fault.step}, {PLACES[fault.phase]}." in words["answer"] and words["cure"] == f"{fault.cure}."
        assert f"to {record(name, repaired=True).loss[-1]:g}. The monitor finds nothing to call a fault." in (
            words["twin"].replace("e-7", "e-07")
        )
    else:
        assert words["answer"].startswith("Nothing is wrong.") and "leave the run alone" in words["cure"]


def test_nothing_is_told_before_it_is_ordered_and_nothing_revealed_before_a_diagnosis():
    for number in range(1, len(WARD) + 1):
        words = Clinic(patient=str(number), ordered="loss").result()
        assert {key for key in EXAMINATIONS if words[f"exam-{key}"]} == {"loss"}
        assert {words[key] for key in REVEALED} == {"Not revealed yet."}


@pytest.mark.parametrize(
    ("diagnosis", "place", "ordered", "score"),
    [
        ("data", "data", "", 100),
        ("data", "data", "loss,outputs", 100 - 2 - 8),
        ("data", "forward", "cheap", 60 - 15),
        ("overflow", "data", "settings,gradients", 40 - 3 - 5),
        ("none", "none", "", 0),
        ("overflow", "data", "deep,cheap", 0),  # 40 - 40
        ("overflow", "forward", "loss", 0),  # not -2
        ("?", "?", "", 0),
        ("data", "data", ",".join(EXAMINATIONS), 30),
    ],
)
def test_scores_by_hand(diagnosis, place, ordered, score):
    shown = Clinic(SMALL, diagnosis=diagnosis, place=place, ordered=ordered, phase="revealed")
    assert shown.score() == score and shown.result()["verdict"].endswith(f"Score: {score} of 100.")


def test_a_healthy_patient_is_right_to_be_sent_home():
    shown = Clinic(SMALL, patient="2", diagnosis="none", place="none", ordered="cheap", phase="revealed")
    assert shown.result()["verdict"] == (
        "The diagnosis is right, the place is right; 15 points went into examinations. Score: 85 of 100."
    )


def test_the_way_of_a_specialist_by_hand():
    # The norm of attention's gradients points at it (5 points), the list of dtypes (3) says FP16.
    assert Clinic(("attention_logits_fp16",), phase="revealed").result()["way"] == (
        "First list of dtypes and settings; then isfinite of every gradient, by name: 8 points, so a score of 92. "
        "Whoever reads it off the curves keeps all 100."
    )
    assert Clinic(("nan_in_input",), phase="revealed").result()["way"].startswith("Just our monitor, cheap: 15 points")
    unseen = Clinic(("accumulation_not_divided",), phase="revealed").result()["way"]
    assert unseen.startswith(("None of these examinations tells it", "Just our monitor"))


def test_what_is_spent_is_said_with_the_last_order():
    assert Clinic(SMALL, ordered="deep,loss").result()["verdict"] == (
        "Ordered: isfinite of the loss. 27 points are spent; the best that is left is 73."
    )
    assert Clinic(SMALL).result()["verdict"].startswith("Nothing is ordered yet.")


def test_values_at_a_step_are_those_of_the_record_and_end_with_it():
    shown = Clinic(("where_trap_under_scaler",), step=3)
    words = shown.result()
    assert (words["now-loss"], words["now-scale"], words["now-gradient_norm"]) == ("0.402", "2^7", "nan")
    shown.step = 255
    assert shown.result()["now-scale"] == "2^-1"
    assert Clinic(("nan_in_input",)).result()["now-scale"] == "none"


def test_a_fault_of_ones_own_is_a_patient():
    own = replace(FAULTS["nan_in_input"], name="mine", title="A NaN of my own")
    assert Clinic([own], phase="revealed").result()["answer"].startswith("A NaN of my own.")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patient", "4"), ("patient", "0"), ("patient", ""), ("step", -1), ("step", 256), ("ordered", "loss,loss"),
        ("ordered", "xray"), ("ordered", "loss,"), ("rate", "1"), ("precision", "fp8"), ("scaler", "yes"),
        ("spike", ""), ("diagnosis", "flu"), ("place", "left"), ("phase", "over"),
    ],
)  # fmt: skip
def test_a_state_out_of_range_is_refused_and_changes_nothing(key, value):
    shown = Clinic(SMALL)
    before = getattr(shown, key)
    with pytest.raises(traitlets.TraitError):
        setattr(shown, key, value)
    assert getattr(shown, key) == before


def test_wards_without_patients_and_with_unknown_ones_are_refused():
    with pytest.raises(ValueError, match="expected 1 to 64 patients, got 0"):
        Clinic([])
    with pytest.raises(ValueError, match="got 65"):
        Clinic(["mlp"] * 65)
    with pytest.raises(KeyError, match="got 'flu'"):
        Clinic(["flu"])


def test_the_name_of_the_links_does_not_depend_on_what_was_recorded():
    assert Clinic(SMALL).name == Clinic(SMALL[:1]).name != Clinic(SMALL, patient="2").name


def test_a_scaler_survives_the_spike_that_kills_an_fp16_run_without_one():
    with_one, without = (draw("0.1", "fp16", scaler, "on") for scaler in ("on", "off"))
    assert [i for i, loss in enumerate(with_one.loss) if not math.isfinite(loss)] == [SPIKE_STEP]
    assert not any(with_one.bad_parameters) and with_one.loss[-1] < with_one.loss[0]
    assert [math.isfinite(loss) for loss in without.loss] == [True] * SPIKE_STEP + [False] * (12 - SPIKE_STEP)
    assert without.bad_parameters[SPIKE_STEP:] == (676,) * (12 - SPIKE_STEP)


def test_without_a_spike_a_gentle_rate_trains_in_fp32_and_is_lost_in_bf16_weights():
    kinds = {key: draw("0.001", key, "off", "off").results["cheap"].text for key in DRAWN["precision"]}
    assert kinds["fp32"] == kinds["fp16"] == "no findings" and "update_swamping" in kinds["bf16"]
    assert draw("0.1", "bf16", "off", "off").results["cheap"].text == "no findings"
    assert "exploding_lr" in draw("100", "fp32", "off", "off").results["cheap"].text


def test_a_drawn_patient_is_not_scored_and_its_examinations_are_not_judged():
    shown = Clinic(SMALL, patient="own", scaler="off", ordered="loss", diagnosis="none", place="none", phase="revealed")
    words = shown.result()
    assert words["verdict"] == "You drew this one, so nothing is scored. The monitor's report stands below."
    assert words["exam-loss"].startswith("Step 6: the loss is nan.")
    assert words["report"] == draw("0.1", "fp16", "off", "on").results["cheap"].text
    assert words["answer"] == (
        "SGD with learning rate 0.1, FP16 autocast, no scaler, at step 6 a batch 100,000 times too large."
    )
    assert words["way"] == "Nothing is scored." and shown.score() == 0
    assert (
        Clinic(SMALL, patient="own", rate="0.1", spike="off", phase="revealed").result()["cure"].startswith("None is")
    )


def test_choices_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match=r"expected rate to be one of 0.001, 0.1, 100, got '1'"):
        draw("1", "fp16", "on", "on")
    with pytest.raises(traitlets.TraitError, match="expected patient to be one of 1, 2, 3, got 'own'"):
        Clinic(SMALL, own=False, patient="own")


def order(visit, key: str):
    return visit.page.locator(f"[data-action=order-{key}]")


def test_a_patient_is_examined_diagnosed_and_tried_again_by_keyboard(pages):
    visit = pages([Clinic(SMALL, name="ward")])
    page, act = visit.page, visit.page.locator("[data-action=diagnose]")
    assert act.is_disabled()
    order(visit, "loss").press("Enter")
    order(visit, "outputs").press("Space")
    order(visit, "loss").press("Enter")  # a second time costs nothing
    assert said(visit) == Clinic(SMALL, ordered="loss,outputs").result()
    assert order(visit, "loss").get_attribute("aria-pressed") == "true"
    assert order(visit, "deep").get_attribute("aria-label") == "Order: 25 points, our monitor, deep"
    page.get_by_label("What is wrong").select_option("data")
    assert act.is_disabled()
    page.get_by_label("Where in the step it begins").select_option("forward")
    act.press("Enter")
    state = {"ordered": "loss,outputs", "diagnosis": "data", "place": "forward", "phase": "revealed"}
    assert said(visit) == Clinic(SMALL, **state).result()
    assert said(visit)["verdict"].endswith("Score: 50 of 100.")
    assert page.evaluate("document.activeElement.dataset.action") == "diagnose"
    assert order(visit, "deep").is_disabled() and page.get_by_label("What is wrong").is_disabled()
    assert page.get_by_label("Examinations and what they said").evaluate("box => box.scrollTop") == 0
    act.press("Enter")
    assert said(visit) == Clinic(SMALL).result() and act.is_disabled()
    assert visit.problems == {}


def test_a_new_patient_comes_with_nothing_ordered_and_its_own_number_of_steps(pages):
    visit = pages([Clinic(SMALL, ordered="loss", diagnosis="data", step=7, name="ward")])
    visit.page.get_by_label("Patient", exact=True).select_option("2")
    assert said(visit) == Clinic(SMALL, patient="2").result()
    step = visit.page.get_by_label("Step", exact=True)
    step.press("End")
    assert step.input_value() == "39"
    assert_page_is_python(KIND, visit)


@pytest.mark.parametrize("width", [1280, 390])
def test_no_patient_order_or_reveal_moves_the_page(pages, width):
    visit = pages([Clinic(name="ward")], width=width)
    height = "document.querySelector('.mpl-exhibit').offsetHeight"
    before = visit.page.evaluate(height)
    for number in range(1, len(WARD) + 1):
        visit.page.get_by_label("Patient", exact=True).select_option(str(number))
        assert visit.page.evaluate(height) == before, number
        for key in ("settings", "deep"):
            order(visit, key).click()
            assert visit.page.evaluate(height) == before, (number, key)
        visit.page.get_by_label("What is wrong").select_option("overflow")
        visit.page.get_by_label("Where in the step it begins").select_option("none")
        visit.page.locator("[data-action=diagnose]").click()
        assert visit.page.evaluate(height) == before, number
        assert not visit.page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert visit.problems == {}


@pytest.mark.parametrize("width", [1280, 390])
def test_what_an_examination_said_is_in_sight(pages, width):
    visit = pages([Clinic(SMALL, name="ward")], width=width)
    for key in EXAMINATIONS:
        order(visit, key).click()
        row, box = (
            visit.page.locator(f"[data-field=exam-{key}]").bounding_box(),
            visit.page.get_by_label("Examinations and what they said").bounding_box(),
        )
        assert box["y"] <= row["y"] and row["y"] + 16 <= box["y"] + box["height"], key


def test_a_patient_is_drawn_and_examined_while_its_choices_change(pages):
    visit = pages([Clinic(SMALL, name="ward")])
    page, precision = visit.page, visit.page.get_by_label("Precision", exact=True)
    assert precision.is_disabled()
    page.get_by_label("Patient", exact=True).select_option("own")
    assert precision.is_enabled() and page.get_by_label("What is wrong").is_disabled()
    order(visit, "cheap").press("Enter")
    state = {"patient": "own", "ordered": "cheap"}
    for label, key, value in (
        ("Precision", "precision", "bf16"),
        ("Learning rate", "rate", "0.001"),
        ("Spike", "spike", "off"),
    ):
        page.get_by_label(label, exact=True).select_option(value)
        state[key] = value
        assert said(visit) == Clinic(SMALL, **state).result()
    assert "update_swamping" in said(visit)["exam-cheap"]
    page.get_by_label("Scaler", exact=True).select_option("off")
    assert_page_is_python(KIND, visit)
    page.locator("[data-action=diagnose]").press("Enter")
    assert said(visit) == Clinic(SMALL, **state, scaler="off", phase="revealed").result()
    page.get_by_label("Precision", exact=True).select_option("fp32")
    assert "no findings" in said(visit)["report"]
    assert visit.problems == {}


def test_a_ward_without_drawn_patients_offers_none(pages):
    visit = pages([Clinic(SMALL, own=False, name="ward")])
    assert visit.page.get_by_label("Patient", exact=True).locator("option").count() == 3
    assert "draw" not in visit.page.locator(".mpl-hint").inner_text()
    assert visit.problems == {}


def test_the_drawing_shows_the_twin_and_the_step_only_after_the_diagnosis(pages):
    visit = pages([Clinic(SMALL, diagnosis="data", place="data", name="ward")])
    dashed = visit.page.locator("svg[role=img] path[stroke-dasharray]")
    shaded = visit.page.locator("svg[role=img] rect[fill-opacity]")
    crosses = visit.page.locator("svg[role=img] path[stroke='var(--mpl-bad)']")
    bars = visit.page.locator("svg[role=img] rect[fill='var(--mpl-over)']:not([fill-opacity])")
    assert (dashed.count(), shaded.count()) == (0, 0)
    assert crosses.count() == 5 + 5 and bars.count() == 5  # loss and norm from step 3 of 8
    visit.page.locator("[data-action=diagnose]").click()
    assert (dashed.count(), shaded.count()) == (1, 1)
