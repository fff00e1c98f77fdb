"""Stories of runs that break, with exact numbers, and what the fixer may and may not do about them."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stability_runs import RUNS, Run, batches, grad_scaler, network, one
from torch import nn, optim
from torch.optim import lr_scheduler as lr

from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.nan_debugging import NumericalStabilityMonitor
from mixprec_lab.nan_debugging.fix_report import FixReport
from mixprec_lab.nan_debugging.fixer import NumericalStabilityFixer
from mixprec_lab.nan_debugging.learning_rate import scale_learning_rates
from mixprec_lab.nan_debugging.rollback import Rollback

NAN, INF = float("nan"), float("inf")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def own_generators():
    """The tests seed the global generators, and leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def health(step=0, loss=1.0, *, grads=(0, 0), params=(0, 0), **more) -> dict:
    """A report of ``check_model_health``: ``grads`` and ``params`` are (NaN, inf)."""
    return {
        "step": step, "loss": loss, "loss_nan": math.isnan(loss), "loss_inf": math.isinf(loss),
        "grad_nan_count": grads[0], "grad_inf_count": grads[1], "param_nan_count": params[0],
        "param_inf_count": params[1], "grad_norm": 1.0, "param_norm": 1.0, "issues": [], "scale": None,
        "skipped": False, "findings": [], **more,
    }  # fmt: skip


def exploding(step: int) -> SimpleNamespace:
    return SimpleNamespace(kind="exploding_lr", severity="fault", step=step, evidence="updates grew 8 times a step")


def trained(name="adamw, scaler", steps=4) -> Run:
    run = RUNS[name]()
    for batch in batches(steps):
        run.step(batch)
    return run


def rates(run) -> list[float]:
    return [float(group["lr"]) for optimizer in run.optimizers for group in optimizer.param_groups]


# -- ordinary skips are the scaler's -----------------------------------------------------------------------------------


def test_an_ordinary_overflow_is_left_to_the_scaler():
    model = nn.Linear(2, 1)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    fixer = NumericalStabilityFixer(model, optimizer, scaler)
    fixer.create_checkpoint()
    with NumericalStabilityMonitor(model, optimizer, scaler) as monitor:
        weight = model.weight.detach().clone()
        loss = 1e36 * model(torch.ones(1, 2)).sum()
        scaler.scale(loss).backward()  # 1e36 * 65536 is beyond FP32
        gradient = model.weight.grad
        fix = fixer.fix_nan_inf(monitor.check_model_health(0, loss))
        assert (fix.action, fix.skip) == ("none", False)
        assert fix.reason == "gradients overflowed under the loss scale: the scaler skips and backs off"
        assert model.weight.grad is gradient  # the scaler must see it
        scaler.step(optimizer)
        scaler.update()
    assert (scaler.get_scale(), optimizer.param_groups[0]["lr"]) == (32768, 0.1)
    assert torch.equal(model.weight, weight)


def test_twenty_overflows_in_a_row_neither_cut_the_learning_rate_nor_restore():
    run = trained()
    fixer = run.fixer()
    fixer.create_checkpoint(4)
    before, lrs = run.bits(), rates(run)
    for step in range(4, 24):
        assert fixer.fix_nan_inf(health(step, grads=(0, 7), scale=256.0, skipped=True)).action == "none"
    assert (run.bits(), rates(run), fixer.lr_factor) == (before, lrs, 1.0)


@pytest.mark.parametrize(
    "scaler, loss, action",
    [
        (lambda: grad_scaler(), 1.0, "none"),
        (lambda: DynamicLossScaler(8.0), 1.0, "none"),
        (lambda: grad_scaler(), NAN, "skip"),  # no scale makes a loss NaN
        (lambda: grad_scaler(init_scale=1.0), 1.0, "skip"),  # nothing to back off from
        (lambda: grad_scaler(enabled=False), 1.0, "skip"),
        (lambda: None, 1.0, "skip"),
    ],
)
def test_a_report_without_the_key_skipped_is_judged_by_the_scaler(scaler, loss, action):
    model = network()
    fixer = NumericalStabilityFixer(model, optim.SGD(model.parameters(), lr=0.1), scaler())
    report = health(0, loss, grads=(0, 3))
    del report["skipped"]
    assert fixer.fix_nan_inf(report).action == action


