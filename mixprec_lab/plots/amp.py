"""Figures of the chapter ``amp``: the pillars, one training step with its dtypes, and a loss scale over time."""

from typing import TYPE_CHECKING

import torch

from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: name, dtype that colours it, what is done, what is lost without it
PILLARS = (
    ("16-bit arithmetic", "fp16", "forward and backward\nin FP16 or BF16", "no speed, and\ntwice the activations"),
    ("FP32 accumulation", "fp32", "products of 16-bit\nnumbers, sums in FP32", "long sums stall"),
    ("FP32 master weights", "fp32", "the optimizer steps\nFP32 parameters", "small updates\nround to nothing"),
    ("loss scaling", "fp16", "gradients times S,\ndivided again in FP32", "FP16 flushes small\ngradients to zero"),
)

#: column, row (0 above), text, dtype: the step runs through the upper row and back through the lower one
STEP = (
    (0, 0, "weights", "fp32"), (1, 0, "cast,\ncached", "fp16"), (2, 0, "matmul,\nconv", "fp16"),
    (3, 0, "softmax,\nnorm", "fp32"), (4, 0, "loss", "fp32"),
    (4, 1, "loss x S", "fp32"), (3, 1, "backward,\nsame dtypes", "fp16"), (2, 1, "gradients\nx S", "fp32"),
    (1, 1, "/ S, check,\nclip", "fp32"), (0, 1, "optimizer\nstep", "fp32"),
)  # fmt: skip


def _box(ax: "Axes", x: float, y: float, width: float, height: float, text: str, dtype: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.06"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour(dtype), edgecolor="none"))
    ax.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", fontsize=9)


def _bare(ax: "Axes", width: float, height: float) -> "Axes":
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.set_axis_off()
    return ax


def pillars() -> "Axes":
    """The four pillars of mixed-precision training: what each one does, and what happens without it."""
    ax = _bare(axes(height=2.4), 4, 2.6)
    for i, (name, dtype, does, lost) in enumerate(PILLARS):
        ax.text(i + 0.5, 2.42, name, ha="center", fontsize=10, fontweight="bold")
        _box(ax, i + 0.06, 0.95, 0.88, 1.3, does, dtype)
        ax.text(i + 0.5, 0.8, f"without it:\n{lost}", ha="center", va="top", fontsize=9, color="#444444")
    return ax


def training_step() -> "Axes":
    """One training step under autocast as boxes and arrows, coloured by dtype: FP16 blue, FP32 grey."""
    ax = _bare(axes(height=2.7), 5, 2.7)
    places = [(column, 1.55 - 1.25 * row) for column, row, _, _ in STEP]
    for (x, y), (_, _, text, dtype) in zip(places, STEP, strict=True):
        _box(ax, x + 0.06, y, 0.74, 0.8, text, dtype)
    for (x, y), (u, v) in zip(places, [*places[1:], places[0]], strict=True):
        start = (x + (0.8 if u > x else 0.06 if u < x else 0.43), y + (0.4 if u != x else 0 if v < y else 0.8))
        end = (u + (0.06 if u > x else 0.8 if u < x else 0.43), v + (0.4 if u != x else 0.8 if v < y else 0))
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#666666", "shrinkA": 1, "shrinkB": 1})
    for i, (dtype, title) in enumerate((("fp16", "FP16 (or BF16, where S is 1)"), ("fp32", "FP32"))):
        ax.text(0.06 + 2.2 * i, 2.52, "\u25a0 " + title, color=colour(dtype), fontsize=10)
    return ax


def gradient_scale(scales: torch.Tensor) -> "Figure":
    """Two panels: ``scales`` (steps,) over the steps on a log2 axis, and counts of its changes in powers of two.

    Steps without a change are counted in the title of the right panel, not drawn: they would dwarf the rest.
    ValueError for an empty tensor and for scales that are not positive.
    """
    import matplotlib.pyplot as plt

    if scales.numel() == 0 or not bool((scales > 0).all()):
        raise ValueError("expected at least one scale, all of them positive")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.0), width_ratios=[2.2, 1])
    left.step(range(len(scales)), scales.tolist(), where="post", color=colour("fp16"))
    left.set_yscale("log", base=2)
    left.set_xlabel("step")
    left.set_ylabel("loss scale")
    changes = scales.double().log2().diff()
    values, counts = changes[changes != 0].unique(return_counts=True)
    right.bar(values.tolist(), counts.tolist(), width=0.6, color=colour("fp16"))
    right.axvline(0, color="#777777", linewidth=1)
    right.set_xlabel("change of log2 scale")
    right.set_ylabel("steps")
    right.set_title(f"{int((changes == 0).sum())} of {len(changes)} steps: none", fontsize=10)
    right.yaxis.get_major_locator().set_params(integer=True)
    return figure
