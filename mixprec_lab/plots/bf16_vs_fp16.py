"""Figures of the chapter ``bf16_vs_fp16``: what each format loses, and differences of paired runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixprec_lab.bf16_vs_fp16 import PairedComparison, RoundingCost
from mixprec_lab.formats import get_format
from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: fate in a format -> (opacity, hatch): solid for what is gone, hatched for what is blurred
_FATES = {"flushed": (1.0, ""), "subnormal": (0.35, "///"), "overflowed": (1.0, "xxx")}


def losses(tensors: Mapping[str, Mapping[str, RoundingCost]]) -> "Axes":
    """Shares of each tensor that each format flushes, holds as subnormals and overflows, one bar each, in percent."""
    rows = [(name, cost) for name, costs in tensors.items() for cost in costs.values()]
    ax = axes(height=0.42 * len(rows) + 1.2)
    for row, (_, cost) in enumerate(rows):
        left = 0.0
        for fate, (alpha, hatch) in _FATES.items():
            share = 100 * getattr(cost.shares, fate)
            face = colour(cost.format)
            ax.barh(row, share, left=left, height=0.7, color=face, alpha=alpha, hatch=hatch, edgecolor="white")
            left += share
        told = f"{left:.1f} %" if left >= 0.1 else "below 0.1 %" if left else "nothing"
        ax.text(left + 0.6, row, told, va="center", fontsize=10)
    for fate, (alpha, hatch) in _FATES.items():
        ax.barh([0], [0], color="#777777", alpha=alpha, hatch=hatch, edgecolor="white", label=fate)
    ax.set_yticks(range(len(rows)), [f"{name}, {cost.format.title}" for name, cost in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    ax.set_xlim(0, max(10.0, 1.15 * max(bar.get_x() + bar.get_width() for bar in ax.patches)))
    ax.set_xlabel("% of the elements")
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax


def updates_lost(lost: Mapping[str, Mapping[float, float]]) -> "Axes":
    """Share of the updates that leave their weight unchanged against the size of the update, one curve a format."""
    ax = axes()
    for name, shares in lost.items():
        fmt = get_format(name)
        ax.plot(
            list(shares), [100 * s for s in shares.values()], "o-", markersize=4, color=colour(fmt), label=fmt.title
        )
    ax.set_xscale("log")
    ax.set_xlabel("size of the update")
    ax.set_ylabel("updates lost, %")
    ax.legend()
    return ax


def paired_differences(comparisons: Mapping[str, PairedComparison]) -> "Axes":
    """Difference of every pair, a row for each comparison, over the spread that seeds alone cause (grey)."""
    ax = axes(height=0.5 * len(comparisons) + 1.1)
    spread = max(c.seed_spread for c in comparisons.values())
    ax.axvspan(-spread, spread, color="#dddddd", label="one standard deviation over seeds")
    ax.axvline(0, color="#555555", linewidth=1)
    for row, comparison in enumerate(comparisons.values()):
        ax.plot(comparison.differences, [row] * len(comparison.differences), "o", color=colour("bf16"), markersize=5)
        ax.plot([comparison.mean], [row], "|", color="#222222", markersize=18, markeredgewidth=2)
    _names(ax, list(comparisons))
    ax.set_xlabel("loss of the variant minus loss of its FP32 twin")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax


def _names(ax: "Axes", names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_ylim(len(names) - 0.4, -0.6)
