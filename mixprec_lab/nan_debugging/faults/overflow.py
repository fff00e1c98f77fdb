"""Faults of range: what is fine in FP32 or BF16 and beyond 65,504 in FP16."""

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.nan_debugging.faults._networks import adam, amp, chain, classification, linear, mlp, regression, sgd
from mixprec_lab.nan_debugging.faults._run import Run, fault, seeded


class _Attention(nn.Module):
    """One head of width 64 over 12 tokens of width 16; its queries and keys are large."""

    def __init__(self, scale_first: bool, gain: float = 100.0) -> None:
        super().__init__()
        self.query, self.key = linear(16, 64, gain)(), linear(16, 64, gain)()
        self.value, self.scale_first = nn.Linear(16, 16), scale_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        logits = (query / 64) @ key.mT if self.scale_first else (query @ key.mT) / 64
        return (logits.softmax(-1) @ value).mean(1)


@fault(
    "Attention logits overflow FP16: scaled after the product instead of before",
    "fp16_overflow", "forward", modules=("attn",), operations=("bmm", "matmul", "mm"),
    cure="scale the queries before the product, normalise queries and keys, or use BF16",
)  # fmt: skip
def attention_logits_fp16(seed: int, repaired: bool) -> Run:
    model = chain(seed, attn=lambda: _Attention(repaired), head=linear(16, 4))
    x = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(seed))
    y = classification(seed, 8)[1]
    return amp(model, sgd(model, 0.01), lambda i: F.cross_entropy(model(x), y))


class _HandSoftmax(nn.Module):
    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shift:
            x = x - x.amax(-1, keepdim=True)
        weights = x.exp()
        return weights / weights.sum(-1, keepdim=True)


@fault(
    "A softmax written by hand in FP16: exp of 12 is infinite",
    "fp16_overflow", "forward", modules=("softmax",), operations=(r"\bexp\b", "ExpBackward"),
    cure="subtract the largest logit of the row, as torch.softmax does, or compute in FP32",
)  # fmt: skip
def hand_softmax_fp16(seed: int, repaired: bool) -> Run:
    model = chain(seed, fc1=linear(16, 32, 15), softmax=lambda: _HandSoftmax(repaired), fc2=linear(32, 4))
    x, y = classification(seed)
    return amp(model, adam(model), lambda i: F.cross_entropy(model(x), y))


class _RMSNorm(nn.Module):
    def __init__(self, in_fp32: bool) -> None:
        super().__init__()
        self.weight, self.in_fp32 = nn.Parameter(torch.ones(32)), in_fp32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if self.in_fp32 else x
        return x * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt().to(x.dtype) * self.weight


@fault(
    "RMSNorm in FP16: the square overflows, rsqrt(inf) is 0, and the output is silently zero",
    "fp16_overflow", "forward", silent=True, modules=("norm",), operations=("pow", "mean", "rsqrt"),
    cure="take the mean square in FP32",
)  # fmt: skip
def rmsnorm_fp16(seed: int, repaired: bool) -> Run:
    model = chain(seed, fc1=linear(16, 32, 1000), norm=lambda: _RMSNorm(repaired), fc2=linear(32, 4))
    x, y = classification(seed)
    return amp(model, adam(model), lambda i: F.cross_entropy(model(x), y))


@fault(
    "A sum over all elements overflows FP16",
    "fp16_overflow", "forward", modules=("^loss$",), operations=("sum",),
    cure="a mean, or .sum(dtype=torch.float32)",
)  # fmt: skip
def loss_sum_fp16(seed: int, repaired: bool) -> Run:
    model = mlp(seed, outputs=256)
    x, y = regression(seed, 64, outputs=256)
    reduce = torch.mean if repaired else torch.sum
    return amp(model, sgd(model, 1e-3), lambda i: reduce((model(x) - 5 * y.half()).pow(2)), scale=16.0)


