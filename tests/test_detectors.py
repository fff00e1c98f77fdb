"""The detectors of others, each on runs made for it, and the matrix that judges any detector."""

import contextlib
import importlib.util
import json
import math
import re
import warnings

import pytest
import torch
from torch import nn

from mixprec_lab.nan_debugging.detectors import (
    RIVALS,
    DetectAnomaly,
    Detection,
    HuggingFaceDebug,
    LossIsFinite,
    ModuleOutputs,
    MonitorDetector,
    NamedGradients,
    ScalerLog,
    Watch,
)
from mixprec_lab.nan_debugging.faults import FAULTS, HEALTHY, Fault, Run
from mixprec_lab.nan_debugging.matrix import Summary, alarms_on_healthy, detection_matrix

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def scripted(losses=(), gradients=None, model=None, scales=()) -> Run:
    """A run whose steps report ``losses[i]``, set ``gradients[i]`` and move the scale to ``scales[i]``."""
    model = nn.Sequential() if model is None else model
    scaler = torch.amp.GradScaler("cpu", init_scale=scales[0]) if scales else None
    if scaler:
        scaler.scale(torch.zeros(()))  # a scaler makes its scale when it is first used

    def step(i, probe) -> None:
        probe.loss(torch.tensor(losses[i] if losses else 1.0))
        if gradients:
            for p, value in zip(model.parameters(), gradients[i], strict=True):
                p.grad = None if value is None else torch.full_like(p, value)
        probe.gradients()
        if scaler:
            scaler.update(scales[i + 1])

    steps = len(losses) or len(gradients or ()) or len(scales) - 1
    return Run(model, [], step, steps, scaler)


def watch(detector, run: Run) -> list[Detection]:
    watching = detector.watch(run)
    for i in range(run.steps):
        with watching.step(i):
            run.step(i, watching)
        if watching.aborted:
            break
    watching.close()
    return watching.detections


# --- each detector


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_loss_is_finite_sees_each_bad_loss_and_no_other(bad):
    found = watch(LossIsFinite(), scripted([1.0, bad, 3.4e38, bad]))
    assert [(d.step, d.kind, d.module) for d in found] == [(i, "non_finite_loss", "loss") for i in (1, 3)]
    assert found[0].message == f"the loss is {bad}"


def test_named_gradients_names_every_bad_parameter_in_order():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    run = scripted(gradients=[(1.0, None, 0.0, 2.0), (1.0, math.nan, -math.inf, None)], model=model)
    found = watch(NamedGradients(), run)
    assert [(d.step, d.module) for d in found] == [(1, "0.bias"), (1, "1.weight")]
    assert found[0].message == "3 of 3 gradients are not finite"


def test_named_gradients_reads_sparse_gradients():
    model = nn.Embedding(5, 2, sparse=True)

    def step(i, probe) -> None:
        model.zero_grad()
        (model(torch.tensor([1, 1, 3])) * (math.inf if i else 1.0)).sum().backward()
        probe.gradients()

    found = watch(NamedGradients(), Run(model, [], step, 2))
    assert [(d.step, d.module, d.message) for d in found] == [(1, "weight", "4 of 4 gradients are not finite")]


def test_the_scaler_log_has_a_line_for_each_back_off_and_none_for_growth():
    found = watch(ScalerLog(), scripted(scales=(8.0, 8.0, 4.0, 16.0, 2.0)))
    assert [d.step for d in found] == [1, 3]
    assert found[1].message == "OVERFLOW! Skipping step. Attempted loss scale: 16, reducing to 2"
    assert watch(ScalerLog(), scripted([1.0, math.nan])) == []


def backward_of(function, at: float) -> Run:
    """Steps that differentiate ``function`` at one point."""
    leaf = torch.tensor([at], requires_grad=True)

    def step(i, probe) -> None:
        function(leaf).sum().backward()

    return Run(nn.Sequential(), [], step, 3)


def test_detect_anomaly_names_the_function_and_ends_the_run():
    found = watch(DetectAnomaly(), backward_of(lambda x: torch.where(x > 0, x.log(), 0.0), 0.0))
    assert [(d.step, d.operation) for d in found] == [(0, "LogBackward0")]
    assert found[0].message.startswith("Function 'LogBackward0' returned nan values in its 0th output")


