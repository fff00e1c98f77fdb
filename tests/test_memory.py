"""The memory model: against published counts, against hand formulas, and against real modules, byte for byte."""

import dataclasses
import math

import pytest
import torch
from networks import GPT, LLAMA, Transformer
from torch import nn
from torch.nn import functional as F

from mixprec_lab.master_weights.adamw import BF16AdamW
from mixprec_lab.master_weights.optimizer import MasterWeightOptimizer
from mixprec_lab.memory import (
    GPUS,
    MODELS,
    NF4_BYTES,
    REGIMES,
    TERMS,
    Gpu,
    LiveBytes,
    ModelShape,
    end_activations,
    get_model,
    get_regime,
    layer_activations,
    logit_bytes,
    lora_parameters,
    regime_table,
    saved_bytes,
    state_bytes,
    training_memory,
)

BATCH, SEQUENCE = 2, 64
SHAPES = {"gpt": GPT, "llama": LLAMA}


def ids_for(shape: ModelShape, batch: int = BATCH, sequence: int = SEQUENCE, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (batch, sequence), generator=generator).to(device)


def loss_of(model: nn.Module, ids: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the logits, held as a training loop holds them."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(ids)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits


# Published numbers.


@pytest.mark.parametrize("name", MODELS)
def test_the_shape_gives_the_published_parameter_count(name):
    assert MODELS[name].parameters == MODELS[name].published


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_counts_are_those_of_a_real_module(shape):
    model = Transformer(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer_parameters == sum(p.numel() for p in model.layers[-1].parameters())
    matrices = [m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)]
    assert shape.matrix_parameters == sum(w.numel() for w in matrices)
    assert shape.head_parameters == model.head.weight.numel()


def test_matrices_of_llama_70b_are_what_its_fp8_checkpoint_holds_in_fp8():
    # Embedding, head and norms stay in BF16 there: 68,451,041,280 values in FP8, 2,102,665,216 in BF16.
    shape = MODELS["llama3_70b"]
    assert shape.matrix_parameters == 68_451_041_280
    assert shape.parameters - shape.matrix_parameters == 2_102_665_216


@pytest.mark.parametrize(
    ("regime", "total"),
    {
        "fp32": 16, "fp32_sgd": 12, "autocast": 16, "bf16_master": 16, "bf16_master_fp32_grad": 18,
        "bf16_master_accumulate": 20, "bf16_fp32_moments": 12, "bf16_pure": 8, "bf16_kahan": 10, "te_fp8_fp32": 16,
        "te_fp8_bf16": 16, "deepseek_v3": 15, "fp8_lm": 7, "fp8_lm_accumulate": 9, "nanotron_fp8": 10,
        "bf16_master_adam8bit": 10 + 1 / 32, "autocast_adam8bit": 10 + 1 / 32,
    }.items(),
)  # fmt: skip
def test_every_convention_has_the_number_its_source_names(regime, total):
    assert REGIMES[regime].bytes_per_parameter == total
    assert training_memory(10**9, regime).states == total * 10**9 + REGIMES[regime].copies * 10**9
    assert REGIMES[regime].source


def test_the_fp8_papers_count_without_some_buffers():
    # FP8-LM, equations 7 and 8: FP32 master, gradient and moments are 16 bytes, its own choice 6; no weights in either.
    assert REGIMES["bf16_master_fp32_grad"].without_weights == 16 and REGIMES["fp8_lm"].without_weights == 6
    deepseek = REGIMES["deepseek_v3"]
    assert deepseek.master + deepseek.accumulated + deepseek.moment_bytes == 12


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_sharding_gives_the_figures_of_the_zero_paper(stage, gigabytes):
    # arXiv:1910.02054, figure 1: 7.5 billion parameters, 16 bytes each, 64 GPUs.
    memory = training_memory(7_500_000_000, "bf16_master", zero_stage=stage, world_size=64 if stage else 1)
    assert round(memory.states / 1e9, 1) == gigabytes


def test_gpt2_xl_needs_24_gb_of_states_as_the_zero_paper_says():
    assert training_memory(1_500_000_000, "bf16_master").states == 24 * 10**9


# Korthikanti et al.


@pytest.mark.parametrize(("sequence", "layers", "heads", "hidden"), [(2048, 96, 96, 12288), (128, 2, 4, 64)])
def test_a_16_bit_gpt_layer_with_dropout_is_the_papers_formula_and_norm_statistics(sequence, layers, heads, hidden):
    shape = ModelShape("gpt", layers, hidden, heads, 0, 4 * hidden)
    saved = layer_activations(shape, sequence, "bf16", attention="full", dropout=True)
    assert sum(s.bytes_per_token for s in saved) == 34 * hidden + 5 * heads * sequence + 2 * 2 * 4
    flash = layer_activations(shape, sequence, "bf16", dropout=True)
    assert sum(s.bytes_per_token for s in flash) == 34 * hidden + 4 * heads + 2 * 2 * 4


def test_activations_are_what_mixed_precision_halves_and_autocast_not_quite():
    def layer(compute):
        return sum(s.bytes_per_token for s in layer_activations(GPT, SEQUENCE, compute))

    statistics_and_sums = 16 + 4 * GPT.heads
    assert layer("fp32") - statistics_and_sums == 2 * (layer("bf16") - statistics_and_sums) == 64 * GPT.hidden
    assert layer("autocast") - layer("bf16") == 2 * 2 * GPT.hidden  # the inputs of two norms stay FP32
    assert layer("bf16") - layer("fp8") == 5 * GPT.hidden  # seven widths of matrix inputs halve, two more are kept


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


class _ExpertLayer(nn.Module):
    """The layer of DeepSeek-V3 in miniature: latent attention expanded in full, top-k experts, one shared expert."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape, low, e = shape, shape.latent, shape.experts
        query, _, _, out = shape.widths

        def linear(a, b):
            return nn.Linear(a, b, bias=False)

        self.norms = nn.ModuleList(nn.RMSNorm(n) for n in (shape.hidden, shape.hidden, low.query_rank, low.latent_rank))
        self.query_down, self.query_up = linear(shape.hidden, low.query_rank), linear(low.query_rank, query)
        self.latent_down = linear(shape.hidden, low.latent_rank + low.rotary_size)
        self.latent_up = linear(low.latent_rank, shape.heads * (low.plain_size + low.value_size))
        self.out, self.router = linear(out, shape.hidden), linear(shape.hidden, e.routed)
        self.router.bias = nn.Parameter(torch.zeros(e.routed))
        self.experts = nn.ModuleList(
            nn.ModuleList([linear(shape.hidden, e.inner), linear(shape.hidden, e.inner), linear(e.inner, shape.hidden)])
            for _ in range(e.routed + e.shared)
        )


def test_the_layer_of_deepseek_v3_is_counted_right():
    small = {"latent": dataclasses.replace(MODELS["deepseek_v3"].latent, query_rank=24, latent_rank=16)}
    small["experts"] = dataclasses.replace(MODELS["deepseek_v3"].experts, routed=6, inner=32, active=2, dense_layers=1)
    shape = dataclasses.replace(MODELS["deepseek_v3"], layers=2, hidden=48, heads=4, inner=80, vocabulary=100, **small)
    layer = _ExpertLayer(shape)
    assert shape.layer_parameters == sum(p.numel() for p in layer.parameters())
    dense = shape.layer_parameters - sum(p.numel() for p in [*layer.experts.parameters(), *layer.router.parameters()])
    assert shape.parameters == shape.layer_parameters + dense + 3 * 48 * 80 + 2 * 100 * 48 + 48


def test_a_token_of_deepseek_v3_saves_its_nine_experts():
    shape = MODELS["deepseek_v3"]
    saved = {s.name: s.bytes_per_token for s in layer_activations(shape, 4096, "bf16")}
    assert saved["input of the last matrix, all visited experts"] == 2 * 9 * 2048
    assert saved["query, key, value"] == 2 * 128 * (192 + 192 + 128)
    dense = {s.name: s.bytes_per_token for s in layer_activations(shape, 4096, "bf16", layer=2)}
    assert dense["input of the last matrix"] == 2 * 18432 and "router scores" not in dense


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


# The result.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_formula_has_the_value_of_the_total_and_the_terms_add_up(name, regime):
    for options in ({}, {"zero_stage": 3, "world_size": 7}, {"adapters": 12_345, "base": "nf4"}):
        memory = training_memory(name, regime, sequence=1000, batch=3, **options)
        value = eval(memory.formula)
        assert memory.total - len(TERMS) < value <= memory.total
        assert memory.total == sum(getattr(memory, term) for term in TERMS)
        text = str(memory)
        assert f"{memory.total / 1e9:.3f}" in text and all(t in text for t in TERMS if getattr(memory, t))


def test_sharding_pads_and_divides_what_it_says():
    whole = training_memory(1001, "bf16_master_accumulate")
    parts = [training_memory(1001, "bf16_master_accumulate", zero_stage=s, world_size=4) for s in (1, 2, 3)]
    shard = 251
    assert [p.masters for p in parts] == [4 * shard] * 3 and [p.moments for p in parts] == [8 * shard] * 3
    assert [p.gradients for p in parts] == [6 * 1001, 6 * shard, 6 * shard]
    assert [p.weights for p in parts] == [2 * 1001, 2 * 1001, 2 * shard]
    assert whole.states == 20 * 1001


def test_full_sharding_gathers_two_layers():
    memory = training_memory(GPT, "autocast", zero_stage=3, world_size=2)
    assert memory.temporary == 2 * 2 * GPT.layer_parameters
    assert training_memory(GPT, "fp32", zero_stage=3, world_size=2).temporary == 4 * 2 * GPT.layer_parameters
    assert training_memory(1000, "fp32", zero_stage=3, world_size=2).temporary == 0


def test_fp8_copies_come_on_top():
    for name in ("te_fp8_fp32", "te_fp8_bf16"):
        fp8 = training_memory("llama3_8b", name)
        assert fp8.copies == 2 * MODELS["llama3_8b"].matrix_parameters
        assert fp8.states > training_memory("llama3_8b", "bf16_master").states
    assert training_memory("llama3_8b", "te_fp8_bf16", zero_stage=3, world_size=8).copies == 0


def test_sizes_given_one_by_one_are_a_gpt():
    sizes = {"layers": 3, "hidden": 64, "heads": 4, "vocabulary": 500}
    named = training_memory(dataclasses.replace(GPT, positions=0), "bf16_master", sequence=32, batch=2)
    single = training_memory(named.parameters, "bf16_master", **sizes, sequence=32, batch=2)
    assert [getattr(single, t) for t in TERMS] == [getattr(named, t) for t in TERMS]


def test_the_logits_are_the_widest_term_of_a_small_model_with_a_large_vocabulary():
    memory = training_memory("gpt2", "autocast", sequence=1024, batch=8)
    assert memory.logits == 14 * 50257 * 1024 * 8 > memory.activations
    assert {c: logit_bytes(c) for c in ("fp32", "autocast", "bf16")} == {"fp32": 16, "autocast": 14, "bf16": 8}


def test_a_model_fits_up_to_the_last_byte():
    memory = training_memory(5_000_000_000, "bf16_master")
    assert memory.fits("h100") and not memory.fits("l40s")
    assert memory.fits(Gpu("own", "own", memory.total, "")) and not memory.fits(Gpu("own", "own", memory.total - 1, ""))
    assert all(gpu.capacity % 10**9 == 0 and gpu.source for gpu in GPUS.values())


def test_nf4_constants_add_an_eighth_of_a_bit():
    assert round(8 * NF4_BYTES - 4, 3) == 0.127  # QLoRA, section 3
    memory = training_memory(10**9, "autocast", adapters=10**6, base="nf4")
    assert memory.weights == math.ceil(NF4_BYTES * 10**9) + 4 * 10**6 and memory.moments == 8 * 10**6
    assert memory.bytes_per_parameter == pytest.approx(0.53, abs=0.01)


def test_lora_of_the_paper_on_gpt3_175b_is_its_trainable_count():
    # Hu et al., table 4: 37.7 million trainable parameters are rank 8 on query and value; rank 4 is half of it.
    shape = ModelShape("gpt3", 96, 12288, 96, 50257, 4 * 12288, positions=2048)
    assert round(lora_parameters(shape, 8) / 1e6, 1) == 37.7 and lora_parameters(shape, 4) == 18_874_368
    assert round(shape.parameters / 1e9, 1) == 174.6


def test_the_table_of_regimes_names_every_regime():
    lines = regime_table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(REGIMES)
    assert [float(line.split()[-1]) for line in lines[2:]] == pytest.approx(
        [r.bytes_per_parameter for r in REGIMES.values()], rel=1e-3
    )


def test_the_ends_of_the_model_save_ids_norm_and_head_input():
    saved = {s.name: s.bytes_per_token for s in end_activations(GPT, "bf16")}
    assert saved == {"token ids, 8 bytes each": 8, "position ids, 8 bytes each": 8, "input of the last norm": 128,
                     "statistics of the last norm": 8, "input of the head": 128}  # fmt: skip


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"regime": "bf17"}, KeyError, "expected a regime, got 'bf17'; the names are fp32, .*nanotron_fp8"),
        ({"regime": None}, KeyError, "expected a regime, got None"),
        ({"parameters": "gpt5"}, KeyError, "expected a model, got 'gpt5'; the names are gpt2, .*deepseek_v3"),
        ({"parameters": 7e9}, TypeError, "expected a number of parameters, .*got 7000000000.0"),
        ({"parameters": True}, TypeError, "expected a number of parameters, .*got True"),
        ({"parameters": 0}, ValueError, "expected parameters to be an integer of 1 or more, got 0"),
        ({"parameters": -5}, ValueError, "expected parameters to be an integer of 1 or more, got -5"),
        ({"zero_stage": 4, "world_size": 8}, ValueError, "expected zero_stage to be 0 .*got 4"),
        ({"zero_stage": 1}, ValueError, "ZeRO stage 1 over one GPU shards nothing"),
        ({"world_size": 0}, ValueError, "expected world_size to be an integer of 1 or more, got 0"),
        ({"world_size": 1.5}, ValueError, "expected world_size to be an integer of 1 or more, got 1.5"),
        ({"sequence": 128}, ValueError, "expected sequence and batch together"),
        ({"sequence": 128, "batch": 1}, ValueError, "with layers, hidden and heads"),
        ({"layers": 2, "hidden": 64}, ValueError, "got no heads"),
        ({"vocabulary": 100}, ValueError, "got no layers, hidden, heads"),
        ({"layers": 2, "hidden": 64, "heads": 0}, ValueError, "expected heads to be an integer of 1 or more, got 0"),
        ({"layers": 2, "hidden": 64, "heads": 5}, ValueError, "expected hidden to be a multiple of heads"),
        ({"layers": 2, "hidden": -64, "heads": 1}, ValueError, "expected hidden to be an integer"),
        ({"parameters": "gpt2", "layers": 2}, ValueError, "brings its own shape"),
        ({"parameters": "gpt2", "sequence": 0, "batch": 1}, ValueError, "expected sequence to be an integer of 1"),
        ({"parameters": "gpt2", "sequence": 8, "batch": -1}, ValueError, "expected batch to be an integer of 1"),
        ({"adapters": -1}, ValueError, "expected adapters to be an integer of 0 or more, got -1"),
        ({"adapters": 5, "base": "int3"}, KeyError, "int3"),
        ({"attention": "sparse"}, ValueError, "expected attention flash or full"),
        ({"policy": "tpu"}, ValueError, "policy cuda or cpu"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, error, words):
    arguments = {"parameters": 1000, "regime": "fp32"} | arguments
    with pytest.raises(error, match=words):
        training_memory(arguments.pop("parameters"), arguments.pop("regime"), **arguments)


def test_bad_names_and_sizes_of_the_parts_are_refused():
    with pytest.raises(KeyError, match="expected a GPU, got 'a1000'; the names are t4"):
        training_memory(10, "fp32").fits("a1000")
    with pytest.raises(ValueError, match="expected heads to be a multiple of kv_heads, got 4 and 3"):
        dataclasses.replace(GPT, kv_heads=3)
    with pytest.raises(ValueError, match="expected layers to be an integer of 1 or more, got 2.5"):
        dataclasses.replace(GPT, layers=2.5)
    with pytest.raises(ValueError, match="expected a rank of 1 or more, got 0"):
        lora_parameters(GPT, 0)
    with pytest.raises(ValueError, match=r"expected targets among query, .*got \['gate'\]"):
        lora_parameters(GPT, 4, ["gate"])
    with pytest.raises(ValueError, match="got none"):
        lora_parameters(GPT, 4, [])
    with pytest.raises(ValueError, match="deepseek_v3 has latent attention or experts"):
        lora_parameters("deepseek_v3", 4)
    with pytest.raises(TypeError, match="expected a module, an optimizer or a tensor, got int"):
        LiveBytes(3)
    assert get_model(GPT) is GPT and get_regime(REGIMES["fp32"]) is REGIMES["fp32"]
