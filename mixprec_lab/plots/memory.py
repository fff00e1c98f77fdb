"""Figures of the chapter ``memory``: bills as stacked bars."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mixprec_lab.memory import TERMS, TrainingMemory
from mixprec_lab.plots.style import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: light theme, dark theme; neighbours in a bar differ in lightness.
TERM_COLOURS: dict[str, tuple[str, str]] = {
    "weights": ("#00456b", "#3f9fd8"),
    "gradients": ("#3d8fc7", "#a5d3f2"),
    "masters": ("#6b4a8a", "#b08fd0"),
    "moments": ("#9f80bb", "#dcc8ee"),
    "copies": ("#9e2a2b", "#ff9191"),
    "activations": ("#b35900", "#e08a2e"),
    "logits": ("#c48a00", "#f5cf6b"),
    "temporary": ("#6f7a80", "#b9c2c8"),
}


def memory_bars(bills: Mapping[str, TrainingMemory], capacity: float | None = None, ax: "Axes | None" = None) -> "Axes":
    """One stacked bar a bill, in GB, and a dashed line at ``capacity`` bytes."""
    ax = axes(ax, 0.42 * len(bills) + 1.3)
    ends = [0.0] * len(bills)
    for term in TERMS:
        sizes = [getattr(bill, term) / 1e9 for bill in bills.values()]
        if any(sizes):
            ax.barh(list(bills), sizes, left=ends, height=0.66, color=TERM_COLOURS[term][0], label=term,
                    edgecolor="white", linewidth=0.8)  # fmt: skip
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    if capacity is not None:
        ax.axvline(capacity / 1e9, color="#222222", linestyle="--", linewidth=1.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    ax.set_xlabel("GB on one GPU")
    ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax
