"""Which backend runs and why, a stand-in for Transformer Engine's interface, and on a GPU the real thing."""

import sys
import types
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.fp8 import (
    BACKENDS,
    CurrentScaling,
    DelayedScaling,
    FixedScaling,
    FP8Linear,
    FP8Trainer,
    available_backends,
    choose_backend,
    why_not,
)
from mixprec_lab.fp8 import backends as module
from mixprec_lab.models import digits, transformer

BF16 = torch.bfloat16
NEEDS = "needs a GPU with FP8 matrix units"


def on_gpu(backend: str):
    """Skip with the library's own reason where ``backend`` does not run on the GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not(backend, device) if device == "cuda" else NEEDS
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def test_a_cpu_emulates_and_says_why():
    chosen = choose_backend("auto", "cpu")
    assert chosen.name == "emulated"
    assert str(chosen) == "emulated: cpu is no CUDA device; products are emulated with exact FP8 operands"
    assert available_backends("cpu") == ["scaled_mm", "emulated"]
    assert why_not("transformer_engine", "cpu") == "cpu is no CUDA device"


@pytest.mark.parametrize(
    ("capability", "installed", "name", "reason"),
    [
        ((8, 0), True, "emulated", "has compute capability 8.0, FP8 matrix units begin at 8.9"),
        ((8, 9), False, "scaled_mm", "A GPU has FP8 matrix units"),
        ((9, 0), True, "transformer_engine", "A GPU has FP8 matrix units"),
    ],
)
def test_a_gpu_gets_the_best_that_runs(capability, installed, name, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(module, "transformer_engine", lambda: stand_in() if installed else "not installed")
    chosen = choose_backend("auto", "cuda")
    assert chosen.name == name and reason in chosen.reason


def test_a_backend_that_was_asked_for_and_does_not_run_is_an_error():
    with pytest.raises(RuntimeError, match="'transformer_engine': cpu is no CUDA device"):
        FP8Linear(16, 16, backend="transformer_engine")
    with pytest.raises(ValueError, match=", ".join(BACKENDS)):
        choose_backend("te")


@pytest.fixture
def fresh_import():
    module.transformer_engine.cache_clear()
    yield
    module.transformer_engine.cache_clear()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("undefined symbol: cublasLtGroupedMatrixLayoutInit_internal"), "cublasLtGroupedMatrixLayout"),
        (RuntimeError("Found empty `transformer-engine` meta package"), "empty `transformer-engine`"),
        (ImportError("undefined symbol: _ZN2at"), "ImportError"),
        (AssertionError(), "AssertionError"),
        (FileNotFoundError(2, "Could not find shared object file"), "FileNotFoundError"),
    ],
)
@pytest.mark.usefixtures("fresh_import")
def test_every_way_the_import_fails_is_one_sentence(error, said, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("transformer_engine."):
                raise error
            return None

    package = types.ModuleType("transformer_engine")
    package.__path__ = []
    package.__spec__ = types.SimpleNamespace(name="transformer_engine", submodule_search_locations=[])
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    sentence = module.transformer_engine()
    assert isinstance(sentence, str) and said in sentence and "\n" not in sentence
    assert sentence.endswith("see requirements-gpu.txt")


@pytest.mark.usefixtures("fresh_import")
def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.transformer_engine() == "Transformer Engine is not installed: see requirements-gpu.txt"


# -- the interface of Transformer Engine, by a stand-in that records what it is asked ----------------------------------


def stand_in() -> module.TransformerEngine:
    """Names and signatures of Transformer Engine 2.12, arithmetic of torch."""
    te, recipe = types.ModuleType("pytorch"), types.ModuleType("recipe")
    te.regions, te.seen = [], []

    class Linear(nn.Linear):
        def __init__(self, in_features, out_features, bias=True, params_dtype=None, device="cuda"):
            super().__init__(in_features, out_features, bias, device=device, dtype=params_dtype)
            self.calls = 0

        def forward(self, x):
            assert te.regions, "called outside of an autocast region"
            assert x.shape[0] % 8 == 0 and x.shape[1] % 16 == 0
            te.seen.append((x.shape, x.dtype, torch.is_autocast_enabled("cpu")))
            self.calls += 1
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

        def get_extra_state(self):
            return torch.tensor([self.calls])

        def set_extra_state(self, state):
            self.calls = int(state)

    @contextmanager
    def autocast(enabled=True, recipe=None):
        te.regions.append(recipe)
        yield
        te.regions.pop()

    te.Linear, te.autocast = Linear, autocast
    recipe.Format = types.SimpleNamespace(HYBRID="hybrid", E4M3="e4m3")
    recipe.DelayedScaling = lambda **options: ("delayed", options)
    recipe.Float8CurrentScaling = lambda **options: ("current", options)
    return module.TransformerEngine(te, recipe)


@pytest.fixture
def engine(monkeypatch):
    te = stand_in()
    monkeypatch.setattr(module, "transformer_engine", lambda: te)
    monkeypatch.setattr("mixprec_lab.fp8.linear.transformer_engine", lambda: te)
    monkeypatch.setattr(module, "_missing_hardware", lambda device: None)
    return te


def test_recipes_are_translated_with_the_names_of_today(engine):
    layer = FP8Linear(16, 16, recipe=DelayedScaling(margin=2, amax_history_len=4), backend="transformer_engine")
    assert layer._te.recipe == (
        "delayed",
        {"margin": 2, "fp8_format": "hybrid", "amax_history_len": 4, "amax_compute_algo": "max", "reduce_amax": True},
    )
    layer = FP8Linear(16, 16, recipe=CurrentScaling("e4m3"), backend="transformer_engine")
    assert layer._te.recipe == ("current", {"fp8_format": "e4m3"})
    for recipe in (FixedScaling(), CurrentScaling(granularity="row"), CurrentScaling(power_of_two=True)):
        with pytest.raises(ValueError, match="runs on emulated, scaled_mm"):
            FP8Linear(16, 16, recipe=recipe, backend="transformer_engine")


def test_the_layer_inside_shares_parameters_and_is_no_submodule(engine):
    layer = FP8Linear(16, 32, backend="transformer_engine")
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer._te._layer.weight is layer.weight and layer._te._layer.bias is layer.bias
    layer(torch.randn(16, 16)).sum().backward()
    assert layer.weight.grad is not None
    layer.eval()
    layer(torch.randn(16, 16))
    assert not layer._te._layer.training


def test_rows_are_padded_and_the_dtype_is_that_of_autocast(engine):
    layer = FP8Linear(16, 32, backend="transformer_engine", pad=True)
    assert layer(torch.randn(3, 16)).shape == (3, 32)
    with torch.autocast("cpu", BF16):
        assert layer(torch.randn(2, 8, 16)).dtype == BF16
    assert engine.pytorch.seen == [((16, 16), torch.float32, False), ((16, 16), BF16, True)]
    assert engine.pytorch.regions == []


def test_the_engines_state_lies_under_its_own_key(engine):
    layer = FP8Linear(16, 16, backend="transformer_engine")
    layer(torch.randn(16, 16))
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "_extra_state"} and int(state["_extra_state"]) == 1
    other = FP8Linear(16, 16, backend="transformer_engine")
    other.load_state_dict(state)
    assert other._te._layer.calls == 1
    with pytest.raises(RuntimeError, match="_extra_state"):
        other.load_state_dict({k: v for k, v in state.items() if k != "_extra_state"})
    with pytest.raises(RuntimeError, match="_extra_state"):
        FP8Linear(16, 16, recipe=CurrentScaling()).load_state_dict(state)


def test_the_trainer_runs_on_the_engine(engine):
    model = transformer()
    trainer = FP8Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), backend="transformer_engine")
    data = digits()
    first = float(trainer.train_step(data.train_images[:32], data.train_labels[:32]).loss)
    for _ in range(10):
        last = float(trainer.train_step(data.train_images[:32], data.train_labels[:32]).loss)
    assert last < first and trainer.scales() == {}
    assert sum("_extra_state" in key for key in trainer.state_dict()["model"]) == 12


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def both(backend: str, recipe, steps: int = 1):
    """Output and gradients of one layer in two backends, after ``steps`` steps on the same data."""
    torch.manual_seed(0)
    emulated = FP8Linear(256, 512, recipe=recipe, device="cuda")
    other = FP8Linear(256, 512, recipe=recipe, backend=backend, device="cuda")
    with torch.no_grad():
        for a, b in zip(emulated.parameters(), other.parameters(), strict=True):
            b.copy_(a)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = (torch.randn(128, 256, generator=g) * 2.0**step).cuda().bfloat16()
        grad = torch.randn(128, 512, generator=g).cuda().bfloat16() * 2.0**-step
        results = []
        for layer in (emulated, other):
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            with torch.autocast("cuda", BF16):
                out = layer(leaf)
            out.backward(grad)
            results.append((out.detach().float(), leaf.grad.float(), layer.weight.grad.float()))
    return emulated, other, results


@pytest.mark.gpu
@on_gpu("scaled_mm")
@pytest.mark.parametrize("recipe", [DelayedScaling(), CurrentScaling(), CurrentScaling(granularity="row")], ids=str)
def test_scaled_mm_on_the_gpu_is_the_emulation_up_to_its_sums(recipe):
    _, _, (ours, theirs) = both("scaled_mm", recipe, steps=3)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / a.norm() < 3e-3  # BF16 output, and Hopper's short accumulator in the forward product


@pytest.mark.gpu
@on_gpu("scaled_mm")
def test_the_compiled_cast_on_the_gpu_is_the_cast_of_the_cpu():
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16).reshape(256, 256)
    for role in ("input", "grad_output"):
        for scale in (2.0**-9, 0.7, 448 / 3.0):
            recipe = FixedScaling(input=scale, grad_output=scale)
            cpu = recipe.quantizer(role)(x, True, True).along(1).values
            gpu = recipe.quantizer(role).cuda()(x.cuda(), True, True).along(1).values.cpu()
            a, b = cpu.float(), gpu.float()
            assert bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.gpu
@on_gpu("transformer_engine")
@pytest.mark.parametrize("recipe", [DelayedScaling(amax_history_len=4), CurrentScaling()], ids=str)
def test_transformer_engine_is_the_emulation_up_to_its_sums(recipe):
    _, _, (ours, theirs) = both("transformer_engine", recipe, steps=4)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / a.norm() < 5e-3


@pytest.mark.gpu
@on_gpu("transformer_engine")
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_the_delayed_scales_are_those_of_transformer_engine(algorithm):
    recipe = DelayedScaling(amax_history_len=4, amax_compute_algo=algorithm, margin=1)
    emulated, other, _ = both("transformer_engine", recipe, steps=7)
    for q in emulated.quantizers.values():
        q.update()
    meta = other._te._layer.fp8_meta
    ours = [float(emulated.quantizers[role].scale) for role in ("input", "weight", "grad_output")]
    forward, backward = meta["scaling_fwd"].scale, meta["scaling_bwd"].scale
    assert ours == [float(forward[0]), float(forward[1]), float(backward[0])]


@pytest.mark.gpu
@on_gpu("scaled_mm")
def test_the_trainer_trains_on_the_gpu():
    data = digits("cuda")
    model = transformer(width=64).cuda()
    trainer = FP8Trainer(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    assert trainer.chosen.name in ("scaled_mm", "transformer_engine")
    losses = [float(trainer.train_step(data.train_images[:64], data.train_labels[:64]).loss) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
