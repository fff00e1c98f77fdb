"""Figures of the chapter ``block_scaling``: what they draw is what the numbers say."""

from itertools import combinations

import matplotlib as mpl
import pytest
import torch
from matplotlib.text import Text

from mixprec_lab import plots
from mixprec_lab.block_scaling import SCHEMES, block_report

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        yield
        plt.close("all")


def test_block_shapes_name_the_number_of_scales_and_shade_one_block():
    first = plots.block_shapes(["per_tensor", "block_128x128", "mxfp8"])
    panels = first.figure.axes
    assert [ax.get_title("center").split("\n")[1] for ax in panels] == ["1 scale", "4 scales", "2,048 scales"]
    assert [ax.patches[-1].get_width() for ax in panels] == [256, 128, 32]


def test_outlier_errors_draw_a_line_a_scheme():
    ax = plots.outlier_errors({"a": {1: 0.1, 10: 0.2}, "b": {1: 0.3, 10: 0.3}}, {"a": "mxfp8", "b": "int8"})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.1, 0.2], [0.3, 0.3]]
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_xscale() == ax.get_yscale() == "log"


def test_scale_rules_end_where_the_rules_end():
    ax = plots.scale_rules("mxfp8", ["floor", "round_up"])
    floor, up = (torch.tensor(line.get_ydata()) for line in ax.lines)
    assert floor[~floor.isnan()].min() == 256 and 511 < floor[~floor.isnan()].max() < 512
    assert 224 < up[~up.isnan()].min() < 225 and up[~up.isnan()].max() <= 448
    assert ax.get_xlabel() and ax.get_ylabel()


def _cross(a, b):
    def turn(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return turn(*a, b[0]) * turn(*a, b[1]) < 0 and turn(*b, a[0]) * turn(*b, a[1]) < 0


def test_bits_and_errors_label_every_point_and_no_two_labels_touch_and_no_two_leaders_cross():
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    reports = [block_report(x, scheme) for scheme in SCHEMES]
    ax = plots.bits_and_errors(reports)
    assert {t.get_text(): t.xy for t in ax.texts} == {r.scheme.title: (r.bits_per_value, r.sqnr_db) for r in reports}
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(t) for t in ax.texts]
    frame = ax.figure.bbox
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    leaders = [(t.xy, t.get_position()) for t in ax.texts]
    assert not any(_cross(a, b) for a, b in combinations(leaders, 2))
    assert sorted(line.get_ydata()[0] for line in ax.lines) == pytest.approx(sorted(r.sqnr_db for r in reports))
