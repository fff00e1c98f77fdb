"""The one figure style of the book and one fixed colour per format.

The colours keep their lightness apart as well as their hue, so they survive colour blindness and grey printing; every
figure also names its formats in words.
"""

import contextlib
from typing import TYPE_CHECKING

from mixprec_lab.formats import FormatLike, get_format

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


def axes(ax: "Axes | None" = None, height: float = 3.6) -> "Axes":
    """``ax`` itself, or the axes of a new figure as wide as the page and ``height`` inches high."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.6, height))[1] if ax is None else ax
