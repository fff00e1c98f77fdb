"""The scalers one trains with: equal to torch's step by step, and told apart from it where they are meant to be."""

import copy
import itertools
import json
import math
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.loss_scaling import (
    RULES,
    DynamicLossScaler,
    LossScaleAtMinimum,
    ScalerRule,
    StaticLossScaler,
    choose_scale,
    underflow_report,
)
from mixprec_lab.loss_scaling.histograms import MagnitudeHistogram
from mixprec_lab.loss_scaling.unscaling import group_gradients

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


def parameters(*shapes, value=1.0, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full(shape, value, dtype=dtype)) for shape in shapes]


def give(ps, *gradients) -> None:
    """Set scaled gradients as a backward pass would have left them."""
    for p, g in zip(ps, gradients, strict=True):
        p.grad = None if g is None else torch.full_like(p, g)


# --- equal to torch.amp.GradScaler


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_torchs_grad_scaler_step_by_step(kind):
    """Two optimizers, one scaler, 600 steps, infinities and NaNs in either half of the parameters, clipping in one."""
    ours = parameters((3,), (2, 2), (4,), (1,))
    theirs = copy.deepcopy(ours)
    pairs = [[OPTIMIZERS[kind](ps[:2]), OPTIMIZERS[kind](ps[2:])] for ps in (ours, theirs)]
    rule = ScalerRule("t", init_scale=2.0**10, window=5)
    scaler, reference = DynamicLossScaler.from_rule(rule), torch.amp.GradScaler("cpu", 2.0**10, growth_interval=5)
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    taken = [[], []]
    for step in range(600):
        slopes = [torch.randn(p.shape, generator=generator) for p in ours]
        if draw.random() < 0.15:
            slopes[draw.randrange(4)].view(-1)[0] = draw.choice([math.inf, -math.inf, math.nan])
        for ps, scale in ((ours, scaler.scale_loss), (theirs, reference.scale)):
            loss = sum((p * c).sum() for p, c in zip(ps, slopes, strict=True))
            scale(loss).backward()
        if step % 3 == 0:
            scaler.unscale_gradients(pairs[0][0])
            reference.unscale_(pairs[1][0])
            for ps in (ours, theirs):
                nn.utils.clip_grad_norm_(ps[:2], 0.5)
        for i, (mine, other) in enumerate(zip(*pairs, strict=True)):
            taken[i].append(scaler.step(mine, update=False))
            reference.step(other)
        scaler.update_scale()
        reference.update()
        assert scaler.scale == reference.get_scale() and scaler.growth_tracker == reference._get_growth_tracker()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)), step
        for optimizer in itertools.chain(*pairs):
            optimizer.zero_grad()
    assert taken[0] != taken[1] and 600 > sum(taken[0]) > 500
    assert scaler.steps == 600 and scaler.skipped == sum(not (a and b) for a, b in zip(*taken, strict=True))


