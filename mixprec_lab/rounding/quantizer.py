"""One rounding function for every format, mode and device: ``quantize``.

How it works.  A value of binade ``2**E`` lies on a grid of step ``2**(E - mantissa_bits)``; below the smallest normal
the step stays what it is there.  So one AND extracts ``2**E`` from the exponent field and one clamp turns it into the
right power for subnormals and overflow alike.  Rounding is then arithmetic: adding and subtracting ``1.5 * 2**(p - 1)``
steps lets the adder itself round to nearest even; the other modes divide by the step, round to an integer and multiply
back.  No comparison makes a boolean tensor on the way, and the work runs in blocks that stay in the L2 cache.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from mixprec_lab.formats import FloatFormat, FormatLike, get_format

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic"]
Overflow = Literal["saturate", "native"]
ROUNDING_MODES: tuple[str, ...] = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")
OVERFLOW_POLICIES: tuple[str, ...] = ("saturate", "native")


class _Layout(NamedTuple):
    """The bit layout of the dtype that the arithmetic runs in."""

    integer: torch.dtype
    fraction_bits: int
    exponent_mask: int
    max_exponent: int


_LAYOUTS = {
    torch.float32: _Layout(torch.int32, 23, 0x7F800000, 127),
    torch.float64: _Layout(torch.int64, 52, 0x7FF0000000000000, 1023),
}
_WORKING_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32} | {d: d for d in _LAYOUTS}


def quantize(
    x: torch.Tensor,
    fmt: FormatLike,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` rounded to values of ``fmt``, in the dtype, shape and device of ``x``.

    Rounding modes: ``nearest_even`` (IEEE default), ``nearest_away`` (ties away from zero), ``toward_zero``, ``up``
    (toward +inf), ``down`` (toward -inf), ``stochastic`` (up or down with probabilities that make the mean exact, to
    ``2**(mantissa_bits - 23)`` of a gap for float32 input; a value of the format never moves).

    Overflow: ``saturate`` sends everything beyond the largest value, infinity included, to the largest value of its
    sign.  ``native`` does what the format says: infinity where it has one, else NaN, else (FP6, FP4) saturation; the
    directed modes never round a finite value past the largest one on the side they round away from (IEEE 754, 7.4).

    Special values: NaN stays NaN (also for formats without one: the result is a tensor, not codes); -0 and results
    that round to zero keep their sign, except in the FNUZ formats, which have no -0.  E8M0 has no sign and no zero:
    negative values become NaN, zero becomes 2**-127 (``saturate``) or NaN (``native``).

    ``x`` may be float32, float64, float16 or bfloat16; float64 is rounded once, not through float32.  The result
    carries no gradient (see ``fake_quantize``).  ``generator`` feeds stochastic rounding and must live on the device
    of ``x``; without it the global one is used.  ``out`` receives the result: contiguous, of the dtype and shape of
    ``x``, not sharing memory with it.

    Raises TypeError for other dtypes and layouts, KeyError for an unknown format, ValueError for an unknown mode or
    policy, a format whose values the dtype of ``x`` cannot hold, or an unfit ``out``.
    """
    fmt = get_format(fmt)
    _check(x, fmt, rounding, overflow, out)
    working = _WORKING_DTYPE[x.dtype]
    source = x.detach().to(working).contiguous()
    direct = out is not None and out.dtype == working
    result = out if direct else torch.empty_like(source)
    kernel = _kernel(fmt, rounding, overflow, working)
    n, block = source.numel(), _block_size(source)
    scratch = torch.empty(min(n, block), dtype=_LAYOUTS[working].integer, device=x.device)
    for a, b in zip(source.view(-1).split(block), result.view(-1).split(block), strict=True):
        kernel(a, b, scratch[: a.numel()], generator)
    if direct:
        return out
    return result.to(x.dtype) if out is None else out.copy_(result)


