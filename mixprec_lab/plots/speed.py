"""Figures of the chapter ``speed``: rooflines, time by its parts, Amdahl's law, records, published points."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixprec_lab.plots.style import axes, colour
from mixprec_lab.speed import PARTS, Device, Expected, amdahl, get_device, roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: light theme, dark theme; neighbours in a bar differ in lightness.
PART_COLOURS: dict[str, tuple[str, str]] = {
    "arithmetic": ("#00456b", "#3f9fd8"),
    "memory": ("#9f80bb", "#dcc8ee"),
    "casts": ("#b35900", "#e08a2e"),
    "launches": ("#c48a00", "#f5cf6b"),
}
_FORMATS = {"fp8": "fp8_e4m3", "fp4": "fp4_e2m1"}  # the format whose colour a rate takes
_MARKERS = "osD^vP*X"


def rooflines(
    device: str | Device, dtypes: Sequence[str], shapes: Mapping[str, tuple[int, int, int]], ax: "Axes | None" = None
) -> "Axes":
    """Attainable TFLOP/s against FLOP per byte, one roof a dtype, and where the training step of each shape lies."""
    ax, device = axes(ax, 4.2), get_device(device)
    for dtype in dtypes:
        ridge, rate = device.ridge(dtype), device.rate(dtype) / 1e12
        xs = [0.3, ridge, 1e4]
        line = [min(rate, x * device.bandwidth / 1e12) for x in xs]
        ax.plot(xs, line, color=colour(_FORMATS.get(dtype, dtype)), label=f"{dtype.upper()}: {rate:g} TFLOP/s")
    for (name, shape), marker in zip(shapes.items(), _MARKERS, strict=False):
        found = [(roofline(*shape, dtype, device, training=True), dtype) for dtype in dtypes]
        for r, dtype in found:
            ax.plot(r.intensity, r.attainable / 1e12, marker, color=colour(_FORMATS.get(dtype, dtype)), markersize=8,
                    markeredgecolor="white")  # fmt: skip
        ax.plot([], [], marker, color="#555555", linestyle="", label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("FLOP per byte moved")
    ax.set_ylabel("TFLOP/s that remain possible")
    ax.set_title(f"{device.title}, {device.bandwidth / 1e12:g} TB/s")
    ax.legend(loc="lower right", fontsize=9)
    return ax


def time_splits(runs: Mapping[str, Expected], ax: "Axes | None" = None) -> "Axes":
    """Two stacked bars a run, BF16 and FP8, by what the time is spent on, in percent of the BF16 time of that run."""
    splits = {f"{dtype}, {name}": (split, run.before.total) for name, run in runs.items()
              for dtype, split in (("BF16", run.before), ("FP8", run.after))}  # fmt: skip
    ax = axes(ax, 0.42 * len(splits) + 1.4)
    ends = [0.0] * len(splits)
    for part in PARTS:
        sizes = [100 * getattr(split, part) / whole for split, whole in splits.values()]
        if any(sizes):
            ax.barh(list(splits), sizes, left=ends, height=0.66, color=PART_COLOURS[part][0], label=part,
                    edgecolor="white", linewidth=0.8)  # fmt: skip
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    ax.axvline(100, color="#222222", linestyle="--", linewidth=1.2)
    ax.set_xlabel("% of the BF16 time of the same size, by the model")
    ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax


def amdahl_curves(speedups: Sequence[float], ax: "Axes | None" = None) -> "Axes":
    """The speed-up of the whole against the share that got faster, one curve for each speed-up of that share."""
    ax = axes(ax)
    shares = [i / 200 for i in range(200)]  # not 1: there a free share makes the whole free
    for speedup, style in zip(speedups, ("-", "--", "-.", ":"), strict=False):
        name = "free" if speedup == float("inf") else f"{speedup:g} times as fast"
        whole = [amdahl(s, speedup) for s in shares]
        ax.plot([100 * s for s in shares], whole, style, color="#00456b", label=name)
    ax.set_xlim(0, 100)
    ax.set_ylim(1, 3)
    ax.set_xlabel("share of the time before, %")
    ax.set_ylabel("speed-up of the whole")
    ax.legend(loc="upper left", title="that share becomes")
    return ax


def matmul_rates(record: Mapping[str, Any], ax: "Axes | None" = None) -> "Axes":
    """Measured TFLOP/s of square products against their size, one line a dtype, from a record; quartiles as bars.

    The title says on what machine and when.  The frame holds the medians; the bar of a disturbed size may leave it.
    """
    ax = axes(ax)
    rows = record["sections"]["matmul"]["rows"]
    ax.set_ylim(min(row["teraflops"] for row in rows) / 1.5, max(row["teraflops"] for row in rows) * 1.5)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        sizes, rates = [row["shape"][0] for row in mine], [row["teraflops"] for row in mine]
        # a rate is inverse to a time: the upper quartile of time is the lower one of the rate
        low = [r - r * row["seconds"]["median"] / row["seconds"]["high"] for r, row in zip(rates, mine, strict=True)]
        high = [r * row["seconds"]["median"] / row["seconds"]["low"] - r for r, row in zip(rates, mine, strict=True)]
        ax.errorbar(sizes, rates, [low, high], fmt="o-", color=colour(_FORMATS.get(dtype, dtype)), capsize=3,
                    label=dtype.upper())  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.set_xlabel("size n of an n x n x n product")
    ax.set_ylabel("TFLOP/s, median and quartiles")
    ax.set_title(source_line(record), fontsize=10)
    ax.legend()
    return ax


def source_line(record: Mapping[str, Any]) -> str:
    """Machine, versions and date of a record, in one line."""
    p = record["provenance"]
    return f"{record['device']}; torch {p['torch']}; {p['date'][:10]}"


def published_ratios(rows: Iterable[tuple[str, float, float | None]], ax: "Axes | None" = None) -> "Axes":
    """Published ratios as dots and what a model says as bars: (label, published, model or None), one row each."""
    rows = list(rows)
    ax = axes(ax, 0.36 * len(rows) + 1.3)
    labels = [label for label, _, _ in rows]
    ax.barh(labels, [0 if model is None else model for _, _, model in rows], height=0.6, color="#c9d6df", label="model")
    ax.plot([ratio for _, ratio, _ in rows], labels, "o", color="#00456b", label="published")
    ax.axvline(1, color="#222222", linestyle="--", linewidth=1.2)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    ax.set_xlabel("FP8 over BF16: times as fast")
    ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return ax
