"""The memory model: against published counts and formulas, its terms and sums, and bad input."""

import dataclasses
import math

import pytest
import torch
from networks import GPT, SEQUENCE, SHAPES, Transformer
from torch import nn

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
    training_memory,
)

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
