"""Runs in which nothing is wrong, though some look like it: skipped steps, -inf in a mask, spikes, zero gradients.

A detector that raises an alarm on one of them is wrong.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab import models
from mixprec_lab.nan_debugging.faults import _healthy_networks as nets
from mixprec_lab.nan_debugging.faults._healthy_networks import STEPS, batches, classify, images, regress, see, then
from mixprec_lab.nan_debugging.faults._networks import adam, amp, chain, classification, linear, mlp, plain, regression
from mixprec_lab.nan_debugging.faults._run import Probe, Run, seeded


def _mlp(seed: int) -> Run:
    model = mlp(seed)
    return plain(model, adam(model), regress(model, seed), STEPS)


def _transformer(seed: int) -> Run:
    model = models.transformer(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    return plain(model, optimizer, see(model, seed), STEPS)


def _convnet_batchnorm(seed: int) -> Run:
    model = chain(
        seed,
        conv1=lambda: nn.Conv2d(1, 8, 3, padding=1), norm1=lambda: nn.BatchNorm2d(8), relu1=nn.ReLU,
        conv2=lambda: nn.Conv2d(8, 8, 3, padding=1), norm2=lambda: nn.BatchNorm2d(8), relu2=nn.ReLU,
        pool=lambda: nn.MaxPool2d(2), flat=nn.Flatten, head=linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return plain(model, optimizer, see(model, seed), STEPS)


def _gan(seed: int) -> Run:
    """Two optimizers; the gradients of the discriminator are polluted by the generator's loss, and not used."""
    with seeded(seed):
        model = nets.Gan()
    fake_side, real_side = adam(model.generator, 1e-3), adam(model.discriminator, 1e-3)
    real, noise = regression(seed, 512, 4, 2)[1], regression(seed + 1, 512, 4, 2)[0]
    batch, judge = batches(seed, 512, 32), F.binary_cross_entropy_with_logits

    def step(i: int, probe: Probe) -> None:
        fake = model.generator(noise[batch(i)])
        ones, zeros = torch.ones(32, 1), torch.zeros(32, 1)
        real_side.zero_grad()
        told_real, told_fake = model.discriminator(real[batch(i)]), model.discriminator(fake.detach())
        tell = judge(told_real, ones) + judge(told_fake, zeros)
        tell.backward()
        real_side.step()
        fake_side.zero_grad()
        fool = judge(model.discriminator(fake), ones)
        probe.loss(tell.detach() + fool)
        fool.backward()
        probe.gradients()
        fake_side.step()

    return Run(model, [fake_side, real_side], step, STEPS)


def _lstm(seed: int) -> Run:
    """Eight rows of an image, one after the other, and the usual clipping."""
    with seeded(seed):
        model = nets.Reader()
    loss_of, optimizer = see(model, seed), adam(model)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        loss = loss_of(i)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Run(model, [optimizer], step, STEPS)


def _scaler_calibration(seed: int) -> Run:
    """FP16 from a scale of 2**24: the first steps are skipped, as they should be."""
    model = mlp(seed)
    return amp(model, adam(model, 1e-3), classify(model, seed), STEPS, 2.0**24)


def _scaler_growth(seed: int) -> Run:
    """FP16 with a scale that grows every 20 steps, until a growth is too much and one step is skipped."""
    model = mlp(seed)
    loss_of, optimizer = classify(model, seed), torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=20)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.7)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(i)
        probe.loss(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            scheduler.step()

    return Run(model, [optimizer], step, STEPS, scaler, scheduler)


def _gradient_accumulation(seed: int) -> Run:
    """Four micro-batches a step under FP16, their losses divided by four, unscaled and clipped once."""
    model, (x, y) = mlp(seed), classification(seed, 256)
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    batch = batches(seed, 256, 32)

    def step(i: int, probe: Probe) -> None:
        total = 0.0
        for part in batch(i).chunk(4):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x[part]), y[part]) / 4
            scaler.scale(loss).backward()
            total = total + loss.detach()
        probe.loss(total)
        scaler.unscale_(optimizer)
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Run(model, [optimizer], step, STEPS, scaler)


def _bf16_autocast(seed: int) -> Run:
    model, (x, y), batch = models.transformer(seed), images(seed), batches(seed, 64, 16)

    def loss_of(i: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x[batch(i)])
        return F.cross_entropy(logits.float(), y[batch(i)])

    return plain(model, adam(model, 3e-3), loss_of, STEPS)


