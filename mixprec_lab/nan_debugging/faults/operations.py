"""Faults of an operation: undefined at a point, or with a slope there that is infinite or not a number."""

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
)
from mixprec_lab.nan_debugging.faults._run import Probe, Run, fault


class _Do(nn.Module):
    """A function as a module, so that it has a path."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def _with(seed: int, gain: float = 1.0, **middle) -> nn.Sequential:
    """fc1, a module around the one function of ``middle``, fc2."""
    (name, function), = middle.items()  # fmt: skip
    return chain(seed, fc1=linear(16, 32, gain), **{name: lambda: _Do(function)}, fc2=linear(32, 4))


# --- forward


class _MaskedAttention(nn.Module):
    def __init__(self, fill: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.fill = fill

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        logits = (self.query(x) / 4) @ self.key(x).mT
        logits = logits.masked_fill(hidden[:, None, :], self.fill)
        return (logits.softmax(-1) @ self.value(x)).mean(1)


@fault(
    "A row that is masked altogether with -inf: its softmax is NaN",
    "masked_softmax", "forward", modules=("attn",), operations=("softmax", "Softmax"),
    cure="a finite mask value, or rows of padding set to zero",
)  # fmt: skip
def masked_softmax(seed: int, repaired: bool) -> Run:
    model = chain(seed, attn=lambda: _MaskedAttention(-1e4 if repaired else -torch.inf), head=linear(16, 4))
    x = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(seed))
    hidden = torch.arange(12) >= torch.tensor([12, 9, 5, 0, 7, 12, 3, 8])[:, None]  # the fourth sample is empty
    y = classification(seed, 8)[1]
    return plain(model, adam(model), lambda i: F.cross_entropy(model.head(model.attn(x, hidden)), y))


@fault(
    "logsumexp over an empty set: -inf forward, NaN backward",
    "masked_softmax", "forward", modules=("pool", "^loss$"), operations=("logsumexp", "Logsumexp", r"\bsub\b"),
    cure="leave empty sets out before the logsumexp",
)  # fmt: skip
def logsumexp_empty(seed: int, repaired: bool) -> Run:
    def pool(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.arange(32).expand(len(x), -1) >= 20
        if not repaired:
            hidden = hidden | (torch.arange(len(x)) == 3)[:, None]
        return x.masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)

    model = chain(seed, fc1=linear(16, 32), pool=lambda: _Do(pool))
    x, y = regression(seed, outputs=1)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y))


@fault(
    "log(softmax) in FP16: a probability underflows and its logarithm is -inf",
    "log_of_zero", "forward", modules=("head",), operations=(r"\blog\b", "^LogBackward"),
    cure="log_softmax, or cross_entropy on the logits",
)  # fmt: skip
def log_softmax_fp16(seed: int, repaired: bool) -> Run:
    head = (lambda z: z.log_softmax(-1)) if repaired else (lambda z: z.softmax(-1).log())
    model = chain(seed, fc1=linear(16, 8, 60), head=lambda: _Do(head))
    x, y = classification(seed, classes=8)
    return amp(model, adam(model), lambda i: F.nll_loss(model(x).float(), y))


@fault(
    "Binary cross-entropy written by hand in FP16: sigmoid is 1, log(1 - 1) is -inf",
    "log_of_zero", "forward", modules=("bce", "^loss$"), operations=(r"\blog\b", "^LogBackward"),
    cure="binary_cross_entropy_with_logits",
)  # fmt: skip
def hand_bce_fp16(seed: int, repaired: bool) -> Run:
    def bce(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if repaired:
            return F.binary_cross_entropy_with_logits(z.float(), y)
        p = z.sigmoid()
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()

    model = chain(seed, fc1=linear(16, 8, 30), bce=lambda: _Do(bce))
    x, y = regression(seed, outputs=8)
    return amp(model, adam(model), lambda i: model.bce(model.fc1(x), (y > 0).float()))


@fault(
    "The logarithm of a negative number",
    "log_of_negative", "forward", modules=("squash",), operations=("log",),
    cure="the logarithm of something positive: softplus, exp, or a clamp",
)  # fmt: skip
def log_of_negative(seed: int, repaired: bool) -> Run:
    model = _with(seed, 4, squash=(lambda z: F.softplus(z).log1p()) if repaired else (lambda z: z.log1p()))
    x, y = regression(seed)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y))


@fault(
    "A mean over no token: 0 / 0",
    "zero_over_zero", "forward", modules=("pool",), operations=("div", "Div"),
    cure="clamp the count to 1",
)  # fmt: skip
def mean_over_nothing(seed: int, repaired: bool) -> Run:
    keep = (torch.arange(12) < torch.tensor([12, 9, 5, 0, 7, 12, 3, 8])[:, None]).float()
    count = keep.sum(1, keepdim=True)

    def pool(x: torch.Tensor) -> torch.Tensor:
        return (x * keep[..., None]).sum(1) / (count.clamp(min=1) if repaired else count)

    model = chain(seed, fc1=linear(16, 16), pool=lambda: _Do(pool), head=linear(16, 4))
    x = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(seed))
    y = classification(seed, 8)[1]
    return plain(model, adam(model), lambda i: F.cross_entropy(model(x), y))


@fault(
    "The standard deviation of one sample: 0 / 0 degrees of freedom",
    "zero_over_zero", "forward", modules=("norm",), operations=("std", "var", "Std", "Var"),
    cure="correction=0, or statistics of more than one sample",
)  # fmt: skip
def std_of_one(seed: int, repaired: bool) -> Run:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.std(0, correction=0 if repaired else 1) + 1)

    model = _with(seed, norm=norm)
    x, y = regression(seed, 1)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y))


class _AddedMask(nn.Module):
    """Attention of which the first ``lengths`` tokens of a sample are read; the mask is added to the logits."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.least = least

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        keep = (torch.arange(x.shape[1]) < lengths[:, None]).float()
        mask = (1 - keep) * self.least
        logits = (self.query(x) / 4) @ self.key(x).mT + mask[:, None, :]
        return (logits.softmax(-1) @ self.value(x)).mean(1)


