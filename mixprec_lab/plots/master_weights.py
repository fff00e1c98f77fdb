"""Figures of the chapter ``master_weights``: thresholds, and states over many steps."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from mixprec_lab.formats import FormatLike, get_format
from mixprec_lab.master_weights import update_threshold
from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: One colour for each way to store a weight, and the style of its line.
METHOD_STYLES = {
    "nearest": ("#c24e00", "-"),
    "masters": ("#777777", "-"),
    "stochastic": ("#00795c", "--"),
    "kahan": ("#0063b2", ":"),
}


def update_thresholds(formats: Iterable[FormatLike], low: int, high: int, rates: Iterable[float] = ()) -> "Axes":
    """The smallest update away from zero that moves a weight, for weights from ``2**low`` to ``2**high``.

    Each of ``rates`` is drawn as a grey line across: what lies above it is not moved by an update of that size.
    """
    ax = axes()
    weights = torch.exp2(torch.linspace(low, high, 2000, dtype=torch.float64))
    for fmt in map(get_format, formats):
        ax.plot(weights, update_threshold(weights, fmt).size, color=colour(fmt), label=fmt.title, linewidth=2)
    for rate in rates:
        ax.axhline(rate, color="#777777", linestyle="--", linewidth=1)
        ax.annotate(f"lr {rate:g}", (weights[0], rate), xytext=(2, 2), textcoords="offset points", color="#777777")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("|weight|")
    ax.set_ylabel("smallest update that moves it")
    ax.legend(loc="lower right")
    return ax


def seed_ranges(curves: Mapping[str, torch.Tensor], every: int, ylabel: str) -> "Axes":
    """One curve for each method of ``METHOD_STYLES`` in ``curves``: the mean over seeds, its range shaded.

    A curve has the shape (seeds, points); its points lie ``every`` steps apart.
    """
    ax = axes()
    for name, curve in curves.items():
        shade, style = METHOD_STYLES[name]
        steps = every * torch.arange(curve.shape[-1])
        ax.plot(steps, curve.mean(0), style, color=shade, label=name, linewidth=2)
        ax.fill_between(steps, curve.amin(0), curve.amax(0), color=shade, alpha=0.12, linewidth=0)
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.legend()
    return ax
