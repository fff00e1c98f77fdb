"""The exercise checks: three verdicts, and no traceback from the reader's code."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from mixprec_lab import checks
from mixprec_lab.formats import decode, get_format
from mixprec_lab.memory import GPUS, training_memory
from mixprec_lab.rounding import accumulate

ALL = [getattr(checks, name) for name in checks.__all__]


def verdict(check, function, capsys) -> str:
    check(function)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("check", ALL, ids=lambda f: f.__name__)
def test_a_stub_is_not_done_and_a_crash_is_shown(check, capsys):
    assert verdict(check, lambda *a: None, capsys) == "Not done yet."
    assert verdict(check, lambda *a: ..., capsys) == "Not done yet."

    def unfinished(*_):
        raise NotImplementedError

    assert verdict(check, unfinished, capsys) == "Not done yet."
    assert "ZeroDivisionError" in verdict(check, lambda *a: 1 / 0, capsys)
    assert verdict(check, lambda *a: "nonsense", capsys).startswith("Not yet: expected ")
    assert verdict(check, lambda *a: torch.ones(2, 2), capsys).startswith("Not yet: expected ")


def test_two_tensors_that_begin_alike_are_told_by_the_value_that_differs(capsys):
    from mixprec_lab.checks._verdict import check

    wanted = torch.tensor([1.0, math.inf, math.nan, 3.0])
    check(lambda x: torch.tensor([1.0, math.inf, math.nan, 2.0]), [((0,), wanted)])
    assert capsys.readouterr().out == "Not yet: expected 3, got 2 at [3] for <lambda>(0)\n"


def consumes_its_generator(parameters, scale):
    overflow = any(not p.grad.isfinite().all() for p in parameters)
    for p in parameters:
        p.grad /= scale
    return overflow


def unscales_without_looking(parameters, scale):
    for p in parameters:
        p.grad /= scale
    return False


def halves_without_a_floor(scale, clean, overflow):
    if overflow:
        return scale / 2, 0
    return (min(scale * 2, 2.0**24), 0) if clean + 1 == 2000 else (scale, clean + 1)


def doubles_without_a_ceiling(scale, clean, overflow):
    if overflow:
        return max(scale / 2, 1.0), 0
    return (scale * 2, 0) if clean + 1 == 2000 else (scale, clean + 1)


def clips_the_scaled_gradient(scaler, optimizer, parameters, loss):
    scaler.scale_loss(loss).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    return scaler.step(optimizer)


def clips_after_the_step(scaler, optimizer, parameters, loss):
    scaler.scale_loss(loss).backward()
    taken = scaler.step(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    return taken


def steps_past_the_scaler(scaler, optimizer, parameters, loss):
    scaler.scale_loss(loss).backward()
    scaler.unscale_gradients(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    scaler.update_scale()
    return True


def masters_that_no_optimizer_steps(model, batches, lr):
    masters = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x).float(), y).backward()
        optimizer.step()
        for p, master in zip(model.parameters(), masters, strict=True):
            p.data.copy_(master)
    return model


def zeroes_the_masters_only(model, batches, lr):
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x).float(), y).backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        for p, master in zip(model.parameters(), masters, strict=True):
            p.data.copy_(master.detach())
    return model


def steps_the_model_itself(model, batches, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x).float(), y).backward()
        optimizer.step()
    return model


def unscales_in_fp16(master, gradient, scale, lr):
    if not gradient.isfinite().all():
        return False
    master -= lr * (gradient / scale).float()
    return True


def never_skips(master, gradient, scale, lr):
    master -= lr * (gradient.float() / scale)
    return True


def never_unscales(master, gradient, scale, lr):
    if not gradient.isfinite().all():
        return False
    master -= lr * gradient.float()
    return True


def average_in_bf16(stream, decay):
    average = stream[0].clone()
    for weights in stream[1:]:
        average.mul_(decay).add_(weights, alpha=1 - decay)
    return average


def counts_every_saved_tensor(forward, model):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.itemsize) or t, lambda t: t):
        forward()
    return sum(sizes)


def counts_tensors_not_storages(forward, model):
    held, sizes = {p.data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.data_ptr() not in held:
            sizes[t.data_ptr()] = t.numel() * t.itemsize
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(sizes.values())


def batch_without_logits(model, gpu):
    none, one = (training_memory(model, "autocast", **run) for run in ({}, {"sequence": 2048, "batch": 1}))
    return int((GPUS[gpu].capacity - none.total) // one.activations)


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.flushed_share, lambda g: (g.abs() < 6.1e-5).float().mean(), "expected 0.00"),
        (checks.decode_e4m3, lambda c: float(decode(torch.tensor(c), "fp8_e4m3fnuz")), "for decode_e4m3"),
        (checks.decode_e4m3, lambda c: 480.0 if c == 0x7F else float(decode(torch.tensor(c), "fp8_e4m3")), "nan"),
        (checks.first_lost_integer, lambda m: 2 ** (m + 1), "expected 257, got 256"),
        (checks.reports_overflow, lambda v, n: "fine", "expected 'flushed'"),
        (checks.stall_point, lambda v, m: v * 2 ** (m + 1), "expected 3.05176e-05"),
        (checks.true_sum_in_bf16, lambda v: float(v.bfloat16().float().sum()), "expected 3.05"),
        (checks.kahan_bf16, lambda v: accumulate(v, "bf16"), "Not yet"),
        (checks.stochastic_grid, lambda x, g: x.round(), "mean"),
        (checks.stochastic_grid, lambda x, g: torch.floor(x + 1), "neighbours of"),
        (checks.worst_relative_error, lambda n: get_format(n).unit_roundoff, "expected 0.111"),
        (checks.first_lost_ratio, lambda w, n: 2 ** (get_format(n).mantissa_bits + 1), "for first_lost_ratio(1.0"),
        (checks.train_on_masters, masters_that_no_optimizer_steps, "for train(1, 0.5)"),
        (checks.train_on_masters, zeroes_the_masters_only, "for train(2, 0.5)"),
        (checks.train_on_masters, steps_the_model_itself, "for train("),
        (checks.unscaled_step, unscales_in_fp16, "for step(a tensor of 3 values (9.53674e-07, ...), 1024)"),
        (checks.unscaled_step, never_skips, "for step(a tensor of 3 values (1, ...)"),
        (checks.unscaled_step, never_unscales, "got a tensor of 4 values (0.999023"),
        (checks.state_bytes, lambda master, moments: 16 if master else 8, "expected 12, got 16"),
        (checks.moving_average, average_in_bf16, "expected a tensor of 3 values (1.39"),
        (checks.sharded_states, lambda n, s, gpus: 16 * n // (gpus if s else 1), "expected 80000000, got 64000000"),
        (checks.sharded_states, lambda n, stage, gpus: 16 * n, "for sharded_states(8000000, 1, 2)"),
        (checks.adapter_states, lambda n, extra, bits: 16 * (n + extra), "expected 32640000, got 128640000"),
        (checks.adapter_states, lambda n, extra, bits: n * bits // 8 + 4 * extra, "adapter_states(8000000, 40000, 32)"),
        (checks.saved_once, counts_every_saved_tensor, "for count('two views of one tensor')"),
        (checks.saved_once, counts_tensors_not_storages, "for count('two views of one tensor')"),
        (checks.largest_batch, batch_without_logits, "for largest_batch('gpt2', 't4')"),
        (checks.unscales_all, consumes_its_generator, "got 'overflow False, gradients [65536.0"),
        (checks.unscales_all, unscales_without_looking, "expected 'overflow True'"),
        (checks.next_scale, halves_without_a_floor, "'xxxxxxxx"),
        (
            checks.next_scale,
            doubles_without_a_ceiling,
            "expected 'scale 1.67772e+07, 0 clean steps', got 'scale 3.35544e+07",
        ),
        (checks.scaled_loss, lambda loss, scale: loss * scale, "expected 196608, got inf"),
        (checks.unscaled_in_fp32, lambda g, scale: g / scale, "a tensor of 4 values"),
        (checks.clipped_step, clips_the_scaled_gradient, "got 'weight (-0.0000, -0.0000)"),
        (checks.clipped_step, clips_after_the_step, "got 'weight (-3.0000, -4.0000)"),
        (checks.clipped_step, steps_past_the_scaler, "got 'weight (nan"),
    ],
)
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    wrong.__name__ = check.__name__
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


def test_a_right_answer_is_correct(capsys):
    def stall(v, m):
        return 2.0 ** (math.ceil(math.log2(v)) + m + 1)

    assert verdict(checks.stall_point, stall, capsys) == "Correct."
    assert verdict(checks.first_lost_integer, lambda m: torch.tensor(2 ** (m + 1) + 1), capsys) == "Correct."


# -- amp ---------------------------------------------------------------------------------------------------------------


def one_region_around_all_steps(model, optimizer, x, y, steps):
    losses = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(steps):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def one_region_a_step(model, optimizer, x, y, steps):
    return [loss for _ in range(steps) for loss in one_region_around_all_steps(model, optimizer, x, y, 1)]


def probabilities_outside_of_autocast(logits, targets):
    with torch.autocast("cuda", enabled=False):
        return F.binary_cross_entropy(torch.sigmoid(logits.float()), targets)


def accumulates(*, divide=True, unscale="once", clip=True):
    def step(model, optimizer, scaler, batches):
        for x, y in batches:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.mse_loss(model(x), y) / (len(batches) if divide else 1)
            scaler.scale(loss).backward()
            if unscale == "each time":
                scaler.unscale_(optimizer)
        if unscale == "once":
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0 if clip else math.inf)
        scaler.step(optimizer)
        scaler.update()
        return norm

    return step


def states(model, optimizer, scaler):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}


def the_scale_without_its_tracker(model, optimizer, scaler):
    fresh = torch.amp.GradScaler("cpu", growth_interval=3).state_dict()
    return copy.deepcopy(states(model, optimizer, scaler) | {"scaler": fresh | {"scale": scaler.get_scale()}})


def without_the_momentum(model, optimizer, scaler):
    state = copy.deepcopy(states(model, optimizer, scaler))
    state["optimizer"]["state"] = {}
    return state


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.fresh_casts, one_region_around_all_steps, "got 'losses 4, 4, 4, 4'"),
        (checks.logits_loss, lambda z, y: F.binary_cross_entropy(torch.sigmoid(z), y), "got 'RuntimeError: torch.nn"),
        (checks.logits_loss, probabilities_outside_of_autocast, "for under_cuda_lists([12.0, 1.0]"),
        (checks.accumulated_step, accumulates(divide=False), "got 'norm 20.0000"),
        (checks.accumulated_step, accumulates(unscale="never"), "got 'norm 10240.0000, weight (-0.0006, -0.0008)"),
        (checks.accumulated_step, accumulates(unscale="each time"), "unscale_() has already been called"),
        (checks.accumulated_step, accumulates(clip=False), "got 'norm 10.0000, weight (-6.0000, -8.0000)"),
        (checks.snapshot, lambda m, o, s: copy.deepcopy(states(m, o, s) | {"scaler": {}}), "RuntimeError"),
        (checks.snapshot, states, "Not yet"),
        (checks.snapshot, the_scale_without_its_tracker, "scale 256' for continued(2, 2)"),
        (checks.snapshot, without_the_momentum, "Not yet"),
        (
            checks.fp16_tools,
            lambda d: (torch.cuda.amp.autocast(), torch.cuda.amp.GradScaler()),
            "got 'product in fp32, scale 1, 4 warnings'",
        ),
        (checks.fp16_tools, lambda d: (torch.autocast(d), torch.amp.GradScaler(d)), "got 'product in bf16"),
        (
            checks.fp16_tools,
            lambda d: (torch.autocast(d, dtype=torch.float16), torch.amp.GradScaler()),
            "scale 1, 1 warnings",
        ),
    ],
)
def test_the_usual_mistake_with_autocast_is_told_apart(check, wrong, told, capsys):
    if check is checks.fp16_tools and torch.cuda.is_available():
        pytest.skip("these tools switch themselves off only where there is no CUDA device")
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.fresh_casts, one_region_a_step),
        (checks.logits_loss, F.binary_cross_entropy_with_logits),
        (checks.accumulated_step, accumulates()),
        (checks.snapshot, lambda m, o, s: copy.deepcopy(states(m, o, s))),
        (checks.fp16_tools, lambda d: (torch.autocast(d, dtype=torch.float16), torch.amp.GradScaler(d))),
    ],
)
def test_a_right_answer_about_autocast_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."
