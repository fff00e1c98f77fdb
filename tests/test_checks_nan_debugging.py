"""The exercise checks of the chapter ``nan_debugging``: right answers, and the usual mistakes told apart."""

import pytest
import torch
from test_checks import verdict
from torch import nn

from mixprec_lab import checks


def hunt(model, x, *, remove=True, order=True):
    found, handles = [], []
    for name, module in model.named_modules():

        def hook(module, args, output, name=name):
            if not output.isfinite().all():
                found.append(name)

        handles.append(module.register_forward_hook(hook))
    model(x)
    if remove:
        for handle in handles:
            handle.remove()
    return (found[0] if order else sorted(found)[0]) if found else ""


def log_where(x):
    return torch.where(x > 0, x.log(), 0.0)


def log_double_where(x):
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), 0.0)


def softmax_of_inf(logits, mask):
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


def softmax_then_mask(logits, mask):
    return logits.softmax(-1) * mask


def softmax_finite(logits, mask):
    return logits.masked_fill(~mask, -1e9).softmax(-1) * mask


def norm_in_fp16(x):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def norm_left_in_fp32(x):
    return norm_in_fp16(x.float())


def norm_in_fp32(x):
    return norm_left_in_fp32(x).to(x.dtype)


def clips_blindly(optimizer, parameters, max_norm):
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return True


def zeroes_and_steps(optimizer, parameters, max_norm):
    for p in parameters:
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    return clips_blindly(optimizer, parameters, max_norm)


def guards(optimizer, parameters, max_norm):
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if norm.isfinite():
        optimizer.step()
    return bool(norm.isfinite())


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.first_bad_module, lambda m, x: hunt(m, x, remove=False), "7 hooks left"),
        (checks.first_bad_module, lambda m, x: hunt(m, x, order=False), "got \"'', 0 hooks left\""),
        (checks.safe_log, log_where, "gradients nan 0.25"),
        (checks.safe_log, lambda x: x.clamp(min=1e-6).log(), "Not yet"),
        (checks.masked_softmax, softmax_of_inf, "nan nan nan"),
        (checks.masked_softmax, softmax_then_mask, "Not yet"),
        (checks.rms_norm, norm_in_fp16, "for row([300.0, 400.0"),
        (checks.rms_norm, norm_left_in_fp32, "a tensor of torch.float32"),
        (checks.guarded_step, clips_blindly, "step taken True"),
        (checks.guarded_step, zeroes_and_steps, "for step([inf, 1.0])"),
    ],
)
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.first_bad_module, hunt),
        (checks.safe_log, log_double_where),
        (checks.masked_softmax, softmax_finite),
        (checks.rms_norm, norm_in_fp32),
        (checks.guarded_step, guards),
    ],
)
def test_a_right_answer_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."
