"""Both 16-bit formats against numpy and ml_dtypes, checkpoints against real casts, p-values against brute force."""

import fractions
import itertools
import math
import statistics

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from mixprec_lab.bf16_vs_fp16 import (
    check_conversion,
    compare_bf16_fp16,
    layer_outputs,
    paired_comparison,
    recorded_tensors,
    rounding_cost,
)
from mixprec_lab.bf16_vs_fp16.compare import costs_by_format
from mixprec_lab.models import convnet

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
SMALLEST_NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide_values() -> torch.Tensor:
    """Float32 values over 46 binades, zeros among them: some flush, some are subnormal, some overflow in FP16."""
    exponents = torch.randint(-28, 18, (20_000,), generator=seeded(1))
    x = torch.randn(20_000, generator=seeded(2)) * torch.exp2(exponents.float())
    return torch.cat([x, torch.zeros(100), torch.tensor([65519.0, 65520.0, -65520.0, 2.0**-25, 3.4028235e38])])


@pytest.mark.parametrize("name", NUMPY)
def test_rounding_cost_is_that_of_numpys_casts(name):
    x = wide_values()
    exact = x.numpy().astype(np.float64)
    with np.errstate(over="ignore"):
        rounded = x.numpy().astype(NUMPY[name]).astype(np.float64)
    cost = rounding_cost(x, name)
    overflowed, zero = np.isinf(rounded), exact == 0
    assert cost.shares.overflowed == overflowed.mean() > 0
    assert cost.shares.flushed == ((rounded == 0) & ~zero).mean()
    assert cost.shares.subnormal == ((rounded != 0) & (np.abs(rounded) < SMALLEST_NORMAL[name])).mean()
    exact, rounded = exact[~overflowed], rounded[~overflowed]
    rms = np.sqrt(np.mean((rounded - exact) ** 2))
    assert cost.rms_error == pytest.approx(rms, rel=1e-12)
    assert cost.rms_relative == pytest.approx(rms / np.sqrt(np.mean(exact**2)), rel=1e-12)
    relative = (np.abs(rounded - exact) / np.abs(np.where(exact == 0, 1, exact)))[exact != 0]
    assert cost.worst_relative == relative.max()
    assert cost.median_relative == np.sort(relative)[(len(relative) - 1) // 2]  # torch takes the lower of two middles


def test_rounding_cost_of_what_is_left_after_overflow_or_of_zeros_is_zero():
    assert rounding_cost(torch.full((3,), 1e6), "fp16").shares.overflowed == 1.0
    for x in (torch.full((3,), 1e6), torch.zeros(3)):
        cost = rounding_cost(x, "fp16")
        assert (cost.rms_error, cost.rms_relative, cost.median_relative, cost.worst_relative) == (0, 0, 0, 0)


def test_a_flushed_value_has_a_relative_error_of_one():
    assert rounding_cost(torch.tensor([1e-9]), "fp16").worst_relative == 1.0
    assert rounding_cost(torch.tensor([1e-9]), "bf16").worst_relative < 2**-8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        rounding_cost(torch.tensor([1.0, bad]), "bf16")
    with pytest.raises(ValueError, match="finite"):
        compare_bf16_fp16(torch.tensor([bad]), torch.ones(2), show=False)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one element"):
        rounding_cost(torch.empty(0), "fp16")
    with pytest.raises(TypeError, match="floating-point"):
        rounding_cost(torch.arange(3), "fp16")
    with pytest.raises(ValueError, match="unsigned"):
        rounding_cost(torch.ones(2), "e8m0")
    for arguments in ({"steps": 0}, {"increment": 0.0}):
        with pytest.raises(ValueError):
            compare_bf16_fp16(torch.ones(2), torch.ones(2), show=False, **arguments)
    with pytest.raises(TypeError, match="floating-point"):
        compare_bf16_fp16(torch.arange(3), torch.ones(2), show=False)


@pytest.fixture(scope="module")
def compared():
    gradients = torch.tensor([1e-9, 1e-6, 1e-3, 0.0])
    activations = torch.tensor([1.0, 300.0, 7e4, -2.5])
    return compare_bf16_fp16(gradients, activations, steps=3000, increment=1e-7, show=False)


def test_weights_cost_eight_times_more_in_bf16(compared):
    weights = compared.tensors["weights"]
    assert weights["bf16"].rms_error / weights["fp16"].rms_error == pytest.approx(8.0, rel=2e-3)
    # The rounding error is uniform over the gap around each value: its variance is a twelfth of the gap squared.
    values = (torch.randn(1_000_000, generator=seeded()) * 0.02).double().numpy()
    exponent = np.frexp(values)[1] - 1
    for name, bits in (("fp16", 10), ("bf16", 7)):
        gap = np.exp2(np.maximum(exponent, -14 if name == "fp16" else -126) - bits)
        assert weights[name].rms_error == pytest.approx(np.sqrt(np.mean(gap**2) / 12), rel=5e-3)


def test_range_is_what_bf16_buys(compared):
    gradients, activations = compared.tensors["gradients"], compared.tensors["activations"]
    assert (gradients["fp16"].shares.flushed, gradients["bf16"].shares.flushed) == (0.25, 0)
    assert (gradients["fp16"].shares.subnormal, gradients["bf16"].shares.subnormal) == (0.25, 0)
    assert (activations["fp16"].shares.overflowed, activations["bf16"].shares.overflowed) == (0.25, 0)


def test_sums_stall_where_16_bit_arithmetic_stalls(compared):
    for name, dtype, stalled_after in (("fp16", torch.float16, 2048), ("bf16", torch.bfloat16, 273)):
        total = torch.zeros((), dtype=dtype)
        for _ in range(3000):
            total = total + torch.tensor(1e-7, dtype=dtype)
        assert compared.accumulation[name].total == total.item()
        assert compared.accumulation[name].stalled_after == stalled_after
    assert (compared.accumulation["fp16"].total, compared.accumulation["bf16"].total) == (2.0**-12, 2.0**-15)
    assert compared.accumulation["fp32"].relative_error < 1e-3


def test_lost_updates_are_those_of_numpy(compared):
    generator = seeded()
    weights = torch.randn(1_000_000, generator=generator) * 0.02
    signs = torch.where(torch.rand(1_000_000, generator=generator) < 0.5, -1.0, 1.0)
    for name, dtype in NUMPY.items():
        stored = weights.numpy().astype(dtype)
        for size, share in compared.lost[name].items():
            moved = (stored.astype(np.float64) + signs.double().numpy() * size).astype(np.float32).astype(dtype)
            assert share == pytest.approx((moved == stored).mean(), abs=2e-5)  # numpy rounds twice, at FP32 first
    assert [round(100 * s) for s in compared.lost["bf16"].values()] == [84, 70, 12, 0]
    assert all(share == 0 for share in compared.lost["fp32"].values())


def test_the_report_is_printed_only_on_demand(compared, capsys):
    again = compare_bf16_fp16(torch.ones(2), torch.ones(2), steps=10, update_sizes=(1e-3,), show=False)
    assert capsys.readouterr().out == "" and list(again.lost["bf16"]) == [1e-3]
    compare_bf16_fp16(torch.ones(2), torch.ones(2), steps=10, update_sizes=(1e-3,))
    assert capsys.readouterr().out.strip() == str(again).strip()
    assert compared == compare_bf16_fp16(
        torch.tensor([1e-9, 1e-6, 1e-3, 0.0]), torch.tensor([1.0, 300.0, 7e4, -2.5]), steps=3000, increment=1e-7,
        generator=seeded(), show=False,
    )  # fmt: skip


def test_real_gradients_need_range_and_real_activations_do_not():
    recorded = recorded_tensors(steps=30)
    gradients, activations = (costs_by_format(recorded[kind]) for kind in ("gradients", "activations"))
    assert gradients["fp16"].shares.subnormal + gradients["fp16"].shares.flushed > 0.2
    assert gradients["bf16"].shares.subnormal + gradients["bf16"].shares.flushed < 0.001
    assert activations["fp16"].shares.overflowed == 0
    assert activations["bf16"].rms_relative / activations["fp16"].rms_relative == pytest.approx(8, rel=0.02)


def test_layer_outputs_are_those_of_every_layer():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))), torch.randn(5, 3)
    hidden = model[0](x)
    expected = torch.cat([t.flatten() for t in (hidden, hidden.relu(), model[1][1](hidden.relu()))])
    assert torch.equal(layer_outputs(model, x), expected.detach())
    assert model.training and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="floating-point"):
        layer_outputs(nn.Sequential(), torch.ones(2, dtype=torch.int64))


