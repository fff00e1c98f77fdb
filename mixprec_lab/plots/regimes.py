"""Figures of the chapter ``all_regimes``: curves, gaps with their intervals, and what pairs are worth."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from mixprec_lab.plots.style import FORMAT_COLOURS, axes
from mixprec_lab.regimes import PairedDifference, Run, get_regime, power

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: regime -> the format that gives its colour, and the dashes that tell it from its family; () is a solid line.
REGIME_STYLES: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType({
    "fp32": ("fp32", ()), "tf32": ("tf32", (6, 3)),
    "fp16_unscaled": ("fp16", (2, 2)), "fp16_dynamic": ("fp16", (8, 3)),
    "bf16_autocast": ("bf16", ()), "bf16_nearest": ("bf16", (2, 2)), "bf16_stochastic": ("bf16", (8, 3, 2, 3)),
    "bf16_kahan": ("bf16", (4, 2)), "bf16_master": ("bf16", (8, 3)), "bf16_short_sums": ("bf16", (12, 2, 2, 2)),
    "fp8_delayed": ("fp8_e4m3", ()), "fp8_current": ("fp8_e4m3", (8, 3)), "fp8_block": ("fp8_e4m3", (2, 2)),
    "mxfp8": ("fp8_e4m3", (8, 3, 2, 3)), "fp8_unscaled": ("fp8_e4m3", (4, 2)),
    "fp8_e4m3_gradients": ("fp8_e4m3", (12, 2, 2, 2)),
    "mxfp4_forward": ("fp4_e2m1", ()), "fp4_per_tensor": ("fp4_e2m1", (2, 2)),
})  # fmt: skip


def regime_colours(name: str) -> tuple[str, str]:
    """The colours of a regime, light theme and dark theme; those of FP32 for one of your own."""
    return FORMAT_COLOURS[REGIME_STYLES.get(name, ("fp32", ()))[0]]


def _dashes(name: str) -> "str | tuple[int, tuple[float, ...]]":
    dashes = REGIME_STYLES.get(name, ("fp32", (1, 1)))[1]
    return (0, tuple(d / 2 for d in dashes)) if dashes else "-"


def regime_curves(runs: Sequence[Run], task: str, regimes: Sequence[str], ax: "Axes | None" = None) -> "Axes":
    """The held-out loss of every seed (thin) and their mean (thick), a colour and a dash for each regime.

    A mean ends where a seed's loss is not finite.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ax = axes(ax)
    for name in regimes:
        own = [r for r in runs if (r.task, r.regime) == (task, name)]
        curves = [[math.nan if x is None else x for x in r.held_out] for r in own]
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        style = {"color": regime_colours(name)[0], "linestyle": _dashes(name)}
        for curve in curves:
            ax.plot(own[0].steps, curve, linewidth=0.7, alpha=0.45, **style)
        ax.plot(own[0].steps, mean, label=get_regime(name).title, **style)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("training steps")
    ax.legend(ncols=2)
    return ax


def gap_intervals(
    differences: Mapping[str, PairedDifference], linear: float, baseline: str = "FP32", ax: "Axes | None" = None
) -> "Axes":
    """One row a regime: each pair's difference (dots) and the interval of the mean (bar); grey bars include 0.

    In thousandths; the axis is linear up to ``linear`` of them on both sides of 0 and logarithmic beyond.
    """
    from matplotlib.ticker import StrMethodFormatter

    ax = axes(ax, 0.31 * len(differences) + 1.0)
    for row, (name, d) in enumerate(differences.items()):
        colour = regime_colours(name)[0] if d.excludes_zero else "#8a8a8a"
        ax.plot([1000 * d.low, 1000 * d.high], [row, row], color=colour, linewidth=4, solid_capstyle="butt", alpha=0.75)
        ax.plot([1000 * x for x in d.differences], [row] * len(d.differences), "o", color="#222222", markersize=2.6)
        ax.plot([1000 * d.mean], [row], "|", color=colour, markersize=15, markeredgewidth=2)
    ax.axvline(0, color="#555555", linewidth=1)
    ax.set_xscale("symlog", linthresh=linear)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set_yticks(range(len(differences)), [get_regime(name).title for name in differences])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_ylim(len(differences) - 0.4, -0.6)
    ax.set_xlabel(f"held-out loss minus that of {baseline}, thousandths")
    return ax


def power_curves(difference: float, deviations: Mapping[str, float], most: int, ax: "Axes | None" = None) -> "Axes":
    """The chance that so many seeds show ``difference``, one curve for each standard deviation of a difference."""
    ax = axes(ax)
    counts = sorted({round(2 * (most / 2) ** (i / 24)) for i in range(25)})
    for (label, deviation), style in zip(deviations.items(), ("-", "--", ":"), strict=False):
        ax.plot(counts, [100 * power(difference, deviation, n) for n in counts], style, color="#222222", label=label)
    ax.axhline(80, color="#b3171f", linewidth=1)
    ax.set_xscale("log")
    ax.set_xlabel("seeds")
    ax.set_ylabel("chance to see it, %")
    ax.legend()
    return ax