# -- a skip is a skip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_skip_moves_nothing_where_zeroing_and_stepping_goes_on(name):
    run = trained(name)
    fixer = run.fixer()
    twin = copy.deepcopy(run)
    for victim in (run, twin):
        victim.backward(victim.loss(batches(5)[4]))
        next(p for p in victim.model.parameters() if p.grad is not None).grad.view(-1)[0] = NAN
    before = run.bits()

    fix = fixer.fix_nan_inf(health(4, grads=(1, 0)))
    assert (fix.action, fix.skip, fix.details) == ("skip", True, {"in_a_row": 1})
    assert fix.reason.startswith("1 NaN and 0 infinite values in the gradients")
    assert all(p.grad is None for p in run.model.parameters())
    assert run.bits() == before

    weights = [p.detach().clone() for p in twin.model.parameters()]
    for p in twin.model.parameters():
        p.grad.zero_()
    for optimizer in twin.optimizers:
        optimizer.step()
    assert twin.bits() != before
    moved = any(not torch.equal(p, w) for p, w in zip(twin.model.parameters(), weights, strict=True))
    assert moved or name in ("milestones", "adafactor")  # neither momentum nor decay: only the state moves


def test_a_skip_after_unscaling_leaves_a_scaler_that_can_unscale_again_at_the_same_scale():
    for name in ("adamw, scaler", "own scaler"):
        run = trained(name)
        fixer, straight = run.fixer(), trained(name)
        loss = run.loss(batches(5)[4]) * NAN
        if isinstance(run.scaler, torch.amp.GradScaler):
            run.scaler.scale(loss).backward()
            run.scaler.unscale_(run.optimizers[0])
        else:
            run.scaler.scale_loss(loss).backward()
            run.scaler.unscale_gradients(run.optimizers[0])
        assert fixer.fix_nan_inf(health(4, NAN, grads=(9, 0))).reason.startswith("the loss is nan")
        assert run.scaler.state_dict() == straight.scaler.state_dict()
        run.step(batches(6)[5])
        assert len(run.losses) == 5 and math.isfinite(run.losses[-1])


def test_a_scaler_that_has_scaled_nothing_yet_survives_a_skip_and_a_restore():
    model = network()
    optimizer, scaler = optim.SGD(model.parameters(), lr=0.1), grad_scaler(init_scale=64.0)
    fixer = NumericalStabilityFixer(model, optimizer, scaler)
    fixer.create_checkpoint()
    assert fixer.fix_nan_inf(health(0, NAN)).action == "skip"
    assert fixer.fix_nan_inf(health(0, NAN, params=(1, 0))).action == "restore"
    scaler.scale(model(torch.ones(2, 6)).sum()).backward()
    scaler.step(optimizer)  # asserts if the scale was written from outside
    scaler.update()
    assert scaler.get_scale() == 64


# -- what is bad for good is restored ----------------------------------------------------------------------------------

BAD = {
    "parameter 0.weight": lambda run: run.model[0].weight.data,
    "buffer 1.running_var": lambda run: run.model[1].running_var,
    "exp_avg of 0.weight": lambda run: run.optimizers[0].state[run.model[0].weight]["exp_avg"],
    "exp_avg_sq of 4.bias": lambda run: run.optimizers[0].state[run.model[4].bias]["exp_avg_sq"],
}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("what", BAD)
def test_bad_parameters_buffers_and_optimizer_state_are_restored_exactly(what, value):
    run = trained()
    fixer = run.fixer()
    fixer.create_checkpoint(4)
    saved = run.bits()
    run.step(batches(5)[4])
    BAD[what](run).view(-1)[0] = value
    fix = fixer.fix_nan_inf(health(5))  # the report does not know about state and buffers
    assert (fix.action, fix.skip) == ("restore", True)
    assert fix.reason == f"NaN or inf in {what}: went back to the checkpoint of step 4"
    assert fix.details == {"step": 4, "times": 1, "bad": [what], "scale": 512.0, "scale_of_checkpoint": 512.0}
    assert run.bits() == saved