def test_sparse_gradients_are_unscaled_as_torch_does():
    tables = [nn.Embedding(5, 3, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    scaler, reference = DynamicLossScaler(), torch.amp.GradScaler("cpu")
    index = torch.tensor([1, 1, 4])
    for table, scale in zip(tables, (scaler.scale_loss, reference.scale), strict=True):
        scale(table(index).square().sum()).backward()
    scaler.unscale_gradients(tables[0].parameters())
    reference.unscale_(torch.optim.SGD(tables[1].parameters(), lr=1.0))
    mine, other = (t.weight.grad for t in tables)
    assert mine.is_sparse and torch.equal(mine.to_dense(), other.to_dense())
    assert torch.allclose(mine.to_dense()[1], 4 * tables[0].weight[1].detach())


def test_bf16_and_float64_gradients_are_unscaled_exactly_by_a_power_of_two():
    ps = parameters((3,), dtype=torch.bfloat16) + parameters((2,), dtype=torch.float64) + parameters((4,))
    give(ps, 65536.0 * 3, 65536.0 / 3, 65536.0 * 5)
    assert DynamicLossScaler().unscale_gradients(ps).item() == 0
    assert ps[0].grad.tolist() == [3.0] * 3 and ps[1].grad.tolist() == [1 / 3] * 2 and ps[2].grad.tolist() == [5.0] * 4


def test_torch_has_no_floor_and_at_scale_zero_it_steps_on_nan():
    """The reason for a floor, and for refusing a scale whose inverse is infinite."""
    (p,) = parameters((1,))
    optimizer = torch.optim.SGD([p], lr=1.0)
    reference = torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    for _ in range(4):
        reference.scale(p.sum() * math.inf).backward()
        reference.step(optimizer)
        reference.update()
        optimizer.zero_grad()
        seen.append(reference.get_scale())
    assert seen == [2.0, 1.0, 0.5, 0.25] and p.item() == 1.0
    reference.update(new_scale=0.0)
    reference.scale(p.sum()).backward()
    reference.step(optimizer)
    assert p.isnan().all()

    ours = parameters((1,))
    scaler = DynamicLossScaler.from_rule(ScalerRule("t", init_scale=2.0**-149))
    give(ours, 1.0)
    with pytest.raises(RuntimeError, match="no finite inverse"):
        scaler.step(torch.optim.SGD(ours, lr=1.0))
    scaler.update_scale(True)
    assert scaler.scale == 0.0
    with pytest.raises(RuntimeError, match="fallen to 0 after 1 skipped"):
        scaler.unscale_gradients(ours)
    assert ours[0].item() == 1.0 and ours[0].grad.item() == 1.0


# --- its own rules


@pytest.mark.parametrize("name", RULES)
def test_a_preset_moves_as_its_rule_says(name):
    ps = parameters((2,))
    optimizer = torch.optim.SGD(ps, lr=0.0)
    scaler, rule = DynamicLossScaler.from_rule(name), RULES[name]
    state, draw = rule.start(), random.Random(2)
    for _ in range(2500):
        overflow = draw.random() < 0.002
        give(ps, math.nan if overflow else 1.0)
        assert scaler.step(optimizer) is not overflow
        state = rule.update(state, overflow)
        assert (scaler.scale, scaler.hysteresis_left) == (state.scale, state.hysteresis_left)
    assert scaler.skipped > 0 and scaler.scale != rule.init_scale


def test_the_scale_stays_between_floor_and_ceiling():
    ps = parameters((1,))
    optimizer = torch.optim.SGD(ps, lr=0.0)
    scaler = DynamicLossScaler(4.0, scale_window=1, max_scale=16.0)
    seen = []
    for gradient in (1.0, 1.0, 1.0, math.inf, math.inf, math.inf, math.inf, math.inf, math.nan, 1.0):
        give(ps, gradient)
        scaler.step(optimizer)
        seen.append((scaler.scale, scaler.skipped_in_a_row))
    assert seen == [(8, 0), (16, 0), (16, 0), (8, 1), (4, 2), (2, 3), (1, 4), (1, 5), (1, 6), (2, 0)]
    assert (scaler.steps, scaler.skipped) == (10, 6)


def test_deepspeeds_floor_ends_the_run_with_its_message():
    ps = parameters((1,))
    scaler = DynamicLossScaler.from_rule(ScalerRule("d", 2.0, min_scale=1.0, raises_at_minimum=True))
    give(ps, math.inf)
    assert not scaler.step(torch.optim.SGD(ps, lr=1.0)) and scaler.scale == 1.0
    give(ps, math.inf)
    with pytest.raises(LossScaleAtMinimum, match="Current loss scale already at minimum"):
        scaler.step(torch.optim.SGD(ps, lr=1.0))
    assert ps[0].item() == 1.0 and scaler.skipped == 2


def test_a_static_scale_never_moves_and_still_skips():
    ps = parameters((1,))
    optimizer, scaler = torch.optim.SGD(ps, lr=1.0), StaticLossScaler(8.0)
    for gradient, taken, value in ((8.0, True, 0.0), (math.nan, False, 0.0), (-16.0, True, 2.0)):
        give(ps, gradient)
        assert scaler.step(optimizer) is taken and ps[0].item() == value
    assert (scaler.scale, scaler.steps, scaler.skipped, scaler.skipped_in_a_row) == (8.0, 3, 1, 0)


# --- unscale, clip, step, update


def test_clipping_belongs_between_unscale_and_step():
    ps = parameters((4,))
    scaler = DynamicLossScaler()
    scaler.scale_loss((ps[0] * 3).sum()).backward()
    scaler.unscale_gradients(ps)
    norm = nn.utils.clip_grad_norm_(ps, 1.0)
    assert norm.item() == 6.0
    scaler.step(torch.optim.SGD(ps, lr=1.0))
    assert torch.allclose(ps[0].detach(), torch.full((4,), 0.5))


def test_clipping_before_unscaling_clips_to_the_norm_over_the_scale():
    """True of torch's scaler as of any: what is clipped to norm 1 is 65,536 gradients of norm 1/65,536."""
    ps = parameters((4,))
    reference, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(ps, lr=1.0)
    reference.scale((ps[0] * 3).sum()).backward()
    nn.utils.clip_grad_norm_(ps, 1.0)
    reference.unscale_(optimizer)
    assert ps[0].grad.norm().item() == pytest.approx(2.0**-16, rel=1e-5)


def test_a_generator_of_parameters_is_unscaled_whole():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    scaler = DynamicLossScaler(init_scale=2.0**12)
    scaler.scale_loss(model(torch.ones(1, 3)).sum()).backward()
    true = [g.clone() / 2.0**12 for g in (p.grad for p in model.parameters())]
    generator = model.parameters()
    assert scaler.unscale_gradients(generator).item() == 0
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), true, strict=True))
    with pytest.raises(ValueError, match="used before"):
        scaler.unscale_gradients(generator)


