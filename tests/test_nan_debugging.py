"""The stability monitor: the catalogue found and named, healthy runs left alone, one read a step, no hooks left."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.models import digits, transformer
from mixprec_lab.nan_debugging import KINDS, Finding, NumericalStabilityMonitor
from mixprec_lab.nan_debugging.detectors import MonitorDetector
from mixprec_lab.nan_debugging.faults import FAULTS, HEALTHY
from mixprec_lab.nan_debugging.matrix import detection_matrix

BF16, FP16 = torch.bfloat16, torch.float16
#: classes of the catalogue page: the bars hold for these, and for the larger set of ``FAULTS`` too
LEVELS = ("cheap", "deep")


def monitored(run, level: str = "cheap", steps: int | None = None) -> NumericalStabilityMonitor:
    monitor = NumericalStabilityMonitor(run.model, run.optimizers, run.scaler, run.scheduler, level=level)

    class Probe:
        loss = staticmethod(monitor.record_loss)
        gradients = staticmethod(monitor.gradients_ready)

    for i in range(run.steps if steps is None else min(steps, run.steps)):
        with monitor.step(i):
            run.step(i, Probe)
    monitor.close()
    return monitor


# -- the bars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_the_catalogue_is_found_placed_and_named_and_no_repaired_twin_is_accused(level):
    detector = MonitorDetector(
        lambda run: NumericalStabilityMonitor(run.model, run.optimizers, run.scaler, run.scheduler, level=level)
    )
    (summary,) = detection_matrix([detector], FAULTS.values()).summary()
    silent = sum(fault.silent for fault in FAULTS.values())
    assert summary.detected >= 0.95 * len(FAULTS)
    assert summary.silent >= 0.92 * silent
    assert summary.named >= 0.90 * len(FAULTS)
    assert summary.alarms == summary.errors == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_are_found_as_well_and_their_twins_not_accused(seed):
    detector = MonitorDetector(
        lambda run: NumericalStabilityMonitor(run.model, run.optimizers, run.scaler, run.scheduler)
    )
    (summary,) = detection_matrix([detector], FAULTS.values(), seeds=(seed,)).summary()
    assert summary.detected >= 0.95 * len(FAULTS) and summary.named >= 0.90 * len(FAULTS)
    assert summary.alarms == summary.errors == 0


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_fault_in_two_hundred_steps(name):
    entry = HEALTHY[name]
    run = entry.build(0) if hasattr(entry, "build") else entry(0)
    assert monitored(run).faults == []


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_fault_under_a_trace_either(name):
    entry = HEALTHY[name]
    run = entry.build(1) if hasattr(entry, "build") else entry(1)
    assert monitored(run, "deep", 12).faults == []


class Reads(TorchDispatchMode):
    """Counts what brings a number to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero")
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_an_ordinary_step_reads_once(narrow, monkeypatch):
    model, data = transformer(), digits()
    images = data.train_images[:32]
    if narrow:
        model, images = model.bfloat16(), images.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lists = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(self.numel()), original(self))[1])
    monitor = NumericalStabilityMonitor(model, optimizer)
    for i in range(4):
        lists.clear()
        with Reads() as reads, monitor.step(i):
            loss = F.cross_entropy(model(images).float(), data.train_labels[:32])
            monitor.record_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            monitor.gradients_ready()
            optimizer.step()
        if i >= 2:  # the first two are traced
            assert reads.count == 0 and len(lists) == 1


# -- what a finding holds ----------------------------------------------------------------------------------------------


def overflow_in_exp() -> NumericalStabilityMonitor:
    class Gate(nn.Module):
        def forward(self, x):
            return x.exp().mean(-1, keepdim=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Gate()).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = NumericalStabilityMonitor(model, optimizer, trace_first=0)
    x = torch.randn(4, 8)
    for i in range(4):
        with monitor.step(i):
            loss = model((x * (300 if i == 3 else 1)).half()).float().mean()
            monitor.record_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            monitor.gradients_ready()
            if i < 3:
                optimizer.step()
    monitor.close()
    return monitor


def test_a_failing_step_is_replayed_to_the_operation_that_made_the_first_infinity():
    (found,) = overflow_in_exp().faults
    assert (found.kind, found.step, found.phase) == ("fp16_overflow", 3, "forward")
    assert (found.module, found.op) == ("1", "aten.exp")
    assert found.reproducible == "yes" and found.tensor.inf > 0 and found.tensor.dtype == "float16"
    assert "first infinity, from float16 (4, 8)" in found.evidence and "FP32" in found.advice


