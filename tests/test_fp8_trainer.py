"""FP8Trainer: a hand-written loop bit for bit, resume, conversion, and the BF16 loss within seed noise."""

import copy
import io
import math
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.device import one_thread
from mixprec_lab.fp8 import (
    CurrentScaling,
    DelayedScaling,
    FixedScaling,
    FP8Linear,
    FP8Trainer,
    convert_linears,
    train_transformer,
    update_scales,
)
from mixprec_lab.models import digits, transformer

BF16 = torch.bfloat16


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1))
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.ModuleList([inner])[0], nn.LayerNorm(32), nn.Linear(32, 10))


def batches(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(32, 16, generator=g), torch.randint(10, (32,), generator=g)) for _ in range(count)
    ]


def make(kind: str, parameters) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2)
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def by_hand(data, kind: str, accumulation: int, max_norm: float | None, recipe):
    """The layers swapped by hand, and the loop written out."""
    model = mlp()
    model[2][0] = FP8Linear.from_linear(model[2][0], recipe)
    model[2][0].auto_update = False
    optimizer, losses = make(kind, model.parameters()), []
    torch.manual_seed(7)
    for i, (x, y) in enumerate(data):
        with torch.autocast("cpu", BF16):
            loss = F.cross_entropy(model(x), y)
        (loss / accumulation).backward()
        losses.append(loss.item())
        if (i + 1) % accumulation == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            update_scales(model)
    return model, losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("recipe", [DelayedScaling(amax_history_len=4), CurrentScaling()], ids=["delayed", "current"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_is_a_hand_written_loop_bit_for_bit(recipe, accumulation, max_norm, kind):
    data = batches(9)
    expected, losses = by_hand(data, kind, accumulation, max_norm, recipe)
    model = mlp()
    trainer = FP8Trainer(
        model,
        make(kind, model.parameters()),
        recipe=recipe,
        accumulation_steps=accumulation,
        max_norm=max_norm,
    )
    torch.manual_seed(7)
    got = [trainer.train_step(x, y) for x, y in data]
    assert [float(step.loss) for step in got] == losses
    assert same(model, expected)
    assert [step.stepped for step in got] == [(i + 1) % accumulation == 0 for i in range(9)]
    assert (trainer.steps, trainer.skipped_steps) == (9 // accumulation, 0)


@pytest.mark.parametrize("recipe", [DelayedScaling(amax_history_len=4), CurrentScaling()], ids=["delayed", "current"])
def test_a_restored_run_continues_bit_for_bit(recipe):
    def fresh() -> FP8Trainer:
        model = mlp(3)
        return FP8Trainer(model, make("adamw", model.parameters()), recipe=recipe)

    trainer, data = fresh(), batches(12)
    for x, y in data[:6]:
        trainer.train_step(x, y)
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    rng = torch.get_rng_state()
    expected = [float(trainer.train_step(x, y).loss) for x, y in data[6:]]
    restored = fresh()
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.set_rng_state(rng)
    assert [float(restored.train_step(x, y).loss) for x, y in data[6:]] == expected
    assert same(restored.model, trainer.model) and restored.steps == trainer.steps == 12


def test_losing_the_scaling_state_changes_the_run():
    model = mlp(3)
    trainer = FP8Trainer(model, make("sgd", model.parameters()))
    for x, y in batches(6):
        trainer.train_step(x * 1e4, y)
    saved, x = copy.deepcopy(trainer.state_dict()), batches(1, seed=5)[0][0] * 1e4
    expected = trainer.predict(x)
    for key in saved["model"]:
        if key.endswith("scale"):
            saved["model"][key] = torch.ones(())
    trainer.load_state_dict(saved)
    assert not torch.equal(trainer.predict(x), expected)


def test_an_optimizer_built_before_the_conversion_trains_the_converted_layers():
    model = mlp()
    optimizer = make("sgd", model.parameters())
    before = [p for p in model.parameters()]
    trainer = FP8Trainer(model, optimizer)
    trainer.convert_to_fp8()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    values = [p.detach().clone() for p in before]
    trainer.train_step(*batches(1)[0])
    assert isinstance(model[2][0], FP8Linear)
    assert all(not torch.equal(p, v) for p, v in zip(before, values, strict=True))


def test_evaluation_moves_no_scale_and_keeps_the_mode():
    model = mlp()
    trainer = FP8Trainer(model, make("sgd", model.parameters()))
    for x, y in batches(3):
        trainer.train_step(x, y)
    scales, x = trainer.scales(), batches(1)[0][0]
    assert len(scales) == 3 and all(key.startswith("2.0.") for key in scales)
    model.eval()
    first = trainer.predict(x)
    assert not model.training
    model.train()
    assert torch.equal(trainer.predict(x), first) and model.training
    assert trainer.scales() == scales and first.dtype == torch.float32


def test_a_step_with_a_nan_gradient_is_left_out_and_counted():
    model = mlp()
    trainer = FP8Trainer(model, make("adamw", model.parameters()))
    x, y = batches(1)[0]
    trainer.train_step(x, y)
    before = copy.deepcopy(trainer.optimizer.state_dict()), [p.detach().clone() for p in model.parameters()]
    step = trainer.train_step(x * math.nan, y)
    assert not step.stepped and trainer.skipped_steps == 1 and trainer.steps == 1
    assert all(map(torch.equal, before[1], model.parameters()))
    assert str(before[0]) == str(trainer.optimizer.state_dict())
    assert trainer.train_step(x, y).stepped and all(math.isfinite(s) for s in trainer.scales().values())


def test_overflow_saturates_and_costs_no_step():
    model = mlp()
    recipe = FixedScaling(input=2.0**20, grad_output=2.0**30)
    trainer = FP8Trainer(model, make("sgd", model.parameters()), recipe=recipe)
    steps = [trainer.train_step(x, y) for x, y in batches(5)]
    assert all(step.stepped for step in steps) and trainer.skipped_steps == 0


# -- conversion --------------------------------------------------------------------------------------------------------


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear | FP8Linear)}


def test_layers_are_converted_at_any_depth_and_the_ends_are_kept():
    model = transformer()
    found = convert_linears(model)
    assert len(found.converted) == 12 and set(found.kept) == {"embed", "head"}
    assert all(kinds(model)[name] == "FP8Linear" for name in found.converted)
    assert kinds(model)["embed"] == kinds(model)["head"] == "Linear"
    assert str(found).splitlines()[0] == "12 of 14 linear layers in FP8"
    assert model(digits().train_images[:16]).shape == (16, 10)


def test_what_is_kept_has_a_reason():
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *_: None)
    middle = nn.ModuleDict(
        {"odd": nn.Linear(32, 20), "special": Special(32, 32), "hooked": hooked, "named": nn.Linear(32, 32)}
    )
    model = nn.Sequential(nn.Linear(32, 32), middle, nn.Linear(32, 32), nn.Linear(32, 32))
    found = convert_linears(model, skip=["1.named"])
    assert found.converted == ("2",)
    assert found.kept == {
        "0": "the first layer reads the data",
        "1.odd": "32 x 20 are not both multiples of 16",
        "1.special": "Special is more than an nn.Linear",
        "1.hooked": "it has hooks",
        "1.named": "asked for",
        "3": "the last layer makes the logits",
    }