def quantize_scaled(
    x: torch.Tensor, scale: torch.Tensor, fmt: FormatLike, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``quantize(x.float() * scale, fmt)``, saturating, in ``dtype``: one pass over memory instead of three.

    ``scale`` is a 0-dim float32 tensor on the device of ``x``; ``dtype`` is float32, or bfloat16 for formats whose
    values it holds.  Special values and errors as in ``quantize``.
    """
    fmt = get_format(fmt)
    if scale.dim() or scale.dtype != torch.float32:
        raise ValueError(f"expected scale to be a 0-dim float32 tensor, got {tuple(scale.shape)}, {scale.dtype}")
    digits = {torch.float32: 23, torch.bfloat16: 7}.get(dtype, -1)
    if fmt.mantissa_bits > digits or not _holds(dtype, fmt):
        raise ValueError(f"expected dtype to be torch.float32 or torch.bfloat16 and to hold {fmt.title}, got {dtype}")
    _check(x, fmt, "nearest_even", "saturate", None)
    kernel = _kernel(fmt, "nearest_even", "saturate", torch.float32)
    source = x.detach().contiguous()
    result = torch.empty(source.shape, dtype=dtype, device=x.device)
    n, block = source.numel(), _block_size(source)
    scaled, rounded = torch.empty(2, min(n, block), dtype=torch.float32, device=x.device).unbind()
    scratch = torch.empty(min(n, block), dtype=torch.int32, device=x.device)
    for a, b in zip(source.view(-1).split(block), result.view(-1).split(block), strict=True):
        m = a.numel()
        target = b if dtype == torch.float32 else rounded[:m]
        torch.mul(a if a.dtype == torch.float32 else a.float(), scale, out=scaled[:m])
        kernel(scaled[:m], target, scratch[:m], None)
        if target is not b:
            b.copy_(target)
    return result


def rounder(
    fmt: FormatLike,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    generator: torch.Generator | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``quantize`` with its choices made and its checks left out: for loops over many small float64 tensors.

    The function it returns expects contiguous float64 tensors; everything else is as in ``quantize``.
    """
    kernel = _kernel(get_format(fmt), rounding, overflow, torch.float64)

    def round_(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernel(x.view(-1), out.view(-1), torch.empty(x.numel(), dtype=torch.int64, device=x.device), generator)
        return out

    return round_


def _check(x: torch.Tensor, fmt: FloatFormat, rounding: str, overflow: str, out: torch.Tensor | None) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in _WORKING_DTYPE or x.layout != torch.strided:
        got = f"{x.dtype} {x.layout}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(
            f"expected a dense float16, bfloat16, float32 or float64 tensor, got {got}: call .float() first"
        )
    if rounding not in ROUNDING_MODES:
        raise ValueError(f"expected rounding to be one of {', '.join(ROUNDING_MODES)}, got {rounding!r}")
    if overflow not in OVERFLOW_POLICIES:
        raise ValueError(f"expected overflow to be one of {', '.join(OVERFLOW_POLICIES)}, got {overflow!r}")
    if not _holds(x.dtype, fmt):
        raise ValueError(
            f"{x.dtype} cannot hold the values of {fmt.title} ({fmt.smallest:g} to {fmt.largest:g}): "
            f"call .float() on the tensor first"
        )
    if out is not None and not (
        out.shape == x.shape and out.dtype == x.dtype and out.device == x.device and out.is_contiguous()
    ):
        raise ValueError(
            f"expected out to be contiguous, {tuple(x.shape)}, {x.dtype} on {x.device}, "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device}"
        )
    if out is not None and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and x.numel():
        raise ValueError("out shares memory with x: give it memory of its own")
    if out is not None and out.requires_grad:
        raise ValueError("out requires grad, and quantize() carries no gradient: pass out.detach()")


@lru_cache(maxsize=256)
def _holds(dtype: torch.dtype, fmt: FloatFormat) -> bool:
    ends = torch.tensor([fmt.smallest, fmt.largest], dtype=torch.float64)
    return bool((ends.to(dtype).double() == ends).all())


def _block_size(x: torch.Tensor) -> int:
    """Elements a pass works on: what stays in L2 on a CPU, everything on a device that has no use for blocks."""
    if x.device.type != "cpu":
        return max(x.numel(), 1)
    return 1 << (16 if torch.get_num_threads() == 1 else 17)


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator | None], None]


