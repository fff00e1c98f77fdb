"""Figures: what they draw is what the numbers say, and the colours can be told apart."""

import itertools

import matplotlib as mpl
import pytest
import torch

from mixprec_lab import plots
from mixprec_lab.formats import FORMATS, FloatFormat
from mixprec_lab.memory import training_memory

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        yield
        plt.close("all")


def luminance(colour: str) -> float:
    """WCAG relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_colour_that_shows_in_both_themes(name):
    light, dark = plots.FORMAT_COLOURS[name]
    assert contrast(light, "#ffffff") >= 3 and contrast(dark, "#14181e") >= 3


def test_no_two_formats_share_a_colour():
    for theme in (0, 1):
        colours = [pair[theme] for pair in plots.FORMAT_COLOURS.values()]
        assert all(a != b for a, b in itertools.combinations(colours, 2))
    assert plots.colour(FloatFormat("own", 4, 3)) == "#777777"


def test_exponent_histogram_counts_binades():
    x = torch.tensor([1.0, 1.5, -2.0, 0.0, float("inf"), float("nan"), 2.0**-30, 3.9])
    exponents, shares = plots.exponent_histogram(x)
    assert exponents.tolist() == [-30, 0, 1] and (shares * 8).tolist() == [1, 2, 2]


def test_bit_layouts_draw_one_cell_a_bit():
    ax = plots.bit_layouts(["fp16", "fp8_e4m3", "e8m0"])
    assert len(ax.patches) == 16 + 8 + 8 + 3  # and one patch for each field of the legend
    assert [t.get_text() for t in ax.get_yticklabels()] == ["FP16", "FP8 E4M3", "E8M0"]


def test_windows_span_the_formats_ranges():
    ax = plots.windows(["fp16"], {"g": torch.randn(100)})
    normal, subnormal = ax.patches
    assert (normal.get_x(), normal.get_x() + normal.get_width()) == (-14, 16)
    assert (subnormal.get_x(), subnormal.get_width()) == (-24, 10)


def test_relative_gaps_lie_between_eps_and_half_of_it():
    (line,) = plots.relative_gaps(["bf16"]).lines
    assert set(line.get_ydata()) == {2.0**-7, 2.0**-8}


def test_update_thresholds_are_half_gaps_and_rates_lie_across():
    ax = plots.update_thresholds(["bf16", "fp16"], -2, 1, [1e-3])
    bf16, fp16, rate = ax.lines
    assert set(bf16.get_ydata()) == {2.0**-10, 2.0**-9, 2.0**-8, 2.0**-7}
    assert set(8 * fp16.get_ydata()) == set(bf16.get_ydata()) and set(rate.get_ydata()) == {1e-3}
    assert ax.get_xlabel() and ax.get_ylabel()


def test_seed_ranges_draw_the_mean_and_the_extremes():
    ax = plots.seed_ranges({"nearest": torch.tensor([[1.0, 2.0], [3.0, 6.0]])}, 10, "loss")
    (line,), (band,) = ax.lines, ax.collections
    assert line.get_ydata().tolist() == [2, 4] and line.get_xdata().tolist() == [0, 10]
    assert set(map(tuple, band.get_paths()[0].vertices.tolist())) >= {(0, 1), (0, 3), (10, 2), (10, 6)}
    assert ax.get_xlabel() and ax.get_ylabel() == "loss"


def test_memory_bars_end_at_the_total_and_the_capacity_is_a_line():
    bills = {"a": training_memory(10**9, "bf16_master"), "b": training_memory("gpt2", "fp32", sequence=64, batch=1)}
    ax = plots.memory_bars(bills, capacity=24e9)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and ax.get_xlabel() == "GB on one GPU"
    ends = [max(bars[i].get_x() + bars[i].get_width() for bars in ax.containers) for i in (0, 1)]
    assert ends == pytest.approx([bill.total / 1e9 for bill in bills.values()])
    assert [bars.get_label() for bars in ax.containers] == ["weights", "gradients", "masters", "moments", "activations",
                                                            "logits"]  # fmt: skip
    assert list(ax.lines[0].get_xdata()) == [24, 24]


def test_rounding_and_error_figures_have_labels():
    for ax in (
        plots.rounding_steps("fp4_e2m1", -2, 2),
        plots.error_against_magnitude(["fp16"], -20, 3),
        plots.running_sums({"naive": torch.ones(3)}, torch.ones(3), {"naive": "#000000"}),
    ):
        assert ax.get_xlabel() and ax.get_ylabel()


def test_style_is_set_once_for_all():
    plots.use_style()
    assert mpl.rcParams["axes.grid"] and mpl.rcParams["figure.facecolor"] == "white"


def test_scale_chase_draws_what_fits_what_is_lost_and_what_is_flushed():
    from mixprec_lab.fp8 import CurrentScaling, DelayedScaling, simulate_scaling

    runs = {
        name: simulate_scaling(recipe, [7.0, 7.0, 28.0, 7.0])
        for name, recipe in (("current", CurrentScaling()), ("delayed", DelayedScaling()))
    }
    top, middle, bottom = plots.scale_chase(runs, "fp8_e4m3").figure.axes
    amax, current, delayed = top.get_lines()
    assert list(amax.get_ydata()) == [7.0, 7.0, 28.0, 7.0] == list(current.get_ydata())
    assert list(delayed.get_ydata()) == [448.0, 7.0, 7.0, 28.0]
    assert list(middle.get_lines()[1].get_ydata()) == runs["delayed"].sqnr_db
    assert list(bottom.get_lines()[0].get_ydata()) == [100 * share for share in runs["current"].flushed]


def test_accumulator_errors_are_drawn_over_the_length_of_the_sum():
    ax = plots.accumulator_errors([64, 128], {"14 bits": [1e-3, 2e-3]})
    assert list(ax.get_lines()[0].get_xdata()) == [64, 128] and list(ax.get_lines()[0].get_ydata()) == [1e-3, 2e-3]


def test_the_decision_tree_holds_every_question_and_the_history_marks_bad_steps():
    texts = [t.get_text() for t in plots.decision_tree().axes[0].texts]
    assert texts[0] == "parameters finite?" and "order of calls, stale state, schedule" in texts
    assert texts.count("yes") == 7 == texts.count("no")
    report = {"loss": 1.0, "grad_norm": 2.0, "param_norm": 3.0, "issues": []}
    reports = [report | {"step": 0}, report | {"step": 1, "loss": float("nan"), "issues": ["bad"]}]
    loss = plots.health_history(reports).axes[0]
    assert loss.get_lines()[0].get_ydata()[0] == 1.0 and list(loss.get_lines()[1].get_xdata()) == [1, 1]


def test_detection_bars_are_shares_in_percent():
    ax = plots.detection_bars([("ours", 1.0, 0.9, 0.5), ("theirs", 0.25, 0.0, 0.0)])
    assert [round(bar.get_width()) for bar in ax.patches] == [100, 90, 50, 25, 0, 0]