def test_skipping_a_container_skips_what_is_inside_and_padding_takes_odd_sizes():
    model = transformer()
    found = convert_linears(model, skip="blocks.0", keep_first_and_last=False, pad=True)
    assert {"embed", "head"} <= set(found.converted)
    assert all(not name.startswith("blocks.0") for name in found.converted) and len(found.converted) == 8


def test_a_shared_layer_becomes_one_layer():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.GELU(), shared)
    convert_linears(model, keep_first_and_last=False)
    assert isinstance(model[0], FP8Linear) and model[0] is model[2]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    convert_linears(model, keep_first_and_last=False)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        (nn.Linear(16, 16), {}, TypeError, "FP8Linear.from_linear"),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), {}, ValueError, "it has none"),
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), {}, ValueError, "0: the first layer"),
        (nn.Sequential(nn.Linear(16, 16)), {"skip": ["blocks"]}, KeyError, "got blocks; the names are 0"),
    ],
)
def test_a_model_that_cannot_be_converted_is_refused_unchanged(model, options, error, said):
    before = kinds(model)
    with pytest.raises(error, match=said):
        convert_linears(model, **options)
    assert kinds(model) == before


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: {"max_norm": 0.0}, ValueError, "max_norm"),
        (lambda m: {"accumulation_steps": 0}, ValueError, "accumulation_steps"),
        (lambda m: {"autocast_dtype": torch.float16}, ValueError, "loss scaling"),
        (lambda m: {"backend": "cuda"}, ValueError, "auto, transformer_engine, scaled_mm, emulated"),
        (lambda m: {"optimizer": make("sgd", nn.Linear(2, 2).parameters())}, ValueError, "parameters of the model"),
        (lambda m: {"optimizer": None}, TypeError, "torch.optim.Optimizer, got Sequential and NoneType"),
        (lambda m: {"model": m.half()}, ValueError, "master weights, got torch.float16"),
        (lambda m: {"model": nn.Sequential()}, ValueError, "one device"),
    ],
)
def test_arguments_that_cannot_work_are_refused(change, error, said):
    model = mlp()
    arguments = {"model": model, "optimizer": make("sgd", model.parameters())} | change(model)
    with pytest.raises(error, match=said):
        FP8Trainer(**arguments)


