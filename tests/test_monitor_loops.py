"""The monitor in loops that are unusual and healthy: no finding, no crash, nothing left behind."""

import copy
import io
import math
import threading

import pytest
import torch
from torch import nn

from mixprec_lab.nan_debugging import NumericalStabilityMonitor

SGD = torch.optim.SGD


def watched(model, optimizer, step, steps: int = 12, level: str = "cheap", **options) -> NumericalStabilityMonitor:
    monitor = NumericalStabilityMonitor(model, optimizer, level=level, **options)
    for i in range(steps):
        with monitor.step(i):
            step(i, monitor)
    monitor.close()
    return monitor


def fit(model, optimizer, loss_of):
    def step(i, monitor):
        loss = loss_of(i)
        monitor.record_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        monitor.gradients_ready()
        optimizer.step()

    return step


LEVELS = pytest.mark.parametrize("level", ["cheap", "deep"])


@LEVELS
def test_float64_and_its_range(level):
    model = nn.Linear(8, 4).double()
    x, optimizer = torch.randn(16, 8, dtype=torch.float64), SGD(model.parameters(), lr=1e-45)
    monitor = watched(model, optimizer, fit(model, optimizer, lambda i: model(x).square().mean() * 1e40), level=level)
    assert monitor.findings == []


@LEVELS
def test_norms_that_leave_float32_and_masks_of_infinity(level):
    class Mask(nn.Module):
        def forward(self, x):
            return x.masked_fill(torch.arange(4) > 2, -math.inf)

    model = nn.Sequential(nn.Linear(8, 4), Mask())
    x, optimizer = torch.randn(16, 8), SGD(model.parameters(), lr=1e-22)
    monitor = watched(
        model, optimizer, fit(model, optimizer, lambda i: model(x).softmax(-1).square().mean() * 1e22), level=level
    )
    assert monitor.findings == []


@pytest.mark.parametrize("every", [2, 4])
def test_accumulation_over_monitored_micro_batches(every):
    model = nn.Linear(8, 4)
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(i, monitor):
        loss = model(torch.randn(4, 8)).square().mean() / every
        monitor.record_loss(loss)
        loss.backward()
        if i % every == every - 1:
            monitor.gradients_ready()
            optimizer.step()
            optimizer.zero_grad()

    assert watched(model, optimizer, step).findings == []


def test_a_part_that_runs_under_no_grad_from_outside():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)})
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(i, monitor):
        with torch.no_grad():
            model["head"](torch.randn(4, 8))
        fit(model, optimizer, lambda i: model["body"](torch.randn(4, 8)).square().mean())(i, monitor)

    assert watched(model, optimizer, step).findings == []


def test_two_optimizers_of_which_one_is_scaled():
    critic, temperature = nn.Linear(8, 1), nn.Parameter(torch.zeros(()))
    model = nn.Module()
    model.critic, model.temperature = critic, temperature
    optimizers = [SGD(critic.parameters(), lr=0.01), torch.optim.Adam([temperature], lr=0.01)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def step(i, monitor):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = critic(torch.randn(16, 8)).square().mean()
        monitor.record_loss(loss)
        scaler.scale(loss).backward()
        monitor.gradients_ready()
        scaler.step(optimizers[0])
        (temperature - 1).square().backward()
        optimizers[1].step()
        scaler.update()

    assert watched(model, optimizers, step, scaler=scaler).findings == []


def test_schedules_one_after_another_and_a_monitor_that_comes_late():
    model = nn.Linear(8, 1)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    optimizer.step()

    def step(i, monitor):
        if i == 6:
            schedule.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6))
        schedule[-1].step()
        fit(model, optimizer, lambda i: model(torch.randn(4, 8)).square().mean())(i, monitor)

    assert watched(model, optimizer, step).findings == []


def test_clipping_after_every_micro_batch_without_a_scaler():
    model = nn.Linear(8, 1)
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(i, monitor):
        optimizer.zero_grad()
        for _ in range(2):
            loss = model(torch.randn(4, 8)).square().mean()
            monitor.record_loss(loss)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        monitor.gradients_ready()
        optimizer.step()

    assert watched(model, optimizer, step, trace_first=0).findings == []


