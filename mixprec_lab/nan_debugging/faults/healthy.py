"""Runs in which nothing is wrong, though some look like it: skipped steps, -inf in a mask, spikes, zero gradients.

A detector that raises an alarm on one of them is wrong.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixprec_lab import models
from mixprec_lab.nan_debugging.faults._networks import adam, amp, chain, classification, linear, mlp, plain, regression
from mixprec_lab.nan_debugging.faults._run import Probe, Run, seeded

STEPS = 200


def _images(seed: int, samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(samples, 1, 8, 8) noisy copies of ten patterns, and which."""
    generator = torch.Generator().manual_seed(seed + 4000)
    labels = torch.randint(10, (samples,), generator=generator)
    patterns = torch.rand(10, 1, 8, 8, generator=generator)
    return patterns[labels] + 0.3 * torch.randn(samples, 1, 8, 8, generator=generator), labels


def _batches(seed: int, samples: int, size: int) -> Callable[[int], torch.Tensor]:
    """Indices of the batch of a step, drawn anew for every step."""
    return lambda i: torch.randint(samples, (size,), generator=torch.Generator().manual_seed(seed * STEPS + i))


def _mlp(seed: int) -> Run:
    model, (x, y), batch = mlp(seed), regression(seed, 256), _batches(seed, 256, 32)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)


def _transformer(seed: int) -> Run:
    model, (x, y), batch = models.transformer(seed), _images(seed), _batches(seed, 64, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    return plain(model, optimizer, lambda i: F.cross_entropy(model(x[batch(i)]), y[batch(i)]), STEPS)


def _convnet_batchnorm(seed: int) -> Run:
    model = chain(
        seed,
        conv1=lambda: nn.Conv2d(1, 8, 3, padding=1), norm1=lambda: nn.BatchNorm2d(8), relu1=nn.ReLU,
        conv2=lambda: nn.Conv2d(8, 8, 3, padding=1), norm2=lambda: nn.BatchNorm2d(8), relu2=nn.ReLU,
        pool=lambda: nn.MaxPool2d(2), flat=nn.Flatten, head=linear(128, 10),
    )  # fmt: skip
    (x, y), batch = _images(seed), _batches(seed, 64, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return plain(model, optimizer, lambda i: F.cross_entropy(model(x[batch(i)]), y[batch(i)]), STEPS)


class _Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def _gan(seed: int) -> Run:
    """Two optimizers; the gradients of the discriminator are polluted by the generator's loss, and not used."""
    with seeded(seed):
        model = _Gan()
    fake_side, real_side = adam(model.generator, 1e-3), adam(model.discriminator, 1e-3)
    real, noise = regression(seed, 512, 4, 2)[1], regression(seed + 1, 512, 4, 2)[0]
    batch, judge = _batches(seed, 512, 32), F.binary_cross_entropy_with_logits

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


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(images.squeeze(1))[0][:, -1])


def _lstm(seed: int) -> Run:
    """Eight rows of an image, one after the other, and the usual clipping."""
    with seeded(seed):
        model = _Reader()
    (x, y), batch, optimizer = _images(seed), _batches(seed, 64, 16), adam(model)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch(i)]), y[batch(i)])
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Run(model, [optimizer], step, STEPS)


def _scaler_calibration(seed: int) -> Run:
    """FP16 from a scale of 2**24: the first steps are skipped, as they should be."""
    model, (x, y), batch = mlp(seed), classification(seed, 256), _batches(seed, 256, 32)
    return amp(model, adam(model, 1e-3), lambda i: F.cross_entropy(model(x[batch(i)]), y[batch(i)]), STEPS, 2.0**24)


def _scaler_growth(seed: int) -> Run:
    """FP16 with a scale that grows every 20 steps, until a growth is too much and one step is skipped."""
    model, (x, y), batch = mlp(seed), classification(seed, 256), _batches(seed, 256, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=20)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.7)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x[batch(i)]), y[batch(i)])
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
    batch = _batches(seed, 256, 32)

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
    model, (x, y), batch = models.transformer(seed), _images(seed), _batches(seed, 64, 16)

    def loss_of(i: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x[batch(i)])
        return F.cross_entropy(logits.float(), y[batch(i)])

    return plain(model, adam(model, 3e-3), loss_of, STEPS)


def _dropout(seed: int) -> Run:
    """Half of the units off: half of the activations are exactly zero."""
    model = chain(seed, fc1=linear(16, 64), relu=nn.ReLU, drop=lambda: nn.Dropout(0.5), fc2=linear(64, 4))
    (x, y), batch = regression(seed, 256), _batches(seed, 256, 32)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)


class _Bag(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(500, 16, sparse=sparse), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(ids).mean(1))


def _ids(seed: int) -> torch.Tensor:
    return torch.randint(500, (256, 6), generator=torch.Generator().manual_seed(seed + 5000))


def _sparse_embedding(seed: int) -> Run:
    """Sparse gradients, two optimizers."""
    with seeded(seed):
        model = _Bag(sparse=True)
    ids, y, batch = _ids(seed), classification(seed, 256)[1], _batches(seed, 256, 32)
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
        model = _Bag(sparse=False)
    ids, y, batch = _ids(seed), classification(seed, 256)[1], _batches(seed, 256, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return plain(model, optimizer, lambda i: F.cross_entropy(model(ids[batch(i)]), y[batch(i)]), STEPS)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.emb(ids)).relu())


