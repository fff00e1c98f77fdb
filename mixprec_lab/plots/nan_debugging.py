"""Figures of the chapter ``nan_debugging``: the health of a run over its steps, the questions of a hunt as a tree."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixprec_lab.plots.style import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAD = "#b3245e"
_QUESTION = "#0063b2"
#: question or answer -> position (column, row), and where yes and no lead
_TREE = {
    "parameters\nfinite?": ((0, 0), "input\nfinite?", "restore a checkpoint;\nlook one step earlier"),
    "input\nfinite?": ((1, 0), "outputs\nfinite?", "bad data:\ndrop the sample"),
    "outputs\nfinite?": ((2, 0), "loss\nfinite?", "replay forward:\nfirst bad operation"),
    "loss\nfinite?": ((3, 0), "gradients\nfinite?", "label, log of zero,\nFP16 reduction"),
    "gradients\nfinite?": ((4, 0), "weights\nmoving?", "finite at\nscale 1?"),
    "weights\nmoving?": ((5, 0), "order of calls,\nstate, schedule", "underflow, lost\nupdates, dtypes"),
}


def decision_tree() -> "Figure":
    """The questions in the order in which they divide the causes: yes to the right, no downwards."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(9.6, 3.4))
    for question, ((column, row), yes, no) in _TREE.items():
        _box(ax, column, row, question, _QUESTION)
        _arrow(ax, (column + 0.3, row), (column + 0.68, row), "yes")
        _arrow(ax, (column, row - 0.2), (column, row - 0.78), "no")
        _box(ax, column, row - 1, no, _QUESTION if no.endswith("?") else _BAD)
        if yes not in _TREE:
            _box(ax, column + 1, row, yes, _BAD)
    _arrow(ax, (4, -1.2), (4, -1.78), "no")
    _box(ax, 4, -2, "replay backward:\nedge of a function", _BAD)
    _arrow(ax, (4.25, -1.2), (4.85, -1.78), "yes")
    _box(ax, 5.15, -2, "the scaler skips it:\na fault only if it goes on", "#00795c")
    ax.set_xlim(-0.5, 6.5)
    ax.set_ylim(-2.3, 0.3)
    ax.axis("off")
    return figure


def _box(ax: "Axes", x: float, y: float, text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
    ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=style, zorder=3)


def _arrow(ax: "Axes", start: tuple[float, float], end: tuple[float, float], word: str) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#777777", "shrinkA": 0, "shrinkB": 0})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    sideways = start[1] == end[1]
    ax.text(x + (0 if sideways else 0.15), y + (0.1 if sideways else 0), word, fontsize=8, color="#444444", ha="center")


def health_history(reports: Sequence[Mapping[str, Any]]) -> "Figure":
    """Loss, gradient norm and parameter norm over the steps of health reports; bad steps are marked by crosses."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, 1, sharex=True, figsize=(7.6, 5.0))
    steps = [r["step"] for r in reports]
    for ax, key, label in zip(panels, ("loss", "grad_norm", "param_norm"), ("loss", "gradient norm", "parameter norm"),
                              strict=True):  # fmt: skip
        ax.plot(steps, [r[key] if math.isfinite(r[key]) else math.nan for r in reports], color="#222222")
        bad = [r["step"] for r in reports if r["issues"]]
        for step in bad:
            ax.axvline(step, color=_BAD, linestyle=":", linewidth=1.5)
        ax.set_ylabel(label)
        if all(r[key] > 0 for r in reports if math.isfinite(r[key])):
            ax.set_yscale("log")
    panels[-1].set_xlabel("step (dotted: something is not finite)")
    return figure


def detection_bars(rows: Sequence[tuple[str, float, float, float]]) -> "Axes":
    """Shares of faults by detector: seen; at the right step and place; named.  Rows: (detector, three shares)."""
    ax = axes(height=0.8 + 0.62 * len(rows))
    looks = (("seen", "#c9c9c9"), ("right step and place", "#6e6e6e"), ("and named", "#00795c"))
    for i, (_, *shares) in enumerate(rows):
        for j, (share, (word, colour)) in enumerate(zip(shares, looks, strict=True)):
            ax.barh(i + 0.26 * (1 - j), 100 * share, height=0.24, color=colour, label=word if i == 0 else None)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of the faults")
    ax.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    return ax
