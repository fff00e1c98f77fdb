"""Faults of the training loop: right calls in the wrong order, too often, or on the wrong object."""

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.nan_debugging.faults._networks import (
    adam,
    amp,
    chain,
    classification,
    linear,
    mlp,
    plain,
    regression,
    sgd,
    tokens,
)
from mixprec_lab.nan_debugging.faults._run import Probe, Run, fault, seeded


@fault(
    "Gradients are clipped while they are still scaled",
    "clip_before_unscale", "optimizer", silent=True, modules=("^optimizer$",), operations=("clip",),
    cure="scaler.unscale_(optimizer) before clip_grad_norm_",
)  # fmt: skip
def clip_before_unscale(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        if repaired:
            scaler.unscale_(optimizer)
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, scaler=scaler)


@fault(
    "Gradients are clipped by value while they are still scaled: only their signs are left",
    "clip_before_unscale", "optimizer", silent=True, modules=("^optimizer$",), operations=("clip", "clamp"),
    cure="scaler.unscale_(optimizer) before clip_grad_value_",
)  # fmt: skip
def clip_value_before_unscale(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), regression(seed)
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu")

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(model(x), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        if repaired:
            scaler.unscale_(optimizer)
        probe.gradients()
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, scaler=scaler)


@fault(
    "Two optimizers, one scaler: the one that is clipped was not unscaled, the other was",
    "clip_before_unscale", "optimizer", silent=True, modules=("^optimizer$",), operations=("clip", "unscale"),
    cure="unscale_ the optimizer whose parameters are clipped",
)  # fmt: skip
def unscale_the_other_optimizer(seed: int, repaired: bool) -> Run:
    model, (x, y) = chain(seed, body=linear(16, 32), relu=nn.ReLU, head=linear(32, 4)), classification(seed)
    body, head = sgd(model.body), sgd(model.head)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step(i: int, probe: Probe) -> None:
        body.zero_grad()
        head.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(body if repaired else head)
        probe.gradients()
        nn.utils.clip_grad_norm_(model.body.parameters(), 0.1)
        scaler.step(body)
        scaler.step(head)
        scaler.update()

    return Run(model, [body, head], step, scaler=scaler)


@fault(
    "The loss of an accumulated step is not divided by the number of micro-batches",
    "accumulation_not_divided", "backward", silent=True,
    modules=("^loss$", "^optimizer$", "fc"), operations=("backward", "accumul"),
    cure="divide the loss of every micro-batch by their number",
)  # fmt: skip
def accumulation_not_divided(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer = sgd(model, 0.05)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        total = 0.0
        for part in range(4):
            loss = F.cross_entropy(model(x[part::4]), y[part::4])
            if repaired:
                loss = loss / 4
            loss.backward()
            total = total + loss.detach()
        probe.loss(total)
        probe.gradients()
        optimizer.step()

    return Run(model, [optimizer], step)


@fault(
    "zero_grad() is missing: every step adds to the gradient of all steps before",
    "zero_grad_missing", "backward", step=1, silent=True,
    modules=("^optimizer$", "fc"), operations=("zero_grad", "backward", "accumul"),
    cure="optimizer.zero_grad() once a step",
)  # fmt: skip
def zero_grad_missing(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), regression(seed)
    optimizer = sgd(model, 0.05)

    def step(i: int, probe: Probe) -> None:
        if repaired:
            optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        optimizer.step()

    return Run(model, [optimizer], step)


@fault(
    "The schedule advances although the scaler skipped the step: the warm-up is over before training starts",
    "scheduler_on_skipped_step", "optimizer", silent=True,
    modules=("^scheduler$", "^optimizer$"), operations=("scheduler",),
    cure="step the scheduler only if the scale did not fall: scaler.get_scale() >= before",
)  # fmt: skip
def scheduler_on_skipped_step(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / 8))

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        probe.gradients()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if not repaired or scaler.get_scale() >= before:
            scheduler.step()

    return Run(model, [optimizer], step, 24, scaler, scheduler)


