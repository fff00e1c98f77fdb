"""check_model_health and diagnose_instability: counts, global norms, and judgement against the run's own level."""

import math

import torch
from torch import nn

from mixprec_lab.nan_debugging import NumericalStabilityMonitor


def test_a_health_report_counts_and_norms_are_global():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, math.inf]]))
    model.weight.grad = torch.tensor([[6.0, 8.0], [math.nan, 0.0]])
    monitor = NumericalStabilityMonitor(model)
    report = monitor.check_model_health(7, torch.tensor(math.nan))
    assert (report["step"], report["loss_nan"], report["loss_inf"]) == (7, True, False)
    assert (report["grad_norm"], report["grad_nan_count"], report["grad_inf_count"]) == (10.0, 1, 0)
    assert (report["param_norm"], report["param_nan_count"], report["param_inf_count"]) == (3.0, 0, 1)
    where = ["1 NaN values in the gradients", "1 infinite values in the parameters"]
    assert report["issues"] == ["the loss is nan", *where]
    assert monitor.history == [report]
    said = " ".join(monitor.diagnose_instability())
    assert "NaN at steps [7]" in said and "gradients were not finite" in said and "parameters were not finite" in said


def test_scaled_gradients_are_measured_unscaled():
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[2.0**17]])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.tensor(1.0))
    report = NumericalStabilityMonitor(model, scaler=scaler).check_model_health(0, 0.5, scaled=True)
    assert report["grad_norm"] == 2.0 and report["scale"] == 2.0**16 and report["issues"] == []


def test_an_ordinary_skip_is_told_apart():
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[math.inf]])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.tensor(1.0))
    monitor = NumericalStabilityMonitor(model, scaler=scaler)
    assert monitor.check_model_health(0, 0.5)["skipped"]
    assert monitor.diagnose_instability() == ["no sign of instability in the last reports"]


def test_explosions_and_vanishing_are_judged_against_the_runs_own_level():
    model = nn.Linear(1, 1, bias=False)
    monitor = NumericalStabilityMonitor(model)
    assert monitor.diagnose_instability() == ["no report yet: call check_model_health(step, loss) after backward"]
    for step, (loss, gradient) in enumerate([(1.0, 1.0), (0.9, 1.1), (0.8, 0.9), (200.0, 500.0)]):
        model.weight.grad = torch.tensor([[gradient]])
        monitor.check_model_health(step, loss)
    said = " ".join(monitor.diagnose_instability())
    assert "the loss is 222 times its median" in said and "the gradient norm is 500 times its median" in said
    calm = NumericalStabilityMonitor(model)
    for step in range(4):
        model.weight.grad = torch.tensor([[1e-12]])
        calm.check_model_health(step, 1.0)
    assert "vanish" in calm.diagnose_instability()[0]