@fault(
    "An additive mask as (1 - keep) * -inf: what is kept gets 0 * -inf, which is NaN",
    "inf_times_zero", "forward", modules=("attn",), operations=(r"\bmul\b", "Mul"),
    cure="(1 - keep) * torch.finfo(dtype).min, or masked_fill",
)  # fmt: skip
def mask_by_multiplication(seed: int, repaired: bool) -> Run:
    least = torch.finfo(torch.float32).min if repaired else -torch.inf
    model = chain(seed, attn=lambda: _AddedMask(least), head=linear(16, 4))
    x = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(seed))
    lengths, y = torch.tensor([12, 9, 5, 1, 7, 12, 3, 8]), classification(seed, 8)[1]
    return plain(model, adam(model), lambda i: F.cross_entropy(model.head(model.attn(x, lengths)), y))


@fault(
    "The variance as E[x*x] - E[x]**2: it cancels below zero, and its root is NaN",
    "sqrt_of_negative", "forward", modules=("norm",), operations=("sqrt", "Sqrt"),
    cure="subtract the mean before squaring, as torch.var does",
)  # fmt: skip
def variance_by_moments(seed: int, repaired: bool) -> Run:
    def norm(x: torch.Tensor) -> torch.Tensor:
        x = x + 1000  # a large common offset
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, correction=0) if repaired else x.pow(2).mean(-1, keepdim=True) - mean**2
        return (x - mean) / variance.sqrt()

    model = _with(seed, 0.2, norm=norm)
    x, y = regression(seed)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y))


