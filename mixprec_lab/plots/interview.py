"""The figure of the chapter ``interview``: what a plan of cards costs on each day."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixprec_lab.plots.style import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = (("#0063b2", "-"), ("#c24e00", "--"), ("#00795c", ":"), ("#7a5195", "-."))


def answers_per_day(loads: Mapping[int, Sequence[int]], ax: "Axes | None" = None) -> "Axes":
    """Answers a day against the day, one line for each number of new cards a day."""
    ax = axes(ax)
    for (new, answers), (colour, style) in zip(loads.items(), _LINES, strict=False):
        ax.plot(range(1, len(answers) + 1), answers, style, color=colour, label=f"{new} new cards a day")
    ax.set_xlabel("day")
    ax.set_ylabel("answers on that day")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")
    return ax
