"""Data in, Axes out: the one figure style of the book and one fixed colour per format.

The colours keep their lightness apart as well as their hue, so they survive colour blindness and grey printing; every
figure also names its formats in words.  ``pyplot`` is imported when a figure is drawn, not before.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mixprec_lab.formats import FormatLike, get_format
from mixprec_lab.rounding import ROUNDING_MODES, quantize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: light theme, dark theme; each has a contrast of 3:1 or more against its page.
FORMAT_COLOURS: dict[str, tuple[str, str]] = {
    "fp32": ("#4d4d4d", "#c9c9c9"),
    "tf32": ("#7a5195", "#c3a0e0"),
    "fp16": ("#0063b2", "#5fb0f5"),
    "bf16": ("#c24e00", "#ff9d52"),
    "fp8_e4m3": ("#00795c", "#3fcfa6"),
    "fp8_e5m2": ("#b3245e", "#ff8fb8"),
    "fp8_e4m3fnuz": ("#4a8f7b", "#8fd9c4"),
    "fp8_e5m2fnuz": ("#c46a8f", "#ffb9d2"),
    "fp6_e3m2": ("#8a6d00", "#d9b93b"),
    "fp6_e2m3": ("#a88932", "#ead88a"),
    "fp4_e2m1": ("#9e2a2b", "#ff9191"),
    "e8m0": ("#3d6b7d", "#8cc4d9"),
}

#: sign, exponent, fraction: one meaning each, in every figure and exhibit.
FIELD_COLOURS = {"sign": "#9a3b5a", "exponent": "#b8860b", "fraction": "#2f6f9f"}

_STYLE = {
    "figure.figsize": (7.6, 3.6), "figure.dpi": 90, "figure.facecolor": "white", "figure.constrained_layout.use": True,
    "font.family": "sans-serif", "font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555", "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.8, "legend.frameon": False, "lines.linewidth": 2,
    "xtick.color": "#333333", "ytick.color": "#333333", "axes.labelcolor": "#222222", "text.color": "#222222",
}  # fmt: skip


def use_style() -> None:
    """Set the book's figure style for this process, and sharp images where IPython shows them."""
    import matplotlib

    matplotlib.rcParams.update(_STYLE)
    with contextlib.suppress(ImportError):  # outside Jupyter there is no inline backend to sharpen
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def colour(fmt: FormatLike) -> str:
    """The figure colour of a format; a neutral grey for formats of your own."""
    return FORMAT_COLOURS.get(get_format(fmt).name, ("#777777", "#aaaaaa"))[0]


def _axes(ax: "Axes | None", height: float = 3.6) -> "Axes":
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.6, height))[1] if ax is None else ax