@lru_cache(maxsize=1024)
def _kernel(fmt: FloatFormat, rounding: str, overflow: str, dtype: torch.dtype) -> Kernel:
    """The function ``(x, out, scratch, generator)`` that rounds one block of ``x`` into ``out``."""
    lay = _LAYOUTS[dtype]
    like_float32 = (fmt.specials, fmt.exponent_bits, fmt.bias) == ("ieee", 8, 127) and fmt.mantissa_bits < 23
    if rounding == "stochastic" and like_float32 and dtype == torch.float32:
        round_block = _stochastic_by_integer_addition(fmt)
    elif rounding != "nearest_even":
        round_block = _by_scaling(fmt, lay, rounding)
    elif fmt.mantissa_bits <= lay.fraction_bits - 2 and 2 * fmt.max_exponent < lay.max_exponent:
        round_block = _nearest_even_by_addition(fmt, lay)
    elif like_float32 and dtype == torch.float32:
        round_block = _nearest_even_by_integer_addition(fmt)
    else:
        round_block = _by_scaling(fmt, lay, rounding)
    limit = _limit(fmt, rounding, overflow, lay)

    def kernel(x: torch.Tensor, o: torch.Tensor, s: torch.Tensor, generator: torch.Generator | None) -> None:
        round_block(x, o, s, generator)
        limit(x, o, s)

    return kernel


def _binade(x: torch.Tensor, s: torch.Tensor, fmt: FloatFormat, lay: _Layout) -> torch.Tensor:
    """Write the power of two that sets each element's step into ``s`` and return it seen as floats."""
    torch.bitwise_and(x.view(lay.integer), lay.exponent_mask, out=s)
    return s.view(x.dtype).clamp_(fmt.smallest_normal, 2.0**fmt.max_exponent)


def _nearest_even_by_addition(fmt: FloatFormat, lay: _Layout) -> Kernel:
    magic = 1.5 * 2.0 ** (lay.fraction_bits - fmt.mantissa_bits)

    def round_block(x, o, s, generator):
        power = _binade(x, s, fmt, lay)
        # In the binade of x + magic * power neighbours are one step of the format apart; 1.5 serves both signs.
        torch.add(x, power, alpha=magic, out=o).sub_(power, alpha=magic).copysign_(x)

    return round_block


def _nearest_even_by_integer_addition(fmt: FloatFormat) -> Kernel:
    """For formats with the exponent field of float32: add half a step minus one plus the last kept bit, then cut."""
    cut = 23 - fmt.mantissa_bits

    def round_block(x, o, s, generator):
        bits = x.view(torch.int32)
        torch.bitwise_right_shift(bits, cut, out=s)
        s.bitwise_and_(1).add_((1 << (cut - 1)) - 1).add_(bits).bitwise_and_(-(1 << cut))
        rounded = s.view(torch.float32)
        torch.clamp(x, rounded, rounded, out=o)  # equals rounded, but the carry above cannot damage a NaN

    return round_block


def _stochastic_by_integer_addition(fmt: FloatFormat) -> Kernel:
    """The same with random bits: they carry into the last kept bit with the probability that the cut ones stand for."""
    cut = 23 - fmt.mantissa_bits

    def round_block(x, o, s, generator):
        draws, lowest = _random_bits(x, cut, generator)
        s.copy_(draws).sub_(lowest).add_(x.view(torch.int32)).bitwise_and_(-(1 << cut))
        rounded = s.view(torch.float32)
        torch.clamp(x, rounded, rounded, out=o)

    return round_block


def _by_scaling(fmt: FloatFormat, lay: _Layout, rounding: str) -> Kernel:
    """Divide by the step, round to an integer, multiply back: every operation but the rounding is exact."""
    below_half = 0.5 - 2.0 ** -(lay.fraction_bits + 2)  # so that adding it never carries a value below a tie over it

    def round_block(x, o, s, generator):
        step = _binade(x, s, fmt, lay).mul_(fmt.eps)
        torch.div(x, step, out=o)
        if rounding == "nearest_even":
            o.round_()
        elif rounding == "toward_zero":
            o.trunc_()
        elif rounding == "up":
            o.ceil_()
        elif rounding == "down":
            o.floor_()
        elif rounding == "nearest_away":
            o.abs_().add_(below_half).floor_()
        else:
            o.abs_().add_(_random_fraction(o, lay.fraction_bits - fmt.mantissa_bits, generator)).floor_()
        o.mul_(step).copysign_(x)

    return round_block


