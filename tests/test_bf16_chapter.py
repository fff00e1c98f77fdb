"""The chapter's exercises and figures: usual mistakes are told apart, and figures draw what the numbers say."""

import itertools

import matplotlib as mpl
import pytest
import torch
from torch import nn

from mixprec_lab import checks, plots
from mixprec_lab.bf16_vs_fp16 import NORM_TYPES, paired_comparison
from mixprec_lab.bf16_vs_fp16.compare import costs_by_format

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        yield
        plt.close("all")


def clips_copies(parameters, max_norm):
    """The note's way: the copies have no ``.grad``, so nothing is clipped and the norm is 0."""
    return float(nn.utils.clip_grad_norm_([p.grad.float() for p in parameters], max_norm))


def scales_up(parameters, max_norm):
    norm = torch.cat([p.grad.float() for p in parameters]).norm()
    for p in parameters:
        p.grad.mul_(max_norm / norm)
    return norm


def only_reports(parameters, max_norm):
    return torch.cat([p.grad.float() for p in parameters]).norm().item()


def clips(parameters, max_norm):
    norm = torch.cat([p.grad.float() for p in parameters]).norm()
    for p in parameters:
        p.grad.copy_(p.grad.float() * (max_norm / norm).clamp(max=1.0))
    return norm


def by_name(model):
    return [name for name, _ in model.named_modules() if "layer_norm" in name or "layernorm" in name]


def by_type(model):
    return [name for name, module in model.named_modules() if isinstance(module, NORM_TYPES)]


def share_of_patterns(differences):
    patterns = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(s >= sums[0] - 1e-12 for s in sums) / len(sums)


def one_sided(differences):
    patterns = itertools.product((1, -1), repeat=len(differences))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in patterns]
    return sum(s >= sums[0] - 1e-12 for s in sums) / len(sums)


def verdict(check, function, capsys) -> str:
    function.__name__ = check.__name__
    check(function)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.exact_from, lambda bits, smallest: 2.0**-14, "for exact_from(7, 5.96046e-08)"),
        (checks.exact_from, lambda bits, smallest: smallest, "expected 7.62939e-06, got 5.96046e-08"),
        (checks.clip_in_fp32, clips_copies, "got a tensor of 2 values (0, ...)"),
        (checks.clip_in_fp32, scales_up, "for clip(0, 100)"),
        (checks.clip_in_fp32, only_reports, "for clip(0, 1)"),
        (checks.norms_by_type, by_name, "expected 'gn, h.input_layernorm, h.ln_2'"),
        (checks.sign_flip_p, one_sided, "expected 0.25, got 0.125"),
        (checks.sign_flip_p, lambda d: 2 / 2 ** len(d), "for sign_flip_p([0.5"),
    ],
)
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.exact_from, lambda bits, smallest: smallest * 2**bits),
        (checks.clip_in_fp32, clips),
        (checks.norms_by_type, by_type),
        (checks.sign_flip_p, share_of_patterns),
    ],
)
def test_a_right_answer_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."


def test_losses_draws_the_shares_of_each_format():
    x = torch.tensor([1e-9, 1e-6, 1.0, 1e6])
    ax = plots.losses({"gradients": costs_by_format(x)})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["gradients, FP16", "gradients, BF16"]
    assert [bar.get_width() for bar in ax.patches[:6]] == [25, 25, 25, 0, 0, 0]
    assert [t.get_text() for t in ax.texts] == ["75.0 %", "nothing"] and ax.get_xlabel()


def test_updates_lost_draws_percent_against_size():
    ax = plots.updates_lost({"bf16": {1e-5: 0.84, 1e-4: 0.12}})
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [1e-5, 1e-4] and line.get_ydata().tolist() == [84, 12]
    assert line.get_color() == plots.colour("bf16") and ax.get_xlabel() and ax.get_ylabel()


def test_paired_differences_draws_every_pair_its_mean_and_the_spread_of_seeds():
    comparison = paired_comparison([1.0, 2.0, 3.0], [1.1, 2.3, 2.9])
    ax = plots.paired_differences({"masters": comparison})
    _, points, mean = ax.lines
    assert points.get_xdata().tolist() == list(comparison.differences)
    assert mean.get_xdata().tolist() == [comparison.mean] and ax.get_xlabel()
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == (-1.0, 2.0)
