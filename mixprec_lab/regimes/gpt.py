"""A character-level GPT of a hundred thousand parameters, and the text it learns: the prose of this book."""

from functools import cache
from importlib.resources import files

import torch
from torch import nn
from torch.nn import functional as F


class CausalAttention(nn.Module):
    """Self-attention to what came before, with every product a call of its own: an emulation can reach it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> the same shape."""
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        logits = (query * query.shape[-1] ** -0.5) @ key.mT
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        share = logits.masked_fill(later, float("-inf")).softmax(-1)
        return self.out((share @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block: ``x + attention(norm1(x))``, then ``x + contract(gelu(expand(norm2(x))))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), CausalAttention(width, heads)
        self.norm2, self.expand = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class GPT(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens), int64 -> (batch, tokens, vocabulary)."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def gpt(seed: int = 0, context: int = 32, width: int = 64, heads: int = 2, depth: int = 2) -> GPT:
    """A GPT over the characters of ``corpus()``; its weights depend on ``seed`` alone.

    ``width`` must be a multiple of ``heads`` (ValueError).  The global generator is left alone.
    """
    if width % heads:
        raise ValueError(f"expected width to be a multiple of heads, got {width} and {heads}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(len(characters()), context, width, heads, depth)


@cache
def corpus() -> str:
    """The text: prose of this book's chapters as of November 2026, ASCII, one sentence a line."""
    return files("mixprec_lab.regimes").joinpath("corpus.txt").read_text("ascii")


@cache
def characters() -> tuple[str, ...]:
    """The characters of ``corpus()``, sorted; the id of one is its place."""
    return tuple(sorted(set(corpus())))


def encoded() -> torch.Tensor:
    """``corpus()`` as ids: (characters,), int64."""
    place = {c: i for i, c in enumerate(characters())}
    return torch.tensor([place[c] for c in corpus()])