def _dropout(seed: int) -> Run:
    """Half of the units off: half of the activations are exactly zero."""
    model = chain(seed, fc1=linear(16, 64), relu=nn.ReLU, drop=lambda: nn.Dropout(0.5), fc2=linear(64, 4))
    return plain(model, adam(model), regress(model, seed), STEPS)


def _ids(seed: int) -> torch.Tensor:
    return torch.randint(500, (256, 6), generator=torch.Generator().manual_seed(seed + 5000))


def _sparse_embedding(seed: int) -> Run:
    """Sparse gradients, two optimizers."""
    with seeded(seed):
        model = nets.Bag(sparse=True)
    ids, y, batch = _ids(seed), classification(seed, 256)[1], batches(seed, 256, 32)
    table, head = torch.optim.SparseAdam(model.emb.parameters(), lr=1e-2), adam(model.head)

    def step(i: int, probe: Probe) -> None:
        table.zero_grad()
        head.zero_grad()
        loss = F.cross_entropy(model(ids[batch(i)]), y[batch(i)])
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        table.step()
        head.step()

    return Run(model, [table, head], step, STEPS)


def _dense_embedding(seed: int) -> Run:
    """A table of which a batch touches few rows: most gradients are exactly zero, and most weights stay."""
    with seeded(seed):
        model = nets.Bag(sparse=False)
    ids, y, batch = _ids(seed), classification(seed, 256)[1], batches(seed, 256, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return plain(model, optimizer, lambda i: F.cross_entropy(model(ids[batch(i)]), y[batch(i)]), STEPS)


def _weight_tying(seed: int) -> Run:
    """Predict the next token of a fixed cycle; embedding and output share one tensor."""
    with seeded(seed):
        model = nets.Tied()
    batch, following = batches(seed, 20, 32), torch.arange(20).roll(-1)
    return plain(model, adam(model), lambda i: F.cross_entropy(model(batch(i)), following[batch(i)]), STEPS)


def _frozen_layers(seed: int) -> Run:
    """The first layer is frozen and still in the optimizer: it has no gradient and does not move."""
    model = mlp(seed)
    model.fc1.requires_grad_(False)
    return plain(model, adam(model), regress(model, seed), STEPS)


def _masked_attention(seed: int) -> Run:
    """A causal mask of -inf, kept in a buffer: infinities that belong there."""
    with seeded(seed):
        model = nets.Causal()
    start, following = batches(seed, 20, 8), torch.arange(12)

    def loss_of(i: int) -> torch.Tensor:
        ids = (start(i)[:, None] + following) % 20
        return F.cross_entropy(model(ids).flatten(0, 1), ((ids + 1) % 20).flatten())

    return plain(model, adam(model), loss_of, STEPS)


def _cosine_schedule(seed: int) -> Run:
    """Warm-up and a cosine that ends at a learning rate of zero: the last updates vanish, as planned."""
    model = mlp(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 20)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [20])
    run = plain(model, optimizer, regress(model, seed), STEPS)
    return then(run, lambda i: scheduler.step(), scheduler)


def _small_batches(seed: int) -> Run:
    """Two samples a batch and a few wild targets: the loss jumps by a factor of a hundred and more."""
    model, (x, y), batch = mlp(seed), regression(seed, 256), batches(seed, 256, 2)
    y = y.clone()
    y[::40] *= 12
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return plain(model, optimizer, lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)


def _label_smoothing(seed: int) -> Run:
    model, (x, y), batch = mlp(seed), classification(seed, 256), batches(seed, 256, 32)

    def loss_of(i: int) -> torch.Tensor:
        return F.cross_entropy(model(x[batch(i)]), y[batch(i)], label_smoothing=0.1)

    return plain(model, adam(model), loss_of, STEPS)


def _momentum_large_lr(seed: int) -> Run:
    """SGD with momentum at a learning rate that is large and stable: the loss rises at times."""
    model = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return plain(model, optimizer, classify(model, seed), STEPS)


def _alternating_heads(seed: int) -> Run:
    """Two tasks in turn: in every step one head has no gradient."""
    with seeded(seed):
        model = nets.Branched()
    (x, y), batch = regression(seed, 256), batches(seed, 256, 32)

    def loss_of(i: int) -> torch.Tensor:
        target = y[batch(i)] if i % 2 else -y[batch(i)]
        return F.mse_loss(model(x[batch(i)], i % 2 == 1), target)

    return plain(model, adam(model), loss_of, STEPS)


def _zero_initialised_branch(seed: int) -> Run:
    """A residual branch that starts at zero: the gradient of its inner layer is exactly zero in the first step."""
    with seeded(seed):
        model = nets.ZeroInit()
    return plain(model, adam(model), regress(model, seed), STEPS)


