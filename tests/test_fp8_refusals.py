"""fp8 under bad input and in unusual models: clear errors, nothing half-changed, no silent way around the layers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixprec_lab.fp8 import (
    CurrentScaling,
    DelayedScaling,
    FP8Linear,
    FP8Trainer,
    convert_linears,
    delayed_update,
    simulate_scaling,
    tensor_core_matmul,
)

HISTORY, SCALE = torch.zeros(4), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: FP8Linear(0, 16), ValueError, "at least 1, got 0 and 16"),
        (lambda: FP8Linear(16, 16, recipe="delayed"), TypeError, "expected a recipe"),
        (lambda: delayed_update(HISTORY, SCALE, 448.0, algorithm="MAX"), ValueError, "'most_recent', got 'MAX'"),
        (lambda: delayed_update(HISTORY[None], SCALE, 448.0), ValueError, r"expected a history \(length,\)"),
        (lambda: simulate_scaling(DelayedScaling(), [1.0], role="bias"), ValueError, "got 'bias'"),
        (lambda: simulate_scaling(DelayedScaling(), [1e39]), ValueError, "float32 numbers"),
        (lambda: tensor_core_matmul(torch.ones(2, 2), torch.ones(2, 2), 14.5), ValueError, "got 14.5"),
        (lambda: tensor_core_matmul(torch.ones(2, 2) * 1j, torch.ones(2, 2)), TypeError, "complex"),
        (lambda: tensor_core_matmul(torch.full((2, 2), 1e30), torch.ones(2, 2)), ValueError, r"2\*\*60"),
    ],
)
def test_what_cannot_work_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()


def trained(steps: int = 3) -> FP8Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    trainer = FP8Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for _ in range(steps):
        trainer.train_step(torch.randn(16, 16), torch.randint(4, (16,)))
    return trainer


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s["counts"].update(steps="7"),
        lambda s: s["counts"].update(loss_fn=3),
        lambda s: s["optimizer"]["param_groups"].append({}),
        lambda s: s["model"].pop("1.weight"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil):
    trainer, state = trained(), copy.deepcopy(trained(6).state_dict())
    before = copy.deepcopy(trainer.state_dict())
    spoil(state)
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        trainer.load_state_dict(state)
    after = trainer.state_dict()
    assert after["counts"] == before["counts"] and callable(trainer.loss_fn)
    assert all(torch.equal(a, b) for a, b in zip(after["model"].values(), before["model"].values(), strict=True))


def test_prediction_restores_the_mode_of_every_module():
    trainer = trained()
    trainer.model[2].eval()
    trainer.predict(torch.randn(5, 16))
    assert trainer.model.training and not trainer.model[2].training


def test_inputs_may_be_named():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))

        def forward(self, x):
            return self.body(x)

    model = Named()
    trainer = FP8Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train_step({"x": torch.randn(16, 16)}, torch.randint(4, (16,)))
    assert trainer.predict({"x": torch.randn(3, 16)}).shape == (3, 4)


def test_layers_that_are_read_past_or_changed_are_kept_with_a_reason():
    changed, extra = nn.Linear(16, 16), nn.Linear(16, 16)
    changed.forward = lambda x: x
    extra.gain = nn.Parameter(torch.ones(()))
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), encoder, changed, extra, nn.Linear(16, 16), nn.Linear(16, 16))
    found = convert_linears(model)
    assert found.converted == ("4",)
    assert "reads its weights past it" in found.kept["1.linear1"] and "were changed" in found.kept["2"]
    assert "were changed" in found.kept["3"]


def test_an_optimizer_that_needs_a_closure_is_refused():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    with pytest.raises(TypeError, match="LBFGS"):
        FP8Trainer(model, torch.optim.LBFGS(model.parameters()))


def test_names_to_skip_may_come_from_a_generator():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    trainer = FP8Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), skip=(name for name in ("1",)))
    assert trainer.convert_to_fp8().converted == ("2",)


def test_an_empty_batch_passes_with_a_scale_for_each_row():
    layer = FP8Linear(16, 16, recipe=CurrentScaling(granularity="row"))
    out = layer(torch.empty(0, 16, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 16) and layer.weight.grad.eq(0).all()


@pytest.mark.parametrize("recipe", [DelayedScaling(), CurrentScaling(), CurrentScaling(granularity="row")], ids=str)
def test_operands_are_kept_by_autograd_so_that_checkpointing_frees_them(recipe):
    layer = FP8Linear(32, 32, recipe=recipe)
    layer.auto_update = False
    x = torch.randn(64, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sum(kept) >= 64 * 32 + 32 * 32
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        checkpoint(layer, x, use_reentrant=False)
    assert sum(kept) <= 64 * 32