def test_detect_anomaly_misses_an_infinite_gradient_and_a_nan_forward():
    assert watch(DetectAnomaly(), backward_of(torch.sqrt, 0.0)) == []  # its slope is infinite
    assert watch(DetectAnomaly(), backward_of(torch.log, -5.0)) == []  # log(-5) is NaN, its slope is -0.2


def test_detect_anomaly_passes_other_errors_through_and_leaves_its_mode():
    watching = DetectAnomaly().watch(scripted([1.0]))
    with pytest.raises(RuntimeError, match="something else"), watching.step(0):
        raise RuntimeError("something else")
    assert watching.detections == [] and not torch.is_anomaly_enabled()


class Outputs(nn.Module):
    """Returns what it is told, in a structure."""

    def forward(self, value: torch.Tensor) -> dict:
        return {"ids": torch.arange(3), "pair": (torch.zeros(2), [value])}


def test_module_outputs_names_the_first_module_of_a_step_and_looks_into_structures():
    model = nn.Sequential(nn.Identity(), Outputs())
    values = (torch.ones(2), torch.tensor([1.0, math.nan]))
    run = Run(model, [], lambda i, probe: model[1](model[0](values[i % 2])) and None, 4)
    found = watch(ModuleOutputs(), run)
    assert [(d.step, d.module, d.operation) for d in found] == [(1, "0", "Identity"), (3, "0", "Identity")]
    run.step = lambda i, probe: model[1](values[i % 2]) and None
    found = watch(ModuleOutputs(), run)
    assert [(d.step, d.module, d.operation) for d in found] == [(1, "1", "Outputs"), (3, "1", "Outputs")]


@pytest.mark.parametrize("detector", [d for d in RIVALS if not d.unavailable], ids=lambda d: d.name)
def test_close_leaves_no_hook_behind(detector):
    run = FAULTS["attention_logits_fp16"].build(0, True)
    watching = detector.watch(run)
    with watching.step(0):
        run.step(0, watching)
    watching.close()
    left = [m for m in run.model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert left == [] and not torch.is_anomaly_enabled()


@pytest.mark.parametrize("detector", [d for d in RIVALS if not d.unavailable], ids=lambda d: d.name)
def test_a_detector_does_not_change_the_run(detector):
    """Its losses are those of a plain run, bit by bit, up to where the detector ended it."""
    for fault in (FAULTS["clip_before_unscale"], FAULTS["updates_lost_bf16"], FAULTS["hand_softmax_fp16"]):
        losses = []
        for watching in (Watch(), None):
            run = fault.build(0, False)
            watching = watching or detector.watch(run)
            told, keep = watching.loss, []
            watching.loss = lambda loss, told=told, keep=keep: (keep.append(loss.detach().clone()), told(loss))
            for i in range(run.steps):
                with watching.step(i):
                    run.step(i, watching)
                if watching.aborted:
                    break
            losses.append(keep)
        count = len(losses[1])
        assert count == 8 or (watching.aborted and fault.name == "hand_softmax_fp16")
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(losses[0], losses[1], strict=False))


@pytest.mark.skipif(HAS_TRANSFORMERS, reason="transformers is installed")
def test_without_transformers_the_hugging_face_detector_says_so():
    assert "pip install transformers" in HuggingFaceDebug().unavailable
    with pytest.raises(ImportError):
        HuggingFaceDebug().watch(scripted([1.0]))


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed; it is no dependency of the course")
def test_the_hugging_face_detector_names_the_module_and_ends_the_run():
    assert HuggingFaceDebug().unavailable == ""
    found = watch(HuggingFaceDebug(), FAULTS["softplus_fp16"].build(0, False))
    assert [(d.step, d.module, d.operation) for d in found] == [(0, "softplus", "_Softplus")]
    assert found[0].message == "output of softplus (_Softplus) has infs"


