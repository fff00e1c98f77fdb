"""A model in BF16 with FP32 islands: which modules stay wide, and no border between the dtypes raises."""

import copy

import pytest
import torch
from bf16_zoo import adamw, batches, build, mlp
from torch import nn
from torch.nn import functional as F

from mixprec_lab.bf16_vs_fp16 import NORM_TYPES, BF16Trainer, bf16_autocast, to_bf16

BF16, FP32 = torch.bfloat16, torch.float32


class OwnNorm(nn.Module):
    """A normalization layer that torch does not know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.gain


class Words(nn.Module):
    """Token ids to logits, with names that no filter for "layer_norm" or "embedding" would find."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.ln_1, self.input_rms = nn.Embedding(300, 8), nn.LayerNorm(8), nn.RMSNorm(8)
        self.own, self.h, self.out = OwnNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.ln_1(self.wte(ids)) + self.table
        return self.out(self.own(self.input_rms(self.h(x)))).mean(1)


def test_norms_stay_fp32_by_type_and_the_rest_becomes_bf16():
    model = build(Words)
    dtypes = to_bf16(model)
    wide = {"ln_1.weight", "ln_1.bias", "input_rms.weight"}
    assert {name for name, dtype in dtypes.items() if dtype == "fp32"} == wide
    assert all(p.dtype == (FP32 if name in wide else BF16) for name, p in model.named_parameters())
    assert model.table.dtype == FP32


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
        nn.LayerNorm, nn.RMSNorm, nn.SyncBatchNorm, lambda width: nn.GroupNorm(2, width),
    ],
)  # fmt: skip
def test_every_norm_of_torch_is_a_norm(norm):
    layer = norm(4)
    assert isinstance(layer, NORM_TYPES)
    to_bf16(nn.Sequential(nn.Linear(4, 4), layer))
    assert all(p.dtype == FP32 for p in layer.parameters())


@pytest.mark.parametrize("keep", ["own", OwnNorm, None])
def test_what_the_caller_lists_stays_fp32_by_name_type_or_object(keep):
    model = build(Words)
    to_bf16(model, [model.own if keep is None else keep])
    assert model.own.gain.dtype == FP32 and model.h.weight.dtype == BF16
    with bf16_autocast(model):
        assert model.own(torch.ones(2, 8, dtype=BF16)).dtype == FP32


def test_a_single_name_is_not_read_as_its_letters_and_unknown_ones_are_refused():
    assert to_bf16(build(Words), "wte")["wte.weight"] == "fp32"
    with pytest.raises(KeyError, match="the names are"):
        to_bf16(build(Words), ["embedding"])
    with pytest.raises(ValueError, match="to keep in FP32"):
        to_bf16(build(Words), [nn.Conv2d])
    with pytest.raises(ValueError, match="to keep in FP32"):
        to_bf16(build(Words), [nn.Linear(2, 2)])


def test_a_shared_parameter_stays_fp32_and_parameters_stay_the_same_objects():
    model = build(Words)
    model.out = nn.Linear(8, 300, bias=False)
    model.out.weight = model.wte.weight
    before = dict(model.named_parameters())
    to_bf16(model, ["wte"])
    assert model.out.weight is model.wte.weight and model.out.weight.dtype == FP32
    assert all(p is before[name] for name, p in model.named_parameters())
    with bf16_autocast(model):
        assert model(torch.tensor([[257, 3]])).shape == (1, 300)


def test_a_norm_computes_in_fp32_and_returns_what_it_was_given():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2.0)
    to_bf16(model)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).mul(100).bfloat16()
    with bf16_autocast(model):
        got = model[1](x)
    assert torch.equal(got, F.layer_norm(x.float(), (8,), model[1].weight, model[1].bias).bfloat16())
    assert got.dtype == BF16 and model[1](x.float()).dtype == FP32


def test_converting_twice_changes_nothing():
    model = build(Words)
    to_bf16(model, ["own"])
    ids = torch.tensor([[257, 3]])
    with bf16_autocast(model):
        once = model(ids)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    to_bf16(model, ["own"])
    with bf16_autocast(model):
        assert torch.equal(model(ids), once)
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


def test_a_copy_of_a_converted_model_has_its_own_norms():
    model = build(Words)
    to_bf16(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.ln_1.weight.zero_()
    assert bool(twin.ln_1(torch.ones(1, 8, dtype=BF16) * torch.arange(8)).abs().sum() > 0)


class Recurrent(nn.Module):
    """An LSTM that is given its state, as a tuple in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = (torch.zeros(1, len(x), 8), torch.zeros(1, len(x), 8))
        return self.out(self.lstm(x.unsqueeze(1), state)[0][:, -1])


class Functional(nn.Module):
    """A kept layer inside a module with a weight of its own, and functional products of both dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.wide = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(F.linear(x, self.weight))[:, :4] @ self.wide.weight[:4, :4]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 8)), layer, nn.Flatten(), nn.Linear(8, 4))


ZOO = {
    "linear": (mlp, ()),
    "kept head": (mlp, ("2",)),
    "kept in the middle": (mlp, ("0", nn.Tanh)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), ()),
    "encoder": (encoder, ()),
    "lstm": (Recurrent, ()),
    "kept lstm": (Recurrent, ("lstm",)),
    "functional": (Functional, ("wide",)),
}


@pytest.mark.parametrize("name", ZOO)
def test_no_border_between_dtypes_raises_and_training_follows_fp32(name):
    make, keep = ZOO[name]
    model, twin = build(make), build(make)
    trainer, reference = BF16Trainer(model, adamw(model), keep_fp32=keep), adamw(twin)
    for x, y in batches(5):
        step = trainer.train_step(x, y)
        loss = F.cross_entropy(twin(x), y)
        assert step.loss.dtype == FP32 and float(step.loss) == pytest.approx(loss.item(), rel=0.03)
        reference.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        reference.step()
    assert trainer.steps == 5 and trainer.predict(batches(1)[0][0]).dtype == FP32 and model.training


def test_token_ids_are_not_rounded():
    model = build(Words)
    trainer = BF16Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.wte.weight.detach().clone()
    trainer.train_step(torch.tensor([[257, 257]]), torch.tensor([1]))
    moved = (model.wte.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [257]  # as a BF16 number the id would be 256


def test_the_backward_pass_is_bf16_and_the_loss_is_fp32():
    seen = []

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(output.dtype)
        return F.cross_entropy(output, target)

    model = mlp()
    model[2].register_full_backward_hook(lambda _m, inputs, outputs: seen.extend(g.dtype for g in (*inputs, *outputs)))
    trainer = BF16Trainer(model, adamw(model), loss_fn)
    trainer.train_step(*batches(1)[0])
    assert seen == [FP32, BF16, BF16]