def test_a_bad_master_is_seen_although_the_optimizer_holds_it():
    run = trained("masters")
    fixer = run.fixer()
    fixer.create_checkpoint(4)
    saved = run.bits()
    run.optimizers[0].named_masters()["0.bias"].data[0] = INF
    fix = fixer.fix_nan_inf(health(4))
    assert (fix.action, fix.details["bad"], run.bits() == saved) == ("restore", ["parameter 0.bias (master)"], True)


def test_one_nan_batch_poisons_batchnorm_and_only_a_restore_cures_it():
    run = trained("momentum")
    fixer = run.fixer()
    fixer.create_checkpoint(4)
    saved = run.bits()
    x, y = batches(5)[4]
    loss = run.loss((x * NAN, y))
    loss.backward()
    with NumericalStabilityMonitor(run.model) as monitor:
        report = monitor.check_model_health(4, loss)
    assert report["param_nan_count"] == 0 and run.model[1].running_mean.isnan().all()
    fix = fixer.fix_nan_inf(report)
    assert fix.details["bad"] == ["buffer 1.running_mean", "buffer 1.running_var"]
    assert run.bits() == saved


def test_without_a_checkpoint_bad_parameters_are_an_error_that_changes_nothing():
    run = trained()
    fixer = run.fixer()
    run.model[0].weight.data[0, 0] = NAN
    run.model[0].weight.grad[0, 0] = 7
    before = run.bits()
    with pytest.raises(
        RuntimeError, match=r"NaN or inf in parameter 0.weight: expected a checkpoint .*, got none: call"
    ):
        fixer.fix_nan_inf(health(4, NAN, params=(1, 0)))
    assert run.bits() == before and run.model[0].weight.grad[0, 0] == 7 and fixer.history == []


