"""Figures of the chapter ``scaling_out``: the error of a sum over ranks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixprec_lab.formats import get_format
from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ORDER_STYLES = {"ring": ("-", "o"), "tree": ("--", "s"), "wide": (":", "^")}


def reduction_errors(ranks: Sequence[int], errors: Mapping[tuple[str, str], Sequence[float]]) -> "Axes":
    """Relative error against the number of ranks, both logarithmic: a line for each (format, order) of ``errors``.

    A format keeps its colour, an order its line and marker.
    """
    ax = axes()
    for (name, order), values in errors.items():
        line, marker = _ORDER_STYLES[order]
        fmt = get_format(name)
        ax.plot(ranks, values, line, marker=marker, markersize=5, color=colour(fmt), label=f"{fmt.title}, {order}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(ranks), [str(n) for n in ranks])
    ax.minorticks_off()
    ax.set_xlabel("ranks")
    ax.set_ylabel("relative error of the sum")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax
