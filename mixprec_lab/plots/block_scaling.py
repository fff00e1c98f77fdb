"""Figures of the chapter ``block_scaling``: blocks, outliers, scale rules, bits against error."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mixprec_lab.block_scaling import BlockReport, BlockScheme, SchemeLike, block_scales, get_scheme
from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P")
_RULES = {"floor": ("#b3245e", "-"), "round_up": ("#0063b2", "--"), "even": ("#8a6d00", ":")}


def block_shapes(schemes: Sequence[SchemeLike], rows: int = 256, columns: int = 256) -> "Axes":
    """Which values share a scale: one square of ``rows`` by ``columns`` values a scheme, cut into its blocks."""
    import matplotlib.pyplot as plt

    chosen = [get_scheme(s) for s in schemes]
    _, panels = plt.subplots(1, len(chosen), figsize=(7.6, 2.2), squeeze=False)
    for ax, scheme in zip(panels[0], chosen, strict=True):
        down, across = scheme.block
        down, across = rows if down is None else down, columns if across is None else across
        # Single rows would be a solid surface: every 16th line is drawn, and the title says what a block is.
        ax.hlines(range(0, rows + 1, max(down, 16)), 0, columns, color=colour(scheme.element), linewidth=0.8)
        ax.vlines(range(0, columns + 1, across), 0, rows, color=colour(scheme.element), linewidth=0.8)
        ax.add_patch(plt.Rectangle((0, 0), across, max(down, 16), color=colour(scheme.element), alpha=0.35))
        scales = -(-rows // down) * -(-columns // across)
        ax.set_title(f"{scheme.title}\n{scales:,} scale{'s' if scales > 1 else ''}", fontsize=10, loc="center")
        ax.set(xlim=(-2, columns + 2), ylim=(rows + 2, -2), xticks=[], yticks=[], aspect="equal", frame_on=False)
    return panels[0, 0]


def outlier_errors(errors: Mapping[str, Mapping[float, float]], schemes: Mapping[str, SchemeLike]) -> "Axes":
    """Relative error of the ordinary values against the size of the outliers, both on log scales, a line a scheme."""
    ax = axes()
    for i, (name, line) in enumerate(errors.items()):
        scheme = get_scheme(schemes[name])
        style = f"{_MARKS[i % len(_MARKS)]}{_LINES[i % len(_LINES)]}"
        ax.plot(list(line), list(line.values()), style, color=colour(scheme.element), markersize=5, label=name)
    ax.set(
        xscale="log", yscale="log", xlabel="outliers are so many times larger", ylabel="relative error of the others"
    )
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def scale_rules(scheme: SchemeLike, rules: Sequence[str]) -> "Axes":
    """Where each rule puts the largest value of a block on the element grid, over two binades of its magnitude."""
    from dataclasses import replace

    scheme = get_scheme(scheme)
    amax = torch.exp2(torch.linspace(0, 2, 801)[:-1].double())
    ax = axes(height=3.2)
    for rule in rules:
        placed = amax / block_scales(amax, replace(scheme, rule=rule)).double()
        tone, line = _RULES[rule]
        jumps = torch.cat([placed[1:] < placed[:-1], torch.tensor([False])])  # no line across a jump
        ax.plot(amax, placed.masked_fill(jumps, torch.nan), line, color=tone, label=rule.replace("_", " "))
    top = scheme.element.largest
    ax.axhspan(top, 2.0 ** (scheme.element.max_exponent + 1), facecolor="#eeeeee", hatch="xxx", edgecolor="#bbbbbb")
    ax.text(1.03, top * 1.02, "saturates", fontsize=10, backgroundcolor="white")
    ax.set(xscale="log", xlabel="largest magnitude in the block", ylabel="the same divided by the scale")
    ax.set_xticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def bits_and_errors(reports: Sequence[BlockReport]) -> "Axes":
    """Signal-to-noise ratio against bits per value, a labelled point a scheme."""
    ax = axes()
    for report in reports:
        scheme: BlockScheme = report.scheme
        ax.plot(report.bits_per_value, report.sqnr_db, "o", color=colour(scheme.element), markersize=7)
        ax.annotate(
            scheme.title, (report.bits_per_value, report.sqnr_db), xytext=(6, 4), textcoords="offset points", fontsize=9
        )
    ax.set(xlabel="bits per value, scales included", ylabel="SQNR, dB")
    ax.set_xlim(4, 9.6)
    return ax