def test_step_unscales_what_is_left_and_heeds_further_parameters():
    a, b = parameters((1,)), parameters((1,))
    give(a, 2.0**16)
    give(b, 2.0**16)
    scaler, optimizer = DynamicLossScaler(), torch.optim.SGD(a + b, lr=1.0)
    scaler.unscale_gradients(a)
    assert scaler.step(optimizer) and a[0].item() == b[0].item() == 0.0
    give(a, 2.0**16)
    give(b, math.inf)
    assert not scaler.step(torch.optim.SGD(a, lr=1.0), b) and a[0].item() == 0.0 and scaler.skipped == 1


def test_one_optimizer_may_skip_while_another_steps_and_the_scale_backs_off_once():
    a, b = parameters((1,)), parameters((1,))
    scaler = DynamicLossScaler()
    give(a, math.nan)
    give(b, 2.0**16)
    assert not scaler.step(torch.optim.SGD(a, lr=1.0), update=False)
    assert scaler.step(torch.optim.SGD(b, lr=1.0), update=False)
    scaler.update_scale()
    assert (a[0].item(), b[0].item(), scaler.scale, scaler.skipped, scaler.steps) == (1.0, 0.0, 2.0**15, 1, 1)


def test_your_own_loop_may_tell_the_scaler_what_it_found():
    ps = parameters((1,))
    scaler = DynamicLossScaler()
    give(ps, math.inf)
    scaler.update_scale(scaler.unscale_gradients(ps))
    assert scaler.scale == 2.0**15
    scaler.update_scale(found_inf=False)
    assert scaler.growth_tracker == 1 and scaler.skipped == 1


