"""The live exhibits under bad input, and what a reader's model is like after an exhibit has run it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.exhibits import (
    LossScaleLab,
    LostUpdateMap,
    OneTensorEveryScheme,
    ScaleHistory,
    TrainingKnobs,
    Windows,
)

OVER_A_TENSOR = {
    "windows": lambda x: Windows.from_tensors({"x": x}),
    "one tensor": lambda x: OneTensorEveryScheme(tensor=x),
    "lost updates": lambda x: LostUpdateMap(weights=x),
    "scale history": lambda x: ScaleHistory(tensor=x),
    "loss scale": lambda x: LossScaleLab({"x": x}),
}


@pytest.mark.parametrize("exhibit", OVER_A_TENSOR)
@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 4).to_sparse(), torch.ones(4, 4, device="meta")], ids=["sparse", "meta"]
)
def test_a_tensor_without_values_in_every_place_is_refused_in_words(exhibit, tensor):
    with pytest.raises(TypeError, match="expected '?.*'? to be a dense tensor with values, got"):
        OVER_A_TENSOR[exhibit](tensor)


@pytest.mark.parametrize("exhibit", OVER_A_TENSOR)
@pytest.mark.parametrize("x", [[1.0, 2.0], "x", 3, torch.ones(2, 2).numpy()], ids=["list", "text", "number", "array"])
def test_what_is_no_tensor_is_refused_in_words(exhibit, x):
    with pytest.raises(TypeError, match="expected"):
        OVER_A_TENSOR[exhibit](x)


@pytest.mark.parametrize("tensors", [[torch.ones(2)], torch.ones(2), "x"], ids=["list", "tensor", "text"])
def test_windows_need_tensors_by_name(tensors):
    with pytest.raises(TypeError, match="expected tensors by name, got"):
        Windows.from_tensors(tensors)


class Unusual(nn.Module):
    """Statistics, dropout and a counter; fails under autocast if told to."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.drop, self.last = nn.Dropout(), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.fails and torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no autocast here")
        return self.last(self.drop(F.relu(self.norm(self.first(x)))))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """Everything that a training step could have changed."""
    modules = list(model.modules())
    return [
        *copy.deepcopy([*model.state_dict().values()]), *(p.grad.clone() for p in model.parameters()),
        *(v for s in copy.deepcopy(optimizer.state_dict())["state"].values() for v in s.values()),
        torch.get_rng_state(), torch.tensor([m.training for m in modules]),
        torch.tensor([len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]),
        torch.tensor([torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["training", "evaluating"])
@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_moves_of_controls_leave_model_optimizer_gradients_and_generator_as_they_were(mode, fails):
    torch.manual_seed(0)
    model = Unusual(fails).train(mode == "training")
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before, sent = state_of(model, optimizer), []
    lab = LossScaleLab(model, (x, y), F.cross_entropy)
    lab.send = lambda content, buffers=None: sent.append(content)
    for state in ({"log2_scale": 12}, {"format": "bf16"}, {"format": "fp8_e4m3"}, {"log2_scale": 40, "format": "fp16"}):
        lab._heard(lab, {"kind": "compute", "view": "v", "id": 1, "state": state}, [])
    lab.refresh()
    lab.close()
    error = "RuntimeError: no autocast here" if fails else None
    assert [s.get("error") for s in sent] == [error, error, None, error]  # FP8 has no autocast
    after = state_of(model, optimizer)
    assert len(after) == len(before) and all(map(torch.equal, after, before))


@pytest.mark.parametrize(
    "state",
    [{"log2_scale": 5, "format": "nope"}, {"log2_scale": 6, "phase": 3}, {"guess": 99, "log2_scale": 9}, {"x": 1}, []],
    ids=str,
)
def test_a_question_that_is_refused_changes_no_control(state):
    lab, sent = LossScaleLab({"x": torch.randn(8)}), []
    lab.send = lambda content, buffers=None: sent.append(content)
    before = lab.get_state(lab._controls)
    lab._heard(lab, {"kind": "compute", "view": "v", "id": 1, "state": state}, [])
    assert "error" in sent[0] and lab.get_state(lab._controls) == before


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_here_is_named_for_a_model_too(device):
    model, batch = nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=f"expected a device of this machine .*, got '{device}'"):
        LossScaleLab(model, batch, F.mse_loss, device=device)


def test_a_model_without_values_is_refused():
    with pytest.raises(ValueError, match="expected a model with values, got parameters on the meta device"):
        LossScaleLab(nn.Linear(2, 2, device="meta"), (torch.ones(1, 2), torch.ones(1, 2)), F.mse_loss)


def test_knobs_may_be_unlinked_twice():
    lab = LossScaleLab({"x": torch.ones(2)})
    knobs = TrainingKnobs(lab)
    knobs.unlink()
    knobs.unlink()
    lab.log2_scale = 7
    assert knobs.read().scale == 1.0
