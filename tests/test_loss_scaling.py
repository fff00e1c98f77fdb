"""Loss scaling: exact histograms against ``classify``, rules against hand-worked stories and against torch's kernel."""

import json
import math
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.formats import FORMATS, FloatFormat, classify
from mixprec_lab.loss_scaling import (
    RULES,
    LossScaleAtMinimum,
    MagnitudeHistogram,
    ScalerRule,
    get_rule,
    record_gradients,
    simulate_scaler,
)
from mixprec_lab.models import convnet, digits

SIGNED = [name for name, fmt in FORMATS.items() if fmt.signed]
TINY = FloatFormat("tiny", 3, 1)


def random_floats(n: int, seed: int = 0) -> torch.Tensor:
    """Any float32: every bit pattern equally likely, so subnormals, infinities and NaNs occur."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int32).view(torch.float32)


def edge_cases(name: str) -> torch.Tensor:
    """Both FP32 neighbours of every edge of a format, at many binades, and the edge itself where FP32 holds it."""
    edges = torch.tensor([edge for edge, _ in FORMATS[name].nearest_edges], dtype=torch.float64)
    shifted = (edges[:, None] * torch.exp2(torch.arange(-30, 31, dtype=torch.float64))).flatten().float()
    near = [torch.nextafter(shifted, torch.full_like(shifted, to)) for to in (0.0, math.inf)]
    return torch.cat([shifted, -shifted, *near])


# --- histograms


@pytest.mark.parametrize("name", SIGNED)
def test_shares_are_those_of_classify_at_every_scale(name):
    x = torch.cat([random_floats(20_000), edge_cases(name), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    histogram = MagnitudeHistogram.of(x)
    for k in (-150, -31, -8, -1, 0, 1, 2, 10, 16, 24, 33, 149, 300):
        assert histogram.shares(name, k) == classify(x, name, 2.0**k), k


def test_subnormal_gradients_of_fp32_are_counted_in_their_own_binades():
    x = torch.tensor([2.0**-149, 3 * 2.0**-149, 2.0**-127, 2.0**-126 - 2.0**-149, 2.0**-126])
    histogram = MagnitudeHistogram.of(x)
    assert histogram.binades == {-149: 1, -148: 1, -127: 2, -126: 1}
    for k in range(90, 150):
        assert histogram.shares("fp16", k) == classify(x, "fp16", 2.0**k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_counted_as_the_values_they_hold(dtype):
    x = (torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)) * 1e-3).to(dtype).float().to(dtype)
    assert MagnitudeHistogram.of(x.transpose(0, 2)).shares("fp8_e4m3", 7) == classify(x, "fp8_e4m3", 128.0)


def test_special_values_are_counted_apart():
    h = MagnitudeHistogram.of(torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.5]), torch.zeros(2))
    assert (h.total, h.zero, h.infinite, h.nan, h.binades) == (8, 4, 2, 1, {0: 1})


def test_histograms_add_like_concatenated_tensors():
    a, b = random_floats(500, 1), random_floats(700, 2)
    assert MagnitudeHistogram.of(a) + MagnitudeHistogram.of(b) == MagnitudeHistogram.of(torch.cat([a, b]))
    assert MagnitudeHistogram.of(a, b) == MagnitudeHistogram.of(torch.cat([a, b]))
    assert MagnitudeHistogram.of(a) != MagnitudeHistogram.of(b)


def test_a_histogram_made_for_one_format_answers_for_it_only():
    x = random_floats(1000)
    histogram = MagnitudeHistogram.of(x, formats=["fp16", TINY])
    assert histogram.shares(TINY, 3) == classify(x, TINY, 8.0)
    assert histogram.shares("fp16", -3) == classify(x, "fp16", 0.125)
    with pytest.raises(ValueError, match="formats="):
        histogram.shares("bf16")
    with pytest.raises(ValueError, match="same formats"):
        histogram + MagnitudeHistogram.of(x)


@pytest.mark.parametrize(
    "x", [random_floats(3000), torch.zeros(4), torch.tensor([math.nan]), torch.tensor([2.0**-149])]
)
def test_json_gives_the_histogram_back(x):
    histogram = MagnitudeHistogram.of(x)
    state = json.loads(json.dumps(histogram.as_dict()))
    again = MagnitudeHistogram.from_dict(state)
    assert again.binades == histogram.binades and again.nan == histogram.nan
    assert again.shares("fp16", 10) == histogram.shares("fp16", 10)
    with pytest.raises(ValueError, match="add up"):
        MagnitudeHistogram.from_dict(state | {"total": 1 + state["total"]})


def test_histograms_refuse_what_they_cannot_count():
    with pytest.raises(TypeError, match="dense floating-point"):
        MagnitudeHistogram.of(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="got list"):
        MagnitudeHistogram.of([1.0])
    with pytest.raises(TypeError, match="sparse"):
        MagnitudeHistogram.of(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="float64 values"):
        MagnitudeHistogram.of(torch.tensor([1 + 2.0**-40], dtype=torch.float64))
    with pytest.raises(ValueError, match="E8M0"):
        MagnitudeHistogram.of(torch.ones(2), formats=["e8m0"])
    with pytest.raises(ValueError, match="at least one format"):
        MagnitudeHistogram.of(torch.ones(2), formats=[])
    with pytest.raises(ValueError, match="empty"):
        MagnitudeHistogram.of().shares("fp16")
    with pytest.raises(TypeError, match="integer log2_scale"):
        MagnitudeHistogram.of(torch.ones(2)).shares("fp16", 1.5)
    with pytest.raises(ValueError, match="E8M0"):
        MagnitudeHistogram.of(torch.ones(2)).shares("e8m0")


# --- recording


class HostReads(TorchDispatchMode):
    """Counts the operators that read a device value on the host."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::item")
        return func(*args, **(kwargs or {}))