class FakeMonitor:
    """Has the interface of a monitor and a log of the calls."""

    def __init__(self, findings=()) -> None:
        self.findings, self.calls = list(findings), []

    @contextlib.contextmanager
    def step(self, i):
        self.calls.append(f"step {i}")
        yield
        self.calls.append("end")

    def record_loss(self, loss) -> None:
        self.calls.append(f"loss {float(loss):g}")

    def gradients_ready(self) -> None:
        self.calls.append("gradients")

    def close(self) -> None:
        self.calls.append("close")


class FakeFinding:
    def __init__(self, severity: str, step: int, module: str = "", parameter: str = "") -> None:
        self.severity, self.step, self.module, self.parameter = severity, step, module, parameter
        self.kind, self.op, self.evidence = "grad_underflow", "mm", "all zero"


def test_the_monitor_detector_drives_a_monitor_and_takes_its_faults_only():
    monitor = FakeMonitor([FakeFinding("warning", 0), FakeFinding("fault", 1, "fc1"), FakeFinding("fault", 2, "", "w")])
    found = watch(MonitorDetector(lambda run: monitor), scripted([1.0, 2.0]))
    assert monitor.calls == ["step 0", "loss 1", "gradients", "end", "step 1", "loss 2", "gradients", "end", "close"]
    assert found == [
        Detection(1, "grad_underflow", "fc1", "mm", "all zero"),
        Detection(2, "grad_underflow", "w", "mm", "all zero"),
    ]


# --- the matrix


class Scripted:
    """Raises the alarms that it is told to, by (seed-independent) name of the run's model class."""

    name, unavailable = "scripted", ""

    def __init__(self, alarms=(), on_twin=(), name: str = "scripted") -> None:
        self.alarms, self.on_twin, self.name = alarms, on_twin, name

    def watch(self, run: Run) -> Watch:
        watching = Watch()
        watching._detections = list(self.on_twin if run.model.training is False else self.alarms)
        return watching


def made_up(name: str = "made_up", step: int = 2, silent: bool = True, body=None) -> Fault:
    """A fault whose repaired twin is a model in eval mode."""

    def build(seed: int, repaired: bool) -> Run:
        model = nn.Linear(1, 1).train(not repaired)
        return Run(model, [], lambda i, probe: body(i, repaired) if body else None, 4)

    return Fault(name, "t", "the_class", "forward", step, silent, ("^fc1$",), ("mm",), "cure", build)


RIGHT = Detection(2, "the_class", "fc1", "", "m")


@pytest.mark.parametrize(
    ("alarms", "expected", "mark"),
    [
        ((), (False, False, False, False), "."),
        ((RIGHT,), (True, True, True, True), "c"),
        ((RIGHT._replace(kind="other"),), (True, True, True, False), "p"),
        ((RIGHT._replace(module="fc2"),), (True, True, False, True), "s"),
        ((RIGHT._replace(module="fc2", operation="aten.addmm"),), (True, True, True, True), "c"),
        ((RIGHT._replace(step=3),), (True, False, True, True), "s"),
        ((RIGHT._replace(module="fc2"), RIGHT), (True, True, False, True), "s"),  # the first one counts
        ((RIGHT._replace(step=3, module="x"), RIGHT), (True, True, True, True), "c"),  # and the first by step
    ],
)
def test_a_verdict_is_that_of_the_first_alarm(alarms, expected, mark):
    verdict = detection_matrix([Scripted(alarms)], [made_up()]).verdicts["scripted"]["made_up"]
    assert (verdict.detected, verdict.right_step, verdict.right_place, verdict.right_class) == expected
    assert (verdict.mark, verdict.alarms, verdict.error) == (mark, (), "")


def test_alarms_on_the_twin_are_counted_once_a_fault_and_shown():
    alarm = Detection(0, "x", "", "", "")
    matrix = detection_matrix([Scripted((RIGHT,), (alarm, alarm))], [made_up(), made_up("b")], seeds=(0, 1))
    assert matrix.summary() == [Summary("scripted", 2, 2, 2, 2, 2, 0)]
    verdict = matrix.verdicts["scripted"]["b"]
    assert verdict.alarms == (alarm, alarm) and verdict.mark == "c!"