@fault(
    "A norm with eps 1e-8 in FP16, where 1e-8 is 0: a constant row is divided by zero",
    "eps_underflow", "forward", modules=("norm",), operations=("div", "Div", "add"),
    cure="an eps that the dtype holds (1e-5 and more in FP16), or compute the norm in FP32",
)  # fmt: skip
def norm_eps_fp16(seed: int, repaired: bool) -> Run:
    def norm(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True).sqrt().detach() + (1e-3 if repaired else 1e-8))

    model = _with(seed, norm=norm)
    x, y = regression(seed)
    x[4] = 0  # an empty sample: without the bias, its row is constant
    with torch.no_grad():
        model.fc1.bias.zero_()
    model.fc1.bias.requires_grad_(False)
    return amp(model, adam(model, 1e-3), lambda i: F.mse_loss(model(x), y))


@fault(
    "BatchNorm meets a last batch of one sample",
    "batchnorm_one_value", "forward", step=2, modules=("norm",), operations=("batch_norm", "BatchNorm"),
    cure="drop_last=True, or a norm that does not look across samples",
)  # fmt: skip
def batchnorm_one_sample(seed: int, repaired: bool) -> Run:
    model = chain(seed, fc1=linear(16, 32), norm=lambda: nn.BatchNorm1d(32), fc2=linear(32, 4))
    x, y = classification(seed, 33)
    batches = [slice(0, 16), slice(16, 32)] if repaired else [slice(0, 16), slice(16, 32), slice(32, 33)]

    def loss_of(i: int) -> torch.Tensor:
        batch = batches[i % len(batches)]
        return F.cross_entropy(model(x[batch]), y[batch])

    return plain(model, adam(model), loss_of)


@fault(
    "Every label of the batch is ignored: the mean over none is NaN, though its gradient is zero",
    "all_labels_ignored", "forward", step=2, modules=("^loss$", "^target$"), operations=("cross_entropy", "nll_loss"),
    cure="skip the batch, or divide the sum by max(1, count)",
)  # fmt: skip
def all_labels_ignored(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)

    def loss_of(i: int) -> torch.Tensor:
        labels = torch.full_like(y, -100) if i == 2 and not repaired else y
        return F.cross_entropy(model(x), labels)

    return plain(model, sgd(model), loss_of)


# --- backward: the forward value is fine


@fault(
    "sqrt at 0: the loss is finite, the gradient is infinity times 0",
    "sqrt_zero_grad", "backward", modules=("dist",), operations=("SqrtBackward", "sqrt", r"\bdiv"),
    cure="sqrt(x + eps), or torch.linalg.vector_norm, whose slope at 0 is 0",
)  # fmt: skip
def sqrt_at_zero(seed: int, repaired: bool) -> Run:
    def dist(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(z - w, dim=-1) if repaired else (z - w).pow(2).sum(-1).sqrt()

    model = chain(seed, fc1=lambda: nn.Linear(16, 8, bias=False), dist=lambda: _Do(dist))
    x, _ = regression(seed)
    twin = x.roll(1, 0)
    twin[7] = x[7]  # a pair of equal samples
    return plain(model, sgd(model), lambda i: (model.dist(model.fc1(x), model.fc1(twin)) - 1).pow(2).mean())


KEEP = (torch.arange(32) % 8 != 5).float()  #: units that were pruned are 0


@fault(
    "x ** 0.5 of pruned units: the slope at 0 is infinite, and times their mask it is NaN",
    "sqrt_zero_grad", "backward", modules=("root",), operations=("PowBackward", "pow", r"\bmul\b", "MulBackward"),
    cure="(x + eps) ** 0.5",
)  # fmt: skip
def root_of_pruned(seed: int, repaired: bool) -> Run:
    model = _with(seed, root=lambda z: (z.sigmoid() * KEEP + (1e-3 if repaired else 0.0)) ** 0.5)
    x, y = regression(seed)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y))


def _safe_log(repaired: bool):
    """log of a pruned, positive layer, 0 where it is 0; a NaN that comes in is not positive, and goes out as 0."""

    def safe(z: torch.Tensor) -> torch.Tensor:
        z = F.softplus(z) * KEEP
        inner = torch.where(z > 0, z, 1.0) if repaired else z
        return torch.where(z > 0, inner.log(), 0.0)

    return safe


