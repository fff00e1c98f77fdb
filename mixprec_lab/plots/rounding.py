"""Figures of the chapter ``rounding``: steps, errors and running sums."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from mixprec_lab.formats import FormatLike, get_format
from mixprec_lab.plots.style import axes, colour
from mixprec_lab.rounding import ROUNDING_MODES, quantize

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def rounding_steps(fmt: FormatLike, low: float, high: float) -> "Axes":
    """Input against output of the five deterministic modes over [low, high], one panel a mode."""
    import matplotlib.pyplot as plt

    modes = [m for m in ROUNDING_MODES if m != "stochastic"]
    figure, panels = plt.subplots(1, len(modes), sharey=True, figsize=(7.6, 2.5))
    x = torch.linspace(low, high, 2001, dtype=torch.float64)
    for ax, mode in zip(panels, modes, strict=True):
        ax.plot(x, x, color="#bbbbbb", linewidth=1)
        ax.plot(x, quantize(x, fmt, mode), ".", color=colour(fmt), markersize=1.5)
        ax.set_title(mode.replace("_", " "), fontsize=10)
        ax.set_aspect("equal")
        ax.set_xlabel("x")
    panels[0].set_ylabel(f"{get_format(fmt).title} value")
    return panels[0]


def error_against_magnitude(formats: Iterable[FormatLike], low: int, high: int) -> "Axes":
    """Relative error of round-to-nearest for values spread evenly in log2, with each format's unit roundoff dashed."""
    ax = axes()
    x = torch.exp2(torch.linspace(low, high, 1500, dtype=torch.float64))
    for fmt in map(get_format, formats):
        error = (quantize(x, fmt) - x).abs() / x
        ax.plot(x.log2(), error, ".", markersize=2, color=colour(fmt), label=fmt.title)
        ax.axhline(fmt.unit_roundoff, color=colour(fmt), linestyle="--", linewidth=1)
    ax.set_yscale("log", base=2)
    ax.set_ylim(2.0**-16, 2)
    ax.set_xlabel("log2 of the value")
    ax.set_ylabel("relative error")
    ax.legend(markerscale=5, ncols=len(ax.lines) // 2, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax


def running_sums(curves: Mapping[str, torch.Tensor], exact: torch.Tensor, colours: Mapping[str, str]) -> "Axes":
    """Partial sums against the number of additions; ``exact`` dashed in grey."""
    ax = axes()
    steps = torch.arange(1, exact.numel() + 1)
    ax.plot(steps, exact, color="#777777", linestyle="--", label="exact")
    for (name, curve), width in zip(curves.items(), (3, 2, 2, 2, 1.5), strict=False):
        ax.plot(steps, curve, color=colours[name], label=name, linewidth=width)
    ax.set_xlabel("number of additions")
    ax.set_ylabel("running sum")
    ax.legend()
    return ax
