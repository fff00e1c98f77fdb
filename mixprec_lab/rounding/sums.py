"""Sums and dot products whose accumulator is a format of your choice, rounded after every single operation.

Each addition is formed in float64 and rounded once to the format.  That equals the correctly rounded addition: float64
has more than ``2 * 24 + 2`` bits, so its own rounding never shows (Figueroa 1995).
"""

from collections.abc import Callable
from typing import Literal

import torch

from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.rounding.quantizer import quantize, rounder

Method = Literal["naive", "pairwise", "kahan", "stochastic", "fp32"]
METHODS: tuple[str, ...] = ("naive", "pairwise", "kahan", "stochastic", "fp32")


def accumulate(
    values: torch.Tensor, fmt: FormatLike, method: Method = "naive", generator: torch.Generator | None = None
) -> torch.Tensor:
    """The sum of ``values`` over the last dimension as hardware of format ``fmt`` would get it, float64.

    ``values`` of shape (..., n) are first rounded to ``fmt``; the result has shape (...).  Methods:

    - ``naive``: ``s = round(s + v)``, left to right.
    - ``pairwise``: halves are summed, then added, down to single values; every addition rounded.
    - ``kahan``: compensated summation (Kahan 1965), every one of its four operations rounded to ``fmt``.
    - ``stochastic``: as naive with stochastic rounding, fed by ``generator``.
    - ``fp32``: accumulated in FP32, rounded to ``fmt`` once at the end.

    Overflow is the format's own (inf or NaN).  The sum of no values is 0.  Raises TypeError for tensors that are not
    floating-point, ValueError for a 0-dim tensor, an unknown method, or an unsigned format (E8M0).
    """
    fmt, values = _prepare(values, fmt, method)
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    if method == "pairwise":
        return _pairwise(values, rounder(fmt))
    return _running(values, fmt, method, generator)[..., -1]


def running_sum(
    values: torch.Tensor, fmt: FormatLike, method: Method = "naive", generator: torch.Generator | None = None
) -> torch.Tensor:
    """All partial sums, float64, shape as ``values``: element i is ``accumulate(values[..., : i + 1], fmt, method)``.

    The stochastic ones come from one sequence of draws.  ``fp32`` rounds each partial sum on store, while the
    accumulator stays in FP32.  Special values and errors as in ``accumulate``.
    """
    fmt, values = _prepare(values, fmt, method)
    if values.shape[-1] == 0:
        return values
    if method == "pairwise":
        nearest = rounder(fmt)
        parts = [_pairwise(values[..., : i + 1], nearest) for i in range(values.shape[-1])]
        return torch.stack(parts, -1)
    return _running(values, fmt, method, generator)


def _prepare(values: torch.Tensor, fmt: FormatLike, method: str) -> tuple[FloatFormat, torch.Tensor]:
    fmt = get_format(fmt)
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if not fmt.signed:
        raise ValueError(f"{fmt.title} has no zero and no sign, so it cannot hold a sum: choose another format")
    if not (isinstance(values, torch.Tensor) and values.is_floating_point()):
        raise TypeError(f"expected a floating-point tensor, got {getattr(values, 'dtype', type(values).__name__)}")
    if values.dim() == 0:
        raise ValueError("expected a tensor of at least one dimension to sum over, got a 0-dim tensor")
    return fmt, quantize(values.double(), fmt, overflow="native")


def _running(values: torch.Tensor, fmt: FloatFormat, method: str, generator: torch.Generator | None) -> torch.Tensor:
    steps = values.movedim(-1, 0).contiguous()
    partial = torch.empty_like(steps)
    total = torch.zeros_like(steps[0])
    compensation = torch.zeros_like(total)
    nearest = rounder(fmt)
    accumulator = {"stochastic": rounder(fmt, "stochastic", generator=generator), "fp32": rounder("fp32")}
    add = accumulator.get(method, nearest)
    for i, v in enumerate(steps):
        if method == "kahan":
            corrected = nearest(v - compensation)
            grown = nearest(total + corrected)
            compensation = nearest(nearest(grown - total) - corrected)
            total = grown
        else:
            total = add(total + v)
        partial[i] = total
    return (nearest(partial) if method == "fp32" else partial).movedim(0, -1)


def _pairwise(values: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    n = values.shape[-1]
    if n == 1:
        return values[..., 0]
    left, right = values.split([n // 2, n - n // 2], dim=-1)
    return nearest(_pairwise(left, nearest) + _pairwise(right, nearest))


def dot(
    a: torch.Tensor,
    b: torch.Tensor,
    operand_fmt: FormatLike,
    accumulator_fmt: FormatLike = "fp32",
    block: int | None = None,
) -> torch.Tensor:
    """``sum(a * b)`` over the last dimension: operands rounded to one format, the sum kept in another, float64.

    Products of the rounded operands are exact in float64; each is added to an accumulator that is
    rounded to ``accumulator_fmt`` after every addition.  With ``block``, the accumulator is emptied into an FP32 one
    every ``block`` elements, as DeepSeek-V3 does with N_C = 128 (arXiv:2412.19437, section 3.3.2).
    ``a`` and ``b`` have one shape (..., n); the result has shape (...).
    Raises ValueError for different shapes, 0-dim tensors, unsigned formats, ``block`` < 1; TypeError as ``accumulate``.
    """
    operand_fmt, a = _prepare(a, operand_fmt, "naive")
    _, b = _prepare(b, operand_fmt, "naive")
    accumulator_fmt, _ = _prepare(a[..., :0], accumulator_fmt, "naive")
    if a.shape != b.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if block is not None and block < 1:
        raise ValueError(f"expected block to be a positive number of elements or None, got {block}")
    products = (a * b).movedim(-1, 0).contiguous()
    nearest, to_fp32 = rounder(accumulator_fmt), rounder("fp32")
    outer = a.new_zeros(a.shape[:-1])
    for chunk in products.split(block or max(len(products), 1)):
        inner = torch.zeros_like(outer)
        for product in chunk:
            inner = nearest(inner + product)
        outer = inner if block is None else to_fp32(outer + inner)
    return outer