def test_a_report_names_everything_and_json_round_trips():
    monitor = overflow_in_exp()
    text = monitor.report()
    assert text.startswith("[fault] step 3, forward: fp16_overflow in 1 aten.exp\n  seen: first infinity")
    (entry,) = [e for e in json.loads(monitor.as_json()) if e["severity"] == "fault"]
    assert entry["kind"] == "fp16_overflow" and entry["tensor"]["dtype"] == "float16"
    assert "fp16_overflow" in monitor.table() and "aten.exp" in monitor.table()


def test_every_kind_has_a_phase_and_advice_and_every_class_of_the_faults_is_a_kind():
    phases = ("data", "forward", "backward", "optimizer", "checkpoint")
    assert all(phase in phases and advice for phase, advice in KINDS.values())
    unnamed = {f.fault_class for f in FAULTS.values()} - set(KINDS)
    assert unnamed <= {"accumulation_not_divided", "normalize_zero_vector"}  # not detected, and so without a name


def test_a_calibrating_scaler_is_handled_and_no_fault():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 1))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-4), torch.amp.GradScaler("cpu", init_scale=2.0**18)
    monitor = NumericalStabilityMonitor(model, optimizer, scaler)
    x = torch.randn(64, 8)
    for i in range(20):
        with monitor.step(i):
            with torch.autocast("cpu", FP16):
                loss = model(x).float().square().sum()
            monitor.record_loss(loss)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            monitor.gradients_ready()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.faults == []
    handled = [f for f in monitor.findings if f.handled]
    assert handled and handled[0].kind == "loss_scale_too_high" and handled[0].scale_dependent == "yes"


# -- the loops it works in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
def test_our_scaler_updates_inside_of_its_step(explicit):
    model = nn.Linear(8, 1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), DynamicLossScaler(256.0)
    monitor = NumericalStabilityMonitor(model, optimizer, scaler)
    for i in range(5):
        with monitor.step(i):
            loss = model(torch.randn(16, 8)).square().mean()
            monitor.record_loss(loss)
            optimizer.zero_grad()
            scaler.scale_loss(loss).backward()
            scaler.unscale_gradients(optimizer)
            monitor.gradients_ready()
            scaler.step(optimizer, update=not explicit)
            if explicit:
                scaler.update_scale()
    assert monitor.faults == []


def test_it_changes_nothing_about_the_training():
    def train(watch: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        monitor = NumericalStabilityMonitor(model, optimizer) if watch else None
        g = torch.Generator().manual_seed(1)
        for i in range(6):
            x = torch.randn(16, 8, generator=g) * (math.inf if i == 4 else 1)
            with monitor.step(i) if watch else torch.enable_grad():
                loss = model(x).square().mean()
                if watch:
                    monitor.record_loss(loss)
                optimizer.zero_grad()
                loss.backward()
                if watch:
                    monitor.gradients_ready()
                if loss.isfinite():
                    optimizer.step()
        return [*model.state_dict().values(), torch.rand(3)]

    for a, b in zip(train(True), train(False), strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def test_gradient_accumulation_and_several_optimizers():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 1)})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in model.values()]
    monitor = NumericalStabilityMonitor(model, optimizers)
    for i in range(5):
        with monitor.step(i):
            for part in range(3):
                x = torch.randn(4, 8) if (i, part) != (3, 1) else torch.full((4, 8), math.nan)
                loss = model["b"](model["a"](x)).square().mean() / 3
                monitor.record_loss(loss)
                loss.backward()
            monitor.gradients_ready()
            for optimizer in optimizers:
                if i != 3:
                    optimizer.step()
                optimizer.zero_grad()
    (found,) = monitor.faults
    assert (found.kind, found.step, found.module) == ("nan_in_data", 3, "input")


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)

    class Root(nn.Module):
        def forward(self, x):
            return x + (0 * x).sqrt()

    model = nn.Sequential(nn.Linear(8, 8), Root())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = NumericalStabilityMonitor(model, optimizer, trace_first=0)
    with monitor.step(0):
        loss = checkpoint(model, torch.randn(16, 8), use_reentrant=False).sum()
        monitor.record_loss(loss)
        loss.backward()
        monitor.gradients_ready()
    (found,) = monitor.faults
    assert found.kind == "sqrt_zero_grad" and found.phase == "backward"


def test_a_compiled_model_is_watched_from_outside():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = NumericalStabilityMonitor(compiled, optimizer, trace_first=0)
    for i in range(3):
        with monitor.step(i):
            x = torch.full((4, 8), math.nan) if i == 2 else torch.randn(4, 8)
            loss = compiled(x).square().mean()
            monitor.record_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            monitor.gradients_ready()
    (found,) = monitor.faults
    assert (found.kind, found.step) == ("nan_in_data", 2)


