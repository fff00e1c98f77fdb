"""Records of patients: curves by hand and by the plain run, examinations by the detection matrix, healthy twins."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from mixprec_lab.exhibits.clinic import WARD
from mixprec_lab.nan_debugging import NumericalStabilityMonitor
from mixprec_lab.nan_debugging.detectors import (
    DetectAnomaly,
    LossIsFinite,
    ModuleOutputs,
    NamedGradients,
    ScalerLog,
)
from mixprec_lab.nan_debugging.faults import FAULTS, HEALTHY, run_fault
from mixprec_lab.nan_debugging.matrix import detection_matrix
from mixprec_lab.nan_debugging.records import (
    EXAMINATIONS,
    FAMILIES,
    MARKS,
    PLACES,
    family_of,
    price,
    record,
)

ILL = [name for name in WARD if name in FAULTS]
WELL = [name for name in WARD if name in HEALTHY]
DETECTORS = {
    "loss": LossIsFinite(),
    "scaler": ScalerLog(),
    "gradients": NamedGradients(),
    "outputs": ModuleOutputs(),
    "anomaly": DetectAnomaly(),
}
MARK_OF = {"c": "named", "p": "located", "s": "seen", ".": "missed"}


def reports(name: str, level: str, repaired: bool = False) -> tuple[str, list]:
    """The report and the findings of a monitor around the run, as a user writes it."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        run = FAULTS[name].build(0, repaired)
        monitor = NumericalStabilityMonitor(run.model, run.optimizers, run.scaler, run.scheduler, level=level)

        class Probe:
            loss, gradients = staticmethod(monitor.record_loss), staticmethod(monitor.gradients_ready)

        for i in range(run.steps):
            with monitor.step(i):
                run.step(i, Probe)
        monitor.close()
    return monitor.report(), monitor.findings


def test_the_ward_has_every_family_and_two_patients_that_are_well():
    assert {record(name).family for name in WARD} == set(FAMILIES)
    assert {record(name).place for name in WARD} == set(PLACES)
    assert 10 <= len(ILL) <= 14 and len(WELL) == 2 and len(set(WARD)) == len(WARD)
    assert any(FAULTS[name].fault_class.startswith("fp8") for name in ILL)


def test_every_class_of_the_catalogue_has_a_family():
    assert {family_of(fault.fault_class) for fault in FAULTS.values()} == set(FAMILIES) - {"none"}
    with pytest.raises(KeyError, match="expected a fault class of the catalogue, got 'measles'"):
        family_of("measles")


@pytest.mark.parametrize("name", ILL)
def test_examinations_say_what_the_detectors_say_and_are_marked_as_in_the_matrix(name):
    matrix, found = detection_matrix(DETECTORS.values(), [FAULTS[name]]), record(name)
    for key, detector in DETECTORS.items():
        verdict, result = matrix.verdicts[detector.name][name], found.results[key]
        assert result.mark == MARK_OF[verdict.mark.rstrip("!")] and not verdict.error
        if verdict.first is None:
            assert result.text == "No alarm."
        else:
            assert result.text.startswith(f"Step {verdict.first.step}: ")
            assert verdict.first.message.rstrip(".") in result.text and verdict.first.module in result.text


@pytest.mark.parametrize("name", ILL)
def test_the_monitor_names_class_place_and_step_of_every_patient_and_its_report_is_recorded(name):
    found = record(name)
    for level in ("cheap", "deep"):
        text, findings = reports(name, level)
        assert found.results[level].text == text and found.results[level].mark == "named"
        first = min((f for f in findings if f.severity == "fault"), key=lambda f: f.step)
        assert (first.kind, first.step, first.phase) == (found.fault_class, found.step, found.place)


@pytest.mark.parametrize("name", ILL)
def test_the_repaired_twin_stays_finite_and_raises_no_alarm_of_the_monitor(name):
    twin = record(name, repaired=True)
    assert (twin.family, twin.place, twin.fault_class, twin.step) == ("none", "none", "", -1)
    assert all(map(math.isfinite, twin.loss)) and not any(twin.bad_parameters) and not twin.error
    assert twin.results["cheap"].mark == twin.results["deep"].mark == "quiet"
    assert twin.loss[-1] < twin.loss[0]


@pytest.mark.parametrize("name", WELL)
def test_healthy_runs_are_their_first_forty_steps_and_the_monitor_leaves_them_alone(name):
    found = record(name)
    assert found.steps == 40 and found.loss[-1] < found.loss[0] and found.family == "none"
    assert found.results["cheap"].mark == "quiet" and found.way == ("cheap",)


def test_a_scaler_that_calibrates_alarms_all_who_look_at_gradients():
    marks = {key: result.mark for key, result in record("scaler_calibration").results.items()}
    assert {key for key, mark in marks.items() if mark == "false"} == {"scaler", "gradients", "anomaly"}


@pytest.mark.parametrize("name", ILL)
def test_the_loss_is_that_of_a_plain_run(name):
    plain = run_fault(FAULTS[name], 0)
    assert repr(record(name).loss) == repr(tuple(float(f"{loss:.3g}") for loss in plain.losses))


