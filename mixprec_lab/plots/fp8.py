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
    """Above: each step's amax, and the largest value that fits at each recipe's scale; below: the SQNR that results."""
    import matplotlib.pyplot as plt

    fmt = get_format(fmt)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7.6, 5.4), height_ratios=(3, 2))
    first = next(iter(runs.values()))
    steps = range(len(first.amax))
    top.semilogy(steps, first.amax, "o", color="#222222", markersize=4, label="largest magnitude of the tensor", base=2)
    for (name, run), style in zip(runs.items(), _LINES, strict=False):
        drawn = {"linestyle": style, "where": "mid", "color": colour(fmt)}
        top.step(steps, [fmt.largest / s for s in run.scale], label=f"largest that fits, {name}", **drawn)
        bottom.step(steps, run.sqnr_db, label=name, **drawn)
    top.set_ylabel("magnitude, log2 scale")
    top.legend(fontsize=9, loc="upper right")
    bottom.set_ylabel("SQNR, dB")
    bottom.set_xlabel("step")
    bottom.legend(fontsize=9, loc="lower right")
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
