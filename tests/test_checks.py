"""The exercise checks: three verdicts, and no traceback from the reader's code."""

import math

import pytest
import torch

from mixprec_lab import checks
from mixprec_lab.formats import decode, get_format
from mixprec_lab.rounding import accumulate

ALL = [getattr(checks, name) for name in checks.__all__]


def verdict(check, function, capsys) -> str:
    check(function)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("check", ALL, ids=lambda f: f.__name__)
def test_a_stub_is_not_done_and_a_crash_is_shown(check, capsys):
    assert verdict(check, lambda *a: None, capsys) == "Not done yet."
    assert verdict(check, lambda *a: ..., capsys) == "Not done yet."

    def unfinished(*_):
        raise NotImplementedError

    assert verdict(check, unfinished, capsys) == "Not done yet."
    assert "ZeroDivisionError" in verdict(check, lambda *a: 1 / 0, capsys)
    assert verdict(check, lambda *a: "nonsense", capsys).startswith("Not yet: expected ")
    assert verdict(check, lambda *a: torch.ones(2, 2), capsys).startswith("Not yet: expected ")


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.flushed_share, lambda g: (g.abs() < 6.1e-5).float().mean(), "expected 0.00"),
        (checks.decode_e4m3, lambda c: float(decode(torch.tensor(c), "fp8_e4m3fnuz")), "for decode_e4m3"),
        (checks.decode_e4m3, lambda c: 480.0 if c == 0x7F else float(decode(torch.tensor(c), "fp8_e4m3")), "nan"),
        (checks.first_lost_integer, lambda m: 2 ** (m + 1), "expected 257, got 256"),
        (checks.reports_overflow, lambda v, n: "fine", "expected 'flushed'"),
        (checks.stall_point, lambda v, m: v * 2 ** (m + 1), "expected 3.05176e-05"),
        (checks.true_sum_in_bf16, lambda v: float(v.bfloat16().float().sum()), "expected 3.05"),
        (checks.kahan_bf16, lambda v: accumulate(v, "bf16"), "Not yet"),
        (checks.stochastic_grid, lambda x, g: x.round(), "mean"),
        (checks.stochastic_grid, lambda x, g: torch.floor(x + 1), "neighbours of"),
        (checks.worst_relative_error, lambda n: get_format(n).unit_roundoff, "expected 0.111"),
    ],
)
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    wrong.__name__ = check.__name__
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


def test_a_right_answer_is_correct(capsys):
    def stall(v, m):
        return 2.0 ** (math.ceil(math.log2(v)) + m + 1)

    assert verdict(checks.stall_point, stall, capsys) == "Correct."
    assert verdict(checks.first_lost_integer, lambda m: torch.tensor(2 ** (m + 1) + 1), capsys) == "Correct."
