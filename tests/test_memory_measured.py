"""The memory model against real modules, optimizers and steps: saved tensors, states and peaks, byte for byte."""

import dataclasses
import math

import pytest
import torch
from networks import BATCH, GPT, LLAMA, SEQUENCE, SHAPES, Transformer, ids_for, loss_of
from torch import nn
from torch.nn import functional as F

from mixprec_lab.master_weights.adamw import BF16AdamW
from mixprec_lab.master_weights.optimizer import MasterWeightOptimizer
from mixprec_lab.memory import (
    REGIMES,
    LiveBytes,
    ModelShape,
    lora_parameters,
    saved_bytes,
    state_bytes,
    training_memory,
)

# Real modules: saved tensors.


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["flash", "full"])
@pytest.mark.parametrize("regime", ["fp32", "autocast", "bf16_pure"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_saved_activations_and_casts_are_exact(shape, regime, attention, dropout):
    model, ids = Transformer(shape, attention, dropout), ids_for(shape)
    if regime == "bf16_pure":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=regime == "autocast"):
        measured = saved_bytes(lambda: model(ids), model)
    expected = training_memory(shape, regime, sequence=SEQUENCE, batch=BATCH, attention=attention,
                               dropout=dropout > 0, policy="cpu")  # fmt: skip
    assert (measured.activations, measured.casts) == (expected.activations, expected.temporary)
    assert sum(size for *_, size in measured.tensors) == measured.activations + measured.casts


def test_one_matrix_for_query_key_and_value_saves_two_casts_of_their_input_under_autocast():
    ids, apart = ids_for(GPT), dataclasses.replace(GPT, fused=False)
    measured, expected = [], []
    for shape in (GPT, apart):
        model = Transformer(shape)
        with torch.autocast("cpu", torch.bfloat16):
            measured.append(saved_bytes(lambda model=model: model(ids), model).activations)
        memory = training_memory(shape, "autocast", sequence=SEQUENCE, batch=BATCH, policy="cpu")
        expected.append(memory.activations)
    assert measured == expected
    assert measured[1] - measured[0] == 2 * 2 * GPT.hidden * GPT.layers * BATCH * SEQUENCE


def test_checkpointed_layers_save_their_input_only():
    model, ids = Transformer(GPT, checkpoint=True), ids_for(GPT)
    measured = saved_bytes(lambda: model(ids), model).activations
    recomputed = saved_bytes(lambda: model.layers[0](torch.zeros(BATCH, SEQUENCE, GPT.hidden)), model).activations
    expected = training_memory(GPT, "fp32", sequence=SEQUENCE, batch=BATCH, activation_checkpointing=True, policy="cpu")
    inputs = BATCH * SEQUENCE * GPT.hidden * 4
    assert expected.activations == measured + recomputed - inputs


class _Fp8Linear(torch.autograd.Function):
    """A product that keeps its input in one byte, as FP8 recipes do; the weight is a parameter and costs nothing."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x.to(torch.float8_e4m3fn), weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.to(grad.dtype).flatten(0, -2)


def test_matrix_inputs_saved_in_one_byte_are_the_fp8_count(monkeypatch):
    model, ids = Transformer(dataclasses.replace(GPT, biased=False)).bfloat16(), ids_for(GPT)
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            monkeypatch.setattr(module, "forward", lambda x, m=module: _Fp8Linear.apply(x, m.weight))
    measured = saved_bytes(lambda: model(ids), model)
    expected = training_memory(GPT, "fp8_lm", sequence=SEQUENCE, batch=BATCH, policy="cpu")
    assert measured.activations == expected.activations


# Real modules and optimizers: what lives from step to step.


class _WideMoments(torch.optim.Optimizer):
    """Adam without its corrections, moments in FP32 for parameters in BF16."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            m, v = (self.state[p].setdefault(k, torch.zeros_like(p, dtype=torch.float32)) for k in "mv")
            g = p.grad.float()
            m.lerp_(g, 0.1), v.lerp_(g * g, 0.05)
            p.add_(-1e-3 * m / (v.sqrt() + 1e-8))


class _ByteMoments(torch.optim.Optimizer):
    """Adam without its corrections, moments in bytes with an FP32 constant for every 256 values."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            m, v = (self._read(p, key) for key in "mv")
            m, v = m.lerp(p.grad.float(), 0.1), v.lerp(p.grad.float() ** 2, 0.05)
            p.add_(-1e-3 * m / (v.sqrt() + 1e-8))
            self._write(p, "m", m), self._write(p, "v", v)

    def _read(self, p, key):
        if key not in self.state[p]:
            return torch.zeros_like(p, dtype=torch.float32)
        blocks = self.state[p][key].float().split(256)
        parts = [b * scale / 127 for b, scale in zip(blocks, self.state[p][key + "_scale"], strict=True)]
        return torch.cat(parts).view_as(p)

    def _write(self, p, key, values):
        blocks = values.flatten().split(256)
        self.state[p][key + "_scale"] = torch.stack([b.abs().max() for b in blocks])
        parts = [(b / b.abs().max().clamp(min=1e-30) * 127).round().to(torch.int8) for b in blocks]
        self.state[p][key] = torch.cat(parts)


def train_two_steps(model, optimizer, autocast=False, after_backward=None, ids=None) -> None:
    ids = ids_for(GPT) if ids is None else ids
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = loss_of(model, ids, autocast)
        loss.backward()
        if after_backward:
            after_backward()
        optimizer.step()


def assert_states(measured, expected) -> None:
    got = (measured.weights, measured.gradients, measured.masters, measured.moments)
    assert got == (expected.weights, expected.gradients, expected.masters, expected.moments)


#: ``BF16AdamW`` compensates its second moment as well as the weights.
KAHAN_BOTH = dataclasses.replace(REGIMES["bf16_kahan"], compensation=4)


@pytest.mark.parametrize(
    ("regime", "dtype", "make", "autocast"),
    [
        ("fp32", torch.float32, torch.optim.AdamW, False),
        ("fp32_sgd", torch.float32, lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9), False),
        ("autocast", torch.float32, torch.optim.AdamW, True),
        ("bf16_pure", torch.bfloat16, torch.optim.AdamW, False),
        ("bf16_pure", torch.bfloat16, lambda p: BF16AdamW(p, lr=1e-3), False),
        (KAHAN_BOTH, torch.bfloat16, lambda p: BF16AdamW(p, lr=1e-3, update="kahan"), False),
        ("bf16_fp32_moments", torch.bfloat16, _WideMoments, False),
    ],
)
def test_states_of_a_real_training_run_are_exact(regime, dtype, make, autocast):
    model = Transformer(GPT).to(dtype)
    optimizer = make(model.parameters())
    train_two_steps(model, optimizer, autocast)
    assert_states(state_bytes(model, optimizer), training_memory(GPT, regime))


def test_states_with_8_bit_moments_are_exact_but_for_the_last_block_of_each_tensor():
    model = Transformer(GPT)
    optimizer = _ByteMoments(model.parameters())
    train_two_steps(model, optimizer, autocast=True)
    measured, expected = state_bytes(model, optimizer), training_memory(GPT, "autocast_adam8bit")
    assert measured.weights == expected.weights and measured.gradients == expected.gradients
    padded = sum(8 * math.ceil(p.numel() / 256) for p in model.parameters())
    assert measured.moments == 2 * GPT.parameters + padded
    assert 0 <= measured.moments - expected.moments <= 8 * len(list(model.parameters()))


def test_states_with_masters_are_16_before_and_18_bytes_while_the_optimizer_steps():
    model, seen = Transformer(GPT).bfloat16(), []
    inner = torch.optim.AdamW(model.parameters(), 1e-3)
    optimizer = MasterWeightOptimizer(inner, model)

    def look() -> None:
        seen.append(state_bytes(model, inner))

    train_two_steps(model, optimizer, after_backward=look)
    assert_states(seen[-1], training_memory(GPT, "bf16_master"))
    assert_states(state_bytes(model, inner), training_memory(GPT, "bf16_master_fp32_grad"))


def test_states_with_an_fp32_buffer_to_accumulate_in_are_20_bytes():
    model = Transformer(GPT).bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, 1e-3)
    for _ in range(2):  # two micro-batches; the 16-bit gradients stay, as the playbook counts them
        model.zero_grad(set_to_none=False)
        loss_of(model, ids_for(GPT), autocast=False)[0].backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad = p.grad.float() if master.grad is None else master.grad + p.grad
    optimizer.step()
    assert_states(state_bytes(model, optimizer), training_memory(GPT, "bf16_master_accumulate"))


class _Adapted(nn.Module):
    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.a = nn.Parameter(torch.randn(rank, frozen.in_features) / rank)
        self.b = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x):
        return self.frozen(x) + F.linear(F.linear(x, self.a), self.b)


def adapt(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Freeze ``model`` in BF16 and put adapters beside every matrix of its layers; the adapters come back."""
    model.bfloat16().requires_grad_(False)
    found = [(owner, name, linear) for owner in model.layers.modules() for name, linear in owner.named_children()
             if isinstance(linear, nn.Linear)]  # fmt: skip
    adapted = [_Adapted(linear, rank) for _, _, linear in found]
    for (owner, name, _), module in zip(found, adapted, strict=True):
        setattr(owner, name, module)
    return [p for module in adapted for p in (module.a, module.b)]


def test_lora_keeps_states_for_its_adapters_only():
    model = Transformer(LLAMA)
    adapters = adapt(model, rank=4)
    count = sum(a.numel() for a in adapters)
    assert count == lora_parameters(LLAMA, 4, ("query", "key", "value", "output", "gate", "up", "down"))
    optimizer = torch.optim.AdamW(adapters, 1e-3)
    train_two_steps(model, optimizer, autocast=True, ids=ids_for(LLAMA))
    assert_states(state_bytes(model, optimizer), training_memory(LLAMA, "autocast", adapters=count))


def test_lora_saves_almost_what_training_in_16_bits_saves():
    rank, tokens, shape = 4, BATCH * SEQUENCE, dataclasses.replace(GPT, fused=False)
    model, ids = Transformer(shape), ids_for(shape)
    count = sum(a.numel() for a in adapt(model, rank))
    with torch.autocast("cpu", torch.bfloat16):
        measured = saved_bytes(lambda: model(ids), model)
    expected = training_memory(shape, "autocast", adapters=count, sequence=SEQUENCE, batch=BATCH, policy="cpu")
    narrow = 2 * rank * 6 * shape.layers  # between the two matrices of each adapter
    frozen = 2 * 8 + (2 * shape.hidden + 2 * 2) + 2 * shape.hidden  # ids, the very first norm, the input of the head
    assert measured.activations == expected.activations + tokens * (narrow - frozen)
    first = 3 * 2 * rank * shape.hidden  # adapters on the embedding, which needs no gradient: their casts are not saved
    assert measured.casts == expected.temporary - first == 2 * count - first


# Peaks.


def step_peak(model, regime, ids, live) -> int:
    """Peak bytes of the second micro-batch of an accumulated step: gradients and states are there already."""
    autocast = regime == "autocast"
    live.reset_peak()
    loss, logits = loss_of(model, ids, autocast)
    loss.backward()
    return live.peak


def prepared(regime: str, shape: ModelShape, device: str):
    model = Transformer(shape).to(device, torch.bfloat16 if regime == "bf16_pure" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ids = ids_for(shape, batch=8, device=device)
    loss_of(model, ids, regime == "autocast")[0].backward()
    optimizer.step()
    return model, optimizer, ids


WIDE = ModelShape("wide vocabulary", layers=4, hidden=64, heads=4, vocabulary=1500, inner=256, positions=64)


@pytest.mark.parametrize("regime", ["fp32", "autocast", "bf16_pure"])
def test_the_peak_of_a_real_step_is_the_total_within_5_percent(regime):
    model, optimizer, ids = prepared(regime, WIDE, "cpu")
    with LiveBytes(model, optimizer, ids) as live:
        peak = step_peak(model, regime, ids, live)
    expected = training_memory(WIDE, regime, sequence=SEQUENCE, batch=8, policy="cpu").total
    assert peak == pytest.approx(expected, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("regime", ["fp32", "autocast", "bf16_pure"])
def test_the_peak_of_a_real_step_on_cuda_is_the_total_within_5_percent(regime):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = dataclasses.replace(WIDE, layers=8, hidden=512, heads=8, inner=2048, vocabulary=32000)
    warm = prepared(regime, dataclasses.replace(shape, layers=1), "cuda")  # workspaces of the libraries
    del warm
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model, optimizer, ids = prepared(regime, shape, "cuda")
    torch.cuda.reset_peak_memory_stats()
    loss, logits = loss_of(model, ids, regime == "autocast")
    loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(training_memory(shape, regime, sequence=SEQUENCE, batch=8).total, rel=0.05)


def test_peaks_are_those_of_the_tracker_of_torch():
    from torch.distributed._tools.mem_tracker import MemTracker

    model, optimizer, ids = prepared("autocast", GPT, "cpu")

    def step() -> None:
        loss_of(model, ids, autocast=True)[0].backward()

    with LiveBytes(model, optimizer, ids) as live:
        step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, ids)
    with tracker:
        step()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert live.peak == pytest.approx(snapshot["Total"], rel=0.01)


def test_live_bytes_follow_a_scripted_story():
    x = torch.zeros(1000)
    with LiveBytes(x) as live:
        assert live.now == live.peak == 4000
        y = x + 1
        assert live.now == 8000
        z = y.view(10, 100)  # no storage of its own
        assert live.now == 8000
        del y
        assert live.now == 8000
        del z
        assert live.now == 4000 and live.peak == 8000
        (x + 1) + (x + 1)
        assert live.now == 4000 and live.peak == 16000
        live.reset_peak()
        assert live.peak == 4000


def test_state_bytes_count_a_storage_once():
    model = Transformer(GPT)
    assert model.head.weight is model.embedding.weight
    assert state_bytes(model).weights == 4 * GPT.parameters == state_bytes(model).total
    steps = torch.optim.AdamW(model.parameters())
    loss_of(model, ids_for(GPT), autocast=False)[0].backward()
    steps.step()
    assert state_bytes(model, steps).counters == 4 * len(list(model.parameters()))


def test_a_view_keeps_its_whole_storage():
    model = nn.Linear(4, 4, bias=False)
    wide = torch.ones(2, 100)
    assert saved_bytes(lambda: model(wide[:, :4]), model).activations == 800
