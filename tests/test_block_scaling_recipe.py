"""Block scaling as a recipe of ``FP8Linear``: which operand is quantized how, and training with it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mixprec_lab.block_scaling import BlockScaling, get_scheme, quantize_blocks, random_hadamard, random_signs
from mixprec_lab.fp8 import ROLES, FP8Linear, FP8Trainer, train_transformer
from mixprec_lab.models import digits


def layer_and_data(recipe, rows: int = 64) -> tuple[FP8Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = FP8Linear(48, 32, bias=False, recipe=recipe, pad=bool(rows % 16))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 48, generator=generator))
    return layer, torch.randn(rows, 48, generator=generator), torch.randn(rows, 32, generator=generator)


def products(recipe, rows: int = 64):
    """(output, gradient of the input, gradient of the weight) of one layer under ``recipe``."""
    layer, x, g = layer_and_data(recipe, rows)
    x.requires_grad_()
    output = layer(x)
    output.backward(g)
    return output.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("scheme", ["tile_1x128", "mxfp8", "mxfp4", "nvfp4", "per_row", "block_128x128"])
def test_each_operand_is_quantized_along_the_axis_that_is_summed(scheme):
    layer, x, g = layer_and_data(BlockScaling(scheme))
    w = layer.weight.detach()
    output, grad_x, grad_w = products(BlockScaling(scheme))
    assert torch.allclose(output, quantize_blocks(x, scheme) @ quantize_blocks(w, scheme).T, atol=1e-4)
    assert torch.allclose(grad_x, quantize_blocks(g, scheme) @ quantize_blocks(w, scheme, 0), atol=1e-4)
    assert torch.allclose(grad_w, quantize_blocks(g, scheme, 0).T @ quantize_blocks(x, scheme, 0), atol=1e-4)


def test_weights_and_gradients_may_have_schemes_of_their_own():
    weights, gradients = replace(get_scheme("nvfp4"), block=(16, 16)), replace(get_scheme("mxfp8"), element="fp8_e5m2")
    layer, x, g = layer_and_data(BlockScaling("mxfp8", weights, gradients))
    w = layer.weight.detach()
    output, grad_x, grad_w = products(BlockScaling("mxfp8", weights, gradients))
    assert torch.allclose(output, quantize_blocks(x, "mxfp8") @ quantize_blocks(w, weights).T, atol=1e-4)
    assert torch.allclose(grad_x, quantize_blocks(g, gradients) @ quantize_blocks(w, weights), atol=1e-4)
    assert torch.allclose(grad_w, quantize_blocks(g, gradients, 0).T @ quantize_blocks(x, "mxfp8", 0), atol=1e-4)


@pytest.mark.parametrize("rows", [64, 50])
def test_the_hadamard_transform_touches_the_weight_gradient_only_and_cancels_out(rows):
    recipe = BlockScaling("mxfp4", hadamard=16, seed=3)
    _, x, g = layer_and_data(recipe, rows)
    plain, transformed = products(BlockScaling("mxfp4"), rows), products(recipe, rows)
    assert torch.equal(plain[0], transformed[0]) and torch.equal(plain[1], transformed[1])
    signs = random_signs(16, torch.Generator().manual_seed(3))
    full = [torch.cat([t, torch.zeros(-rows % 16, t.shape[1])]) for t in (g, x)]
    left, right = (quantize_blocks(random_hadamard(t, signs, 0), "mxfp4", 0) for t in full)
    assert torch.allclose(transformed[2], left.T @ right, atol=1e-3)
    assert float((transformed[2] - g.T @ x).norm() / (g.T @ x).norm()) < 0.25


def test_stochastic_gradients_are_unbiased_and_seeded_and_nothing_else_is_random():
    recipe = BlockScaling("nvfp4", stochastic_gradients=True)
    first, again, other = (products(replace(recipe, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])
    _, x, g = layer_and_data(recipe)
    exact = g.T @ quantize_blocks(x, "nvfp4", 0)
    mean = torch.stack([products(replace(recipe, seed=seed))[2] for seed in range(100)]).mean(0)
    # Saturation of scales that E4M3 rounded down is the only bias that stays.
    assert float((mean - exact).norm() / exact.norm()) < 0.35 * float((first[2] - exact).norm() / exact.norm())


def test_published_recipes_say_what_they_are():
    nvidia, deepseek = BlockScaling.nvfp4(), BlockScaling.deepseek(seed=5)
    assert [nvidia.of(role).block for role in ROLES] == [(1, 16), (16, 16), (1, 16)]
    assert nvidia.hadamard == 16 and nvidia.stochastic_gradients
    assert [deepseek.of(role).block for role in ROLES] == [(1, 128), (128, 128), (1, 128)] and deepseek.seed == 5
    assert BlockScaling.nvfp4(hadamard=0).hadamard == 0


def test_layers_can_be_copied_and_have_no_state_beside_their_parameters():
    layer, x, g = layer_and_data(BlockScaling.nvfp4())
    assert set(layer.state_dict()) == {"weight"}
    layer(x).backward(g)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


def test_autocast_and_bf16_inputs_reach_the_blocks_in_float32():
    layer, x, _ = layer_and_data(BlockScaling("mxfp8"))
    x = x.bfloat16()
    expected = quantize_blocks(x.float(), "mxfp8") @ quantize_blocks(layer.weight.detach(), "mxfp8").T
    assert torch.allclose(layer(x).float(), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BlockScaling("mxfp9"), KeyError, "got 'mxfp9'"),
        (lambda: BlockScaling(gradient_scheme="none"), KeyError, "got 'none'"),
        (lambda: BlockScaling(hadamard=12), ValueError, "power of two, got 12"),
        (lambda: FP8Linear(32, 32, recipe=BlockScaling(), backend="scaled_mm"), ValueError, "runs on emulated"),
    ],
)
def test_recipes_that_cannot_run_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_transformer_trains_in_mxfp8_as_well_as_in_bf16():
    data = digits()
    bf16, mxfp8 = train_transformer(data, 0, steps=80), train_transformer(data, 0, BlockScaling("mxfp8"), steps=80)
    assert mxfp8.test_loss < 1.15 * bf16.test_loss and mxfp8.losses[-1] < 0.5 * mxfp8.losses[0]


def test_the_trainer_takes_the_recipe():
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = FP8Trainer(model, optimizer, backend="emulated", recipe=BlockScaling.nvfp4())
    data = digits()
    step = trainer.train_step(data.train_images[:64].flatten(1), data.train_labels[:64])
    assert bool(torch.isfinite(step.loss)) and isinstance(model[2], FP8Linear)