@pytest.mark.parametrize(
    "at_checkpoint, now, after",
    [
        (65536.0, 64.0, (64.0, 2)),  # backed off since: the note's "reset" would raise it
        (64.0, 128.0, (64.0, 1)),  # grown since
        (64.0, 64.0, (64.0, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["torch", "own"])
def test_no_repair_raises_a_scale(kind, at_checkpoint, now, after):
    model = network()
    key = {"torch": "_growth_tracker", "own": "clean"}[kind]
    scaler = grad_scaler() if kind == "torch" else DynamicLossScaler(scale_window=3)
    fixer = NumericalStabilityFixer(model, optim.SGD(model.parameters(), lr=0.1), scaler)
    scaler.load_state_dict({**scaler.state_dict(), "scale": at_checkpoint, key: 1})
    fixer.create_checkpoint(0)
    scaler.load_state_dict({**scaler.state_dict(), "scale": now, key: 2})
    model[0].weight.data[0, 0] = NAN
    fix = fixer.fix_nan_inf(health(9, params=(1, 0)))
    assert (fix.details["scale"], fix.details["scale_of_checkpoint"]) == (after[0], at_checkpoint)
    assert (scaler.state_dict()["scale"], scaler.state_dict()[key]) == after
    fixer.restore_checkpoint()  # asked for by name, it is exact
    assert (scaler.state_dict()["scale"], scaler.state_dict()[key]) == (at_checkpoint, 1)


# -- skips in a row, explosions, and the learning rate -----------------------------------------------------------------


def test_after_enough_skips_in_a_row_the_checkpoint_comes_back_and_a_good_step_starts_the_count_again():
    run = trained()
    fixer = run.fixer(restore_after=3)
    fixer.create_checkpoint(4)
    actions = [
        fixer.fix_nan_inf(health(step, loss)).action
        for step, loss in enumerate([NAN, INF, 1.0, NAN, NAN, NAN, NAN, 1.0], 4)
    ]
    assert actions == ["skip", "skip", "none", "skip", "skip", "restore", "skip", "none"]
    assert fixer.history[5].reason == "the loss is nan, 3 times in a row: went back to the checkpoint of step 4"
    assert fixer.lr_factor == 1.0


def test_without_a_checkpoint_skips_go_on_and_say_so():
    fixer = RUNS["momentum"]().fixer(restore_after=2)
    fixes = [fixer.fix_nan_inf(health(step, NAN)) for step in range(4)]
    assert [(fix.action, fix.details["in_a_row"]) for fix in fixes] == [("skip", n) for n in (1, 2, 3, 4)]
    assert str(fixes[3]) == "skip: the loss is nan; there is no checkpoint to go back to if this goes on"


def test_a_loss_far_above_its_median_and_its_beginning_is_skipped():
    fixer = RUNS["momentum"]().fixer()
    for step, loss in enumerate([4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.125]):
        assert fixer.fix_nan_inf(health(step, loss)).action == "none"
    for loss, action in ((39.0, "none"), (40.0, "none"), (41.0, "none"), (100.0, "none"), (101.0, "skip")):
        twin = copy.deepcopy(fixer)  # the median is 1, the first losses were at most 4
        assert twin.fix_nan_inf(health(7, loss)).action == action
    assert twin.history[-1].reason.startswith("the loss is 101, its median 1")
    for step in range(7, 60):
        fixer.fix_nan_inf(health(step, 1e-6))
    assert fixer.fix_nan_inf(health(60, 39.0)).action == "none"  # a run that has converged may stumble
    assert copy.deepcopy(fixer).fix_nan_inf(health(61, 41.0)).action == "skip"


def test_few_losses_explode_nothing():
    fixer = RUNS["momentum"]().fixer()
    assert [fixer.fix_nan_inf(health(i, 10.0 ** (4 * i))).action for i in range(5)] == ["none"] * 5


def test_the_second_restore_of_one_checkpoint_halves_the_learning_rate_and_the_sixth_is_refused():
    run = trained("momentum")
    fixer = run.fixer()
    fixer.create_checkpoint(4)
    lrs = []
    for times in range(1, 6):
        run.model[0].weight.data[0, 0] = NAN
        fix = fixer.fix_nan_inf(health(4 + times, params=(1, 0)))
        assert (fix.action, fix.details["times"]) == ("restore", times)
        assert fix.details.get("learning_rates") == (None if times == 1 else rates(run))
        lrs += rates(run)
    start = 0.1 * 0.1  # StepLR has stepped once
    assert lrs == pytest.approx([start, start / 2, start / 4, start / 8, start / 16], rel=0, abs=0)
    assert fix.reason.endswith("with 0.0625 times the learning rate that the run began with")
    run.model[0].weight.data[0, 0] = NAN
    before = run.bits()
    with pytest.raises(RuntimeError, match=r"after the checkpoint of step 4 was restored 5 times: it is not"):
        fixer.fix_nan_inf(health(10, params=(1, 0)))
    assert run.bits() == before


def test_nan_batches_are_no_evidence_against_the_learning_rate():
    run = trained("momentum")
    fixer = run.fixer(restore_after=2)
    fixer.create_checkpoint(4)
    for times in (1, 2, 3):
        run.model[1].running_mean[0] = NAN  # as a NaN batch leaves it
        fix = fixer.fix_nan_inf(health(4 + times, NAN))
        assert (fix.details["times"], fix.details["bad"]) == (times, ["buffer 1.running_mean"])
    for step in range(8, 12):
        fix = fixer.fix_nan_inf(health(step, NAN))
    assert (fix.action, fix.details["times"], fixer.lr_factor) == ("restore", 5, 1.0)


@pytest.mark.parametrize("last, loss", [(1.0, 1e5), (500.0, INF)])
def test_losses_that_climbed_before_they_broke_are_evidence_at_the_second_restore(last, loss):
    run = trained("momentum")
    fixer = run.fixer(restore_after=2)
    for step, good in enumerate([60.0, 1.0, 1.0, 1.0, 1.0]):
        fixer.fix_nan_inf(health(step, good))
    fixer.create_checkpoint(5)
    factors = []
    for _ in range(3):
        assert fixer.fix_nan_inf(health(5, last)).action == "none"
        for step in (6, 7):
            fix = fixer.fix_nan_inf(health(step, loss))
        assert fix.action == "restore"
        factors.append(fixer.lr_factor)
    assert factors == [1.0, 0.5, 0.25]


def test_a_restore_forgets_the_losses_of_the_future_it_left():
    run = RUNS["momentum"]()
    fixer = run.fixer()
    fixer.create_checkpoint(0)
    for step in range(5):
        fixer.fix_nan_inf(health(step, 10.0**step))
    fixer.restore_checkpoint()
    for step in range(5):
        fixer.fix_nan_inf(health(step, 1.0))
    assert fixer.fix_nan_inf(health(5, 101.0)).action == "skip"  # 10 times 10**4 would let it pass


def test_the_scaler_inside_of_a_master_weight_optimizer_is_not_raised_either():
    run = trained("masters, scaler")
    scaler = run.optimizers[0].scaler
    fixer = run.fixer()
    fixer.create_checkpoint(4)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0})
    run.model[0].weight.data[0, 0] = NAN
    assert fixer.fix_nan_inf(health(5, params=(1, 0))).details["scale"] == 2.0
    assert scaler.get_scale() == 2.0
    run.step(batches(1)[0])


def test_a_later_checkpoint_and_a_rollback_are_progress_and_a_checkpoint_of_the_same_step_is_not():
    for again, factor in ((4, 0.5), (5, 1.0), (None, 1.0)):
        run = trained("momentum")
        fixer = run.fixer()
        fixer.create_checkpoint(4)
        for _ in range(2):
            run.model[0].weight.data[0, 0] = NAN
            fixer.fix_nan_inf(health(6, params=(1, 0)))
            fixer.create_checkpoint(again) if again else fixer.rollback_and_skip([6])
        assert fixer.lr_factor == factor


def test_a_cut_is_in_later_checkpoints_outlives_restores_and_ends_with_a_rollback_behind_it():
    run = trained("momentum")
    start = rates(run)[0]
    fixer = run.fixer()
    fixer.create_checkpoint(4)
    fix = fixer.fix_nan_inf(health(5, findings=[exploding(5)]))
    assert (fix.action, fix.skip, fix.details) == ("cut_learning_rate", True, {"learning_rates": [start / 2]})
    assert fix.reason == f"exploding_lr at step 5: updates grew 8 times a step: halved, to {start / 2:g}"
    assert all(p.grad is None for p in run.model.parameters())
    assert fixer.fix_nan_inf(health(5, findings=[exploding(5)])).action == "none"  # one finding, one cut
    run.model[0].weight.data[0, 0] = NAN
    assert fixer.fix_nan_inf(health(6, params=(1, 0))).details["learning_rates"] == [start / 2]
    fixer.create_checkpoint(7)
    fixer.rollback_and_skip([5])
    assert (rates(run), fixer.lr_factor, fixer.checkpoints) == ([start], 1.0, (4,))


def test_parameters_that_exploded_by_the_learning_rate_come_back_with_half_of_it():
    run = trained("momentum")
    fixer, start = run.fixer(), rates(run)[0]
    fixer.create_checkpoint(4)
    run.model[0].weight.data[0, 0] = INF
    fix = fixer.fix_nan_inf(health(6, params=(0, 1), findings=[exploding(6)]))
    assert (fix.action, fix.details["times"], fix.details["learning_rates"]) == ("restore", 1, [start / 2])
    assert rates(run) == [start / 2]


def test_findings_of_other_kinds_or_severities_cut_nothing():
    run = trained("momentum")
    fixer, before = run.fixer(), rates(run)
    for kind, severity in (("spike", "fault"), ("exploding_lr", "warning"), ("exploding_lr", "info")):
        found = SimpleNamespace(kind=kind, severity=severity, step=3, evidence="")
        assert fixer.fix_nan_inf(health(3, findings=[found])).action == "none"
    assert rates(run) == before


def test_a_run_whose_learning_rate_is_six_times_too_high_dies_alone_and_converges_with_the_fixer():
    def descend(with_fixer: bool) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 3.0)
        optimizer = optim.SGD(model.parameters(), lr=12.0)  # w**2 / 2 needs less than 2
        fixer = NumericalStabilityFixer(model, optimizer)
        fixer.create_checkpoint(0)
        for step in range(400):
            optimizer.zero_grad()
            loss = model.weight.square().sum() / 2
            loss.backward()
            if with_fixer:
                with NumericalStabilityMonitor(model) as monitor:
                    report = monitor.check_model_health(step, loss)
                if fixer.fix_nan_inf(report).skip:
                    continue
            optimizer.step()
        return loss.item() if not with_fixer else (loss.item(), fixer.lr_factor)

    assert math.isnan(descend(with_fixer=False))
    assert descend(with_fixer=True) == (0.0, 0.125)  # 12 again, 6 and 3 diverge; 1.5 does not