def test_a_fault_counts_as_detected_only_if_it_is_for_every_seed():
    class Sometimes(Scripted):
        def watch(self, run: Run) -> Watch:
            watching = Watch()
            watching._detections = [RIGHT] if float(run.model.weight) > 0 else []
            return watching

    def build(seed: int, repaired: bool) -> Run:
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, 1.0 if seed == 0 and not repaired else -1.0)
        return Run(model, [], lambda i, probe: None, 1)

    fault = Fault("f", "t", "the_class", "forward", 2, True, ("^fc1$",), ("mm",), "cure", build)
    assert detection_matrix([Sometimes()], [fault]).summary()[0].detected == 1
    assert detection_matrix([Sometimes()], [fault], seeds=(0, 1)).summary()[0].detected == 0


def test_what_a_detector_raises_is_shown_and_not_taken_for_the_run():
    class Broken(Scripted):
        def watch(self, run: Run) -> Watch:
            watching = Watch()
            watching.loss = lambda loss: 1 / 0
            return watching

    class Unmade(Scripted):
        def watch(self, run: Run) -> Watch:
            raise KeyError("no such layer")

    fault = FAULTS["updates_lost_bf16"]
    matrix = detection_matrix([Broken(name="broken"), Unmade(name="unmade")], [fault])
    assert [row.errors for row in matrix.summary()] == [1, 1]
    error = matrix.verdicts["broken"][fault.name].error
    assert error.startswith("ZeroDivisionError: division by zero (fault, seed 0, step 0); ") and "twin" in error
    assert "no such layer" in matrix.table() and matrix.verdicts["unmade"][fault.name].mark == ".E"


def test_an_exception_of_the_run_is_no_error_of_the_detector_unless_it_is_hidden():
    class Hiding(Scripted):
        def watch(self, run: Run) -> Watch:
            watching = Watch()
            watching.step = lambda i: contextlib.suppress(IndexError)
            return watching

    fault = FAULTS["token_out_of_range"]
    matrix = detection_matrix([LossIsFinite(), Hiding(name="hiding")], [fault])
    assert matrix.verdicts["loss isfinite"][fault.name].error == ""
    assert matrix.verdicts["hiding"][fault.name].error.startswith("hid IndexError: index out of range")


def test_the_watch_is_closed_even_if_the_run_raises():
    closed = []

    class Closing(Scripted):
        def watch(self, run: Run) -> Watch:
            watching = Watch()
            watching.close = lambda: closed.append(1)
            return watching

    detection_matrix([Closing()], [FAULTS["half_model_with_scaler"]])
    assert closed == [1, 1]


def test_a_detector_that_is_not_available_is_named_and_left_out():
    absent = Scripted(name="absent")
    absent.unavailable = "not here: install it"
    matrix = detection_matrix([absent, LossIsFinite()], [made_up()])
    assert list(matrix.verdicts) == ["loss isfinite"]
    assert matrix.table().endswith("absent did not run: not here: install it")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one seed"):
        detection_matrix([LossIsFinite()], [made_up()], seeds=())
    with pytest.raises(ValueError, match="different names"):
        detection_matrix([LossIsFinite(), LossIsFinite()], [made_up()])
    with pytest.raises(ValueError, match="faults with different names"):
        detection_matrix([LossIsFinite()], [made_up(), made_up()])


def test_the_matrix_survives_json_and_prints_a_row_for_each_detector_and_fault():
    detectors = [LossIsFinite(), ModuleOutputs()]
    faults = [FAULTS[name] for name in ("attention_logits_fp16", "updates_lost_bf16", "half_model_with_scaler")]
    matrix = detection_matrix(detectors, faults)
    data = json.loads(json.dumps(matrix.as_dict()))
    assert data["verdicts"]["module outputs"]["attention_logits_fp16"]["first"]["module"] == "attn"
    assert data["summary"][1] == {
        "detector": "module outputs", "detected": 1, "silent": 0, "localised": 1, "named": 0, "alarms": 0, "errors": 0,
    }  # fmt: skip
    lines = matrix.table().splitlines()
    assert lines[0] == "3 faults, 1 of them silent"
    assert [line.split("  ")[0] for line in lines[3:]] == ["loss isfinite", "module outputs"]
    assert re.search(r"attention_logits_fp16 +fp16_overflow +s +p$", matrix.by_fault(), re.MULTILINE)


