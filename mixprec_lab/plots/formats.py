"""Figures of the chapter ``formats``: bits, gaps and ranges."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mixprec_lab.formats import FormatLike, get_format
from mixprec_lab.plots.style import FIELD_COLOURS, axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bit_layouts(formats: Iterable[FormatLike], ax: "Axes | None" = None) -> "Axes":
    """One row of cells per format, aligned at the end of the exponent: sign, exponent, fraction."""
    chosen = [get_format(f) for f in formats]
    ax = axes(ax, 0.42 * len(chosen) + 0.9)
    for row, fmt in enumerate(chosen):
        fields = ["sign"] * fmt.signed + ["exponent"] * fmt.exponent_bits + ["fraction"] * fmt.mantissa_bits
        start = -(fmt.exponent_bits + fmt.signed)
        for i, field in enumerate(fields):
            ax.barh(row, 0.92, left=start + i, height=0.72, align="center", color=FIELD_COLOURS[field])
        split = f"{int(fmt.signed)} + {fmt.exponent_bits} + {fmt.mantissa_bits}"
        ax.text(fmt.mantissa_bits + 0.4, row, split, va="center", fontsize=10)
    ax.set_yticks(range(len(chosen)), [f.title for f in chosen])
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_xlim(-9.5, max(f.mantissa_bits for f in chosen) + 4)
    handles = [ax.barh(0, 0, color=c, label=name) for name, c in FIELD_COLOURS.items()]
    ax.legend(handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax


def relative_gaps(formats: Iterable[FormatLike], low: int = -30, high: int = 20, ax: "Axes | None" = None) -> "Axes":
    """Gap between neighbours over the value itself, against the value's log2: range is width, precision depth."""
    ax = axes(ax)
    for fmt in map(get_format, formats):
        first = max(low, round(math.log2(fmt.smallest)))
        last = min(high, fmt.max_exponent)
        xs, ys = [], []
        for e in range(first, last + 1):
            gap = 2.0 ** (max(e, fmt.min_exponent) - fmt.mantissa_bits)
            xs += [e, e + 1]
            ys += [gap / 2.0**e, gap / 2.0 ** (e + 1)]
        ax.plot(xs, ys, color=colour(fmt), label=fmt.title)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("log2 of the value")
    ax.set_ylabel("gap / value")
    ax.legend(ncols=2)
    return ax


def exponent_histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(exponents, shares): for each binade 2**e that occurs, the share of all elements of ``x`` that lie in it.

    Zeros, NaNs and infinities lie in no binade, so the shares add up to less than 1 where there are some.
    """
    finite = x.detach().double().flatten()
    exponents = torch.frexp(finite[finite.isfinite() & (finite != 0)]).exponent - 1
    values, counts = exponents.unique(return_counts=True)
    return values, counts.double() / x.numel()


def windows(formats: Sequence[FormatLike], tensors: Mapping[str, torch.Tensor] | None = None) -> "Axes":
    """Every format's range on one log2 axis (dark: normal, light: subnormal), under histograms of ``tensors``."""
    import matplotlib.pyplot as plt

    chosen = [get_format(f) for f in formats]
    heights = [2.2, 0.36 * len(chosen) + 0.4] if tensors else [0.36 * len(chosen) + 0.6]
    size = 7.6, sum(heights) + 0.6
    figure, stacked = plt.subplots(len(heights), 1, sharex=True, height_ratios=heights, figsize=size)
    top, bottom = (stacked[0], stacked[1]) if tensors else (None, stacked)
    for (name, x), style in zip((tensors or {}).items(), (("#222222", "-"), ("#888888", "--")), strict=False):
        exponents, shares = exponent_histogram(x)
        top.step(exponents, shares * 100, where="post", color=style[0], linestyle=style[1], label=name)
        top.set_ylabel("% of elements\nper binade")
        top.legend()
    for row, fmt in enumerate(chosen):
        low = round(math.log2(fmt.smallest))
        bottom.barh(row, fmt.max_exponent + 1 - fmt.min_exponent, left=fmt.min_exponent, height=0.66, color=colour(fmt))
        bottom.barh(row, fmt.min_exponent - low, left=low, height=0.66, color=colour(fmt), alpha=0.4, hatch="///")
    bottom.set_yticks(range(len(chosen)), [f.title for f in chosen])
    bottom.tick_params(axis="y", length=0)
    bottom.grid(axis="y", visible=False)
    bottom.invert_yaxis()
    bottom.set_xlabel("log2 of the magnitude (solid: normal, hatched: subnormal)")
    return bottom
