"""Figures of the chapter ``fp8``: scales chasing a spike, short accumulators."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixprec_lab.formats import FormatLike, get_format
from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mixprec_lab.fp8 import ScalingRun

_LINES = ("-", "--", "-.", ":")
_GREYS = ("#222222", "#6e6e6e", "#a0a0a0")


def scale_chase(runs: Mapping[str, "ScalingRun"], fmt: FormatLike) -> "Axes":
    """A tensor's amax with what fits at each recipe's scale; the SQNR that results; the share that is flushed."""
    import matplotlib.pyplot as plt

    fmt = get_format(fmt)
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(7.6, 6.4), height_ratios=(3, 2, 1.6))
    first = next(iter(runs.values()))
    steps = range(len(first.amax))
    top.semilogy(steps, first.amax, "o", color="#222222", markersize=4, label="amax", base=2, zorder=5)
    looks = zip(_LINES, ("#b0b0b0", "#222222", colour(fmt)), (4.5, 1.6, 1.8), strict=False)
    for (name, run), (style, tone, width) in zip(runs.items(), looks, strict=False):
        drawn = {"linestyle": style, "where": "mid", "color": tone, "linewidth": width, "label": name}
        top.step(steps, [fmt.largest / s for s in run.scale], **drawn)
        middle.step(steps, run.sqnr_db, **drawn)
        bottom.step(steps, [100 * share for share in run.flushed], **drawn)
    for ax, label in ((top, "largest that fits"), (middle, "SQNR, dB"), (bottom, "flushed, %")):
        ax.set_ylabel(label)
    top.legend(fontsize=9, loc="upper right")
    bottom.set_xlabel("step")
    return top


def accumulator_errors(lengths: Sequence[int], errors: Mapping[str, Sequence[float]]) -> "Axes":
    """Largest relative error of a product against the length of its sums, both logarithmic; one line an accumulator."""
    ax = axes()
    for (name, values), style, grey in zip(errors.items(), _LINES, (*_GREYS, "#222222"), strict=False):
        ax.loglog(lengths, values, style, color=grey, marker="o", markersize=4, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("products in a sum, K")
    ax.set_ylabel("largest relative error")
    ax.legend(fontsize=9)
    return ax