def test_a_state_of_another_recipe_or_in_mid_accumulation_is_refused():
    model = mlp()
    trainer = FP8Trainer(model, make("sgd", model.parameters()), accumulation_steps=2)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="expected recipe"):
        trainer.load_state_dict(state | {"recipe": "CurrentScaling()"})
    with pytest.raises(ValueError, match="keys"):
        trainer.load_state_dict({"model": state["model"], "recipe": state["recipe"]})
    trainer.train_step(*batches(1)[0])
    with pytest.raises(RuntimeError, match="mid-accumulation"):
        trainer.state_dict()


def test_a_loss_that_is_no_scalar_is_refused():
    model = mlp()
    trainer = FP8Trainer(model, make("sgd", model.parameters()), lambda out, y: out)
    with pytest.raises(ValueError, match=r"scalar, got \(32, 10\)"):
        trainer.train_step(*batches(1)[0])


# -- the reason the thing exists ---------------------------------------------------------------------------------------

SEEDS = range(5)


@pytest.fixture(scope="module")
def bf16_losses() -> list[float]:
    return [train_transformer(digits(), seed).test_loss for seed in SEEDS]


@pytest.mark.parametrize("recipe", [DelayedScaling(), CurrentScaling()], ids=["delayed", "current"])
@one_thread()
def test_fp8_reaches_the_loss_of_bf16_within_the_noise_of_seeds(recipe, bf16_losses):
    fp8_losses = [train_transformer(digits(), seed, recipe).test_loss for seed in SEEDS]
    differences = [a - b for a, b in zip(fp8_losses, bf16_losses, strict=True)]
    noise = statistics.stdev(bf16_losses)
    assert abs(statistics.mean(differences)) < noise / 2
    assert max(map(abs, differences)) < 2 * noise


def test_e4m3_without_scaling_does_not(bf16_losses):
    losses = [train_transformer(digits(), seed, FixedScaling("e4m3")).test_loss for seed in SEEDS]
    assert min(losses) > 1.8 > 3 * statistics.mean(bf16_losses)  # log 10 = 2.30 is guessing