@fault(
    "torch.where(x == 0, 0, log(x)): the branch that is not taken sends 0 times infinity back",
    "where_trap", "backward", modules=("safe",), operations=(r"\blog\b", "^LogBackward", r"\bdiv"),
    cure="a second where inside: torch.where(m, x, 1).log()",
)  # fmt: skip
def where_trap(seed: int, repaired: bool) -> Run:
    def safe(z: torch.Tensor) -> torch.Tensor:
        z = F.softplus(z) * KEEP
        inner = torch.where(z == 0, 1.0, z) if repaired else z
        return torch.where(z == 0, 0.0, inner.log())

    model, (x, y) = _with(seed, safe=safe), regression(seed)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y))


@fault(
    "torch.where(x > 0, log(x), 0) makes weights NaN and then hides them: NaN > 0 is false, so the loss stays finite",
    "where_trap", "backward", silent=True,
    modules=("safe",), operations=(r"\blog\b", "^LogBackward", r"\bdiv"),
    cure="a second where inside: torch.where(m, x, 1).log()",
)  # fmt: skip
def where_trap_hides_nan(seed: int, repaired: bool) -> Run:
    model, (x, y) = _with(seed, safe=_safe_log(repaired)), regression(seed)
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y))


@fault(
    "torch.where(x > 0, log(x), 0) under a scaler: the loss stays finite, the scale falls for ever",
    "where_trap", "backward", silent=True,
    modules=("safe",), operations=(r"\blog\b", "^LogBackward", r"\bdiv"),
    cure="a second where inside: torch.where(m, x, 1).log(); no loss scale helps",
)  # fmt: skip
def where_trap_under_scaler(seed: int, repaired: bool) -> Run:
    model, (x, y) = _with(seed, safe=_safe_log(repaired)), regression(seed)
    return amp(model, adam(model), lambda i: F.mse_loss(model(x), y), 12)


@fault(
    "acos of a cosine that is 1: its slope is infinite",
    "acos_at_one", "backward", modules=("angle",), operations=("AcosBackward", "acos", "rsqrt"),
    cure="clamp the cosine to 1 - 1e-6, or use atan2",
)  # fmt: skip
def acos_at_one(seed: int, repaired: bool) -> Run:
    def angle(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        cosine = (z * w).sum(-1)
        return cosine.clamp(-0.999, 0.999).acos() if repaired else cosine.clamp(-1, 1).acos()

    model = chain(seed, emb=lambda: nn.Embedding(16, 2), angle=lambda: _Do(angle))
    with torch.no_grad():
        model.emb.weight[:4] = torch.eye(2).repeat(2, 1)
    first, second = torch.arange(16), torch.arange(15, -1, -1)
    second[0] = 0

    def loss_of(i: int) -> torch.Tensor:
        z, w = (F.normalize(model.emb(ids), dim=-1) for ids in (first, second))
        return model.angle(z, w).mean()

    return plain(model, sgd(model, 0.01), loss_of)


@fault(
    "F.normalize of a zero vector: a gradient of 1e12, and clipping silences every other parameter",
    "normalize_zero_vector", "backward", silent=True,
    modules=("emb",), operations=("normalize", "DivBackward", r"\bdiv", "norm", "clip"),
    cure="a larger eps: F.normalize(x, eps=1e-3), or no zero vectors (padding_idx rows, dead units)",
)  # fmt: skip
def normalize_zero_vector(seed: int, repaired: bool) -> Run:
    model = chain(seed, emb=lambda: nn.Embedding(20, 16), head=linear(16, 4))
    with torch.no_grad():
        model.emb.weight[0] = 0
    ids, y = torch.arange(20), classification(seed, 20)[1]
    optimizer = sgd(model)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        unit = F.normalize(model.emb(ids), dim=-1, eps=1.0 if repaired else 1e-12)
        loss = F.cross_entropy(model.head(unit), y)
        probe.loss(loss)
        loss.backward()
        probe.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Run(model, [optimizer], step)