def test_counts_by_hand():
    # 16 * 32 + 32 + 32 * 4 + 4 = 676 parameters; one NaN in the batch of step 3 reaches all of them.
    found = record("nan_in_input")
    assert found.bad_gradients == found.bad_parameters == (0, 0, 0, 676, 676, 676, 676, 676)
    assert [math.isfinite(value) for value in found.gradient_norm] == [True] * 3 + [False] * 5


def test_an_infinite_weight_counts_as_one_bad_parameter():
    def build(seed: int, repaired: bool):
        run = FAULTS["nan_in_input"].build(seed, True)
        train = run.step

        def step(i, probe):
            train(i, probe)
            if i == 1:
                run.model[0].weight.data[0, 0] = torch.inf

        run.step, run.steps = step, 2
        return run

    found = record(replace(FAULTS["nan_in_input"], build=build))
    assert found.bad_parameters == (0, 1) and found.bad_gradients == (0, 0)


def test_scales_halve_while_every_step_is_skipped():
    assert record("where_trap_under_scaler").scale == tuple(2.0 ** (10 - i) for i in range(12))
    assert not any(record("where_trap_under_scaler").bad_parameters)
    assert all(map(math.isnan, record("nan_in_input").scale))  # there is no scaler


def test_gradients_that_underflow_are_zero_and_their_share_is_one():
    found = record("gradients_underflow")
    assert set(found.flushed) == {1.0} and set(found.gradient_norm) == {0.0}
    # The same run with a scaler: its gradients are seen unscaled, where FP16 would lose most of them.
    assert all(0.5 < share < 1 for share in record("gradients_underflow", repaired=True).flushed)


def test_gradients_that_are_clipped_before_unscale_carry_the_scale():
    found, twin = record("clip_before_unscale"), record("clip_before_unscale", repaired=True)
    assert found.scale[0] == twin.scale[0] == 4096.0
    assert found.gradient_norm[0] / 4096 == pytest.approx(twin.gradient_norm[0], rel=0.01)


def test_the_list_of_settings_shows_16_bit_weights_their_optimizer_and_autocast():
    bf16 = record("updates_lost_bf16").results["settings"].text.splitlines()
    assert bf16[:2] == ["parameters: 4 bfloat16", "first input: bfloat16 (32, 16)"]
    assert "SGD: lr 0.001" in bf16 and "scaler: none" in bf16
    autocast = record("loss_in_fp16").results["settings"].text.splitlines()
    assert autocast[:3] == ["parameters: 4 float32", "first input: float32 (32, 16)", "fc1 (Linear) returns float16"]
    assert "scaler: GradScaler" in autocast
    assert "Adam: lr 0.01, eps 1e-08; state: 8 exp_avg float32, 8 exp_avg_sq float32" in (
        record("masked_softmax").results["settings"].text
    )


@pytest.mark.parametrize("name", [*WARD, "token_out_of_range", "sqrt_at_zero", "accumulation_not_divided"])
def test_the_way_is_the_cheapest_of_all_that_tell(name):
    found = record(name)
    marks = {key: result.mark for key, result in found.results.items()}
    alone = [(key,) for key in marks if marks[key] == "named" or (marks[key] == "quiet" and key in ("cheap", "deep"))]
    pairs = [("settings", key) for key in marks if marks[key] == "located"]
    assert set(marks) == set(EXAMINATIONS) and set(marks.values()) <= set(MARKS)
    if alone or pairs:
        assert found.way in alone + pairs and price(found.way) == min(map(price, alone + pairs))
    else:
        assert found.way == ()


def test_prices_add_up():
    assert price(()) == 0 and price(("loss", "settings", "anomaly")) == 2 + 3 + 10
    points = [examination.points for examination in EXAMINATIONS.values()]
    assert points == sorted(points) and sum(points) == 70


def test_a_run_that_raises_is_recorded_up_to_there():
    found = record("token_out_of_range")
    assert (
        found.steps == 2
        and math.isnan(found.loss[1])
        and found.error == "step 1: IndexError: index out of range in self"
    )
    assert found.results["loss"].text == "No alarm. The run ended in step 1: IndexError: index out of range in self"
    assert record("where_trap_under_scaler").results["anomaly"].text.endswith(" The run ended in step 0.")


@pytest.mark.parametrize("name", ["attention_logits_fp16", "stale_amax"])
def test_a_second_recording_is_the_same(name):
    first = record(name)
    assert record(FAULTS[name], seed=0, repaired=False) is first  # however it is asked for
    again = record(replace(FAULTS[name], cure="none"))  # another fault for the cache, the same run
    assert repr(replace(again, cure=first.cure)) == repr(first)


def test_recording_leaves_the_random_state_and_the_threads_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    record("nan_in_input", 5)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_another_seed_is_another_patient_with_the_same_fault():
    one, other = record("nan_in_input"), record("nan_in_input", 1)
    assert one.loss != other.loss and one.fault_class == other.fault_class and other.results["cheap"].mark == "named"


def test_unknown_patients_and_twins_of_the_healthy_are_refused():
    with pytest.raises(KeyError, match="expected the name of a fault or of a healthy run, got 'flu'"):
        record("flu")
    with pytest.raises(ValueError, match="'mlp'.*a healthy run has no repaired twin"):
        record("mlp", repaired=True)
