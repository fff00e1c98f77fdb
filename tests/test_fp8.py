"""FP8Linear: the three products against float64, backends against each other, state, shapes and bad input."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from mixprec_lab.fp8 import CurrentScaling, DelayedScaling, FixedScaling, FP8Linear, update_scales

FP32, BF16 = torch.float32, torch.bfloat16
INF, NAN = math.inf, math.nan
RECIPES = {
    "delayed": DelayedScaling(),
    "current": CurrentScaling(),
    "row": CurrentScaling(granularity="row"),
    "power of two": CurrentScaling(power_of_two=True),
    "fixed": FixedScaling(input=4.0, weight=64.0, grad_output=1024.0),
}


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# -- products ----------------------------------------------------------------------------------------------------------


def exact_products(layer: FP8Linear, x, g):
    """The three products of the layer's own operands in float64, and the bounds of FP32 sums in any order."""
    q = layer.quantizers
    x_, w_, g_ = q["input"](x, False), q["weight"](layer.weight.detach(), False), q["grad_output"](g, False)
    real = lambda operand, axis: operand.along(axis).values.double() / operand.along(axis).scale.double()  # noqa: E731
    pairs = {
        "output": (real(x_, 1), real(w_, 1).T),
        "input": (real(g_, 1), real(w_, 0)),
        "weight": (real(g_, 0).T, real(x_, 0)),
    }
    return {k: (a @ b, (a.abs() @ b.abs()) * (a.shape[1] + 6) * 2.0**-24) for k, (a, b) in pairs.items()}


