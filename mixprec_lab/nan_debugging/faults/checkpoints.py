"""Faults of saving and resuming: what was not in the checkpoint, or was there in too few bits.

A new process is played in this one: the objects stay the same, so that whoever watches them still can, and
``_as_new`` runs their constructor again, after which the checkpoint is loaded.
"""

import copy

import torch
from torch.nn import functional as F

from mixprec_lab.nan_debugging.faults._networks import adam, classification, mlp, regression
from mixprec_lab.nan_debugging.faults._run import Probe, Run, fault

RESUME = 20  #: the step before which the run is resumed


def _as_new(optimizer: torch.optim.Adam) -> None:
    """Leave ``optimizer`` as a new process constructs it: the options of its groups, no state."""
    optimizer.state.clear()


@fault(
    "The checkpoint holds no scaler state: skipped steps after every resume",
    "scaler_state_not_restored", "checkpoint", step=RESUME, silent=True,
    modules=("^scaler$",), operations=("scaler", "state_dict"),
    cure="save scaler.state_dict() and load it",
)  # fmt: skip
def scaler_state_not_restored(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer, scaler = adam(model, 1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**24)

    def resume() -> None:
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        saved["scaler"] = scaler.state_dict()
        _as_new(optimizer)
        scaler.__init__("cpu", init_scale=2.0**24)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if repaired:
            scaler.load_state_dict(saved["scaler"])

    def step(i: int, probe: Probe) -> None:
        if i == RESUME:
            resume()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        probe.gradients()
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, 30, scaler)


def _resuming(seed: int, restore, scheduled: bool = False) -> Run:
    """A run with Adam that is stopped and resumed: ``restore(saved, model, optimizer, scheduler)`` loads the rest."""
    model, (x, y) = mlp(seed), regression(seed)
    optimizer = adam(model, 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40) if scheduled else None

    def resume() -> None:
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if scheduler is not None:
            saved["scheduler"] = scheduler.state_dict()
            scheduler.last_epoch, scheduler._step_count = 0, 1
        _as_new(optimizer)
        model.load_state_dict(saved["model"])
        restore(saved, optimizer, scheduler)

    def step(i: int, probe: Probe) -> None:
        if i == RESUME:
            resume()
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    return Run(model, [optimizer], step, 30, scheduler=scheduler)


@fault(
    "The checkpoint holds no optimizer state: Adam starts again with empty moments",
    "optimizer_state_not_restored", "checkpoint", step=RESUME, silent=True,
    modules=("^optimizer$",), operations=("optimizer", "exp_avg", "state_dict"),
    cure="save optimizer.state_dict() and load it",
)  # fmt: skip
def optimizer_state_not_restored(seed: int, repaired: bool) -> Run:
    def restore(saved: dict, optimizer: torch.optim.Optimizer, scheduler: None) -> None:
        if repaired:
            optimizer.load_state_dict(saved["optimizer"])

    return _resuming(seed, restore)


@fault(
    "The checkpoint holds no schedule: the learning rate jumps back to its start",
    "scheduler_state_not_restored", "checkpoint", step=RESUME, silent=True,
    modules=("^scheduler$", "^optimizer$"), operations=("scheduler", "lr", "state_dict"),
    cure="save scheduler.state_dict() and load it",
)  # fmt: skip
def scheduler_state_not_restored(seed: int, repaired: bool) -> Run:
    def restore(saved: dict, optimizer: torch.optim.Optimizer, scheduler) -> None:
        optimizer.load_state_dict(saved["optimizer"])
        if repaired:
            scheduler.load_state_dict(saved["scheduler"])
        else:
            for group in optimizer.param_groups:  # what the constructor of a new schedule does
                group["lr"] = group["initial_lr"]

    return _resuming(seed, restore, scheduled=True)


@fault(
    "Optimizer state saved in FP16 to save space: the second moment comes back as zero",
    "optimizer_state_cast", "checkpoint", step=RESUME, silent=True,
    modules=("^optimizer$",), operations=("exp_avg_sq", "optimizer", "to_copy"),
    cure="save optimizer state in the dtype in which it is kept",
)  # fmt: skip
def optimizer_state_cast(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), regression(seed)
    optimizer = adam(model, 1e-3)

    def resume() -> None:
        for state in optimizer.state.values():
            if not repaired:
                state["exp_avg_sq"] = state["exp_avg_sq"].half().float()

    def step(i: int, probe: Probe) -> None:
        if i == RESUME:
            resume()
        optimizer.zero_grad()
        loss = 1e-2 * F.mse_loss(model(x), y)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        optimizer.step()

    return Run(model, [optimizer], step, 30)