def test_hooks_are_gone_after_a_forward_pass_that_raises():
    model = convnet()
    for look in (layer_outputs, lambda m, x: check_conversion(m, "fp16", x)):
        with pytest.raises(RuntimeError):
            look(model, torch.ones(1, 3))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -------------------------------------------------------------------------------- checkpoints


def test_a_bf16_checkpoint_is_judged_as_half_would_convert_it():
    generator = seeded(3)
    state = {
        "fine": torch.randn(64, 64, generator=generator).bfloat16(),
        "tiny": torch.randn(64, 64, generator=generator).mul(1e-7).bfloat16(),
        "just below": torch.tensor([65280.0]).bfloat16(),
        "large": torch.tensor([3.0, -70000.0]).bfloat16(),
        "ids": torch.arange(4),
        "empty": torch.empty(0),
    }
    report = check_conversion(state)
    cast = {name: t.half() for name, t in state.items() if name not in ("ids", "empty")}
    assert report.overflowing == [name for name, t in cast.items() if t.isinf().any()] == ["large"]
    assert report.flushed == max(float(((t == 0) & (state[n] != 0)).float().mean()) for n, t in cast.items()) > 0.1
    assert not report.safe and report.headroom < 1 and "large" in str(report) and "OVERFLOWS" in str(report)
    assert set(report.weights) == set(cast) and report.activations == {}


