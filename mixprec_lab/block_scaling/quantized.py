"""Quantize a tensor block by block, and take the result apart: elements, scales, second-level scale."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mixprec_lab.block_scaling.schemes import INT8, BlockScheme, SchemeLike, block_scales, divided, get_scheme
from mixprec_lab.formats import FORMATS, encode
from mixprec_lab.rounding import Rounding, quantize

_WORKING = {d: torch.float32 for d in (torch.float16, torch.bfloat16, torch.float32)} | {torch.float64: torch.float64}


class _Cut(NamedTuple):
    """How a tensor of one shape is cut into blocks: ``split`` makes them, ``join`` puts them back."""

    shape: torch.Size
    block: tuple[int, ...]  #: size of a block in each dimension, 1 or more

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks in each dimension, the shape of the scales; a short block at an end counts."""
        return tuple(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with every dimension as two, (blocks, size of a block); zeros fill short blocks."""
        full = [g * b for g, b in zip(self.grid, self.block, strict=True)]
        if list(self.shape) != full:
            missing = [(0, f - n) for f, n in zip(full, self.shape, strict=True)]
            x = F.pad(x, [n for pair in reversed(missing) for n in pair])
        return x.reshape([n for pair in zip(self.grid, self.block, strict=True) for n in pair])

    def join(self, blocks: torch.Tensor) -> torch.Tensor:
        """The tensor that ``split`` made ``blocks`` of."""
        x = blocks.reshape([g * b for g, b in zip(self.grid, self.block, strict=True)])
        return x[tuple(slice(n) for n in self.shape)].contiguous()

    def largest(self, blocks: torch.Tensor) -> torch.Tensor:
        """The largest magnitude in each block, in the shape of ``spread``; NaN where there is one."""
        inside = list(range(1, blocks.dim(), 2))
        if not inside:
            return blocks.abs()
        # Two reductions read less memory than abs() would write.
        return torch.maximum(blocks.amax(inside, keepdim=True), -blocks.amin(inside, keepdim=True)).abs_()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales in the shape of ``grid``, ready to be broadcast over the blocks."""
        return scales.reshape([n for g in self.grid for n in (g, 1)])


def _cut(shape: torch.Size, scheme: BlockScheme, axis: int) -> _Cut:
    dims, (rows, columns) = len(shape), scheme.block
    most = max(dims, 1)
    if not isinstance(axis, int) or isinstance(axis, bool) or not -most <= axis < most:
        raise ValueError(f"expected axis to be an integer from {-most} to {most - 1}, got {axis!r}")
    axis %= most
    if rows is None:
        # An empty tensor is one block as well, so that its scale has a place.
        return _Cut(shape, tuple(max(n, 1) for n in shape))
    block = [1] * dims
    if dims:
        block[axis] = columns or max(shape[axis], 1)
    if rows > 1:
        if dims < 2 or axis < dims - 2:
            raise ValueError(
                f"{scheme.title} cuts the last two dimensions into blocks of {rows} by {columns}: expected a tensor of "
                f"two dimensions or more and axis -1 or -2, got shape {tuple(shape)} and axis {axis}"
            )
        block[dims - 1 if axis == dims - 2 else dims - 2] = rows
    return _Cut(shape, tuple(block))


@dataclass(frozen=True, eq=False)
class BlockQuantized:
    """A tensor as a scheme stores it: about ``elements * scales * tensor_scale``, each scale spread over its block."""

    elements: torch.Tensor  #: values of the element format, in the shape of the tensor; float32, or float64 for float64
    scales: torch.Tensor  #: values of the scale format, float32; blocked dimensions are divided by their block
    tensor_scale: torch.Tensor | None  #: second-level scale, float32, no dimensions; None where there is none
    scheme: BlockScheme
    axis: int
    dtype: torch.dtype  #: that of the tensor, and of ``dequantize()``

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.elements.shape

    def dequantize(self) -> torch.Tensor:
        """The tensor that the parts stand for, in ``dtype``; what rounds up beyond its largest value is infinite."""
        cut = _cut(self.shape, self.scheme, self.axis)
        scales = _total(self.scales, self.tensor_scale).to(self.elements.dtype)
        return cut.join(cut.split(self.elements) * cut.spread(scales)).to(self.dtype)

    @property
    def bits_per_value(self) -> float:
        """Bits stored for each value: element, its share of the block scales, and of the FP32 tensor scale.

        NaN for an empty tensor.
        """
        n = self.elements.numel()
        if n == 0:
            return math.nan
        second = 0 if self.tensor_scale is None else 32
        return self.scheme.element.bits + (self.scales.numel() * self.scheme.scale.bits + second) / n

    def packed(self) -> torch.Tensor:
        """The elements in the torch dtype that hardware reads: float8, int8, or two FP4 values to a byte.

        FP4 pairs lie along the last dimension, the first of a pair in the low half of the byte, as in
        ``torch.float4_e2m1fn_x2``.  Elements of blocks with a NaN scale are stored as 0; the scale says what they are.
        Raises ValueError where torch has no dtype (FP6) and for an odd last dimension in FP4.
        """
        element, values = self.scheme.element, self.elements.nan_to_num(nan=0.0)
        if element == INT8:
            return values.to(torch.int8)
        if element == FORMATS["fp4_e2m1"]:
            if not self.shape or self.shape[-1] % 2:
                raise ValueError(f"two FP4 values share a byte: expected an even last dimension, got {self.shape}")
            codes = encode(values, element).to(torch.uint8)
            return (codes[..., ::2] | codes[..., 1::2] << 4).view(torch.float4_e2m1fn_x2)
        if element.torch_dtype is None:
            raise ValueError(f"torch has no dtype for {element.title}: use formats.encode(elements, ...) for its codes")
        return values.to(element.torch_dtype)

    def packed_scales(self) -> torch.Tensor:
        """The block scales in the torch dtype of their format: ``float8_e8m0fnu``, ``float8_e4m3fn`` or ``float32``."""
        return self.scales.to(self.scheme.scale.torch_dtype)


def _total(scales: torch.Tensor, tensor_scale: torch.Tensor | None) -> torch.Tensor:
    return scales if tensor_scale is None else scales * tensor_scale


def block_quantize(
    x: torch.Tensor,
    scheme: SchemeLike,
    axis: int = -1,
    rounding: Rounding = "nearest_even",
    generator: torch.Generator | None = None,
) -> BlockQuantized:
    """``x`` in the parts that ``scheme`` stores; blocks lie along ``axis``, two-dimensional ones in the last two.

    A dimension that is no multiple of its block ends in a shorter block.  Elements are ``x / scale`` rounded to
    nearest even (or as ``rounding`` says; ``generator`` feeds stochastic rounding), and saturate beyond the largest.
    With a second level, ``tensor_scale`` is the largest magnitude over the product of both formats' largest values, and
    block scales are made from magnitudes divided by it; elements are ``x`` over the product of both scales.
    The computation runs in float32, in float64 for float64 tensors; the result carries no gradient.

    Special values: a block that holds NaN or infinity gets the scale NaN, and all its values become NaN, since nothing
    is known of their size (the specification says the same of a NaN scale, OCP MX 1.0, section 5.1); with a
    second-level scale that is the whole tensor.  -0 keeps its sign.  A block of zeros stays zero.  In NVFP4 a block
    whose scale rounds to zero becomes zero.

    Raises TypeError for tensors that are not dense float16, bfloat16, float32 or float64, KeyError for an unknown
    scheme, ValueError for an axis that ``x`` does not have, for two-dimensional blocks of fewer than two dimensions,
    and as ``rounding.quantize`` for a rounding mode.
    """
    scheme = get_scheme(scheme)
    cut, elements, scales, tensor_scale = _quantized(x, scheme, axis, rounding, generator)
    return BlockQuantized(cut.join(elements), scales.reshape(cut.grid), tensor_scale, scheme, axis, x.dtype)


def _quantized(
    x: torch.Tensor, scheme: BlockScheme, axis: int, rounding: Rounding, generator: torch.Generator | None
) -> tuple[_Cut, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(cut, elements in blocks, scales to be broadcast over them, second-level scale), after all checks."""
    if not isinstance(x, torch.Tensor) or x.dtype not in _WORKING or x.layout != torch.strided:
        got = f"{x.dtype} {x.layout}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(
            f"expected a dense float16, bfloat16, float32 or float64 tensor, got {got}: call .float() first"
        )
    cut = _cut(x.shape, scheme, axis)
    blocks = cut.split(x.detach().to(_WORKING[x.dtype]))
    scales, tensor_scale = _scales(cut.largest(blocks), scheme)
    total = _total(scales, tensor_scale).to(blocks.dtype)
    # A block scale that was flushed to zero flushes its block: x / inf is a zero with the sign of x.
    scaled = blocks / (total if tensor_scale is None else total.masked_fill(total == 0, math.inf))
    return cut, quantize(scaled, scheme.element, rounding, "saturate", generator), scales, tensor_scale


def _scales(amax: torch.Tensor, scheme: BlockScheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scales of blocks with these largest magnitudes, second-level scale)."""
    if not scheme.second_level:
        return block_scales(amax, scheme), None
    largest = amax.max() if amax.numel() else amax.new_zeros(())
    tensor_scale = divided(largest, scheme.element.largest * scheme.scale.largest).float()
    tensor_scale = tensor_scale.clamp(min=FORMATS["fp32"].smallest_normal).masked_fill(~largest.isfinite(), torch.nan)
    return block_scales(amax / tensor_scale.to(amax.dtype), scheme), tensor_scale


def quantize_blocks(
    x: torch.Tensor,
    scheme: SchemeLike,
    axis: int = -1,
    rounding: Rounding = "nearest_even",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """``x`` after a round trip through ``scheme``, in the dtype and shape of ``x``: what a matrix product would see.

    The products ``element * scale`` are computed in float32 (float64 for float64) and rounded once to the dtype of
    ``x``.  Everything else is as in ``block_quantize``.
    """
    cut, elements, scales, tensor_scale = _quantized(x, get_scheme(scheme), axis, rounding, generator)
    return cut.join(elements.mul_(_total(scales, tensor_scale).to(elements.dtype))).to(x.dtype)