@LEVELS
def test_unscaling_many_gradients_at_once_by_hand(level):
    model = nn.Linear(8, 1)
    optimizer, scaler = SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=256.0)

    def step(i, monitor):
        loss = model(torch.randn(16, 8)).square().mean()
        monitor.record_loss(loss)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        torch._foreach_div_([p.grad for p in model.parameters()], scaler.get_scale())
        monitor.gradients_ready()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert watched(model, optimizer, step, level=level).findings == []


def test_a_bf16_teacher_that_is_copied_and_a_warm_up_from_zero():
    model = nn.ModuleDict({"student": nn.Linear(8, 8).bfloat16(), "teacher": nn.Linear(8, 8).bfloat16()})
    model["teacher"].requires_grad_(False)
    optimizer = SGD(model["student"].parameters(), lr=0.0)

    def step(i, monitor):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1, max(0, i - 3))
        fit(model, optimizer, lambda i: model["student"](torch.randn(4, 8).bfloat16()).square().mean())(i, monitor)
        with torch.no_grad():
            for p, q in zip(model["teacher"].parameters(), model["student"].parameters(), strict=True):
                p.copy_(q)

    assert watched(model, optimizer, step).faults == []


def test_even_ids_are_ids():
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Flatten(), nn.Linear(32, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 250, (64, 4), generator=torch.Generator().manual_seed(0)) * 4
    assert watched(model, optimizer, fit(model, optimizer, lambda i: model(ids).square().mean())).findings == []


@LEVELS
def test_transforms_of_functions_are_let_through(level):
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(i, monitor):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        per_sample = torch.func.vmap(
            torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)).sum()), (None, 0)
        )
        per_sample(parameters, torch.randn(5, 3))
        fit(model, optimizer, lambda i: model(torch.randn(4, 3)).square().mean())(i, monitor)

    assert watched(model, optimizer, step, level=level).findings == []


@pytest.mark.parametrize("kind", ["sparse", "lazy", "float8"])
def test_tensors_that_cannot_be_measured_are_passed_over(kind):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.later = nn.Linear(8, 1), nn.LazyLinear(1)

        def forward(self, x):
            return self.layer(x.to_dense() if kind == "sparse" else x.float())

    model = Odd()
    optimizer = SGD(model.layer.parameters(), lr=0.1)
    x = torch.randn(4, 8)
    given = x.to_sparse() if kind == "sparse" else x.to(torch.float8_e4m3fn) if kind == "float8" else x
    monitor = watched(model, optimizer, fit(model, optimizer, lambda i: model(given).square().mean()))
    assert monitor.findings == []
    assert monitor.check_model_health(0, 1.0)["issues"] == []


def test_copies_and_files_of_the_model_have_no_hooks():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    monitor = NumericalStabilityMonitor(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with monitor.step(0):
        for other in (twin, loaded):
            other(torch.full((1, 2), math.nan))
        monitor.record_loss(model(torch.ones(1, 2)).sum())
    assert monitor.findings == []


def test_steps_of_two_monitors_may_overlap_and_leave_nothing_patched():
    before = torch.autograd.backward, torch.optim.Optimizer.__dict__["zero_grad"]
    a, b = (NumericalStabilityMonitor(nn.Linear(2, 2)) for _ in range(2))
    first, second = a.step(0), b.step(0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert (torch.autograd.backward, torch.optim.Optimizer.__dict__["zero_grad"]) == before


def test_threads_train_side_by_side():
    torch.set_num_threads(1)
    failures: list[object] = []

    def train(seed: int) -> None:
        model = nn.Linear(8, 1)
        optimizer = SGD(model.parameters(), lr=0.01)
        try:
            monitor = watched(model, optimizer, fit(model, optimizer, lambda i: model(torch.ones(4, 8)).mean()), 40)
            failures.extend(monitor.findings)
        except Exception as error:  # a thread has nobody to raise to
            failures.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_broken_state_changes_nothing():
    monitor = NumericalStabilityMonitor(nn.Linear(2, 2))
    state = monitor.state_dict()
    state["baselines"] = {"output_norms": {"x": (1.0, 2)}}
    with pytest.raises(ValueError, match="expected baselines"):
        monitor.load_state_dict(state)
    assert monitor.examiner.output_norms == {}
    with monitor.step(0), pytest.raises(RuntimeError, match="load between steps"):
        monitor.load_state_dict(NumericalStabilityMonitor(nn.Linear(2, 2)).state_dict())