def test_calls_out_of_order_are_named():
    ps = parameters((1,))
    optimizer, scaler = torch.optim.SGD(ps, lr=1.0), DynamicLossScaler()
    with pytest.raises(RuntimeError, match="no gradient was checked"):
        scaler.update_scale()
    give(ps, 2.0**16)
    scaler.unscale_gradients(optimizer)
    with pytest.raises(RuntimeError, match="unscaled already"):
        scaler.unscale_gradients(ps)
    assert ps[0].grad.item() == 1.0
    with pytest.raises(RuntimeError, match=r"save after update_scale\(\)"):
        scaler.state_dict()
    scaler.step(optimizer, update=False)
    with pytest.raises(RuntimeError, match="stepped already"):
        scaler.step(optimizer)
    assert ps[0].item() == 0.0
    scaler.update_scale()
    give(ps, 2.0**16)
    assert scaler.step(optimizer) and ps[0].item() == -1.0


class HostReads(TorchDispatchMode):
    """Counts the operators that wait for a device value."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 50])
def test_a_step_reads_one_value_from_the_device(count):
    ps = parameters(*[(2,)] * count)
    optimizer, scaler = torch.optim.SGD(ps, lr=1.0), DynamicLossScaler()
    give(ps, *[1.0] * count)
    with HostReads() as mode:
        scaler.scale_loss(torch.ones(()))
        scaler.unscale_gradients(optimizer)
        assert mode.reads == 0
        scaler.step(optimizer)
    assert mode.reads == 1


# --- what it refuses


def test_fp16_gradients_are_refused_and_left_alone():
    model = nn.Linear(3, 2).half()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    scaler, optimizer = DynamicLossScaler(), torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    assert all((p.grad == 1).all() for p in model.parameters()) and scaler.steps == 0
    reference = torch.amp.GradScaler("cpu")
    reference.scale(torch.ones(()))
    with pytest.raises(ValueError, match=r"^Attempting to unscale FP16 gradients\.$"):
        reference.unscale_(optimizer)


def test_an_fp16_loss_is_scaled_in_fp32_but_its_gradient_is_still_fp16():
    for loss in (torch.tensor(1.5, dtype=torch.float16), torch.tensor([1.5], dtype=torch.float16)):
        assert DynamicLossScaler().scale_loss(loss).item() == 98304.0
    reference = torch.amp.GradScaler("cpu")
    assert reference.scale(torch.tensor(1.5, dtype=torch.float16)).item() == 98304.0
    assert reference.scale(torch.tensor([1.5], dtype=torch.float16)).item() == math.inf
    for scale, gradient in ((2.0**15, 2.0**15), (2.0**16, math.inf)):
        loss = torch.tensor(1.5, dtype=torch.float16, requires_grad=True)
        StaticLossScaler(scale).scale_loss(loss).backward()
        assert loss.grad.item() == gradient


def test_losses_of_any_shape_and_nesting_are_scaled():
    scaler = StaticLossScaler(4.0)
    a, b = torch.ones(2), torch.full((1, 3), 2.0, dtype=torch.float64)
    scaled = scaler.scale_loss([a, (b, [a])])
    assert isinstance(scaled[1], tuple) and scaled[1][0].dtype == torch.float64
    assert scaled[0].tolist() == [4.0, 4.0] and scaled[1][0].tolist() == [[8.0] * 3] and scaled[1][1][0].sum() == 8
    assert [x.item() for x in scaler.scale_loss(iter([a.sum()]))] == [8.0]
    for bad in (torch.tensor(1), torch.tensor(True), 1.0, "loss", None, [1.0], {"loss": a}):
        with pytest.raises(TypeError, match="expected a"):
            scaler.scale_loss(bad)


def test_targets_without_parameters_or_gradients_are_refused():
    scaler, (p,) = DynamicLossScaler(), parameters((2,))
    with pytest.raises(RuntimeError, match="no inf check was recorded"):
        scaler.step(torch.optim.SGD([p], lr=1.0))
    with pytest.raises(RuntimeError, match="none of the 1 parameters has a gradient"):
        scaler.unscale_gradients([p])
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="expected parameters, got none"):
            scaler.unscale_gradients(empty)
    for bad in (p, nn.Linear(1, 1), "weights", {"p": p}, 3, [1.0], nn.Linear(1, 1).named_parameters()):
        with pytest.raises(TypeError, match="expected"):
            scaler.unscale_gradients(bad)
    with pytest.raises(TypeError, match="expected an optimizer"):
        scaler.step([p])
    assert scaler.steps == 0


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan, "1024", None])
def test_a_scale_that_makes_no_sense_is_refused(scale):
    with pytest.raises(ValueError, match="expected a scale that is positive"):
        StaticLossScaler(scale)
    with pytest.raises((ValueError, TypeError)):
        DynamicLossScaler(scale)


@pytest.mark.parametrize(
    "arguments",
    [{"scale_factor": 1.0}, {"scale_factor": math.inf}, {"scale_factor": -2.0}, {"scale_window": 0}, {"hysteresis": 0},
     {"min_scale": 2.0**20}, {"max_scale": 1.0}, {"init_scale": 2.0**40}],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        DynamicLossScaler(**arguments)


# --- checkpoints


def run(scaler, optimizer, p, stream):
    for gradient in stream:
        give([p], gradient)
        scaler.step(optimizer)


@pytest.mark.parametrize("name", [*RULES, "static"])
def test_a_resumed_scaler_goes_on_as_if_never_stopped(name):
    make = (lambda: StaticLossScaler(2.0)) if name == "static" else (lambda: DynamicLossScaler.from_rule(name))
    (p,) = parameters((1,))
    optimizer, draw = torch.optim.SGD([p], lr=0.0), random.Random(3)
    stream = [draw.choice([1.0, math.inf]) for _ in range(8)] + [1.0] * 1500 + [math.nan, 1.0, math.nan]
    whole, first, second = make(), make(), make()
    run(whole, optimizer, p, stream)
    run(first, optimizer, p, stream[:700])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run(second, optimizer, p, stream[700:])
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "change",
    [{"scale": math.nan}, {"scale": 0.25}, {"scale": "1"}, {"clean": -1}, {"clean": 1.5}, {"hysteresis_left": 2},
     {"steps": None}, {"kind": "StaticLossScaler"}, {"extra": 1}, {"rule": {"name": "x", "speed": 3}},
     {"rule": {"name": "x", "window": 0}}],
)  # fmt: skip
def test_a_wrong_state_is_refused_whole(change):
    scaler = DynamicLossScaler()
    scaler.update_scale(True)
    before = scaler.state_dict()
    with pytest.raises(ValueError, match="expected"):
        scaler.load_state_dict(before | {"skipped": 9} | change)
    assert scaler.state_dict() == before
    for bad in ({}, None, torch.amp.GradScaler("cpu").state_dict(), StaticLossScaler().state_dict()):
        with pytest.raises(ValueError, match="expected a state"):
            scaler.load_state_dict(bad)


# --- devices


def test_gradients_are_grouped_by_device_and_dtype():
    ps = parameters((1,), (2,)) + parameters((3,), dtype=torch.bfloat16)
    ps.append(nn.Parameter(torch.empty(2, device="meta")))
    for p in ps:
        p.grad = torch.empty_like(p)
    ps += parameters((7,))
    covered, groups = group_gradients(ps)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    sizes = {(device, dtype): [g.numel() for g in gs] for (device, dtype), gs in groups.items()}
    assert sizes == {(cpu, torch.float32): [1, 2], (cpu, torch.bfloat16): [3], (meta, torch.float32): [2]}
    assert len(covered) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parameters_on_two_devices_share_one_verdict():
    a, b = parameters((2,)), [nn.Parameter(torch.ones(2, device="cuda"))]
    optimizer, scaler = torch.optim.SGD(a + b, lr=1.0), DynamicLossScaler()
    give(a + b, 2.0**16, math.inf)
    assert not scaler.step(optimizer) and a[0].tolist() == [1.0, 1.0]
    give(a + b, 2.0**15, 2.0**15)
    assert scaler.step(optimizer) and a[0].tolist() == b[0].tolist() == [0.0, 0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_only_the_step_waits():
    ps = [nn.Parameter(torch.ones(3, device="cuda")) for _ in range(20)]
    optimizer, scaler = torch.optim.SGD(ps, lr=1.0), DynamicLossScaler()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.scale_loss(sum(p.sum() for p in ps)).backward()
        scaler.unscale_gradients(optimizer)
        with pytest.raises(RuntimeError, match="synchroniz"):
            scaler.step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- one tensor


def test_a_report_tells_lost_from_short_of_digits():
    x = torch.tensor([0.0, 2.0**-25, 2.0**-24, 2.0**-15, 1.0, 70000.0, math.inf, math.nan])
    report = underflow_report(x)
    s = report.shares
    assert (s.zero, s.flushed, s.subnormal, s.normal, s.overflowed, s.infinite, s.nan) == (
        0.125, 0.125, 0.25, 0.125, 0.125, 0.125, 0.125,
    )  # fmt: skip
    assert report.elements == 8 and report.lost == 1 / 7
    assert "flushed to zero  12.50%" in str(report) and "was NaN" in str(report)
    assert "was NaN" not in str(underflow_report(torch.ones(3)))
    assert underflow_report(torch.zeros(3)).lost == 0.0


def test_a_histogram_gives_the_same_report_for_powers_of_two():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 1e-7
    for scale in (0.125, 1.0, 2.0**13):
        assert underflow_report(MagnitudeHistogram.of(x), "fp16", scale) == underflow_report(x, "fp16", scale)
    for scale in (3.0, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="power of two"):
            underflow_report(MagnitudeHistogram.of(x), "fp16", scale)
    with pytest.raises(TypeError, match="floating-point"):
        underflow_report([1.0])
    with pytest.raises(ValueError, match="positive, finite scale"):
        underflow_report(x, "fp16", -1.0)


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp8_e4m3", "fp4_e2m1"])
@pytest.mark.parametrize("headroom", [1.0, 2.0, 3.0])
def test_the_chosen_scale_is_the_largest_that_fits(fmt, headroom):
    from mixprec_lab.formats import get_format

    largest = get_format(fmt).largest
    for amax in (1.0, 0.75, 3.5, 2.0**-20, largest, largest * 1.5, 1e-30, 7.0):
        scale = choose_scale(torch.tensor([amax / 3, -amax], dtype=torch.float64), fmt, headroom)
        assert math.frexp(scale)[0] == 0.5 and amax * scale * headroom <= largest
        assert scale == 2.0**126 or 2 * amax * scale * headroom > largest


def test_the_scale_is_chosen_over_all_tensors_and_stays_in_fp32():
    ps = [torch.tensor([0.5]), torch.zeros(0), torch.tensor([-3.0], dtype=torch.float16), torch.zeros(2, 2)]
    assert choose_scale(ps) == choose_scale(iter(ps)) == choose_scale(torch.tensor(3.0)) == 8192.0
    assert choose_scale(torch.tensor(2.0**-149)) == 2.0**126
    assert choose_scale(torch.tensor(1e300, dtype=torch.float64)) == 2.0**-126


def test_no_scale_is_chosen_where_none_can_be():
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="no scale makes it finite"):
            choose_scale(torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match="all gradients are zero"):
        choose_scale(torch.zeros(3))
    with pytest.raises(ValueError, match="got none"):
        choose_scale([])
    with pytest.raises(TypeError, match="got torch.int64"):
        choose_scale(torch.tensor([1]))
    with pytest.raises(TypeError, match="got float"):
        choose_scale([1.0])
    for headroom in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="headroom"):
            choose_scale(torch.ones(1), headroom=headroom)
