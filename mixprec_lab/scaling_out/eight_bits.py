"""Eight bits on the wire: moving values is exact, adding them is not.

An all-gather only copies, so an FP8 tensor and its scale arrive as they left: a quarter of FP32's bytes, and the result
is what quantizing on the spot would give.  A sum has to be put on the grid again after each addition, with a scale of
its own, and a grid of three mantissa bits is off by up to a sixteenth at each hop (``simulate_reduction`` with an FP8
wire).
"""

from typing import NamedTuple

import torch
from torch import distributed

from mixprec_lab.formats import FormatLike, decode, encode, get_format
from mixprec_lab.fp8 import amax
from mixprec_lab.rounding import quantize


class Message(NamedTuple):
    """A tensor as 8-bit codes: ``decode(codes) / scale``."""

    codes: torch.Tensor  #: uint8, of the tensor's shape
    scale: torch.Tensor  #: 0-dim float32


def pack(x: torch.Tensor, fmt: FormatLike = "fp8_e4m3", largest: torch.Tensor | None = None) -> Message:
    """``x`` in ``fmt``, its largest magnitude (or ``largest``) on the format's; ValueError if that is not finite.

    Any floating-point shape; a tensor of zeros gets the scale 1.
    """
    fmt = get_format(fmt)
    if fmt.bits != 8:
        raise ValueError(f"expected an 8-bit format, got {fmt.title}, which has {fmt.bits}")
    largest = amax(x) if largest is None else largest
    if not torch.isfinite(largest):
        raise ValueError(f"expected finite values, got a largest magnitude of {largest.item()}: skip this step")
    scale = torch.where(largest > 0, (fmt.largest / largest.double()).clamp(max=2.0**127), 1.0).float()
    return Message(encode(quantize(x.float() * scale, fmt), fmt).to(torch.uint8), scale)


def unpack(message: Message, fmt: FormatLike = "fp8_e4m3") -> torch.Tensor:
    """The values of a message, float32."""
    return decode(message.codes.long(), fmt).float() / message.scale


def all_gather(shard: torch.Tensor, fmt: FormatLike = "fp8_e4m3", *, same_scale: bool = False) -> torch.Tensor:
    """The shards of all ranks, one after the other along the first axis, float32; their codes and scales travel.

    Shards must have one shape.  With ``same_scale`` all ranks use the largest magnitude of the whole tensor, found by
    one more collective, so that the result does not depend on how the tensor was cut.  Needs a process group; the
    codes travel as bytes, because gloo knows no FP8 (torch 2.13: "Invalid scalar type").
    """
    largest = amax(shard)
    if same_scale:
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    message, ranks = pack(shard, fmt, largest), distributed.get_world_size()
    codes = [torch.empty_like(message.codes) for _ in range(ranks)]
    scales = [torch.empty_like(message.scale) for _ in range(ranks)]
    distributed.all_gather(codes, message.codes)
    distributed.all_gather(scales, message.scale)
    return torch.cat([unpack(Message(c, s), fmt) for c, s in zip(codes, scales, strict=True)])