def _activation_checkpointing(seed: int) -> Run:
    """Part of the forward pass runs twice, the second time inside the backward pass."""
    with seeded(seed):
        model = nets.Checkpointed()
    return plain(model, adam(model), regress(model, seed), STEPS)


def _weight_average(seed: int) -> Run:
    """A moving average of the weights in FP32, which moves slowly and does move."""
    with seeded(seed):
        model = nets.Averaged()

    @torch.no_grad()
    def average(i: int) -> None:
        for kept, p in zip(model.ema.parameters(), model.net.parameters(), strict=True):
            kept.lerp_(p, 0.001)

    run = plain(model, adam(model.net), regress(model, seed), STEPS)
    return then(run, average)


def _warm_up_from_zero(seed: int) -> Run:
    """The first learning rate is 0: the first step moves nothing, as planned."""
    model = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, done / 20))
    run = plain(model, optimizer, regress(model, seed), STEPS)
    return then(run, lambda i: scheduler.step(), scheduler)


def _negative_loss(seed: int) -> Run:
    """A likelihood: its negative logarithm falls through zero."""
    model = mlp(seed, outputs=8)
    (x, y), batch = regression(seed, 256), batches(seed, 256, 32)

    def loss_of(i: int) -> torch.Tensor:
        mean, width = model(x[batch(i)]).chunk(2, -1)
        return F.gaussian_nll_loss(mean, y[batch(i)], F.softplus(width) + 1e-2)

    return plain(model, adam(model), loss_of, STEPS)


def _summed_loss(seed: int) -> Run:
    """A sum over all elements in FP32: a loss of thousands, gradients of hundreds, a small learning rate."""
    model, (x, y) = mlp(seed, outputs=64), regression(seed, 128, outputs=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    return plain(model, optimizer, lambda i: F.mse_loss(model(x), y, reduction="sum"), STEPS)


def _gradient_penalty(seed: int) -> Run:
    """The gradient with respect to the input is part of the loss: a backward pass through a backward pass."""
    model = chain(seed, fc1=linear(16, 32), act=nn.SiLU, fc2=linear(32, 4))
    (x, y), batch = regression(seed, 256), batches(seed, 256, 32)

    def loss_of(i: int) -> torch.Tensor:
        inputs = x[batch(i)].clone().requires_grad_()
        out = model(inputs)
        (slope,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        return F.mse_loss(out, y[batch(i)]) + 0.01 * slope.pow(2).sum(1).mean()

    return plain(model, adam(model), loss_of, STEPS)


def _evaluation_between_steps(seed: int) -> Run:
    """Every tenth step ends with an evaluation in eval mode, without gradients."""
    norm, drop = (lambda: nn.BatchNorm1d(32)), (lambda: nn.Dropout(0.2))
    model = chain(seed, fc1=linear(16, 32), norm=norm, drop=drop, fc2=linear(32, 4))
    (x, y), batch = regression(seed, 256), batches(seed, 256, 32)

    def evaluate(i: int) -> None:
        if i % 10 == 0:
            model.eval()
            with torch.no_grad():
                F.mse_loss(model(x), y)
            model.train()

    run = plain(model, adam(model), lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)
    return then(run, evaluate)


def _unfrozen_on_the_way(seed: int) -> Run:
    """The first layer is frozen for 100 steps and trained for 100."""
    model, (x, y), batch = mlp(seed), regression(seed, 256), batches(seed, 256, 32)

    def loss_of(i: int) -> torch.Tensor:
        model.fc1.requires_grad_(i >= 100)
        return F.mse_loss(model(x[batch(i)]), y[batch(i)])

    return plain(model, adam(model), loss_of, STEPS)


_BUILDERS = (
    _mlp, _transformer, _convnet_batchnorm, _gan, _lstm, _scaler_calibration, _scaler_growth,
    _gradient_accumulation, _bf16_autocast, _dropout, _sparse_embedding, _dense_embedding, _weight_tying,
    _frozen_layers, _masked_attention, _cosine_schedule, _small_batches, _label_smoothing, _momentum_large_lr,
    _alternating_heads, _zero_initialised_branch, _activation_checkpointing, _weight_average,
    _warm_up_from_zero, _negative_loss, _summed_loss, _gradient_penalty, _evaluation_between_steps,
    _unfrozen_on_the_way,
)  # fmt: skip

HEALTHY: Mapping[str, Callable[[int], Run]] = MappingProxyType({b.__name__.lstrip("_"): b for b in _BUILDERS})