SCHEDULERS = {
    "none": lambda o: None,
    "step": lambda o: lr.StepLR(o, 4),
    "lambda": lambda o: lr.LambdaLR(o, lambda t: 1 / (1 + t)),
    "cosine": lambda o: lr.CosineAnnealingLR(o, 9, eta_min=0.01),
    "restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3, eta_min=0.01),
    "one cycle": lambda o: lr.OneCycleLR(o, max_lr=0.3, total_steps=40),
    "cyclic": lambda o: lr.CyclicLR(o, base_lr=0.1, max_lr=0.4, step_size_up=3),
    "weight averaging": lambda o: optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=9),
    "warm-up, then cosine": lambda o: lr.SequentialLR(
        o, [lr.LinearLR(o, 0.25, total_iters=6), lr.CosineAnnealingLR(o, 9)], milestones=[6]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_cut_rate_stays_at_half_of_the_uncut_one_whatever_the_scheduler(kind, tensor):
    paths = []
    for factor in (1.0, 0.5):
        model = network()
        rate = torch.tensor(0.2) if tensor else 0.2
        optimizer = optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        optimizer.step()
        scheduler = SCHEDULERS[kind](optimizer)
        path = []
        for step in range(38):
            if step == 4:
                scale_learning_rates([optimizer], [scheduler] if scheduler else [], factor)
            path.append(float(optimizer.param_groups[0]["lr"]) * (1 if step < 4 else 1 / factor))
            optimizer.step()
            if scheduler:
                scheduler.step()
        paths.append(path)
    assert paths[0] == pytest.approx(paths[1], rel=1e-6)
    assert len(set(paths[0])) > 2 or kind == "none"


def test_a_rate_shared_by_several_groups_is_cut_once():
    model, rate = network(), torch.tensor(0.2)
    groups = [{"params": m.parameters(), "lr": rate} for m in (model[0], model[1], model[4])]
    optimizer = optim.SGD(groups, lr=0.1)
    assert scale_learning_rates([optimizer], [], 0.5) == [pytest.approx(0.1)] * 3
    assert optimizer.param_groups[1]["lr"] is rate


def test_a_checkpoint_without_a_step_is_that_of_the_next_one():
    run = RUNS["momentum"]()
    fixer = run.fixer(keep=9)
    assert [fixer.create_checkpoint(), fixer.create_checkpoint()] == [0, 1]
    fixer.fix_nan_inf(health(7))
    assert [fixer.create_checkpoint(), fixer.create_checkpoint()] == [8, 8]
    fixer.fix_nan_inf(health(12))
    run.model[0].weight.data[0, 0] = NAN
    assert fixer.fix_nan_inf(health(13, params=(1, 0))).details["step"] == 8
    assert fixer.create_checkpoint() == 8  # where the run is again
    fixer.restore_checkpoint(1)
    assert fixer.create_checkpoint() == 1


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_a_rollback_takes_the_newest_checkpoint_that_has_not_seen_the_bad_batches():
    for asked, options, step, skip, left in [
        ([25], {}, 20, {25}, (0, 10, 20)),
        ({31, 12}, {}, 10, {12, 31}, (0, 10)),
        ([10], {}, 10, {10}, (0, 10)),
        (range(25, 28), {"before": 15}, 10, {25, 26, 27}, (0, 10)),
        (3, {}, 30, {30, 31, 32}, (0, 10, 20, 30)),
        (300, {"before": 25 - 10}, 10, set(range(10, 310)), (0, 10)),
        ([5], {"before": 30}, 0, {5}, (0,)),
    ]:
        fixer = RUNS["momentum"]().fixer(keep=9)
        for i in (0, 10, 20, 30):
            fixer.create_checkpoint(i)
        plan = fixer.rollback_and_skip(asked, **options)
        assert plan == Rollback(step, frozenset(skip))
        assert sorted(fixer.checkpoints) == sorted(left) and fixer.checkpoints[-1] == step


def test_the_newest_is_the_one_of_the_latest_step_whatever_was_restored_last():
    fixer = RUNS["momentum"]().fixer()
    for i in (0, 10, 20):
        fixer.create_checkpoint(i)
    fixer.restore_checkpoint(0)
    assert fixer.rollback_and_skip([25]).step == 20
    fixer.restore_checkpoint(0)
    assert fixer.rollback_and_skip(1).step == 0  # how many, from where the run is


def test_the_files_of_the_abandoned_future_are_removed(tmp_path):
    run = RUNS["momentum"]()
    fixer = run.fixer(directory=tmp_path)
    for i in (0, 10, 20):
        fixer.create_checkpoint(i)
    fixer.rollback_and_skip([13])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000000.pt", "checkpoint-00000010.pt"]
    assert run.fixer(directory=tmp_path).checkpoints == (0, 10)


def test_remaining_batches_are_numbered_and_complete():
    plan = Rollback(3, frozenset({4, 6}))
    assert list(plan.remaining("abcdefgh")) == [(3, "d"), (5, "f"), (7, "h")]
    assert list(plan.remaining(iter("bcdefgh"), first=1)) == [(3, "d"), (5, "f"), (7, "h")]
    assert list(plan.remaining("de", first=3)) == [(3, "d")]
    with pytest.raises(ValueError, match="expected batches from number 3 or earlier, got them from 4 on"):
        plan.remaining("efgh", first=4)


@pytest.mark.parametrize(
    "asked, options, error, match",
    [
        (0, {}, ValueError, "expected at least one batch to skip, got 0"),
        ([], {}, ValueError, "expected numbers of batches"),
        ([-1, 4], {}, ValueError, "of at least 0"),
        ("12", {}, TypeError, "got a str"),
        (True, {}, TypeError, "got a bool"),
        (None, {}, TypeError, "got a NoneType"),
        ([torch.eye(2)], {}, TypeError, "expected the numbers of the batches, got a Tensor"),
        ([9], {}, RuntimeError, r"expected a checkpoint of step 9 or earlier, got \[10, 20\]"),
        (3, {"before": 5}, RuntimeError, "expected a checkpoint of step 5 or earlier"),
        (3, {"before": -1}, ValueError, "expected before to be a step"),
        (3, {"before": "12"}, ValueError, "got '12'"),
    ],
)
def test_a_rollback_that_makes_no_sense_changes_nothing(asked, options, error, match):
    run = trained("momentum")
    fixer = run.fixer()
    fixer.create_checkpoint(10)
    fixer.create_checkpoint(20)
    run.step(batches(1)[0])
    before = run.bits()
    with pytest.raises(error, match=match):
        fixer.rollback_and_skip(asked, **options)
    assert run.bits() == before and fixer.checkpoints == (10, 20)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "report, error, match",
    [
        (None, TypeError, "expected the report of check_model_health"),
        ("loss", TypeError, "got a str"),
        ({}, ValueError, "got one without step, loss, loss_nan"),
        ({"step": 1, "loss": 1.0}, ValueError, "got one without loss_nan, loss_inf, grad_nan_count"),
        (health(-1), ValueError, "expected step to be a whole number of at least 0, got -1"),
        (health(0, grads=(-1, 0)), ValueError, "expected grad_nan_count"),
        (health(0, grads=(0, 0.5)), ValueError, "expected grad_inf_count"),
        (health() | {"loss": "1"}, TypeError, "expected the loss as a number, got a str"),
        (health() | {"loss": torch.ones(())}, TypeError, "got a Tensor"),
    ],
)
def test_something_else_than_a_report_changes_nothing(report, error, match):
    run = trained()
    fixer, before = run.fixer(), run.bits()
    with pytest.raises(error, match=match):
        fixer.fix_nan_inf(report)
    assert run.bits() == before and fixer.history == [] and run.model[0].weight.grad is not None


