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
#: the questions from top to bottom, and what a no means
_QUESTIONS = (
    ("parameters finite?", "restore a checkpoint,\nlook one step earlier"),
    ("input finite?", "bad data:\ndrop the sample"),
    ("outputs finite?", "replay forward:\nfirst bad operation"),
    ("loss finite?", "label, log of zero,\nreduction in FP16"),
    ("gradients finite?", "finite at\nscale 1?"),
    ("weights moving?", "underflow, lost updates,\ndtypes"),
    ("order of calls, stale state, schedule", ""),
)


def decision_tree() -> "Figure":
    """The questions in the order in which they divide the causes: yes downwards, no to the right."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.6, 6.0))
    for row, (question, no) in enumerate(_QUESTIONS):
        last = not no
        _box(ax, 0, -row, question, _BAD if last else _QUESTION)
        if last:
            continue
        _arrow(ax, (0, -row - 0.22), (0, -row - 0.76), "yes")
        _arrow(ax, (0.4, -row), (0.72, -row), "no")
        _box(ax, 1.1, -row, no, _QUESTION if no.endswith("?") else _BAD)
    _arrow(ax, (1.33, -3.9), (1.72, -3.6), "no")
    _box(ax, 2.1, -3.5, "replay backward:\nedge of a function", _BAD)
    _arrow(ax, (1.33, -4.1), (1.72, -4.4), "yes")
    _box(ax, 2.1, -4.5, "the scaler skips it: a\nfault only if it goes on", "#00795c")
    ax.set_xlim(-0.48, 2.58)
    ax.set_ylim(-6.35, 0.35)
    ax.axis("off")
    return figure


def _box(ax: "Axes", x: float, y: float, text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
    ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox=style, zorder=3)


def _arrow(ax: "Axes", start: tuple[float, float], end: tuple[float, float], word: str) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#777777", "shrinkA": 0, "shrinkB": 0})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    down = start[0] == end[0]
    ax.text(x + (0.09 if down else 0), y + (-0.06 if down else 0.12), word, fontsize=10, color="#444444", ha="center")


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
