"""Figures of the chapter ``loss_scaling``: gradients in a format's window, training curves."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mixprec_lab.loss_scaling import MagnitudeHistogram

_LINES = ("-", "--", "-.", ":")


def gradient_windows(
    histograms: Mapping[str, "MagnitudeHistogram"], fmt: FormatLike, log2_scales: Sequence[int]
) -> "Axes":
    """Shares by binade after scaling, one panel for each scale, over the ranges of ``fmt``; zeros lie in no binade."""
    import matplotlib.pyplot as plt

    fmt = get_format(fmt)
    size = (7.6, 0.7 + 1.9 * len(log2_scales))
    figure, panels = plt.subplots(len(log2_scales), 1, sharex=True, sharey=True, squeeze=False, figsize=size)
    for ax, k in zip(panels[:, 0], log2_scales, strict=True):
        _ranges(ax, fmt)
        for (name, histogram), style in zip(histograms.items(), _LINES, strict=False):
            binades = histogram.binades
            low, high = min(binades), max(binades)
            shares = [100 * binades.get(e, 0) / histogram.total for e in range(low, high + 1)]
            edges = [e + k for e in range(low, high + 2)]
            ax.stairs(shares, edges, color="#222222", linestyle=style, linewidth=1.6, label=name)
        ax.set_title(f"S = 2^{k}" if k else "S = 1", fontsize=10)
        ax.set_ylabel("% per binade")
    panels[0, 0].legend(loc="center right", bbox_to_anchor=(0.86, 0.5), fontsize=9)
    panels[-1, 0].set_xlabel("log2 of the scaled gradient's magnitude")
    return panels[-1, 0]


def _ranges(ax: "Axes", fmt: FloatFormat) -> None:
    """Where rounding to nearest gives zero (hatched), a subnormal (light), a normal value (plain), overflow."""
    zero, normal, over = (math.log2(edge) for edge, _ in fmt.nearest_edges)
    ax.axvspan(-80, zero, facecolor="#eeeeee", hatch="///", edgecolor="#bbbbbb", linewidth=0)
    ax.axvspan(zero, normal, facecolor=colour(fmt), alpha=0.30, linewidth=0)
    ax.axvspan(normal, over, facecolor=colour(fmt), alpha=0.12, linewidth=0)
    ax.axvspan(over, 60, facecolor="#eeeeee", hatch="xxx", edgecolor="#bbbbbb", linewidth=0)
    ax.set_xlim(zero - 17, over + 6)
    parts = ((zero - 8.5, "flushed"), ((zero + normal) / 2, "subnormal"), ((normal + over) / 2, "normal"))
    for x, word in (*parts, (over + 3, "overflow")):
        ax.text(x, 0.97, word, transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=8)


def training_curves(curves: Mapping[str, Sequence[Sequence[float]]], formats: Mapping[str, FormatLike]) -> "Axes":
    """Error against step, log scale; one line a seed, one line style and its format's colour a way of training."""
    ax = axes()
    for (name, seeds), style, width in zip(curves.items(), _LINES, (4, 1.5, 1.5, 1.5), strict=False):
        for i, errors in enumerate(seeds):  # the first way is drawn wide, so that others on top of it show
            ax.plot(errors, style, color=colour(formats[name]), linewidth=width, label=None if i else name)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("squared error per pixel")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return ax