def batch(n=32):
    data = digits()
    return data.train_images[:n], data.train_labels[:n]


def test_recorded_histograms_are_those_of_the_gradients():
    model, (images, labels) = convnet(), batch()
    record = record_gradients(model, images, labels, nn.functional.cross_entropy)
    outputs = []
    x = images
    for layer in model:
        x = layer(x)
        outputs.append(x)
    loss = nn.functional.cross_entropy(x, labels)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [*parameters.values(), *outputs])
    assert list(record.weights) == ["0", "2", "6", "8"] and len(record.activations) == 9
    for i, layer in enumerate(record.weights):
        assert record.weights[layer] == MagnitudeHistogram.of(*gradients[2 * i : 2 * i + 2])
    for i, g in enumerate(gradients[len(parameters) :]):
        assert record.activations[str(i)] == MagnitudeHistogram.of(g)
    assert record.total("weights").total == 13_170
    assert record.total() == MagnitudeHistogram.of(*gradients[len(parameters) :])


def test_scaling_the_loss_shifts_every_histogram_by_log2_of_the_scale():
    model, (images, labels) = convnet(), batch()
    plain, scaled = (
        record_gradients(model, images, labels, nn.functional.cross_entropy, loss_scale=s) for s in (1.0, 2.0**12)
    )
    for kind in ("weights", "activations"):
        a, b = plain.total(kind), scaled.total(kind)
        assert {e + 12: n for e, n in a.binades.items()} == b.binades and a.zero == b.zero
        assert a.shares("fp16", 12) == b.shares("fp16")