@pytest.mark.parametrize("step", [-1, 1.0, "1", True])
def test_a_step_is_a_whole_number(step):
    with pytest.raises(ValueError, match="expected step to be a whole number of at least 0"):
        RUNS["momentum"]().fixer().create_checkpoint(step)


def test_arguments_of_another_kind_are_refused(tmp_path):
    model = network()
    sgd = optim.SGD(model.parameters(), lr=0.1)
    other = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for arguments, options, error, match in [
        ((sgd, sgd), {}, TypeError, "expected an nn.Module, got SGD"),
        ((nn.ReLU(), sgd), {}, ValueError, "expected a model with parameters"),
        ((model, None), {}, ValueError, "and an optimizer, got none"),
        ((model, model), {}, TypeError, "expected optimizer to be one or a list, got a Sequential without"),
        ((model, [sgd, other]), {}, ValueError, "of this model's parameters, got 2 that are not"),
        ((model, sgd, 65536.0), {}, TypeError, "expected scaler to be a torch.amp.GradScaler or .*, got a float"),
        ((model, sgd, None, 0.1), {}, TypeError, "expected scheduler to be one or a list, got a float"),
        ((model, sgd), {"device": "meta"}, ValueError, 'expected device to be "cpu", or None'),
        ((model, sgd), {"keep": 0}, ValueError, "expected keep to be a whole number of at least 1, got 0"),
        ((model, sgd), {"restore_after": 1.5}, ValueError, "expected restore_after"),
    ]:
        with pytest.raises(error, match=match):
            NumericalStabilityFixer(*arguments, **options)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        NumericalStabilityFixer(model, sgd, directory=tmp_path / "file")


