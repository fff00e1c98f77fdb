"""What a sum over ranks costs when its messages are narrow: every order of addition, simulated to the bit.

An all-reduce is a sum, and a sum in a narrow format stalls.  Where the running sum itself travels (a ring, a tree) it
is rounded at every hop; where the summands travel and the sum stays in FP32 (``wide``), once before and once after.
Where the number of ranks divides that of the values, ``ring`` is what gloo computes, bit for bit.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch

from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.rounding import quantize

Order = Literal["ring", "tree", "wide"]
Reduction = Callable[[torch.Tensor, FloatFormat], torch.Tensor]
ORDERS: tuple[str, ...] = ("ring", "tree", "wide")
_FP32 = get_format("fp32")


def gradients(ranks: int, size: int = 2048, noise: float = 1.0, seed: int = 0) -> torch.Tensor:
    """A gradient as each of ``ranks`` sees it, (ranks, size), float32: what they share, N(0, 1), plus their own noise.

    ``noise`` is the standard deviation of what differs from rank to rank.  ValueError for no ranks, no values, and
    noise that is negative or not finite.
    """
    if not (ranks >= 1 and size >= 1 and 0 <= noise < math.inf):
        raise ValueError(f"expected a rank, a value, and noise of 0 or more, got {ranks}, {size} and {noise}")
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(size, generator=generator)
    return shared + noise * torch.randn(ranks, size, generator=generator)


def simulate_reduction(contributions: torch.Tensor, wire: FormatLike = "bf16", order: Order = "ring") -> torch.Tensor:
    """The sum over the first axis of ``contributions`` (ranks, size) as a reduction leaves it, float32 of (size,).

    ``wire`` is the format of every message.  Additions are FP32, as on the hardware, and what is sent is rounded to
    nearest even.  With a format of 16 bits the gradients themselves are rounded to it before they are added, and values
    beyond its range become infinite.  Formats of 8 bits and fewer are sent with a scale for each message, which takes
    its largest magnitude to the format's, and are added to gradients that are FP32 still; a message of few elements
    flatters them, so take some 50 times as many elements as ranks.

    ``ring``: the values are cut into as many chunks as there are ranks; the sum of chunk c starts on rank c - 1, walks
    down from rank to rank and ends on rank c.  ``tree``: rank i and rank i + ranks / 2 add, and so on by halves (the
    number of ranks must be a power of two).  ``wide``: every rank sends its summand, the receiver adds in FP32 in the
    order of the ranks and rounds once.

    TypeError unless ``contributions`` are float32; ValueError for another shape, order or number of ranks, and for a
    format without a sign.
    """
    fmt = get_format(wire)
    if not fmt.signed:
        raise ValueError(f"expected a format with a sign, got {fmt.title}: gradients are negative, too")
    if not isinstance(contributions, torch.Tensor) or contributions.dtype != torch.float32:
        got = contributions.dtype if isinstance(contributions, torch.Tensor) else type(contributions).__name__
        raise TypeError(f"expected a float32 tensor of shape (ranks, size), got {got}: call .float() first")
    if contributions.dim() != 2 or not len(contributions):
        raise ValueError(f"expected contributions of shape (ranks, size), got {tuple(contributions.shape)}")
    orders: dict[str, Reduction] = {"ring": _ring, "tree": _tree, "wide": _wide}
    if order not in orders:
        raise ValueError(f"expected order to be one of {', '.join(ORDERS)}, got {order!r}")
    return orders[order](contributions, fmt)


def on_the_wire(x: torch.Tensor, fmt: FormatLike) -> torch.Tensor:
    """``x`` (..., size), float32, as its receiver reads it; each row is one message, with one scale if it needs one."""
    fmt = get_format(fmt)
    if fmt.bits > 8:
        return x if fmt == _FP32 else quantize(x, fmt, overflow="native")
    largest = x.abs().amax(-1, keepdim=True) if x.numel() else x
    scale = torch.where(largest > 0, fmt.largest / largest.double(), 1.0).clamp(max=2.0**127).float()
    return quantize(x * scale, fmt) / scale


def _ring(contributions: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    ranks, size = contributions.shape
    here, length = contributions.device, -(-size // ranks)
    chunk = torch.arange(ranks, device=here).unsqueeze(1)
    index = -(-chunk * size // ranks) + torch.arange(length, device=here)  # (ranks, length): a row for each chunk
    inside = index < -(-(chunk + 1) * size // ranks)  # a shorter chunk is filled up by zeros, which change no sum

    def sent_by(hop: int) -> torch.Tensor:
        return torch.where(inside, contributions[(chunk - hop) % ranks, index.clamp(max=size - 1)], 0.0)

    running = on_the_wire(sent_by(1), fmt)
    for hop in range(2, ranks + 1):
        own = on_the_wire(sent_by(hop), fmt) if fmt.bits > 8 else sent_by(hop)
        running = on_the_wire(running + own, fmt)
    return running[inside]


def _tree(contributions: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    ranks = len(contributions)
    if ranks & (ranks - 1):
        raise ValueError(f"expected a power of two of ranks for a tree, got {ranks}")
    running = on_the_wire(contributions, fmt)
    while len(running) > 1:
        upper, lower = running.chunk(2)
        running = on_the_wire(upper + lower, fmt)
    return running[0]


def _wide(contributions: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    total = torch.zeros_like(contributions[0])
    for row in on_the_wire(contributions, fmt):
        total = total + row
    return on_the_wire(total, fmt)


def exact_sum(contributions: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis of (ranks, size), correctly rounded to float64 whatever cancels (``math.fsum``).

    ValueError for another shape and for values that are not finite, whose sum is not exact.
    """
    if contributions.dim() != 2 or not bool(contributions.isfinite().all()):
        got = tuple(contributions.shape) if contributions.dim() != 2 else "NaN or infinity"
        raise ValueError(f"expected finite contributions of shape (ranks, size), got {got}")
    columns = contributions.double().T.tolist()
    return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)