def bit_layouts(formats: Iterable[FormatLike], ax: "Axes | None" = None) -> "Axes":
    """One row of cells per format, aligned at the end of the exponent: sign, exponent, fraction."""
    chosen = [get_format(f) for f in formats]
    ax = _axes(ax, 0.42 * len(chosen) + 0.9)
    for row, fmt in enumerate(chosen):
        fields = ["sign"] * fmt.signed + ["exponent"] * fmt.exponent_bits + ["fraction"] * fmt.mantissa_bits
        start = -(fmt.exponent_bits + fmt.signed)
        for i, field in enumerate(fields):
            ax.barh(row, 0.92, left=start + i, height=0.72, align="center", color=FIELD_COLOURS[field])
        split = f"{int(fmt.signed)} + {fmt.exponent_bits} + {fmt.mantissa_bits}"
        ax.text(fmt.mantissa_bits + 0.4, row, split, va="center", fontsize=10)
    ax.set_yticks(range(len(chosen)), [f.title for f in chosen])
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_xlim(-9.5, max(f.mantissa_bits for f in chosen) + 4)
    handles = [ax.barh(0, 0, color=c, label=name) for name, c in FIELD_COLOURS.items()]
    ax.legend(handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax


def relative_gaps(formats: Iterable[FormatLike], low: int = -30, high: int = 20, ax: "Axes | None" = None) -> "Axes":
    """Gap between neighbours over the value itself, against the value's log2: range is width, precision depth."""
    ax = _axes(ax)
    for fmt in map(get_format, formats):
        first = max(low, round(math.log2(fmt.smallest)))
        last = min(high, fmt.max_exponent)
        xs, ys = [], []
        for e in range(first, last + 1):
            gap = 2.0 ** (max(e, fmt.min_exponent) - fmt.mantissa_bits)
            xs += [e, e + 1]
            ys += [gap / 2.0**e, gap / 2.0 ** (e + 1)]
        ax.plot(xs, ys, color=colour(fmt), label=fmt.title)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("log2 of the value")
    ax.set_ylabel("gap / value")
    ax.legend(ncols=2)
    return ax


def exponent_histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(exponents, shares): for each binade 2**e that occurs, the share of all elements of ``x`` that lie in it.

    Zeros, NaNs and infinities lie in no binade, so the shares add up to less than 1 where there are some.
    """
    finite = x.detach().double().flatten()
    exponents = torch.frexp(finite[finite.isfinite() & (finite != 0)]).exponent - 1
    values, counts = exponents.unique(return_counts=True)
    return values, counts.double() / x.numel()


def windows(formats: Sequence[FormatLike], tensors: Mapping[str, torch.Tensor] | None = None) -> "Axes":
    """Every format's range on one log2 axis (dark: normal, light: subnormal), under histograms of ``tensors``."""
    import matplotlib.pyplot as plt

    chosen = [get_format(f) for f in formats]
    heights = [2.2, 0.36 * len(chosen) + 0.4] if tensors else [0.36 * len(chosen) + 0.6]
    figure, axes = plt.subplots(len(heights), 1, sharex=True, height_ratios=heights, figsize=(7.6, sum(heights) + 0.6))
    top, bottom = (axes[0], axes[1]) if tensors else (None, axes)
    for (name, x), style in zip((tensors or {}).items(), (("#222222", "-"), ("#888888", "--")), strict=False):
        exponents, shares = exponent_histogram(x)
        top.step(exponents, shares * 100, where="post", color=style[0], linestyle=style[1], label=name)
        top.set_ylabel("% of elements\nper binade")
        top.legend()
    for row, fmt in enumerate(chosen):
        low = round(math.log2(fmt.smallest))
        bottom.barh(row, fmt.max_exponent + 1 - fmt.min_exponent, left=fmt.min_exponent, height=0.66, color=colour(fmt))
        bottom.barh(row, fmt.min_exponent - low, left=low, height=0.66, color=colour(fmt), alpha=0.4, hatch="///")
    bottom.set_yticks(range(len(chosen)), [f.title for f in chosen])
    bottom.tick_params(axis="y", length=0)
    bottom.grid(axis="y", visible=False)
    bottom.invert_yaxis()
    bottom.set_xlabel("log2 of the magnitude (solid: normal, hatched: subnormal)")
    return bottom


def rounding_steps(fmt: FormatLike, low: float, high: float) -> "Axes":
    """Input against output of the five deterministic modes over [low, high], one panel a mode."""
    import matplotlib.pyplot as plt

    modes = [m for m in ROUNDING_MODES if m != "stochastic"]
    figure, axes = plt.subplots(1, len(modes), sharey=True, figsize=(7.6, 2.5))
    x = torch.linspace(low, high, 2001, dtype=torch.float64)
    for ax, mode in zip(axes, modes, strict=True):
        ax.plot(x, x, color="#bbbbbb", linewidth=1)
        ax.plot(x, quantize(x, fmt, mode), ".", color=colour(fmt), markersize=1.5)
        ax.set_title(mode.replace("_", " "), fontsize=10)
        ax.set_aspect("equal")
        ax.set_xlabel("x")
    axes[0].set_ylabel(f"{get_format(fmt).title} value")
    return axes[0]


def error_against_magnitude(formats: Iterable[FormatLike], low: int, high: int) -> "Axes":
    """Relative error of round-to-nearest for values spread evenly in log2, with each format's unit roundoff dashed."""
    ax = _axes(None)
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
    ax = _axes(None)
    steps = torch.arange(1, exact.numel() + 1)
    ax.plot(steps, exact, color="#777777", linestyle="--", label="exact")
    for (name, curve), width in zip(curves.items(), (3, 2, 2, 2, 1.5), strict=False):
        ax.plot(steps, curve, color=colours[name], label=name, linewidth=width)
    ax.set_xlabel("number of additions")
    ax.set_ylabel("running sum")
    ax.legend()
    return ax
