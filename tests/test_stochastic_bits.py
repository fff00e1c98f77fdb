"""Stochastic rounding by integer addition: the same bits as by scaling, and exact over every draw there is."""

import math

import pytest
import torch

from mixprec_lab.formats import FloatFormat, get_format
from mixprec_lab.rounding import quantize, quantizer, ulp

BF16_MAX = get_format("bf16").largest
SPREAD = torch.cat(
    [torch.arange(-(2**31), 2**31, 65_521), torch.tensor([0, -(2**31), 0x7F7FFFFF, 0x7F7F0000, 1, 0xFFFF])]
)


def test_stochastic_by_integers_equals_stochastic_by_scaling():
    # Every exponent and both signs, subnormals, NaN and infinities among them; the same draws, so the same bits.
    x = SPREAD.int().view(torch.float32)
    for name in ("bf16", "tf32", FloatFormat("e8m3", 8, 3), FloatFormat("e8m20", 8, 20)):
        fmt, results = get_format(name), []
        for kernel in (quantizer._stochastic_by_integer_addition(fmt), by_scaling(fmt)):
            out, scratch = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.int32)
            kernel(x, out, scratch, torch.Generator().manual_seed(1))
            results.append(out)
        ours, theirs = results
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isnan(), x.isnan())
        number = ~x.isnan()
        assert torch.equal(ours[number], theirs[number]) and torch.equal(ours.signbit()[number], x.signbit()[number])


def by_scaling(fmt):
    return quantizer._by_scaling(fmt, quantizer._LAYOUTS[torch.float32], "stochastic")


@pytest.mark.parametrize("x", [1.0, 1.00390625, -0.7123, 3.3e-39, -1e-45, 3.4e38, -3.4028235e38, 0.0, -0.0, math.inf])
def test_each_of_all_draws_sends_a_value_up_as_often_as_its_distance_says(x, monkeypatch):
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    monkeypatch.setattr(quantizer, "_random_bits", lambda like, bits, generator: (every, -(2**15)))
    value = torch.tensor(x)
    y = quantize(value.expand(2**16), "bf16", "stochastic", overflow="native")
    cut = int(value.view(torch.int32)) & 0xFFFF
    inner = (value.view(torch.int32) & -0x10000).view(torch.float32)
    assert int((y != inner).sum()) == cut and torch.equal(y.signbit(), value.signbit().expand(2**16))
    outer = y[y != inner].unique()
    assert len(outer) <= 1 and all(
        o == inner + ulp(inner.double(), "bf16").copysign(value.double()) or o.isinf() for o in outer
    )
    saturated = quantize(value.expand(2**16), "bf16", "stochastic", overflow="saturate")
    assert torch.equal(saturated, y.clamp(-BF16_MAX, BF16_MAX))