def test_every_action_but_none_asks_to_skip():
    assert [FixReport(a, "").skip for a in ("none", "skip", "restore", "cut_learning_rate")] == [
        False,
        True,
        True,
        True,
    ]


# -- the whole loop ----------------------------------------------------------------------------------------------------


def test_the_loop_of_the_docstring_with_bad_batches_is_the_run_on_the_good_ones():
    def train(data, repair: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        scaler = grad_scaler()
        scheduler = lr.CosineAnnealingLR(optimizer, 30)
        fixer = NumericalStabilityFixer(model, optimizer, scaler, scheduler)
        with NumericalStabilityMonitor(model, optimizer, scaler, scheduler) as monitor:
            for i, (x, y) in enumerate(data):
                if i % 5 == 0:
                    fixer.create_checkpoint(i)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if repair and fixer.fix_nan_inf(monitor.check_model_health(i, loss)).skip:
                    continue
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() >= scale:
                    scheduler.step()
        return model, scaler, [fix.action for fix in fixer.history]

    data = batches(20)
    bad = [(x * NAN, y) if i in (7, 11) else (x, y) for i, (x, y) in enumerate(data)]
    model, scaler, actions = train(bad, repair=True)
    good, same, _ = train([batch for i, batch in enumerate(data) if i not in (7, 11)], repair=False)
    assert actions == ["skip" if i in (7, 11) else "none" for i in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), good.parameters(), strict=True))
    assert scaler.state_dict() == same.state_dict()


