"""Faults of the loss scale: too high, too low, unchecked, bypassed, half applied."""

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.nan_debugging.faults._networks import adam, amp, chain, classification, linear, mlp, regression, sgd
from mixprec_lab.nan_debugging.faults._run import Probe, Run, fault

SCALER, UNSCALE = ("^scaler$",), ("scaler", "unscale")


@fault(
    "The loss scale starts far too high: every step is skipped",
    "loss_scale_too_high", "backward", silent=True, modules=SCALER, operations=UNSCALE,
    cure="start at 2**16 or lower, or wait for the back-off; raise an alarm after several skipped steps in a row",
)  # fmt: skip
def scale_far_too_high(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    scale = 2.0**10 if repaired else 2.0**60
    return amp(model, sgd(model), lambda i: F.cross_entropy(model(x), y), 10, scale)


@fault(
    "A static loss scale without a check: infinite gradients reach the weights",
    "static_scale_no_check", "optimizer", modules=("fc2", "^scaler$"), operations=("to_copy|ToCopy", "scale"),
    cure="torch.amp.GradScaler, which checks before it steps; or skip the step if a gradient is not finite",
)  # fmt: skip
def static_scale_unchecked(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    if repaired:
        return amp(model, sgd(model), lambda i: F.cross_entropy(model(x), y), 20, 2.0**24)
    optimizer = sgd(model)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        (loss * 2.0**24).backward()
        for p in model.parameters():
            p.grad.div_(2.0**24)
        probe.gradients()
        optimizer.step()

    return Run(model, [optimizer], step, 20)


@fault(
    "FP16 without loss scaling: every gradient is rounded to zero",
    "grad_underflow", "backward", silent=True,
    modules=("fc1", "fc2"), operations=("underflow", "AddmmBackward", "ToCopy"),
    cure="scale the loss with torch.amp.GradScaler, or use BF16",
)  # fmt: skip
def gradients_underflow(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), regression(seed)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=repaired)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = 1e-6 * F.mse_loss(model(x), y)  # an auxiliary loss with a small weight
        probe.loss(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        probe.gradients()
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, scaler=scaler if repaired else None)


def _bypassing(seed: int, repaired: bool, optimizer_of) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu")

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        probe.gradients()
        if repaired:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    return Run(model, [optimizer], step, scaler=scaler)


@fault(
    "optimizer.step() on scaled gradients: SGD takes steps 65,536 times too long",
    "optimizer_step_bypasses_scaler", "optimizer", modules=("^optimizer$", "^scaler$"),
    operations=("optimizer.step", "scaler"), cure="call scaler.step(optimizer), never optimizer.step()",
)  # fmt: skip
def step_bypasses_scaler_sgd(seed: int, repaired: bool) -> Run:
    return _bypassing(seed, repaired, sgd)


@fault(
    "optimizer.step() on scaled gradients: Adam hides it, but an infinite gradient would be used",
    "optimizer_step_bypasses_scaler", "optimizer", silent=True, modules=("^optimizer$", "^scaler$"),
    operations=("optimizer.step", "scaler"), cure="call scaler.step(optimizer), never optimizer.step()",
)  # fmt: skip
def step_bypasses_scaler_adam(seed: int, repaired: bool) -> Run:
    return _bypassing(seed, repaired, adam)


@fault(
    "scaler.step() without scaler.update()",
    "missing_scaler_update", "optimizer", step=1, modules=SCALER, operations=("scaler", "update"),
    cure="call scaler.update() once after every optimizer step",
)  # fmt: skip
def scaler_never_updated(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        probe.gradients()
        scaler.step(optimizer)
        if repaired:
            scaler.update()

    return Run(model, [optimizer], step, scaler=scaler)


@fault(
    "Two losses, and only one of them is scaled",
    "partial_loss_scaling", "backward", silent=True, modules=("^loss$", "^scaler$"), operations=("scale",),
    cure="scale the sum: scaler.scale(main + auxiliary)",
)  # fmt: skip
def one_loss_of_two_scaled(seed: int, repaired: bool) -> Run:
    model = chain(seed, fc1=linear(16, 32), relu=nn.ReLU, fc2=linear(32, 5))
    (x, labels), (_, y) = classification(seed), regression(seed)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = model(x)
            main, auxiliary = F.cross_entropy(out[:, :4], labels), F.mse_loss(out[:, 4], y[:, 0])
        probe.loss(main + auxiliary)
        total = scaler.scale(main + auxiliary) if repaired else scaler.scale(main) + auxiliary
        total.backward()
        scaler.unscale_(optimizer)
        probe.gradients()
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, scaler=scaler)


@fault(
    "The loss is reduced in FP16, where the scale 65,536 itself is infinite",
    "scale_not_representable", "backward", silent=True,
    modules=("^scaler$", "^loss$"), operations=("to_copy|ToCopy", "MulBackward", "scale"),
    cure="compute the loss in FP32: model(x).float() before the reduction; .float() after it is too late",
)  # fmt: skip
def loss_in_fp16(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), regression(seed)

    def loss_of(i: int) -> torch.Tensor:
        out = model(x).float() if repaired else model(x)
        return (out - y.to(out.dtype)).abs().mean()

    return amp(model, sgd(model), loss_of, 8, 2.0**16)


@fault(
    "model.half() together with a GradScaler",
    "fp16_master_weights_with_scaler", "optimizer", modules=SCALER, operations=("unscale",),
    cure="keep the parameters in FP32 and run the model under autocast",
)  # fmt: skip
def half_model_with_scaler(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    if not repaired:
        model, x = model.half(), x.half()
    return amp(model, sgd(model), lambda i: F.cross_entropy(model(x).float(), y))


@fault(
    "scaler.unscale_() after every micro-batch of an accumulated step",
    "unscale_per_micro_batch", "optimizer", modules=SCALER, operations=UNSCALE,
    cure="call unscale_ once, after the last micro-batch",
)  # fmt: skip
def unscale_every_micro_batch(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        losses = []
        for part in range(0, 32, 8):
            with torch.autocast("cpu", torch.float16):
                losses.append(F.cross_entropy(model(x[part : part + 8]), y[part : part + 8]) / 4)
            scaler.scale(losses[-1]).backward()
            if not repaired or part == 24:
                scaler.unscale_(optimizer)
        probe.loss(sum(losses).detach())
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, scaler=scaler)


@fault(
    "A hand-written scaler divides the accumulated gradients after every micro-batch",
    "unscale_per_micro_batch", "optimizer", silent=True,
    modules=("^scaler$", "fc1", "fc2"), operations=("unscale", "div", "backward"),
    cure="divide once, after the last micro-batch: the first one was divided four times",
)  # fmt: skip
def divide_every_micro_batch(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer, scale = sgd(model), 2.0**10

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        total = 0.0
        for part in range(0, 32, 8):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x[part : part + 8]), y[part : part + 8]) / 4
            (loss * scale).backward()
            total = total + loss.detach()
            if not repaired or part == 24:
                for p in model.parameters():
                    p.grad.div_(scale)
        probe.loss(total)
        probe.gradients()
        optimizer.step()

    return Run(model, [optimizer], step)


@fault(
    "scaler.update() after every micro-batch, before any step",
    "update_before_step", "optimizer", modules=SCALER, operations=("update", "scaler"),
    cure="call update once, after scaler.step(optimizer)",
)  # fmt: skip
def update_every_micro_batch(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = [F.cross_entropy(model(x[part::4]), y[part::4]) / 4 for part in range(4)]
        probe.loss(sum(losses))
        for loss in losses:
            scaler.scale(loss).backward()
            if not repaired:
                scaler.update()
        probe.gradients()
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, scaler=scaler)
