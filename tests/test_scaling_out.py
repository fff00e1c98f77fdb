"""Reductions in narrow formats, bytes on the wire, and what ``launch`` refuses; everything in one process."""

import math
from fractions import Fraction

import pytest
import torch

from mixprec_lab.formats import decode, get_format
from mixprec_lab.scaling_out import (
    ORDERS,
    error_bound,
    exact_sum,
    gradients,
    launch,
    on_the_wire,
    process_group,
    reduction_error,
    simulate_reduction,
)
from mixprec_lab.scaling_out.eight_bits import pack, unpack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def ring_by_hand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Element by element in torch's own arithmetic: start at the rank below the chunk's, walk down."""
    ranks, size = x.shape
    total = torch.empty(size)
    for i in range(size):
        chunk = i * ranks // size
        running = x[(chunk - 1) % ranks, i].to(dtype)
        for hop in range(2, ranks + 1):
            running = running + x[(chunk - hop) % ranks, i].to(dtype)
        total[i] = running.float()
    return total


def tree_by_hand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows = [row.to(dtype) for row in x]
    while len(rows) > 1:
        half = len(rows) // 2
        rows = [rows[i] + rows[i + half] for i in range(half)]
    return rows[0].float()


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize(("ranks", "size"), [(1, 5), (2, 7), (3, 10), (5, 64), (8, 3), (7, 1)])
def test_a_ring_is_torchs_sum_in_the_order_of_the_ring(wire, ranks, size):
    x = gradients(ranks, size, noise=3.0, seed=ranks)
    assert torch.equal(simulate_reduction(x, wire, "ring"), ring_by_hand(x, DTYPES[wire]))


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_a_tree_is_torchs_sum_by_halves(wire, ranks):
    x = gradients(ranks, 33, noise=3.0)
    assert torch.equal(simulate_reduction(x, wire, "tree"), tree_by_hand(x, DTYPES[wire]))


@pytest.mark.parametrize("wire", DTYPES)
def test_a_wide_sum_rounds_the_summands_and_the_total(wire):
    x, total = gradients(9, 40, noise=3.0), torch.zeros(40)
    for row in x:
        total += row.to(DTYPES[wire]).float()
    assert torch.equal(simulate_reduction(x, wire, "wide"), total.to(DTYPES[wire]).float())


def test_a_ring_in_bf16_stalls_at_256_and_no_other_order_does():
    ones = torch.ones(1024, 4)
    assert simulate_reduction(ones, "bf16", "ring").tolist() == [256.0] * 4
    for wire, order in (("bf16", "tree"), ("bf16", "wide"), ("fp32", "ring"), ("fp16", "ring")):
        assert simulate_reduction(ones, wire, order).tolist() == [1024.0] * 4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_no_element_is_off_by_more_than_the_bound(wire, order, noise):
    for ranks in (2, 16, 128):
        x = gradients(ranks, 256, noise)
        error = (simulate_reduction(x, wire, order).double() - exact_sum(x)).abs()
        assert (error <= error_bound(ranks, wire, order) * x.abs().double().sum(0)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_the_bound_is_not_far_from_what_happens_between_two_ranks(order):
    x = gradients(2, 4096, noise=0.1)
    error = (simulate_reduction(x, "bf16", order).double() - exact_sum(x)).abs() / x.abs().double().sum(0)
    assert error.max() > 0.6 * error_bound(2, "bf16", order)


def test_the_bound_of_one_rounding_is_the_unit_roundoff():
    assert error_bound(1, "bf16", "ring") == pytest.approx(2.0**-8, rel=1e-12)
    assert error_bound(2, "fp32", "ring") == pytest.approx(2.0**-24, rel=1e-12)
    assert error_bound(1024, "bf16", "tree") == pytest.approx((1 + 2.0**-8) ** 11 * (1 + 2.0**-24) ** 10 - 1, rel=1e-12)


def test_the_exact_sum_is_exact():
    x = torch.tensor([[1e30, 1.0], [1.0, 2.0**-60], [-1e30, 2.0**-60]])
    expected = [float(sum(Fraction(v) for v in column)) for column in x.double().T.tolist()]
    assert exact_sum(x).tolist() == expected == [1.0, 1.0 + 2.0**-59]


def test_more_ranks_hurt_the_ring_and_not_the_others():
    few, many = gradients(8, 512), gradients(512, 512)
    assert reduction_error(many, "bf16", "ring") > 10 * reduction_error(few, "bf16", "ring")
    for order in ("tree", "wide"):
        assert reduction_error(many, "bf16", order) < 1.5 * reduction_error(few, "bf16", order)


def test_a_sum_in_fp8_loses_at_every_hop_and_moving_values_does_not():
    x = gradients(64, 64 * 64)
    wide, ring = (reduction_error(x, "fp8_e4m3", order) for order in ("wide", "ring"))
    assert ring > 3 * wide and wide < get_format("fp8_e4m3").unit_roundoff


@pytest.mark.parametrize(("wire", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bit_messages_are_torchs_casts(wire, dtype):
    x = torch.cat([torch.randn(1000) * 100, torch.tensor([7e4, -1e39, 2.0**-25, 2.0**-24, -0.0, math.inf])])
    assert torch.equal(on_the_wire(x, wire), x.to(dtype).float())
    assert on_the_wire(x, wire).signbit().tolist() == x.signbit().tolist()


def test_an_eight_bit_message_has_its_own_scale_and_touches_the_largest_value():
    x = torch.stack([torch.linspace(-3, 3, 101), torch.linspace(-1e-6, 1e-6, 101), torch.zeros(101)])
    sent = on_the_wire(x, "fp8_e4m3")
    assert torch.equal(sent[2], x[2])
    assert (sent[:2].abs().amax(1) / x[:2].abs().amax(1) - 1).abs().max() < 2.0**-22
    error, u = (sent - x).abs(), get_format("fp8_e4m3").unit_roundoff
    assert (error <= (x.abs() * u).clamp(min=2.0**-10 / 448 * x.abs().amax(1, keepdim=True)) * (1 + 1e-6)).all()


def test_codes_are_torchs_fp8_bytes():
    x = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 3
    for fmt in BYTES:
        message, largest = pack(x, fmt), get_format(fmt).largest
        cast = (x * message.scale).clamp(-largest, largest).to(BYTES[fmt])
        assert torch.equal(message.codes, cast.view(torch.uint8))
        assert torch.equal(unpack(message, fmt), cast.float() / message.scale)
        assert unpack(message, fmt).abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_an_empty_scale_is_one_and_an_infinite_one_is_refused():
    message = pack(torch.zeros(3, 2))
    assert message.scale == 1 and torch.equal(decode(message.codes.long(), "fp8_e4m3"), torch.zeros(3, 2).double())
    assert pack(torch.tensor([2.0**-149])).scale == 2.0**127
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="finite values.*skip this step"):
            pack(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="8-bit format, got BF16"):
        pack(torch.ones(1), "bf16")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: simulate_reduction(torch.ones(2, 2).double()), TypeError, "float32"),
        (lambda: simulate_reduction([[1.0]]), TypeError, "got list"),
        (lambda: simulate_reduction(torch.ones(3)), ValueError, r"\(ranks, size\)"),
        (lambda: simulate_reduction(torch.ones(0, 3)), ValueError, r"\(ranks, size\)"),
        (lambda: simulate_reduction(torch.ones(2, 3), order="star"), ValueError, "ring, tree, wide"),
        (lambda: simulate_reduction(torch.ones(3, 3), order="tree"), ValueError, "power of two"),
        (lambda: simulate_reduction(torch.ones(2, 3), "bf17"), KeyError, "bf17"),
        (lambda: error_bound(2, "fp8_e4m3"), ValueError, "16 bits or more"),
        (lambda: error_bound(0), ValueError, "at least one rank"),
        (lambda: error_bound(6, "bf16", "tree"), ValueError, "power of two"),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_process_that_nobody_launched_is_told_how(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.*torchrun"), process_group():
        pass


def local(x):
    return x


@pytest.mark.parametrize(
    ("target", "options", "error", "match"),
    [
        (local, {"processes": 0}, ValueError, "at least one process"),
        (local, {"timeout": 0}, ValueError, "timeout above 0"),
        (local, {"show": "loud"}, ValueError, "'by rank', 'live' or 'nothing'"),
        (lambda: 1, {}, ValueError, "top level of a module.*%%writefile"),
        (torch.nn.Module.train, {}, ValueError, "top level of a module"),
        ("no_such_job.py", {}, FileNotFoundError, "no_such_job.py"),
        (__file__, {"arguments": {"x": 1}}, ValueError, "no arguments for a script"),
        (local, {"arguments": {"x": [{"y": object()}]}}, TypeError, r"a object as arguments\['x'\]\[0\]\['y'\]"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_starts(target, options, error, match):
    with pytest.raises(error, match=match):
        launch(target, **options)


def test_a_function_of_a_notebook_is_refused(monkeypatch):
    monkeypatch.setattr(local, "__module__", "__main__")
    with pytest.raises(ValueError, match="%%writefile"):
        launch(local)