class _Kl(nn.Module):
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), a mean over the batch."""

    def __init__(self, clamped: bool) -> None:
        super().__init__()
        self.clamped = clamped

    def forward(self, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        if self.clamped:
            mean, logvar = mean.float(), logvar.float().clamp(-10, 10)
        return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()


class _Vae(nn.Module):
    def __init__(self, repaired: bool) -> None:
        super().__init__()
        self.encoder, self.decoder, self.kl = linear(16, 16, 15)(), nn.Linear(8, 16), _Kl(repaired)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, logvar = self.encoder(x).chunk(2, -1)
        return F.mse_loss(self.decoder(mean), x) + 1e-3 * self.kl(mean, logvar)


@fault(
    "The KL term of a VAE: exp(logvar) overflows FP16",
    "fp16_overflow", "forward", modules=("kl", "vae"), operations=(r"\bexp\b", "ExpBackward"),
    cure="clamp logvar and compute the KL term in FP32",
)  # fmt: skip
def vae_kl_fp16(seed: int, repaired: bool) -> Run:
    model, (x, _) = chain(seed, vae=lambda: _Vae(repaired)), regression(seed)
    return amp(model, adam(model, 1e-3), lambda i: model(x), scale=16.0)


@fault(
    "Features in raw units: 100,000 is infinite once autocast has cast it to FP16",
    "fp16_overflow", "forward", modules=("^input$", "fc1"), operations=("to_copy", "addmm", "linear", "mm"),
    cure="normalise the features",
)  # fmt: skip
def raw_features_fp16(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    x = x if repaired else x * 1e5
    return amp(model, sgd(model), lambda i: F.cross_entropy(model(x), y))


class _Recurrent(nn.Module):
    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.inner, self.again = nn.Linear(16, 32), linear(32, 32, 6)()
        self.bounded = bounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(len(x), 32)
        for _ in range(16):
            state = self.inner(x) + self.again(state)
            state = state.tanh() if self.bounded else state.relu()
        return state


@fault(
    "A recurrent state that grows with every time step leaves FP16",
    "fp16_overflow", "forward", modules=("cell",), operations=("addmm", "linear", "mm", "add"),
    cure="a bounded activation, a gate, or an orthogonal start",
)  # fmt: skip
def recurrent_state_fp16(seed: int, repaired: bool) -> Run:
    model = chain(seed, cell=lambda: _Recurrent(repaired), head=linear(32, 4))
    x, y = classification(seed)
    return amp(model, sgd(model, 1e-3), lambda i: F.cross_entropy(model(x), y), scale=16.0)


class _Softplus(nn.Module):
    def __init__(self, stable: bool) -> None:
        super().__init__()
        self.stable = stable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softplus(x) if self.stable else (1 + x.exp()).log()


@fault(
    "A softplus written by hand in FP16: log(1 + exp(12)) is infinite",
    "fp16_overflow", "forward", modules=("softplus",), operations=(r"\bexp\b", "ExpBackward"),
    cure="torch.nn.functional.softplus",
)  # fmt: skip
def softplus_fp16(seed: int, repaired: bool) -> Run:
    model = chain(seed, fc1=linear(16, 32, 15), softplus=lambda: _Softplus(repaired), fc2=linear(32, 4))
    x, y = classification(seed)
    return amp(model, adam(model), lambda i: F.cross_entropy(model(x), y))


class _Deep(nn.Module):
    """Sixteen blocks ``x + gain * relu(layer(x))`` without a norm."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.blocks, self.gain = nn.ModuleList(nn.Linear(32, 32) for _ in range(16)), gain
        with torch.no_grad():
            for block in self.blocks:
                block.weight.abs_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + self.gain * block(x).relu()
        return x


@fault(
    "A deep residual network without norms: the stream doubles in every block and leaves FP16",
    "fp16_overflow", "forward", modules=("blocks",), operations=("addmm", "linear", "mm", "mul", "add"),
    cure="scale the branches by 1 over the depth, or normalise",
)  # fmt: skip
def residual_stream_fp16(seed: int, repaired: bool) -> Run:
    with seeded(seed):
        model = nn.Sequential()
        model.add_module("stem", nn.Linear(16, 32))
        model.add_module("body", _Deep(0.02 if repaired else 1.0))
        model.add_module("head", nn.Linear(32, 4))
    x, y = classification(seed)
    return amp(model, sgd(model, 1e-2), lambda i: F.cross_entropy(model(x), y), scale=16.0)