@pytest.mark.parametrize(("value", "safe"), [(65519.0, True), (65520.0, False)])
def test_the_edge_is_65520(value, safe):
    report = check_conversion({"w": torch.tensor([value])})
    assert report.safe is safe is bool(torch.tensor([value]).half().isfinite().all())


def test_what_fp16_holds_bf16_holds():
    model = convnet().half()
    for p in model.parameters():
        p.data.view(-1)[0] = 65504.0
    report = check_conversion(model, "bf16")
    assert report.safe and report.flushed == 0 and report.headroom > 1e33


class Product(nn.Module):
    """Scores that overflow FP16 in a product of its own forward, which no layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.inner.weight)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return (y * y + mask).softmax(-1)


def test_a_product_inside_forward_is_seen_and_a_mask_of_infinities_does_not_alarm():
    model, mask = Product(), torch.tensor([[0.0, -math.inf]])
    quiet = check_conversion(model, "fp16", torch.tensor([[200.0, 3.0]]), mask)
    assert quiet.safe and quiet.headroom == pytest.approx(65520 / 40000)
    loud = check_conversion(model, "fp16", torch.tensor([[300.0, 3.0]]), mask)
    assert any("mul" in name for name in loud.overflowing) and not any("inner" in name for name in loud.overflowing)
    assert not check_conversion(model, "fp16").activations
    assert any(name.startswith("inner: ") for name in loud.activations)


def test_conversion_refuses_what_it_cannot_judge():
    with pytest.raises(TypeError, match="overflows to infinity"):
        check_conversion(convnet(), "fp8_e4m3")
    with pytest.raises(TypeError, match="no forward pass"):
        check_conversion({"w": torch.ones(2)}, "fp16", torch.ones(2))
    with pytest.raises(ValueError, match="got none"):
        check_conversion({"ids": torch.arange(3)})
    with pytest.raises(KeyError):
        check_conversion(convnet(), "fp17")


# -------------------------------------------------------------------------------- paired runs


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_is_the_share_of_sign_patterns(seed):
    n = 3 + 2 * seed
    baseline, shift = torch.randn(n, generator=seeded(seed)), torch.randn(n, generator=seeded(seed + 9))
    # Multiples of 1/8 make ties exact, as fractions are.
    baseline, variant = ((x * 8).round().div(8).tolist() for x in (baseline, baseline + 0.5 * shift + 0.3))
    found = paired_comparison(baseline, variant)
    exact = [fractions.Fraction(b) - fractions.Fraction(a) for a, b in zip(baseline, variant, strict=True)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, exact, strict=True))) for signs in itertools.product((1, -1), repeat=n)
    ]
    assert found.p_value == sum(s >= abs(sum(exact)) for s in sums) / 2**n
    assert found.differences == tuple(map(float, exact))
    assert found.mean == pytest.approx(statistics.mean(found.differences))
    assert found.standard_error == pytest.approx(statistics.stdev(found.differences) / n**0.5)
    assert found.seed_spread == pytest.approx(statistics.stdev(baseline))


def test_five_pairs_cannot_reach_five_percent_and_six_can():
    for n, smallest in ((5, 0.0625), (6, 0.03125)):
        found = paired_comparison(list(range(n)), [x + 1 + x / 7 for x in range(n)])
        assert found.p_value == found.smallest_p == smallest
    assert "p = 0.031" in str(found)


def test_a_variant_that_changes_nothing_has_p_one():
    assert paired_comparison([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]).p_value == 1.0


@pytest.mark.parametrize(
    ("baseline", "variant", "told"),
    [
        ([1.0], [1.0], "2 to 24"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "got 2 and 3"),
        ([0.0] * 25, [0.0] * 25, "2 to 24"),
        ([1.0, math.nan], [1.0, 2.0], "diverged"),
        ([1.0, 2.0], [1.0, math.inf], "diverged"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(baseline, variant, told):
    with pytest.raises(ValueError, match=told):
        paired_comparison(baseline, variant)


# -------------------------------------------------------------------------------- claims the selector's table makes


def test_bf16_rounds_ids_positions_and_timesteps():
    assert torch.tensor([257.0, 999.0]).bfloat16().tolist() == [256.0, 1000.0]


def test_fp16_loses_adams_epsilon_a_small_square_and_a_small_energy():
    assert torch.tensor([1e-8, 1e-4**2]).half().tolist() == [0.0, 0.0]
    assert torch.tensor(1e-8).half().float().log() == -math.inf


def test_a_second_moment_in_bf16_cannot_decay_at_0_999_and_can_at_0_95():
    for beta, expected in ((0.999, True), (0.95, False)):
        v = torch.ones((), dtype=torch.bfloat16)
        for _ in range(1000):
            v = v * beta
        assert bool(v == 1.0) is expected


def test_a_gain_of_one_in_bf16_ignores_every_step_below_2_to_the_minus_9():
    below, above = (1 - torch.tensor([1.95e-3, 1.96e-3])).bfloat16(), (1 + torch.tensor([3.9e-3, 3.91e-3])).bfloat16()
    assert (below == 1).tolist() == [True, False]  # 2**-9 = 1.953e-3: the finer side
    assert (above == 1).tolist() == [True, False]  # 2**-8 = 3.906e-3


def test_bf16_overflows_above_3_39e38():
    assert torch.tensor([3.3895e38, 3.4028235e38]).bfloat16().isinf().tolist() == [False, True]


def test_cpu_autocast_leaves_softmax_and_layer_norm_in_bf16():
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.functional.linear(x, torch.randn(8, 8))
        assert y.dtype == y.softmax(-1).dtype == torch.bfloat16
        assert nn.functional.layer_norm(y, (8,)).dtype == torch.bfloat16


def test_backward_operators_run_in_the_dtype_of_their_forward_operators():
    seen = []
    w = torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.functional.linear(torch.randn(4, 8), w)
    y.register_hook(lambda g: seen.append(g.dtype))
    y.float().square().sum().backward()
    assert seen == [torch.bfloat16] and w.grad.dtype == torch.float32