def _weight_tying(seed: int) -> Run:
    """Predict the next token of a fixed cycle; embedding and output share one tensor."""
    with seeded(seed):
        model = _Tied()
    batch, following = _batches(seed, 20, 32), torch.arange(20).roll(-1)
    return plain(model, adam(model), lambda i: F.cross_entropy(model(batch(i)), following[batch(i)]), STEPS)


def _frozen_layers(seed: int) -> Run:
    """The first layer is frozen and still in the optimizer: it has no gradient and does not move."""
    model, (x, y), batch = mlp(seed), regression(seed, 256), _batches(seed, 256, 32)
    model.fc1.requires_grad_(False)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)


class _Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.qkv, self.head = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)
        self.register_buffer("mask", torch.full((12, 12), -torch.inf).triu(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.emb(ids)).chunk(3, -1)
        return self.head(((query / 4) @ key.mT + self.mask).softmax(-1) @ value)


def _masked_attention(seed: int) -> Run:
    """A causal mask of -inf, kept in a buffer: infinities that belong there."""
    with seeded(seed):
        model = _Causal()
    start, following = _batches(seed, 20, 8), torch.arange(12)

    def loss_of(i: int) -> torch.Tensor:
        ids = (start(i)[:, None] + following) % 20
        return F.cross_entropy(model(ids).flatten(0, 1), ((ids + 1) % 20).flatten())

    return plain(model, adam(model), loss_of, STEPS)


def _cosine_schedule(seed: int) -> Run:
    """Warm-up and a cosine that ends at a learning rate of zero: the last updates vanish, as planned."""
    model, (x, y), batch = mlp(seed), regression(seed, 256), _batches(seed, 256, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 20)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [20])
    run = plain(model, optimizer, lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)
    train = run.step

    def step(i: int, probe: Probe) -> None:
        train(i, probe)
        scheduler.step()

    run.step, run.scheduler = step, scheduler
    return run


def _small_batches(seed: int) -> Run:
    """Two samples a batch and a few wild targets: the loss jumps by a factor of a hundred and more."""
    model, (x, y), batch = mlp(seed), regression(seed, 256), _batches(seed, 256, 2)
    y = y.clone()
    y[::40] *= 12
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return plain(model, optimizer, lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)


def _label_smoothing(seed: int) -> Run:
    model, (x, y), batch = mlp(seed), classification(seed, 256), _batches(seed, 256, 32)

    def loss_of(i: int) -> torch.Tensor:
        return F.cross_entropy(model(x[batch(i)]), y[batch(i)], label_smoothing=0.1)

    return plain(model, adam(model), loss_of, STEPS)


def _momentum_large_lr(seed: int) -> Run:
    """SGD with momentum at a learning rate that is large and stable: the loss rises at times."""
    model, (x, y), batch = mlp(seed), classification(seed, 256), _batches(seed, 256, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return plain(model, optimizer, lambda i: F.cross_entropy(model(x[batch(i)]), y[batch(i)]), STEPS)


class _Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return (self.left if left else self.right)(self.body(x).relu())


def _alternating_heads(seed: int) -> Run:
    """Two tasks in turn: in every step one head has no gradient."""
    with seeded(seed):
        model = _Branched()
    (x, y), batch = regression(seed, 256), _batches(seed, 256, 32)

    def loss_of(i: int) -> torch.Tensor:
        target = y[batch(i)] if i % 2 else -y[batch(i)]
        return F.mse_loss(model(x[batch(i)], i % 2 == 1), target)

    return plain(model, adam(model), loss_of, STEPS)


class _ZeroInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer, self.head = (nn.Linear(16, 16) for _ in range(4))
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(self.inner(x).relu()))[:, :4]


def _zero_initialised_branch(seed: int) -> Run:
    """A residual branch that starts at zero: the gradient of its inner layer is exactly zero in the first step."""
    with seeded(seed):
        model = _ZeroInit()
    (x, y), batch = regression(seed, 256), _batches(seed, 256, 32)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


def _activation_checkpointing(seed: int) -> Run:
    """Part of the forward pass runs twice, the second time inside the backward pass."""
    with seeded(seed):
        model = _Checkpointed()
    (x, y), batch = regression(seed, 256), _batches(seed, 256, 32)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)


class _Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.ema = nn.Linear(16, 4), nn.Linear(16, 4).requires_grad_(False)
        self.ema.load_state_dict(self.net.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def _weight_average(seed: int) -> Run:
    """A moving average of the weights in FP32, which moves slowly and does move."""
    with seeded(seed):
        model = _Averaged()
    (x, y), batch = regression(seed, 256), _batches(seed, 256, 32)
    run = plain(model, adam(model.net), lambda i: F.mse_loss(model(x[batch(i)]), y[batch(i)]), STEPS)
    train = run.step

    def step(i: int, probe: Probe) -> None:
        train(i, probe)
        with torch.no_grad():
            for average, p in zip(model.ema.parameters(), model.net.parameters(), strict=True):
                average.lerp_(p, 0.001)

    run.step = step
    return run


HEALTHY: Mapping[str, Callable[[int], Run]] = MappingProxyType(
    {
        builder.__name__.lstrip("_"): builder
        for builder in (
            _mlp,
            _transformer,
            _convnet_batchnorm,
            _gan,
            _lstm,
            _scaler_calibration,
            _scaler_growth,
            _gradient_accumulation,
            _bf16_autocast,
            _dropout,
            _sparse_embedding,
            _dense_embedding,
            _weight_tying,
            _frozen_layers,
            _masked_attention,
            _cosine_schedule,
            _small_batches,
            _label_smoothing,
            _momentum_large_lr,
            _alternating_heads,
            _zero_initialised_branch,
            _activation_checkpointing,
            _weight_average,
        )
    }
)