def test_findings_of_one_rank_are_known_to_all(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch\n"
        "from torch import distributed, nn\n"
        "from mixprec_lab.nan_debugging import NumericalStabilityMonitor\n"
        "rank, store = int(sys.argv[1]), sys.argv[2]\n"
        "distributed.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)\n"
        "torch.manual_seed(0)\n"
        "model = nn.parallel.DistributedDataParallel(nn.Linear(8, 1))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "monitor = NumericalStabilityMonitor(model, optimizer)\n"
        "for i in range(4):\n"
        "    with monitor.step(i):\n"
        "        x = torch.full((4, 8), float('nan')) if (i, rank) == (2, 1) else torch.ones(4, 8)\n"
        "        loss = model(x).square().mean()\n"
        "        monitor.record_loss(loss)\n"
        "        optimizer.zero_grad(); loss.backward(); monitor.gradients_ready()\n"
        "        if i < 2: optimizer.step()\n"
        "everywhere = monitor.gather()\n"
        "print([(r, f.kind, f.step) for r, f in everywhere if f.kind == 'nan_in_data'])\n"
        "distributed.destroy_process_group()\n",
        encoding="utf-8",
    )
    ranks = [
        subprocess.Popen([sys.executable, script, str(r), tmp_path / "store"], stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert said == ["[(1, 'nan_in_data', 2)]"] * 2


# -- state, hooks, bad input -------------------------------------------------------------------------------------------


def test_close_removes_every_hook_and_patch():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    backward, step = torch.autograd.backward, torch.amp.GradScaler.__dict__["step"]
    with NumericalStabilityMonitor(model) as monitor:
        with pytest.raises(ZeroDivisionError), monitor.step(0):
            assert torch.autograd.backward is not backward
            raise ZeroDivisionError
        assert torch.autograd.backward is backward and torch.amp.GradScaler.__dict__["step"] is step
        assert any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    monitor.close()
    with pytest.raises(RuntimeError, match="closed"), monitor.step(1):
        pass


def test_a_restored_monitor_continues():
    monitor = overflow_in_exp()
    state = copy.deepcopy(monitor.state_dict())
    other = NumericalStabilityMonitor(nn.Linear(2, 2))
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.findings == monitor.findings and isinstance(other.findings[0], Finding)
    with pytest.raises(ValueError, match="expected a step after 3"), other.step(3):
        pass
    with pytest.raises(ValueError, match="expected keys"):
        other.load_state_dict({"findings": []})
    assert other.findings == monitor.findings


def test_steps_must_grow_unless_rewound():
    monitor = NumericalStabilityMonitor(nn.Linear(2, 2))
    with monitor.step(5), pytest.raises(RuntimeError, match="step 5 to be over"), monitor.step(6):
        pass
    for bad in (5, 4, -1):
        with pytest.raises(ValueError, match="expected a step after 5"), monitor.step(bad):
            pass
    with pytest.raises(TypeError, match="whole number, got str"), monitor.step("6"):
        pass
    monitor.rewind(3)
    with monitor.step(3):
        pass


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: NumericalStabilityMonitor(nn.ReLU()), ValueError, "with parameters"),
        (lambda: NumericalStabilityMonitor([]), TypeError, "got list"),
        (lambda: NumericalStabilityMonitor(nn.Linear(1, 1), level="high"), ValueError, "cheap, deep"),
        (lambda: NumericalStabilityMonitor(nn.Linear(1, 1), trace_first=-1), ValueError, "trace_first"),
        (lambda: NumericalStabilityMonitor(nn.Linear(1, 1), "adam"), TypeError, "optimizer, or a list"),
        (lambda: NumericalStabilityMonitor(nn.Linear(1, 1), scaler=3.0), TypeError, "expected a scaler"),
        (lambda: NumericalStabilityMonitor(nn.Linear(1, 1), scheduler="x"), TypeError, "expected a scheduler"),
        (lambda: NumericalStabilityMonitor(nn.Linear(1, 1)).record_loss(1.0), RuntimeError, "inside of"),
        (lambda: NumericalStabilityMonitor(nn.Linear(1, 1)).gradients_ready(), RuntimeError, "inside of"),
    ],
)
def test_what_cannot_work_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize(
    ("loss", "error"), [("1.0", TypeError), (None, TypeError), (True, TypeError), (torch.ones(2), ValueError)]
)
def test_a_loss_that_is_no_scalar_is_refused(loss, error):
    monitor = NumericalStabilityMonitor(nn.Linear(1, 1))
    with monitor.step(0), pytest.raises(error, match="expected"):
        monitor.record_loss(loss)
    with pytest.raises(error, match="expected"):
        monitor.check_model_health(0, loss)
