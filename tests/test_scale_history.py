"""The scale history: its JavaScript against ``simulate_scaling``, stories by hand, jumps by mouse and keyboard."""

import random

import pytest

from mixprec_lab.fp8 import CurrentScaling, FixedScaling, simulate_scaling


@pytest.mark.parametrize("fp8_format", ["e4m3", "e5m2"])
def test_current_scaling_never_clips(fp8_format):
    draw = random.Random(0)  # largest / amax rounds, and so does amax * scale: not always to the largest or below
    run = simulate_scaling(CurrentScaling(fp8_format), [2.0 ** draw.uniform(-20, 20) for _ in range(300)])
    assert set(run.clipped) == {0.0}


@pytest.mark.parametrize(("fp8_format", "edge", "on_it"), [("e4m3", 464.0, False), ("e5m2", 61440.0, True)])
def test_a_value_is_clipped_where_rounding_would_leave_the_format(fp8_format, edge, on_it):
    below, above = edge * (1 - 2.0**-20), edge * (1 + 2.0**-20)
    run = simulate_scaling(FixedScaling(fp8_format), [below, edge, above])
    assert [share > 0 for share in run.clipped] == [False, on_it, True]
