"""Transformers for the tests of the memory model: built from a ``ModelShape``, nothing but plain torch."""

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.memory import ModelShape

GPT = ModelShape("test gpt", layers=3, hidden=64, heads=4, vocabulary=500, inner=256, positions=64)
LLAMA = ModelShape("test llama", layers=2, hidden=64, heads=8, vocabulary=300, inner=176, kv_heads=2, gated=True,
                   fused=False, biased=False, norm="rms", tied=False)  # fmt: skip
SHAPES = {"gpt": GPT, "llama": LLAMA}
BATCH, SEQUENCE = 2, 64


def ids_for(shape: ModelShape, batch: int = BATCH, sequence: int = SEQUENCE, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (batch, sequence), generator=generator).to(device)


def loss_of(model: nn.Module, ids: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the logits, held as a training loop holds them."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(ids)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits


class Attention(nn.Module):
    """Causal attention, by the fused operator or with the probabilities as a tensor."""

    def __init__(self, shape: ModelShape, attention: str, dropout: float) -> None:
        super().__init__()
        self.widths = shape.widths[:3]
        self.size = shape.hidden // shape.heads
        self.groups, self.kind, self.dropout = shape.heads // shape.key_heads, attention, dropout
        self.rotary = shape.norm == "rms"
        widths = [sum(self.widths)] if shape.fused else self.widths
        self.project = nn.ModuleList(nn.Linear(shape.hidden, width, shape.biased) for width in widths)
        self.out = nn.Linear(shape.hidden, shape.hidden, shape.biased)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [layer(x) for layer in self.project]
        parts = parts[0].split(self.widths, -1) if len(parts) == 1 else parts
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in parts)
        if self.rotary:
            half = self.size // 2
            q, k = (0.8 * t + 0.6 * torch.cat((-t[..., half:], t[..., :half]), -1) for t in (q, k))  # one angle for all
        if self.kind == "flash":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)
        else:
            if self.groups > 1:
                k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
            scores = (q * self.size**-0.5) @ k.transpose(-1, -2)
            future = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=x.device).triu(1)
            y = F.dropout((scores + future).softmax(-1), self.dropout) @ v
        return self.out(y.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    def __init__(self, shape: ModelShape, attention: str, dropout: float) -> None:
        super().__init__()
        norm = nn.LayerNorm if shape.norm == "layer" else nn.RMSNorm
        self.dropout, self.gated = dropout, shape.gated
        self.norm1, self.norm2 = norm(shape.hidden), norm(shape.hidden)
        self.attention = Attention(shape, attention, dropout)
        self.up = nn.Linear(shape.hidden, shape.inner, shape.biased)
        self.gate = nn.Linear(shape.hidden, shape.inner, shape.biased) if shape.gated else None
        self.down = nn.Linear(shape.inner, shape.hidden, shape.biased)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), self.dropout)
        y = self.norm2(x)
        y = F.silu(self.gate(y)) * self.up(y) if self.gated else F.gelu(self.up(y))
        return x + F.dropout(self.down(y), self.dropout)


class Transformer(nn.Module):
    """A decoder of the given shape; ``forward(ids)`` returns logits, by checkpointed layers if asked to."""

    def __init__(self, shape: ModelShape, attention: str = "flash", dropout: float = 0.0, checkpoint: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.positions, shape.hidden) if shape.positions else None
        self.layers = nn.ModuleList(Layer(shape, attention, dropout) for _ in range(shape.layers))
        self.norm = (nn.LayerNorm if shape.norm == "layer" else nn.RMSNorm)(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self.checkpoint = checkpoint

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        if self.positions:
            x = x + self.positions(torch.arange(ids.shape[-1], device=ids.device).expand_as(ids).contiguous())
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.checkpoint else layer(x)
        return self.head(self.norm(x))
