"""What puts a tensor on an FP8 grid: a scale for each tensor or row, taken from the tensor itself or from its past."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from mixprec_lab.formats import FloatFormat
from mixprec_lab.rounding import quantize, quantize_scaled

FP32_MAX = torch.finfo(torch.float32).max


class Scaled(NamedTuple):
    """``values / scale`` is the tensor that was quantized: every value one of an FP8 format."""

    values: torch.Tensor  #: (rows, columns), float32, bfloat16 or one of torch's float8 dtypes
    scale: torch.Tensor  #: float32; (), or one for each row or column, broadcastable to ``values``

    def along(self, axis: int) -> "Scaled":
        """The tensor as the operand of a product that sums over ``axis``: one scale for all serves both axes."""
        return self

    def dequantized(self) -> torch.Tensor:
        """``values / scale``, float32."""
        return self.values.float() / self.scale


class RowScaled(NamedTuple):
    """A tensor that gets one scale for each line along the axis of a product's sum: two axes, two quantized copies."""

    source: torch.Tensor
    format: FloatFormat
    power_of_two: bool
    epsilon: float
    native: bool

    def along(self, axis: int) -> Scaled:
        """Quantized with one scale for each line along ``axis`` (0 or 1)."""
        if not self.source.numel():
            shape = [1 if i == axis else size for i, size in enumerate(self.source.shape)]
            return scaled(self.source, self.source.new_ones(shape, dtype=torch.float32), self.format, self.native)
        low, high = torch.aminmax(self.source, dim=axis, keepdim=True)
        scale = current_scale(torch.maximum(-low, high).float(), self.format, self)
        return scaled(self.source, scale, self.format, self.native)


def amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in ``x``, 0-dim float32; NaN if any element is NaN, 0 for an empty tensor."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def current_scale(amax_: torch.Tensor, fmt: FloatFormat, rule: "CurrentQuantizer | RowScaled") -> torch.Tensor:
    """``fmt.largest / amax``, float32, in the shape of ``amax_``; with ``rule.power_of_two`` rounded down to one.

    An amax below ``rule.epsilon`` counts as that.  0, inf and NaN give 1; a quotient that overflows gives the largest
    float32.  These are the rules of Transformer Engine (``common/recipe/recipe_common.cuh``, version 2.12).
    """
    bounded = torch.where(amax_ < rule.epsilon, torch.full_like(amax_, rule.epsilon), amax_)
    scale = _quotient(fmt.largest, bounded)
    if rule.power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(bounded.isfinite() & (bounded > 0), scale, torch.ones_like(scale))


def _quotient(largest: float, amax_: torch.Tensor) -> torch.Tensor:
    """``largest / amax``, correctly rounded; torch computes ``number / tensor`` as ``number * (1 / tensor)``."""
    return torch.div(torch.full_like(amax_, largest), amax_).clamp_(max=FP32_MAX)