class Restless(nn.Module):
    """Dropout, batch statistics, an in-place activation, a shared layer, a tuple output, an unused parameter."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.act = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.shared, self.lstm = nn.Linear(6, 6), nn.LSTM(6, 4)
        self.unused, self.free = nn.Linear(2, 2), nn.Parameter(torch.ones(6))

    def forward(self, x, gain):
        x = self.act(self.shared(self.drop(self.norm(x)) * gain * self.free))
        return self.lstm(self.shared(x))[0]


def test_recording_leaves_no_trace():
    torch.manual_seed(0)
    model, x = Restless(), torch.randn(5, 6)
    model.free.grad = torch.full((6,), 7.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    norm, rng = model.norm.running_mean, torch.random.get_rng_state()
    loss_fn = lambda out, target: (out - target).square().mean()  # noqa: E731
    first = record_gradients(model, (x, 2.0), torch.zeros(5, 4), loss_fn)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and model.norm.running_mean is norm
    assert (model.free.grad == 7).all() and model.norm.weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())
    assert record_gradients(model, (x, 2.0), torch.zeros(5, 4), loss_fn) == first
    assert set(first.weights) == {"", "norm", "shared", "lstm"}
    assert first.activations["shared"].total == 2 * 5 * 6 and first.activations["lstm"].total == 5 * 4

    def failing(out, target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record_gradients(model, (x, 2.0), None, failing)
    assert torch.equal(rng, torch.random.get_rng_state()) and torch.equal(norm, state["norm.running_mean"])
    assert not any(m._forward_hooks for m in model.modules())


def test_recording_reads_nothing_tensor_by_tensor():
    model, (images, labels) = convnet(), batch(4)
    with HostReads() as mode:
        record_gradients(model, images, labels, nn.functional.cross_entropy)
    assert mode.reads == 0
    with HostReads() as mode:
        max(p.abs().max().item() for p in model.parameters())
    assert mode.reads == 8


def test_under_autocast_flushed_gradients_are_seen_as_zeros():
    model, (images, labels) = convnet(), batch()
    loss_fn = lambda out, y: nn.functional.cross_entropy(out, y) * 2.0**-14  # noqa: E731
    full = record_gradients(model, images, labels, loss_fn)
    with torch.autocast("cpu", torch.float16):
        half = record_gradients(model, images, labels, loss_fn)
        scaled = record_gradients(model, images, labels, loss_fn, loss_scale=2.0**14)
    first = half.activations["0"]  # CPUs with FP16 arithmetic and without differ in a few elements at the edge
    assert first.zero > 0.999 * first.total > full.activations["0"].zero
    assert scaled.activations["0"].zero < half.activations["0"].zero
    assert min(scaled.activations["0"].binades) >= -24 > min(full.activations["0"].binades)


def test_recording_refuses_what_has_no_gradient():
    model, (images, labels) = convnet(), batch(4)
    with pytest.raises(ValueError, match="scalar loss"):
        record_gradients(model, images, labels, lambda out, y: out)
    with pytest.raises(ValueError, match="scalar loss"):
        record_gradients(model, images, labels, lambda out, y: out.detach().sum())
    with pytest.raises(ValueError, match="scalar loss that depends on the model's parameters, got float"):
        record_gradients(model, images, labels, lambda out, y: 1.0)
    with pytest.raises(ValueError, match="requires a gradient"):
        record_gradients(convnet().requires_grad_(False), images, labels, nn.functional.cross_entropy)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="loss_scale"):
            record_gradients(model, images, labels, nn.functional.cross_entropy, loss_scale=scale)
    with pytest.raises(KeyError, match="weights, activations"):
        record_gradients(model, images, labels, nn.functional.cross_entropy).total("layers")


# --- rules


def scales(rule, overflows) -> list[float]:
    """The scale after each step of a story of overflows (1) and clean steps (0)."""
    state, seen = rule.start(), []
    for overflow in overflows:
        state = rule.update(state, bool(overflow))
        seen.append(state.scale)
    return seen


@pytest.mark.parametrize(("growth", "backoff"), [(2.0, 0.5), (1.7, 0.3)])
def test_the_torch_rule_is_torchs_kernel(growth, backoff):
    rule = ScalerRule("t", init_scale=3.0e5, growth_factor=growth, backoff_factor=backoff, window=4)
    scale, tracker = torch.tensor(3.0e5), torch.tensor(0, dtype=torch.int32)
    state, draw = rule.start(), random.Random(0)
    for step in range(6000):
        overflow = draw.random() < (0.02 if step < 3000 else 0.4)  # up to FP32's largest, then down to 0
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(overflow)), growth, backoff, 4)
        state = rule.update(state, overflow)
        assert state.scale == scale.item() and state.clean % 4 == tracker.item(), step
    assert scale.item() == 0.0


def test_torch_has_no_floor_and_refuses_to_grow_to_infinity():
    assert scales(RULES["torch"], [1] * 18)[-3:] == [1.0, 0.5, 0.25]
    assert scales(RULES["torch"], [1] * 166)[-2:] == [2.0**-149, 0.0]
    top = ScalerRule("top", init_scale=2.0**127, window=1)
    assert scales(top, [0, 0, 1, 0]) == [2.0**127, 2.0**127, 2.0**126, 2.0**127]


def test_deepspeeds_story():
    rule = ScalerRule("d", init_scale=8.0, window=3, grace=1, hysteresis=2, min_scale=1.0, raises_at_minimum=True)
    #        grows after 1 + 3 clean steps, then every 3; the first overflow costs patience, the second the scale
    assert scales(rule, [0, 0, 0, 0, 0, 0, 0]) == [8, 8, 8, 16, 16, 16, 32]
    assert scales(rule, [1, 0, 0, 1, 1]) == [8, 8, 8, 4, 2]  # clean steps do not restore the patience ...
    assert scales(rule, [1, 0, 0, 0, 0, 1, 1]) == [8, 8, 8, 8, 16, 16, 8]  # ... a growth does
    with pytest.raises(LossScaleAtMinimum, match="Current loss scale already at minimum"):
        scales(rule, [1, 1, 1, 1, 1])


def test_consecutive_hysteresis_is_refilled_by_a_clean_step():
    rule = ScalerRule("c", init_scale=8.0, window=100, hysteresis=2, refill="clean_step")
    assert scales(rule, [1, 0, 1, 0, 1, 1]) == [8, 8, 8, 8, 8, 4]


def test_megatrons_story():
    rule = ScalerRule("m", init_scale=8.0, window=3, hysteresis=2, min_scale=1.0)
    assert scales(rule, [0, 0, 0, 0, 0, 0]) == [8, 8, 16, 16, 16, 32]
    assert scales(rule, [1, 0, 1, 1, 1, 1, 1]) == [8, 8, 4, 2, 1, 1, 1]  # "in a row" in its docstring, not in its code


def test_presets_hold_the_documented_numbers():
    numbers = {n: (r.init_scale, r.window, r.hysteresis, r.min_scale) for n, r in RULES.items()}
    assert numbers == {
        "torch": (2.0**16, 2000, 1, 0.0),
        "deepspeed": (2.0**16, 1000, 2, 1.0),
        "megatron": (2.0**32, 1000, 2, 1.0),
    }
    assert get_rule("torch") is RULES["torch"] and get_rule(RULES["megatron"]) is RULES["megatron"]
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_scale() == RULES["torch"].init_scale and scaler.get_growth_interval() == RULES["torch"].window


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_scale", 0.0), ("init_scale", -1.0), ("init_scale", math.inf), ("init_scale", math.nan),
        ("growth_factor", 1.0), ("growth_factor", math.nan), ("backoff_factor", 1.0), ("backoff_factor", 0.0),
        ("window", 0), ("window", 2.5), ("grace", -1), ("hysteresis", 0), ("hysteresis", True), ("refill", "never"),
        ("min_scale", -1.0), ("min_scale", 2.0**17), ("max_scale", 2.0**15), ("max_scale", math.inf),
    ],
)  # fmt: skip
def test_a_rule_that_makes_no_sense_is_refused(field, value):
    name = "init_scale" if (field, value) in (("min_scale", 2.0**17), ("max_scale", 2.0**15)) else field
    with pytest.raises(ValueError, match=f"expected {name} to be"):
        ScalerRule("bad", **{field: value})
    with pytest.raises(KeyError, match="torch, deepspeed, megatron"):
        get_rule("apex")


# --- the simulator


def test_overflow_begins_where_the_format_begins_to_round_to_infinity():
    rule = ScalerRule("one", init_scale=1.0)
    stream = [65519.99, 65520.0, math.inf, math.nan, 0.0]
    assert simulate_scaler(rule, stream).overflow == [False, True, True, True, False]
    assert simulate_scaler(rule, [464.0, 464.1], "fp8_e4m3").overflow == [False, True]


@pytest.mark.parametrize("name", RULES)
def test_a_simulation_is_the_rule_on_real_fp16_gradients(name):
    draw = random.Random(1)
    stream = [2.0 ** draw.uniform(-8, 3) * (draw.random() > 0.01 or 1e4) for _ in range(3000)]
    run = simulate_scaler(name, stream, batch_size=8)
    rule, state = RULES[name], RULES[name].start()
    for i, amax in enumerate(stream):
        overflow = not (torch.tensor(amax, dtype=torch.float64) * state.scale).half().isfinite().item()
        assert (run.scale_before[i], run.overflow[i]) == (state.scale, overflow)
        state = rule.update(state, overflow)
        assert (run.scale_after[i], run.hysteresis_left[i]) == (state.scale, state.hysteresis_left)
    assert run.skipped == sum(run.overflow) > 3 and run.lost_samples == 8 * run.skipped
    assert run.final_scale == run.scale_after[-1] and run.ended_at is None


def test_equilibrium_costs_one_step_a_window():
    run = simulate_scaler(ScalerRule("t", window=20), [1.0] * 21_000)
    assert run.skipped == 1 + (21_000 - 1) // 21 and set(run.scale_after) == {2.0**15, 2.0**16}


def test_deepspeed_ends_the_run_at_its_floor_and_torch_goes_on():
    stream = [math.nan] * 40
    deepspeed, torch_ = simulate_scaler("deepspeed", stream), simulate_scaler("torch", stream)
    assert deepspeed.ended_at == 17 and len(deepspeed.scale_after) == 18 and deepspeed.final_scale == 1.0
    assert torch_.ended_at is None and torch_.skipped == 40 and torch_.final_scale == 2.0**-24
    assert simulate_scaler("torch", []).final_scale == 2.0**16


def test_the_simulator_refuses_bad_input():
    with pytest.raises(ValueError, match="magnitudes, got -1.0 at step 1"):
        simulate_scaler("torch", [1.0, -1.0])
    for size in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            simulate_scaler("torch", [1.0], batch_size=size)
    with pytest.raises(KeyError, match="torch, deepspeed, megatron"):
        simulate_scaler("apex", [1.0])
    with pytest.raises(ValueError, match="E8M0"):
        simulate_scaler("torch", [1.0], "e8m0")