@pytest.mark.parametrize("unscale", [True, False])
def test_a_skip_inside_of_a_monitored_step_is_no_misuse_of_the_scaler(unscale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer, scaler = optim.AdamW(model.parameters(), lr=0.01), grad_scaler()
    fixer = NumericalStabilityFixer(model, optimizer, scaler)
    with NumericalStabilityMonitor(model, optimizer, scaler) as monitor:
        for i, (x, y) in enumerate(batches(16)):
            with monitor.step(i):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x * 1e5 if i == 12 else x), y)
                monitor.record_loss(loss)
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                monitor.gradients_ready()
                if fixer.fix_nan_inf(monitor.check_model_health(i, loss, scaled=not unscale)).skip:
                    continue
                scaler.step(optimizer)
                scaler.update()
    assert [i for i, fix in enumerate(fixer.history) if fix.skip] == [12]
    assert monitor.faults == []


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("device", ["cpu", None])
def test_on_a_gpu_a_rollback_is_bitwise_too(device):
    data = batches(12)

    def run_of():
        torch.cuda.manual_seed_all(0)
        return Run(
            one(lambda p: optim.AdamW(p, lr=0.01, fused=True)),
            lambda: torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=3), device="cuda",
        )  # fmt: skip

    straight = run_of()
    for batch in data[:4] + data[6:]:
        straight.step(batch)
    expected = straight.bits(), torch.cuda.get_rng_state()
    run = run_of()
    fixer = run.fixer(device=device)
    for i, batch in enumerate(data[:6]):
        if i == 4:
            fixer.create_checkpoint(i)
        run.step(batch)
    for _, batch in fixer.rollback_and_skip([4, 5]).remaining(data):
        run.step(batch)
    assert run.bits() == expected[0]
    assert torch.equal(torch.cuda.get_rng_state(), expected[1])
