"""The exercise checks of the chapter ``fp8``: right answers, and the usual mistakes told apart."""

import copy
import math

import pytest
import torch
from test_checks import verdict
from torch import nn

from mixprec_lab import checks
from mixprec_lab.fp8 import FP8Linear, convert_linears


def scale_of(amaxes, scale):
    largest = max((a for a in amaxes if not math.isnan(a)), default=0.0)
    return 448 / largest if 0 < largest < math.inf else scale


def always_divides(amaxes, scale):
    return 448 / max(amaxes)


def last_one_only(amaxes, scale):
    return 448 / amaxes[-1] if 0 < amaxes[-1] < math.inf else scale


def cleans_nan(x):
    return x.nan_to_num().clamp(-57344, 57344).to(torch.float8_e5m2)


def rounds_and_unscales(x, w):
    sx, sw = 448 / x.abs().max(), 448 / w.abs().max()
    cast = lambda t, s: (t * s).clamp(-448, 448).to(torch.float8_e4m3fn).float()  # noqa: E731
    return cast(x, sx) @ cast(w, sw).T / sx / sw


def forgets_one_scale(x, w):
    return rounds_and_unscales(x, w) * (448 / w.abs().max())


def no_scaling(x, w):
    return x.to(torch.float8_e4m3fn).float() @ w.to(torch.float8_e4m3fn).float().T


def direct_children_only(model):
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, FP8Linear.from_linear(child))
    return model


def new_parameters(model):
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            twin = FP8Linear(child.in_features, child.out_features)
            twin.load_state_dict(child.state_dict(), strict=False)
            setattr(model, name, twin)
        else:
            new_parameters(child)
    return model


def right_conversion(model):
    convert_linears(model, keep_first_and_last=False)
    return model


def weights_only(layer):
    return {k: v.clone() for k, v in layer.state_dict().items() if k in ("weight", "bias")}


def without_the_history(layer):
    return {k: v.clone() for k, v in layer.state_dict().items() if "amax_history" not in k}


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.delayed_scale, always_divides, "for delayed_scale([0.0, 0.0], 64"),
        (checks.delayed_scale, last_one_only, "expected 32, got 64"),
        (checks.saturating_cast, lambda x: x.to(torch.float8_e5m2), "got '57344, 57344, inf, inf'"),
        (checks.saturating_cast, cleans_nan, "expected 'nan, 2'"),
        (checks.saturating_cast, lambda x: x.clamp(-57344, 57344), "a tensor of torch.float32"),
        (checks.fp8_product, lambda x, w: x @ w.T, "Not yet"),
        (checks.fp8_product, forgets_one_scale, "Not yet"),
        (checks.fp8_product, no_scaling, "Not yet"),
        (checks.convert, direct_children_only, "got '1 of 3 layers in FP8"),
        (checks.convert, new_parameters, "0 of 4 parameters moved"),
        (checks.resumed_scale, weights_only, "input scale 1,"),
        (checks.resumed_scale, without_the_history, "Not yet"),
    ],
)
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    wrong.__name__ = check.__name__
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.delayed_scale, scale_of),
        (checks.saturating_cast, lambda x: x.clamp(-57344, 57344).to(torch.float8_e5m2)),
        (checks.fp8_product, rounds_and_unscales),
        (checks.convert, right_conversion),
        (checks.resumed_scale, lambda layer: copy.deepcopy(layer.state_dict())),
    ],
)
def test_a_right_answer_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."