def reduction_error(contributions: torch.Tensor, wire: FormatLike = "bf16", order: Order = "ring") -> float:
    """Root mean square error of ``simulate_reduction`` over the root mean square of the exact sum; errors as of both.

    NaN if both are 0, as for gradients of zeros; infinite if only the exact sum is 0, or a sum overflows.
    """
    exact = exact_sum(contributions)
    return float((simulate_reduction(contributions, wire, order).double() - exact).norm() / exact.norm())


def error_bound(ranks: int, wire: FormatLike = "bf16", order: Order = "ring") -> float:
    """A factor b such that ``|sum - exact| <= b * (sum of the magnitudes)`` for every element that stays in range.

    A value that is rounded k times with unit roundoff u and m times with FP32's u32 is multiplied by at most
    ``(1 + u)**k * (1 + u32)**m`` (Higham 2002, section 3.1).  The first summand of a ring is rounded once to be sent
    and once at each of ranks - 1 additions; in a tree at log2(ranks) additions; of a wide sum once, and the sum once
    more.  Holds for formats of 16 bits and more while nothing is subnormal; ValueError for narrower ones.
    Infinite where the bound is beyond float64.
    """
    fmt = get_format(wire)
    if fmt.bits <= 8:
        raise ValueError(f"expected a format of 16 bits or more, got {fmt.title}: its scales change from hop to hop")
    if not isinstance(ranks, int) or ranks < 1 or order not in ORDERS or (order == "tree" and ranks & (ranks - 1)):
        raise ValueError(f"expected at least one rank, a power of two of them for a tree, got {ranks!r} and {order!r}")
    hops = {"ring": ranks - 1, "tree": (ranks - 1).bit_length(), "wide": 1}[order]
    additions = {"ring": ranks - 1, "tree": hops, "wide": ranks}[order]
    u = 0.0 if fmt == _FP32 else fmt.unit_roundoff
    log = (hops + 1) * math.log1p(u) + additions * math.log1p(_FP32.unit_roundoff)
    return math.expm1(log) if log < 709 else math.inf
