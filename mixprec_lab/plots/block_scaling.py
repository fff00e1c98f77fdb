"""Figures of the chapter ``block_scaling``: blocks, outliers, scale rules, bits against error."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mixprec_lab.block_scaling import BlockReport, SchemeLike, block_scales, get_scheme
from mixprec_lab.plots.style import axes, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", "--", "-.", ":")
_LINE = 1.5  # decibels: as high as a line of text in ``bits_and_errors``
_MARKS = ("o", "s", "^", "D", "v", "P")
#: the rules agree over most of a binade: the wide line lies below the narrow ones
_RULES = {"floor": ("#e39ab5", "-", 7), "even": ("#d9a400", "-", 3.5), "round_up": ("#0b3c68", "--", 1.5)}


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
    scheme = get_scheme(scheme)
    amax = torch.exp2(torch.linspace(0, 2, 801)[:-1].double())
    ax = axes(height=3.2)
    for rule in rules:
        placed = amax / block_scales(amax, replace(scheme, rule=rule)).double()
        tone, line, width = _RULES[rule]
        jumps = torch.cat([placed[1:] < placed[:-1], torch.tensor([False])])  # no line across a jump
        ax.plot(
            amax, placed.masked_fill(jumps, torch.nan), line, color=tone, linewidth=width, label=rule.replace("_", " ")
        )
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
    for group in _neighbours(reports):
        bits = [r.bits_per_value for r in group]
        middle = (min(bits) + max(bits)) / 2
        right = [r for r in group if r.bits_per_value >= middle]
        _labels(ax, right, max(bits) + 0.3, "left")
        _labels(ax, [r for r in group if r.bits_per_value < middle], min(bits) - 0.3, "right")
    ax.set(xlabel="bits per value, scales included", ylabel="SQNR, dB")
    ax.set_xlim(right=ax.get_xlim()[1] + 1.2)
    return ax


def _neighbours(reports: Sequence[BlockReport]) -> list[list[BlockReport]]:
    """The reports from the best ratio down, those together whose names would lie on one another."""
    groups: list[list[BlockReport]] = []
    for report in sorted(reports, key=lambda r: -r.sqnr_db):
        last = groups[-1][-1] if groups else None
        if last and last.sqnr_db - report.sqnr_db < _LINE and abs(last.bits_per_value - report.bits_per_value) < 0.6:
            groups[-1].append(report)
        else:
            groups.append([report])
    return groups


def _labels(ax: "Axes", reports: Sequence[BlockReport], x: float, side: str) -> None:
    """Points, and their names at ``x`` in the order of the points, one line apart, so that no two leaders cross."""
    for i, report in enumerate(reports):
        point = report.bits_per_value, report.sqnr_db
        ax.plot(*point, "o", color=colour(report.scheme.element), markersize=7)
        level = sum(r.sqnr_db for r in reports) / len(reports) + ((len(reports) - 1) / 2 - i) * _LINE
        arrow = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.8, "shrinkB": 4}
        ax.annotate(report.scheme.title, point, xytext=(x, level), ha=side, va="center", fontsize=9, arrowprops=arrow)
