"""What a scale costs step by step, and sums in few bits, against integers worked by hand."""

import math
from fractions import Fraction

import pytest
import torch

from mixprec_lab.fp8 import (
    CurrentScaling,
    DelayedScaling,
    FixedScaling,
    lognormal_shape,
    normal_shape,
    simulate_scaling,
    tensor_core_matmul,
)
from mixprec_lab.rounding import quantize

HALVES = torch.tensor([1.0, -0.5, 0.25, 0.0])


def test_a_jump_clips_for_one_step_and_a_drop_waits_for_the_history():
    recipe = DelayedScaling(amax_history_len=3)
    run = simulate_scaling(recipe, [7.0, 7.0, 28.0, 7.0, 7.0, 7.0, 7.0], shape=HALVES)
    assert run.scale == [1.0, 64.0, 64.0, 16.0, 16.0, 16.0, 64.0]
    assert run.clipped == [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]  # 28 and 14, at 448 / 64 = 7
    assert run.flushed == [0.0] * 7
    # 28, -14, 7, 0 became 7, -7, 7, 0
    assert run.sqnr_db[2] == pytest.approx(10 * math.log10((28**2 + 14**2 + 7**2) / (21**2 + 7**2)), rel=1e-12)
    assert run.sqnr_db[3] == math.inf  # powers of two times 7: exact


def test_a_stale_scale_flushes_what_is_small():
    run = simulate_scaling(DelayedScaling(), [2.0**10, 2.0**-10], shape=HALVES, role="input")
    # scale 448 / 2^10 = 0.4375; 0.4375 * 2^-10 is below half the smallest subnormal 2^-9
    assert run.scale == [1.0, 0.4375] and run.flushed == [0.0, 0.75]


def test_current_scaling_never_clips_and_fixed_never_moves():
    amaxes = [2.0**k for k in (0, 20, -20, 3)]
    current = simulate_scaling(CurrentScaling(), amaxes)
    assert current.clipped == [0.0] * 4 and current.scale == [448 / a for a in amaxes]
    assert max(current.sqnr_db) - min(current.sqnr_db) < 1e-9  # scaling by powers of two changes nothing
    fixed = simulate_scaling(FixedScaling(input=4.0), amaxes)
    assert fixed.scale == [4.0] * 4 and fixed.clipped[1] > 0.9 and fixed.flushed[2] == 1.0


def test_one_infinity_freezes_the_scale_for_the_whole_history():
    run = simulate_scaling(DelayedScaling(amax_history_len=8), [7.0, math.inf, *[3.5] * 9], shape=HALVES)
    assert run.scale == [1.0, *[64.0] * 9, 128.0]
    assert run.clipped[1] == 0.25 and math.isnan(run.sqnr_db[1])


def test_rows_and_gradients():
    run = simulate_scaling(CurrentScaling(granularity="row"), [7.0], role="grad_output")
    assert run.scale == [57344 / 7]


@pytest.mark.parametrize("shape", [normal_shape(), lognormal_shape()])
def test_shapes_are_symmetric_and_reach_one(shape):
    assert float(shape.abs().max()) == 1.0 and abs(float((shape > 0).double().mean()) - 0.5) < 0.01


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([-1.0],), "got -1.0"),
        (([math.nan],), "got nan"),
        (([1.0],), "largest magnitude is 1"),
    ],
)
def test_impossible_streams_are_refused(arguments, said):
    shape = torch.ones(3) * 2 if "magnitude" in said else None
    with pytest.raises(ValueError, match=said):
        simulate_scaling(DelayedScaling(), *arguments, shape=shape)


# -- short accumulators ------------------------------------------------------------------------------------------------


def by_fractions(a: list[float], b: list[float], bits: int, group: int, promote: int | None) -> float:
    """One dot product of the model in exact arithmetic."""

    def last_place(x: Fraction) -> Fraction:
        exponent = 0
        while Fraction(2) ** exponent > x:
            exponent -= 1
        while Fraction(2) ** (exponent + 1) <= x:
            exponent += 1
        return Fraction(2) ** (exponent - bits + 1)

    def cut(x: Fraction, step: Fraction) -> Fraction:
        return math.trunc(x / step) * step

    total, acc = Fraction(0), Fraction(0)
    for start in range(0, len(a), group):
        if promote and start and start % promote == 0:
            total, acc = Fraction(float(torch.tensor(float(total)) + torch.tensor(float(acc)))), Fraction(0)
        terms = [acc] + [Fraction(x) * Fraction(y) for x, y in zip(a[start:][:group], b[start:][:group], strict=True)]
        largest = max(map(abs, terms))
        if largest:
            acc = sum(cut(t, last_place(largest)) for t in terms)
            acc = cut(acc, last_place(abs(acc))) if acc else acc
    return float(torch.tensor(float(total)) + torch.tensor(float(acc))) if promote else float(acc)


@pytest.mark.parametrize(("bits", "group", "promote"), [(14, 32, None), (14, 32, 64), (5, 8, 16), (10, 16, None)])
def test_a_short_accumulator_is_the_model_in_exact_arithmetic(bits, group, promote):
    g = torch.Generator().manual_seed(bits)
    a = quantize(torch.randn(3, 200, generator=g), "fp8_e4m3")
    b = quantize(torch.randn(200, 2, generator=g), "fp8_e4m3")
    got = tensor_core_matmul(a, b, bits, group, promote)
    for i in range(3):
        for j in range(2):
            assert float(got[i, j]) == by_fractions(a[i].tolist(), b[:, j].tolist(), bits, group, promote)


def test_enough_bits_make_it_exact():
    g = torch.Generator().manual_seed(0)
    a, b = (quantize(torch.randn(8, 8, generator=g), "fp8_e4m3") for _ in range(2))
    assert torch.equal(tensor_core_matmul(a, b, 48), a.double() @ b.double())
    assert torch.equal(tensor_core_matmul(torch.zeros(2, 64), torch.zeros(64, 2)), torch.zeros(2, 2).double())


def test_promotion_cures_what_fourteen_bits_cost():
    g = torch.Generator().manual_seed(0)
    a, b = (quantize(torch.rand(*s, generator=g), "fp8_e4m3") for s in ((16, 4096), (4096, 16)))
    exact = a.double() @ b.double()
    short, promoted = (
        float(((tensor_core_matmul(a, b, promote_every=every) - exact).abs() / exact).max()) for every in (None, 128)
    )
    assert short > 0.01 and promoted < 0.002


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), r"\(m, k\) and \(k, n\)"),
        ((torch.ones(2, 2), torch.ones(2, 2), 1), "accumulator bits"),
        ((torch.ones(2, 2), torch.ones(2, 2), 14, 32, 48), "multiple of 32"),
        ((torch.full((2, 2), math.inf), torch.ones(2, 2)), "finite"),
    ],
)
def test_impossible_products_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        tensor_core_matmul(*arguments)
