"""The exercises of the chapter ``scaling_out``: right answers pass, each usual mistake is told apart; its figure."""

import matplotlib as mpl
import pytest
import torch
from test_checks import verdict

from mixprec_lab import checks, plots
from mixprec_lab.plots import colour


def wide(contributions):
    return sum(row.bfloat16().float() for row in contributions).bfloat16().float()


def narrow(contributions):
    total = contributions[0].bfloat16()
    for row in contributions[1:]:
        total = total + row.bfloat16()
    return total.float()


def averages(before):
    def fp16_mean(contributions):
        ranks = len(contributions)
        first = before(ranks)
        total = torch.zeros_like(contributions[0], dtype=torch.float16)
        for row in contributions:
            total = total + (row / first).half()
        return total.float() / (ranks / first)

    return fp16_mean


def root(ranks):
    return 2 ** ((ranks.bit_length()) // 2)


def together(weights, gradients, scale):
    if not all(g.isfinite().all() for g in gradients):
        return scale / 2
    for w, g in zip(weights, gradients, strict=True):
        w -= g / scale
    return scale


def alone(weights, gradients, scale):
    for w, g in zip(weights, gradients, strict=True):
        if g.isfinite().all():
            w -= g / scale
    return scale if all(g.isfinite().all() for g in gradients) else scale / 2


def keeps_the_scale(weights, gradients, scale):
    together(weights, gradients, scale)
    return scale


def clips(norm_of):
    def clip(shards, limit):
        return [g * min(1.0, limit / norm_of(g, shards)) for g in shards]

    return clip


def whole(g, shards):
    return float(torch.cat(shards).norm())


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.wide_sum, wide),
        (checks.fp16_mean, averages(root)),
        (checks.one_verdict, together),
        (checks.clipped_shards, clips(whole)),
    ],
)
def test_a_right_answer_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.wide_sum, narrow, "expected a tensor of 2 values (1024, ...), got a tensor of 2 values (256, ...)"),
        (checks.wide_sum, lambda x: x.sum(0), "Not yet"),
        (checks.wide_sum, lambda x: x.sum(0).bfloat16().float(), "Not yet"),
        (checks.fp16_mean, averages(lambda ranks: 1), "expected 256, got inf"),
        (checks.fp16_mean, averages(lambda ranks: ranks), "expected 3.8147e-06, got 0"),
        (checks.one_verdict, alone, "got 'weights [[-1.0, -2.0], [0.0]], scale 4'"),
        (checks.one_verdict, keeps_the_scale, "scale 8' for step([[8.0, 16.0], [inf]], 8"),
        (checks.clipped_shards, clips(lambda g, shards: float(g.norm())), "expected a tensor of 2 values (0.6, ...)"),
        (checks.clipped_shards, lambda shards, limit: [g / whole(g, shards) for g in shards], "([0.25], [0.5])"),
    ],
)
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


def test_reduction_errors_draw_a_line_for_each_format_and_order():
    mpl.use("Agg")
    with mpl.rc_context():
        import matplotlib.pyplot as plt

        errors = {("bf16", "ring"): [1e-3, 1e-2, 1e-1], ("bf16", "tree"): [1e-3] * 3, ("fp32", "ring"): [1e-7] * 3}
        ax = plots.reduction_errors((2, 8, 64), errors)
        assert [line.get_ydata().tolist() for line in ax.lines] == [list(e) for e in errors.values()]
        assert [line.get_color() for line in ax.lines] == [colour("bf16"), colour("bf16"), colour("fp32")]
        assert len({line.get_linestyle() for line in ax.lines[:2]}) == 2
        labels = [t.get_text() for t in ax.get_legend().get_texts()]
        assert labels == ["BF16, ring", "BF16, tree", "FP32, ring"]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("ranks", "relative error of the sum")
        assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "8", "64"]
        plt.close("all")
