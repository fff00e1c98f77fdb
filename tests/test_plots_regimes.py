"""The figures of the chapter ``all_regimes``: what is drawn is what was given, in the units of the axis."""

import math
from dataclasses import replace

import matplotlib as mpl
import pytest
from regime_record import small_record

from mixprec_lab import plots
from mixprec_lab.regimes import differences, power, runs_of

RUNS = runs_of(small_record())


@pytest.fixture(autouse=True)
def agg():
    before = mpl.get_backend()
    mpl.use("agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")
    mpl.use(before)


def test_curves_are_the_seeds_and_their_mean():
    ax = plots.regime_curves(RUNS, "text", ["fp32", "bf16_nearest"])
    lines = [list(line.get_ydata()) for line in ax.lines]
    assert len(lines) == 2 * (4 + 1)
    own = [r.held_out for r in RUNS if (r.task, r.regime) == ("text", "fp32")]
    assert lines[:4] == [list(curve) for curve in own]
    assert lines[4] == pytest.approx([sum(column) / 4 for column in zip(*own, strict=True)], rel=1e-12)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["FP32", "BF16 weights, nearest"]


def test_a_mean_ends_where_a_seed_was_lost():
    ax = plots.regime_curves(RUNS, "images", ["mxfp8"])
    mean = list(ax.lines[-1].get_ydata())
    assert math.isfinite(mean[0]) and all(math.isnan(x) for x in mean[1:])


def test_gaps_are_drawn_in_thousandths_and_grey_if_they_include_zero():
    found = {name: d for (task, name), d in differences([r for r in RUNS if r.task == "text"]).items()}
    found["bf16_nearest"] = replace(found["bf16_nearest"], low=-0.001, high=0.002)
    found["mxfp8"] = replace(found["mxfp8"], low=0.001, high=0.002)
    ax = plots.gap_intervals(found, linear=0.1)
    bars = {name: ax.lines[3 * row] for row, name in enumerate(found)}
    assert list(bars["mxfp8"].get_xdata()) == [1.0, 2.0] and list(bars["bf16_nearest"].get_xdata()) == [-1.0, 2.0]
    assert bars["bf16_nearest"].get_color() != plots.regime_colours("bf16_nearest")[0]
    assert bars["mxfp8"].get_color() == plots.regime_colours("mxfp8")[0]
    dots = ax.lines[3 * list(found).index("mxfp8") + 1].get_xdata()
    assert list(dots) == [1000 * d for d in found["mxfp8"].differences]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["FP16, unscaled", "BF16 weights, nearest", "MXFP8"]


def test_power_curves_are_power_in_percent():
    ax = plots.power_curves(0.5, {"narrow": 1.0, "wide": 3.0}, most=40)
    for line, deviation in zip(ax.lines, (1.0, 3.0), strict=False):
        x, y = line.get_xdata(), line.get_ydata()
        assert (x[0], x[-1]) == (2, 40)
        assert [100 * power(0.5, deviation, int(n)) for n in x] == pytest.approx(list(y))