def delayed_update(
    amax_history: torch.Tensor, scale: torch.Tensor, largest: float, margin: int = 0, algorithm: str = "max"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The history and the scale after a step, as new tensors; slot 0 of the history is where the step left its amax.

    ``amax_history``: (length,), float32: slot 0 staged, slots 1 to length - 1 older ones, oldest first.
    ``scale``: 0-dim float32.  The new scale is ``largest / amax / 2**margin``, of the largest amax in the whole history
    (``max``) or of the staged one (``most_recent``).  Then the oldest amax is dropped, the staged one appended and slot
    0 set to zero.

    A staged 0 means that nothing was recorded: history and scale stay.  An amax that is inf or NaN leaves the scale as
    it is; "max" passes over NaN, while an inf keeps the scale frozen until it has left the history.  A quotient that
    overflows gives the largest float32.  These are the rules of Transformer Engine's kernel
    (``common/recipe/delayed_scaling.cu``, version 2.12).  Raises ValueError for other shapes and algorithms.
    """
    if amax_history.dim() != 1 or not len(amax_history) or scale.dim():
        shapes = f"{tuple(amax_history.shape)} and {tuple(scale.shape)}"
        raise ValueError(f"expected a history (length,) and a 0-dim scale, got {shapes}")
    if algorithm not in ("max", "most_recent"):
        raise ValueError(f"expected algorithm to be 'max' or 'most_recent', got {algorithm!r}")
    staged = amax_history[0]
    chosen = amax_history.nan_to_num(nan=0.0, posinf=torch.inf).max() if algorithm == "max" else staged
    quotient = _quotient(largest * 2.0**-margin, chosen)
    rolled = torch.cat([torch.zeros_like(amax_history[:1]), amax_history[2:], amax_history[:1]])[: len(amax_history)]
    recorded = staged != 0
    usable = recorded & chosen.isfinite() & (chosen > 0)
    return torch.where(recorded, rolled, amax_history), torch.where(usable, quotient, scale)


class Quantizer(nn.Module):
    """What the quantizers share: the format, and the dtype that holds the values (float32 or bfloat16)."""

    def __init__(self, fmt: FloatFormat) -> None:
        super().__init__()
        self.format, self.dtype = fmt, torch.float32

    def _scaled(self, x: torch.Tensor, scale: torch.Tensor, native: bool) -> Scaled:
        return scaled(x, scale, self.format, native, self.dtype)


class FixedQuantizer(Quantizer):
    """One scale for ever: FP8 as a plain number format."""

    def __init__(self, fmt: FloatFormat, scale: float) -> None:
        super().__init__(fmt)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)

    def forward(self, x: torch.Tensor, record: bool = True, native: bool = False) -> Scaled:
        """``x`` (rows, columns) on the grid; what is out of range saturates."""
        return self._scaled(x, self.scale, native)


class CurrentQuantizer(Quantizer):
    """A scale from the tensor that is quantized: one pass to find its amax, one to round."""

    def __init__(self, fmt: FloatFormat, power_of_two: bool, epsilon: float, granularity: str) -> None:
        super().__init__(fmt)
        self.power_of_two, self.epsilon, self.granularity = power_of_two, epsilon, granularity

    def forward(self, x: torch.Tensor, record: bool = True, native: bool = False) -> Scaled | RowScaled:
        """``x`` (rows, columns) on the grid, its largest magnitude at the format's largest value."""
        if self.granularity == "row":
            return RowScaled(x, self.format, self.power_of_two, self.epsilon, native)
        return self._scaled(x, current_scale(amax(x), self.format, self), native)


class DelayedQuantizer(Quantizer):
    """A scale from the amax history of the tensors that were quantized before: one pass.

    The scale starts at 1 and moves in ``update``; ``amax_history`` and ``scale`` are buffers, always float32, and
    belong into a checkpoint: without them the steps after a restart run at scale 1.
    """

    amax_history: torch.Tensor
    scale: torch.Tensor

    def __init__(self, fmt: FloatFormat, margin: int, length: int, algorithm: str) -> None:
        super().__init__(fmt)
        self.margin, self.algorithm = margin, algorithm
        self.register_buffer("amax_history", torch.zeros(length))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor, record: bool = True, native: bool = False) -> Scaled:
        """``x`` (rows, columns) on the grid at the present scale; saturates.  ``record`` stages its amax."""
        if record:
            staged = self.amax_history[0]
            staged.copy_(torch.maximum(staged, amax(x)))  # keeps NaN: it means that something is wrong
        return self._scaled(x, self.scale, native)

    def update(self) -> None:
        """Move the scale by the staged amax (see ``delayed_update``); nothing happens if none is staged."""
        history, scale = delayed_update(
            self.amax_history, self.scale, self.format.largest, self.margin, self.algorithm
        )
        self.amax_history.copy_(history)
        self.scale.copy_(scale)

    def _apply(self, fn, recurse=True):
        """``.to(device)`` moves the state, ``.half()`` and ``.bfloat16()`` do not round it."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, exact in before.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = exact.to(self._buffers[name].device)
        return self


def scaled(
    x: torch.Tensor, scale: torch.Tensor, fmt: FloatFormat, native: bool, dtype: torch.dtype = torch.float32
) -> Scaled:
    """``x * scale`` on the grid of ``fmt``, saturating: in ``dtype``, or (``native``) in torch's dtype for the format.

    ``dtype`` is float32 or bfloat16; both hold every value of an FP8 format.
    """
    if native:
        cast = _compiled_cast() if x.is_cuda else _cast
        return Scaled(cast(x, scale, fmt.largest, fmt.torch_dtype), scale)
    if scale.dim() == 0:
        return Scaled(quantize_scaled(x, scale, fmt, dtype), scale)
    return Scaled(quantize(x.float() * scale, fmt, overflow="saturate").to(dtype), scale)


def _cast(x: torch.Tensor, scale: torch.Tensor, largest: float, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() * scale).clamp(-largest, largest).to(dtype)  # clamped: casts differ between releases of torch


@cache
def _compiled_cast() -> Callable[..., torch.Tensor]:
    """The cast in one kernel: as four it would read and write five times the bytes."""
    return torch.compile(_cast, dynamic=True)