@pytest.mark.parametrize("backend", ["emulated", "scaled_mm"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_three_products_are_those_of_the_operands(name, backend):
    torch.manual_seed(0)
    layer = FP8Linear(64, 32, recipe=RECIPES[name], backend=backend)
    for _ in range(2):  # so that delayed scales have moved once
        x = randn(48, 64, seed=1).requires_grad_()
        g = randn(48, 32, seed=2, scale=1e-3)
        output = layer(x)
        layer.weight.grad = layer.bias.grad = None
        output.backward(g)
    found = {"output": output.detach() - layer.bias.detach(), "input": x.grad, "weight": layer.weight.grad}
    # row scales come out of the kernel in BF16: one rounding more
    rounding = 2.0**-8 if (backend, name) == ("scaled_mm", "row") else 0.0
    for key, (exact, bound) in exact_products(layer, x.detach(), g).items():
        slack = bound + rounding * exact.abs() + 2.0**-22 * float(layer.bias.detach().abs().max())
        assert bool(((found[key].double() - exact).abs() <= slack).all()), key
    assert torch.allclose(layer.bias.grad, g.sum(0), rtol=1e-6, atol=1e-9)
    full = x.detach() @ layer.weight.detach().T
    error = (found["output"] - full).norm() / full.norm()
    assert 0.005 < error < 0.06  # FP8 it is, and no worse than FP8


@pytest.mark.parametrize("name", ["delayed", "current", "fixed"])
def test_both_backends_give_the_same_numbers_up_to_the_order_of_sums(name):
    torch.manual_seed(0)
    emulated = FP8Linear(32, 48, recipe=RECIPES[name])
    scaled = FP8Linear.from_linear(nn.Linear(32, 48), recipe=RECIPES[name], backend="scaled_mm")
    scaled.load_state_dict(emulated.state_dict())
    for seed in range(3):
        x, g = randn(32, 32, seed=seed), randn(32, 48, seed=9 + seed)
        results = []
        for layer in (emulated, scaled):
            leaf = x.clone().requires_grad_()
            layer.weight.grad = None
            out = layer(leaf)
            out.backward(g)
            results.append((out.detach(), leaf.grad, layer.weight.grad))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=2e-6 * float(a.abs().max()))
    for key, value in emulated.state_dict().items():
        assert torch.equal(value, scaled.state_dict()[key]), key


@pytest.mark.parametrize("name", ["current", "row"])
def test_a_16_bit_output_is_rounded_once_with_the_bias_inside(name):
    torch.manual_seed(0)
    emulated = FP8Linear(32, 20, recipe=RECIPES[name], pad=True)
    scaled = FP8Linear(32, 20, recipe=RECIPES[name], backend="scaled_mm", pad=True)
    scaled.load_state_dict(emulated.state_dict())
    x = randn(48, 32).bfloat16()
    ours, theirs = emulated(x).float(), scaled(x).float()
    # either is off by half an ulp, and the kernel rounds the bias to BF16
    bound = 2.0**-7 * ours.abs() + 2.0**-8 * emulated.bias.detach().abs()
    assert bool(((ours - theirs).abs() <= bound).all())
    assert (ours == theirs).float().mean() > 0.8


def test_products_in_bf16_hold_the_operands_exactly():
    torch.manual_seed(0)
    wide = FP8Linear(64, 32, recipe=CurrentScaling(power_of_two=True), bias=False)
    narrow = FP8Linear.from_linear(nn.Linear(64, 32, bias=False), CurrentScaling(power_of_two=True), product_dtype=BF16)
    narrow.load_state_dict(wide.state_dict())
    x = randn(16, 64)
    assert torch.allclose(narrow(x), wide(x).bfloat16().float(), rtol=2.0**-8, atol=0)
    assert not torch.equal(narrow(x), wide(x))


def test_an_identity_of_powers_of_two_passes_exactly_forward_and_backward():
    layer = FP8Linear(16, 16, bias=False, recipe=FixedScaling())
    nn.init.eye_(layer.weight)
    x = torch.exp2(torch.arange(-6.0, 9.0, 15 / 256)[:256].floor()).reshape(16, 16).requires_grad_()
    out = layer(x)
    assert torch.equal(out, x)
    g = torch.exp2(torch.arange(-14.0, 15.0, 29 / 256)[:256].floor()).reshape(16, 16)
    out.backward(g)
    assert torch.equal(x.grad, g)


def test_the_gradient_is_e5m2_and_everything_else_e4m3():
    layer = FP8Linear(16, 16, bias=False, recipe=FixedScaling())
    nn.init.eye_(layer.weight)
    x = torch.full((16, 16), 17.0, requires_grad=True)  # between 16 and 18 of E4M3: 16, the even one
    out = layer(x)
    assert set(out.flatten().tolist()) == {16.0}
    out.backward(torch.full((16, 16), 18.0))  # between 16 and 20 of E5M2
    assert set(x.grad.flatten().tolist()) == {16.0}


def test_overflow_saturates_infinity_too_and_nan_stays():
    layer = FP8Linear(16, 16, bias=False, recipe=FixedScaling())
    nn.init.eye_(layer.weight)
    x = torch.zeros(16, 16)
    x[0, :3] = torch.tensor([1000.0, -INF, 449.0])
    x[1, 0] = NAN
    out = layer(x).detach()
    assert out[0, :4].tolist() == [448.0, -448.0, 448.0, 0.0]
    assert out[1].isnan().all() and out[2:].eq(0).all()


def test_the_output_has_the_dtype_of_the_input_or_of_autocast_and_gradients_those_of_their_tensors():
    layer = FP8Linear(16, 32)
    for dtype in (FP32, BF16, torch.float16):
        x = randn(16, 16).to(dtype).requires_grad_()
        out = layer(x)
        assert out.dtype == dtype
        out.float().sum().backward()
        assert x.grad.dtype == dtype and layer.weight.grad.dtype == layer.bias.grad.dtype == FP32
    with torch.autocast("cpu", BF16):
        assert layer(randn(16, 16)).dtype == BF16


def test_autocast_does_not_round_the_sums():
    torch.manual_seed(0)
    layer = FP8Linear(64, 64, recipe=CurrentScaling())
    x = randn(32, 64).requires_grad_()
    plain = layer(x)
    plain.backward(torch.ones_like(plain))
    expected, x.grad = x.grad, None
    with torch.autocast("cpu", BF16):
        out = layer(x)
        out.backward(torch.ones_like(out))  # not recommended, but it must not change the arithmetic
    assert torch.equal(out, plain.bfloat16())
    assert torch.equal(x.grad, expected)


def test_leading_dimensions_are_rows():
    layer = FP8Linear(16, 32, recipe=CurrentScaling())
    x = randn(2, 4, 8, 16)
    assert torch.equal(layer(x), layer(x.reshape(64, 16)).reshape(2, 4, 8, 32))
    assert layer(randn(16)[None].expand(16, 16)).shape == (16, 32)


def test_gradients_that_are_not_needed_are_not_computed():
    layer = FP8Linear(16, 16)
    layer.weight.requires_grad_(False)
    x = randn(16, 16).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_second_derivatives_are_refused():
    layer = FP8Linear(16, 16)
    x = randn(16, 16).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# -- state -------------------------------------------------------------------------------------------------------------


def run(layer: FP8Linear, seeds) -> list[torch.Tensor]:
    outputs = []
    for seed in seeds:
        x = randn(16, 16, seed=seed, scale=2.0**seed).requires_grad_()
        out = layer(x)
        out.sum().backward()
        outputs.append(out.detach())
    return outputs


def test_a_restored_layer_continues_bit_for_bit_and_one_without_the_history_does_not():
    torch.manual_seed(0)
    layer = FP8Linear(16, 16)
    run(layer, range(5))
    saved = copy.deepcopy(layer.state_dict())
    expected = run(layer, range(5, 9))
    restored, amnesic = FP8Linear(16, 16), FP8Linear(16, 16)
    restored.load_state_dict(saved)
    amnesic.load_state_dict({k: v for k, v in saved.items() if "quantizers" not in k}, strict=False)
    assert all(map(torch.equal, run(restored, range(5, 9)), expected))
    assert not torch.equal(run(amnesic, range(5, 9))[0], expected[0])
    assert sum("amax_history" in key for key in saved) == 3


def test_recipes_without_state_share_checkpoints_with_nn_linear():
    layer, linear = FP8Linear(16, 32, recipe=CurrentScaling()), nn.Linear(16, 32)
    layer.load_state_dict(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, linear.weight)


def test_evaluation_reads_the_scales_and_leaves_them():
    layer = FP8Linear(16, 16)
    run(layer, range(4))
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = randn(16, 16, scale=1000.0)
    first = layer(x)
    layer(x).sum().backward()
    assert torch.equal(layer(x), first)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


def test_casting_the_module_does_not_round_its_scaling_state():
    layer = FP8Linear(16, 16)
    run(layer, range(4))
    exact = {k: v.clone() for k, v in layer.state_dict().items() if "quantizers" in k}
    layer.bfloat16()
    assert layer.weight.dtype == BF16
    for key, value in exact.items():
        assert layer.state_dict()[key].dtype == FP32 and torch.equal(layer.state_dict()[key], value)


def test_scales_move_at_the_next_training_call_or_when_told():
    layer = FP8Linear(16, 16, recipe=DelayedScaling(amax_history_len=1))
    x = torch.full((16, 16), 7.0)
    layer(x)
    assert float(layer.quantizers["input"].scale) == 1.0
    layer(x)
    assert float(layer.quantizers["input"].scale) == 64.0
    told = FP8Linear(16, 16, recipe=DelayedScaling(amax_history_len=1))
    told.auto_update = False
    for _ in range(3):
        told(x)
    assert float(told.quantizers["input"].scale) == 1.0
    assert update_scales(nn.Sequential(told)) == 3
    assert float(told.quantizers["input"].scale) == 64.0
    assert update_scales(nn.Linear(2, 2)) == 0


def test_activation_checkpointing_recomputes_the_same_values_when_scales_wait():
    from torch.utils.checkpoint import checkpoint

    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.Sequential(FP8Linear(16, 32), nn.GELU(), FP8Linear(32, 16))
        for layer in layers:
            layer.auto_update = False
        for seed in range(3):
            x = randn(16, 16, seed=seed, scale=3.0**seed).requires_grad_()
            layers.zero_grad()
            (checkpoint(layers, x, use_reentrant=False) if recompute else layers(x)).sum().backward()
            update_scales(layers)
        return [x.grad, *(p.grad for p in layers.parameters()), *layers.buffers()]

    assert all(map(torch.equal, gradients(True), gradients(False)))


# -- shapes and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["emulated", "scaled_mm"])
def test_padding_changes_nothing_but_the_sizes_that_are_taken(backend):
    torch.manual_seed(0)
    layer = FP8Linear(20, 10, recipe=CurrentScaling(), backend=backend, pad=True)
    x = randn(3, 20).requires_grad_()
    out = layer(x)
    out.backward(randn(3, 10, seed=3))
    wide = FP8Linear(32, 16, recipe=CurrentScaling())
    with torch.no_grad():
        wide.weight.zero_()[:10, :20] = layer.weight
        wide.bias.zero_()[:10] = layer.bias
    filled = torch.zeros(16, 32)
    filled[:3, :20] = x.detach()
    assert torch.allclose(out, wide(filled)[:3, :10], rtol=0, atol=1e-6)
    assert x.grad.shape == x.shape and layer.weight.grad.shape == (10, 20)


@pytest.mark.parametrize(("sizes", "said"), [((20, 16), "in_features"), ((16, 10), "out_features")])
def test_sizes_that_matrix_units_do_not_take_are_refused(sizes, said):
    with pytest.raises(ValueError, match=rf"expected {said} to be a multiple of 16.*pad=True"):
        FP8Linear(*sizes)


def test_rows_are_checked_where_a_gradient_is_needed():
    layer = FP8Linear(16, 16)
    with pytest.raises(ValueError, match=r"multiple of 16.*got 3.*pad=True"):
        layer(randn(3, 16))
    with torch.no_grad():
        assert layer(randn(3, 16)).shape == (3, 16)


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.zeros(16, 8), ValueError, r"expected \(..., 16\), got \(16, 8\)"),
        (torch.tensor(1.0), ValueError, "expected"),
        (torch.zeros(16, 16, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(16, 16, dtype=torch.float64), TypeError, "got torch.float64"),
        ([1.0], TypeError, "got list"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_nothing_is_staged(x, error, said):
    layer = FP8Linear(16, 16)
    with pytest.raises(error, match=said):
        layer(x)
    assert not any(float(b.sum()) for name, b in layer.named_buffers() if "amax" in name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DelayedScaling(margin=0.5), "margin"),
        (lambda: DelayedScaling(margin=100), "margin"),
        (lambda: DelayedScaling(amax_history_len=0), "amax_history_len"),
        (lambda: DelayedScaling(amax_compute_algo="mean"), "'max' or 'most_recent', got 'mean'"),
        (lambda: DelayedScaling(fp8_format="fp8"), "hybrid, e4m3, e5m2, got 'fp8'"),
        (lambda: CurrentScaling(granularity="block"), "'tensor' or 'row'"),
        (lambda: CurrentScaling(amax_epsilon=-1.0), "amax_epsilon"),
        (lambda: FixedScaling(input=0.0), "scale of input"),
        (lambda: FixedScaling(weight=INF), "scale of weight"),
        (lambda: FP8Linear(16, 16, product_dtype=torch.float16), "product_dtype"),
        (lambda: FP8Linear(16, 16, backend="cuda"), "backend"),
        (lambda: FP8Linear(16, 16, recipe=CurrentScaling("e5m2"), backend="scaled_mm"), "runs on emulated"),
    ],
)
def test_recipes_and_layers_refuse_what_cannot_work(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_unknown_keyword_is_an_error_and_not_ignored():
    with pytest.raises(TypeError, match="interval"):
        DelayedScaling(interval=1)  # Transformer Engine since 2.2 swallows it


def test_reduced_amaxes_are_the_largest_of_all_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch\n"
        "from torch import distributed\n"
        "from mixprec_lab.fp8 import DelayedScaling, FP8Linear, update_scales\n"
        "rank, store = int(sys.argv[1]), sys.argv[2]\n"
        "distributed.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)\n"
        "for reduce in (True, False):\n"
        "    layer = FP8Linear(16, 16, recipe=DelayedScaling(reduce_amax=reduce))\n"
        "    layer.auto_update = False\n"
        "    layer(torch.full((16, 16), 7.0 * 2**rank))\n"
        "    update_scales(layer)\n"
        "    print(float(layer.quantizers['input'].scale))\n"
        "distributed.destroy_process_group()\n",
        encoding="utf-8",
    )
    ranks = [
        subprocess.Popen([sys.executable, script, str(r), tmp_path / "store"], stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    said = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert said == [["32.0", "64.0"], ["32.0", "32.0"]]