def _random_fraction(like: torch.Tensor, bits: int, generator: torch.Generator | None) -> torch.Tensor:
    """Uniform multiples of ``2**-bits`` in [0, 1): few enough bits that adding one to an integer in range is exact."""
    draws, lowest = _random_bits(like, bits, generator)
    return draws.to(like.dtype).sub_(lowest).mul_(2.0**-bits)


def _random_bits(like: torch.Tensor, bits: int, generator: torch.Generator | None) -> tuple[torch.Tensor, int]:
    """Uniform integers, one for each element of ``like``, of the ``2**bits`` from the second result on."""
    # Filling 64-bit words is the cheapest generator torch has on a CPU; each holds as many draws as their bits allow.
    integer = torch.int16 if bits <= 16 else _LAYOUTS[like.dtype].integer
    per_word = 8 // integer.itemsize
    words = (like.numel() + per_word - 1) // per_word
    random = torch.empty(words, dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=generator)
    draws = random.view(integer)[: like.numel()]
    return (draws, -(2**15)) if bits == 16 else (draws.bitwise_and_((1 << bits) - 1), 0)


def _limit(fmt: FloatFormat, rounding: str, overflow: str, lay: _Layout) -> Callable:
    """What ``(x, out, scratch)`` does to results beyond the largest value, and to what the format does not have."""
    if not fmt.signed:
        return _limit_unsigned(fmt, rounding, overflow)
    largest = fmt.largest
    if overflow == "saturate" or fmt.specials == "none":
        limit = lambda x, o, s: o.clamp_(-largest, largest)  # noqa: E731
    elif rounding in ("toward_zero", "up", "down"):
        limit = _limit_directed(fmt, rounding)
    elif fmt.has_inf:
        grow = 2.0 ** (lay.max_exponent - fmt.max_exponent)
        limit = lambda x, o, s: o.mul_(grow).mul_(1 / grow) if grow > 1 else o  # noqa: E731
    elif fmt.mantissa_bits <= 20 and 2 * fmt.max_exponent + 1 < lay.max_exponent:
        limit = _nan_beyond(largest, lay)
    else:
        limit = lambda x, o, s: o.masked_fill_(o.abs() > largest, math.nan)  # noqa: E731
    if fmt.has_negative_zero:
        return limit
    return lambda x, o, s: limit(x, o, s).add_(0.0)  # -0 + 0 = +0


def _nan_beyond(largest: float, lay: _Layout) -> Callable:
    """NaN where ``|out| > largest``, without a boolean tensor: the sign of ``largest**2 - out**2`` becomes a mask."""
    shift = 31 if lay.integer == torch.int32 else 63

    def limit(x, o, s):
        torch.mul(o, o, out=s.view(o.dtype)).neg_().add_(largest**2)
        s.bitwise_right_shift_(shift)
        o.view(lay.integer).bitwise_or_(s)
        return o

    return limit


def _limit_directed(fmt: FloatFormat, rounding: str) -> Callable:
    low = -fmt.largest if rounding != "down" else -math.inf
    high = fmt.largest if rounding != "up" else math.inf
    beyond = math.inf if fmt.has_inf else math.nan

    def limit(x, o, s):
        o.clamp_(low, high)
        overflowed = (o.abs() > fmt.largest) | x.isinf()
        return o.copy_(torch.where(overflowed, torch.full_like(o, beyond).copysign_(x), o))

    return limit


def _limit_unsigned(fmt: FloatFormat, rounding: str, overflow: str) -> Callable:
    native, inward = overflow == "native", rounding in ("toward_zero", "down")

    def limit(x, o, s):
        if native:
            overflowed = x.isinf() if inward else o > fmt.largest
            o.masked_fill_(overflowed | (x == 0), math.nan)
        o.clamp_(fmt.smallest, fmt.largest)
        return o.masked_fill_(x < 0, math.nan)

    return limit
