"""The figures of the chapter ``speed`` draw the numbers they are given."""

import math

import matplotlib as mpl
import pytest
from test_speed_records import record

from mixprec_lab import plots
from mixprec_lab.speed import DEVICES, Expected, Split, amdahl, expected_fp8_speedup, roofline

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        yield
        plt.close("all")


def test_roofs_turn_at_the_ridge_and_points_lie_on_or_under_them():
    shapes = {"one": (1, 4096, 4096), "many": (4096, 4096, 4096)}
    ax = plots.rooflines("h100", ["bf16", "fp8"], shapes)
    device = DEVICES["h100"]
    for line, dtype in zip(ax.lines, ("bf16", "fp8"), strict=False):
        x, y = line.get_data()
        assert x[1] == device.ridge(dtype) and y[2] == device.rate(dtype) / 1e12 == pytest.approx(y[1])
        assert y[0] == pytest.approx(x[0] * device.bandwidth / 1e12)
    drawn = [line for line in ax.lines[2:] if len(line.get_xdata())]  # the others are names in the legend
    points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in drawn]
    expected = [roofline(*s, d, "h100", training=True) for s in shapes.values() for d in ("bf16", "fp8")]
    assert points == [(r.intensity, r.attainable / 1e12) for r in expected]
    assert ax.get_xlabel() and ax.get_ylabel() and "3.35 TB/s" in ax.get_title()


def test_bars_stack_to_the_share_of_the_bf16_time():
    small = Expected(Split(1e-3, 1e-3, 0, 0), Split(1e-3, 2e-3, 3e-3, 4e-3), 0.2)
    large = Expected(Split(8e-3, 0, 0, 0), Split(4e-3, 0, 0, 0), 2.0)
    ax = plots.time_splits({"small": small, "large": large})
    ends = [max(p.get_x() + p.get_width() for p in ax.patches[i::4]) for i in range(4)]
    assert ends == pytest.approx([100, 500, 100, 50])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["BF16, small", "FP8, small", "BF16, large", "FP8, large"]
    assert "% of the BF16 time" in ax.get_xlabel()


def test_the_legend_names_only_parts_that_have_a_visible_bar():
    runs = {str(n): expected_fp8_speedup(n, n, n, "h100", "current") for n in (1024, 2048, 4096)}
    ax = plots.time_splits(runs)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["arithmetic", "memory", "casts"]
    for bars in ax.containers:
        assert max(bar.get_width() for bar in bars) > 5


def test_amdahls_curves_are_amdahls():
    ax = plots.amdahl_curves([2, math.inf])
    for line, speedup in zip(ax.lines, (2, math.inf), strict=True):
        x, y = line.get_data()
        assert [amdahl(s / 100, speedup) for s in x] == pytest.approx(list(y))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["2 times as fast", "free"]


def test_rates_come_from_the_record_with_machine_and_date():
    ax = plots.matmul_rates(record())
    (bars,) = ax.containers
    line = bars.lines[0]
    assert list(line.get_xdata()) == [1024] and list(line.get_ydata()) == [600.0]
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert low == pytest.approx(600 * 1.1 / 1.2) and high == pytest.approx(600 * 1.1 / 1.0)
    assert ax.get_title(loc="left") + ax.get_title() == "NVIDIA H200; torch 2.13; 2026-11-26"
    assert ax.get_ylim() == pytest.approx((400, 900))


def test_published_dots_and_modelled_bars():
    ax = plots.published_ratios([("a", 1.39, 1.6), ("b", 0.8, None)])
    assert [patch.get_width() for patch in ax.patches] == [1.6, 0]
    assert list(ax.lines[0].get_xdata()) == [1.39, 0.8]