def test_alarms_on_healthy_runs_are_all_kept_and_errors_go_through():
    runs = {"a": lambda seed: scripted([1.0, math.nan, math.inf]), "b": lambda seed: scripted([0.0])}
    found = alarms_on_healthy(LossIsFinite(), runs, seeds=(0, 1))
    assert [d.step for d in found["a"]] == [1, 2, 1, 2] and found["b"] == []

    def raising(seed: int) -> Run:
        return Run(nn.Sequential(), [], lambda i, probe: [][0], 1)

    with pytest.raises(IndexError):
        alarms_on_healthy(LossIsFinite(), {"c": raising})


# --- what the rivals reach on the catalogue


@pytest.fixture(scope="module")
def rivals():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return detection_matrix(RIVALS)


def rows(matrix) -> dict[str, Summary]:
    return {row.detector: row for row in matrix.summary()}


def test_no_rival_names_a_class_and_none_sees_half_of_the_silent_faults(rivals):
    silent = sum(fault.silent for fault in rivals.faults)
    for row in rivals.summary():
        assert row.named == 0 and row.silent < silent / 4, row


def test_the_loss_shows_no_silent_fault_and_never_lies_about_a_twin(rivals):
    row = rows(rivals)["loss isfinite"]
    assert (row.silent, row.alarms) == (0, 0)
    bad = [f for f in rivals.faults if rivals.verdicts["loss isfinite"][f.name].detected]
    assert 0 < row.localised < row.detected == len(bad) < len(rivals.faults) / 2
    assert all(not fault.silent for fault in bad)


def test_gradients_show_a_little_more_and_alarm_on_the_calibration_of_a_scaler(rivals):
    loss, gradients = rows(rivals)["loss isfinite"], rows(rivals)["gradient isfinite"]
    assert gradients.detected > loss.detected and gradients.silent > 0
    alarmed = {name for name, v in rivals.verdicts["gradient isfinite"].items() if v.alarms}
    assert alarmed == {"static_scale_unchecked", "scaler_state_not_restored", "scheduler_on_skipped_step"}
    assert alarmed == {name for name, v in rivals.verdicts["detect_anomaly"].items() if v.alarms}


def test_the_scaler_log_never_says_where(rivals):
    for name, verdict in rivals.verdicts["scaler log"].items():
        assert verdict.first is None or (verdict.first.module, verdict.first.kind) == ("scaler", "overflow"), name
    assert rivals.verdicts["scaler log"]["where_trap_under_scaler"].detected


def test_hooks_find_the_place_of_most_forward_faults_and_of_no_other(rivals):
    found = [f for f in rivals.faults if rivals.verdicts["module outputs"][f.name].localised]
    assert {fault.phase for fault in found} == {"forward"} and len(found) >= 15


def test_together_the_rivals_miss_most_silent_faults(rivals):
    seen = {name for row in rivals.verdicts.values() for name, verdict in row.items() if verdict.detected}
    missed = [fault for fault in rivals.faults if fault.silent and fault.name not in seen]
    assert len(missed) > 0.75 * sum(fault.silent for fault in rivals.faults)


def test_only_detectors_of_gradients_and_scales_alarm_on_healthy_runs():
    alarmed = {}
    names = ("mlp", "gan", "masked_attention", "sparse_embedding", "scaler_calibration", "scaler_growth")
    for detector in (LossIsFinite(), NamedGradients(), ScalerLog()):
        found = alarms_on_healthy(detector, {name: HEALTHY[name] for name in names})
        alarmed[detector.name] = {name for name, alarms in found.items() if alarms}
    with_a_scaler = {"scaler_calibration", "scaler_growth"}
    assert alarmed == {"loss isfinite": set(), "gradient isfinite": with_a_scaler, "scaler log": with_a_scaler}