@fault(
    "scheduler.step() before optimizer.step(): the first learning rate is never used",
    "scheduler_before_optimizer", "optimizer", silent=True,
    modules=("^scheduler$", "^optimizer$"), operations=("scheduler",),
    cure="optimizer.step() first, then scheduler.step()",
)  # fmt: skip
def scheduler_before_optimizer(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        for one in (optimizer, scheduler) if repaired else (scheduler, optimizer):
            one.step()

    return Run(model, [optimizer], step, scheduler=scheduler)


@fault(
    "The head was replaced after the optimizer was made: the new one never learns",
    "parameter_not_in_optimizer", "optimizer", silent=True,
    modules=("head", "^optimizer$"), operations=("optimizer", "step"),
    cure="make the optimizer after the model is complete, or add_param_group",
)  # fmt: skip
def head_replaced(seed: int, repaired: bool) -> Run:
    model, (x, y) = chain(seed, fc1=linear(16, 32), relu=nn.ReLU, head=linear(32, 10)), classification(seed)
    optimizer = adam(model)
    with seeded(seed):
        model.head = nn.Linear(32, 4)
    return plain(model, adam(model) if repaired else optimizer, lambda i: F.cross_entropy(model(x), y))


@fault(
    "A no_grad left over from evaluation: the encoder gets no gradient",
    "no_gradients", "backward", silent=True, modules=("encoder",), operations=("no_grad", "backward", "grad"),
    cure="no_grad only around what is not trained",
)  # fmt: skip
def no_grad_left_over(seed: int, repaired: bool) -> Run:
    model = chain(seed, encoder=linear(16, 32), relu=nn.ReLU, head=linear(32, 4))
    x, y = classification(seed)

    def loss_of(i: int) -> torch.Tensor:
        with torch.set_grad_enabled(repaired):
            features = model.relu(model.encoder(x))
        return F.cross_entropy(model.head(features), y)

    return plain(model, adam(model), loss_of)


@fault(
    "A second optimizer whose parameters take no part in the loss: no inf checks were recorded",
    "no_gradients", "optimizer", modules=("^scaler$", "^optimizer$", "head"), operations=("scaler", "step", "inf"),
    cure="use the head in the loss, or step only optimizers with gradients",
)  # fmt: skip
def optimizer_without_gradients(seed: int, repaired: bool) -> Run:
    model = chain(seed, body=linear(16, 32), head=linear(32, 4))
    x, y = classification(seed)
    body, head = sgd(model.body), sgd(model.head)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(i: int, probe: Probe) -> None:
        body.zero_grad()
        head.zero_grad()
        with torch.autocast("cpu", torch.float16):
            features = model.body(x)
            loss = F.cross_entropy(model.head(features) if repaired else features[:, :4], y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        probe.gradients()
        scaler.step(body)
        scaler.step(head)
        scaler.update()

    return Run(model, [body, head], step, scaler=scaler)


@fault(
    "FP32 master weights are stepped but not copied back into the BF16 model",
    "master_not_copied", "optimizer", silent=True,
    modules=("^optimizer$", "fc"), operations=("copy", "optimizer"),
    cure="copy every master into its parameter after the step",
)  # fmt: skip
def masters_not_copied(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed).bfloat16(), regression(seed)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)

    def step(i: int, probe: Probe) -> None:
        model.zero_grad()
        loss = F.mse_loss(model(x.bfloat16()).float(), y)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        if repaired:
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)

    return Run(model, [optimizer], step)


class _BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(ids).mean(1))


@fault(
    "One infinite gradient in BF16, where no scaler looks: clipping makes it NaN and every other gradient zero",
    "clip_spreads_nan", "optimizer", step=2, modules=("emb", "^optimizer$"), operations=("clip", "mul"),
    cure="clip_grad_norm_(..., error_if_nonfinite=True), and skip the step",
)  # fmt: skip
def clipping_spreads_nan(seed: int, repaired: bool) -> Run:
    with seeded(seed):
        model = _BagOfWords().bfloat16()
    ids, (_, y) = tokens(seed), classification(seed, 8)
    optimizer = sgd(model)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids).float(), y)
        probe.loss(loss)
        loss.backward()
        if i == 2 and not repaired:  # a rare product beyond the largest BF16, as a bad kernel or batch leaves one
            model.emb.weight.grad[ids[0, 0], 0] = torch.tensor(3.0e38, dtype=torch.bfloat16) * 4
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Run(model, [optimizer], step)


@fault(
    "Clipping by hand in FP16: the squares overflow, the norm is infinite, and every gradient becomes zero",
    "fp16_overflow", "optimizer", silent=True, modules=("^optimizer$", "fc"), operations=("pow", "norm", "sum", "clip"),
    cure="take the norm in FP32, as clip_grad_norm_ does",
)  # fmt: skip
def clip_norm_overflows(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed).half(), regression(seed)
    optimizer = sgd(model, 0.01)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        loss = 2000 * F.mse_loss(model(x.half()).float(), y)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        grads = [p.grad.float() if repaired else p.grad for p in model.parameters()]
        norm = sum(g.pow(2).sum() for g in grads).sqrt()
        for p in model.parameters():
            p.grad.mul_((1.0 / (norm + 1e-3)).clamp(max=1.0).to(p.dtype))
        optimizer.step()

    return Run(model, [optimizer], step)


@fault(
    "The learning rate is far too high: weights explode, then activations overflow",
    "exploding_lr", "forward", step=1, modules=("fc1", "fc2", "^optimizer$"), operations=("addmm", "linear", "mm"),
    cure="lower the learning rate, warm up, clip; watch the ratio of update to weight",
)  # fmt: skip
def learning_rate_explodes(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    optimizer = sgd(model, 0.1 if repaired else 1e5)
    return amp(model, optimizer, lambda i: F.cross_entropy(model(x), y))
