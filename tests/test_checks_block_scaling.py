"""The exercises of the chapter ``block_scaling``: right answers pass, the usual mistakes are told apart."""

import math

import pytest
import torch

from mixprec_lab import checks
from mixprec_lab.block_scaling import quantize_blocks
from mixprec_lab.rounding import quantize


def verdict(check, function, capsys) -> str:
    check(function)
    return capsys.readouterr().out.strip()


def own(scale_of, clamp=True):
    def own_blocks(x, block):
        parts = x.view(x.shape[0], -1, block)
        scale = scale_of(parts)
        scale = torch.where(scale > 0, scale, 1.0) if clamp else scale
        return (quantize(parts / scale, "fp8_e4m3") * scale).view_as(x)

    return own_blocks


def amax_scale(parts):
    return parts.abs().amax(-1, keepdim=True) / 448


def by_logarithm(amax, emax):
    return 2.0 ** max(math.floor(torch.tensor(amax).log2()) - emax, -127)


def by_exponent(amax, emax):
    return 2.0 ** max(math.frexp(amax)[1] - 1 - emax, -127)


def by_exact_looking_logarithm(amax, emax):
    return 2.0 ** max(math.floor(math.log2(amax)) - emax, -127)


def two_levels(x):
    amax = x.abs().amax(-1)
    tensor_scale = amax.max() / (6 * 448)
    return quantize(amax / tensor_scale / 6, "fp8_e4m3") * tensor_scale


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.own_blocks, own(amax_scale)),
        (checks.own_blocks, own(lambda p: 1 / (448 / p.abs().amax(-1, keepdim=True)))),
        (checks.mx_scale, by_exponent),
        (checks.transposed_operand, lambda x: quantize_blocks(x, "tile_1x128", axis=0).T),
        (checks.transposed_operand, lambda x: quantize_blocks(x.T, "tile_1x128")),
        (checks.dequantized, lambda q, s: q.float() * s),
        (checks.nvfp4_scales, two_levels),
    ],
)
def test_a_right_answer_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."


@pytest.mark.parametrize(
    ("check", "wrong", "told"),
    [
        (checks.own_blocks, own(lambda p: p.abs().mean(-1, keepdim=True) / 448), "got 2.13115e+10 at [3, 0] for"),
        (checks.own_blocks, own(lambda p: p.abs().max() / 448), "got -3.67002e+06 at [2, 45] for"),
        (checks.own_blocks, own(amax_scale, clamp=False), "expected 0, got nan at [0, 0]"),
        (checks.mx_scale, lambda amax, emax: amax / 448, "expected 0.00390625, got 0.00223214"),
        (checks.mx_scale, lambda a, e: by_exponent(a * 1.999, e), "got 0.0078125 for mx_scale(1.9, 8)"),
        (checks.mx_scale, lambda a, e: 2.0 ** (math.frexp(a)[1] - 1 - e), "expected 5.87747e-39"),
        (checks.mx_scale, by_logarithm, "expected 131072, got 262144 for mx_scale(1048575.9375, 2)"),
        (checks.mx_scale, by_exact_looking_logarithm, "expected 0.5, got 1 for mx_scale(255.99999999999997, 8)"),
        (checks.transposed_operand, lambda x: quantize_blocks(x, "tile_1x128").T, "got 2.09995 at [206, 20]"),
        (checks.transposed_operand, lambda x: quantize_blocks(x, "tile_1x128", axis=0), "[256, 128], got one of"),
        (checks.dequantized, lambda q, s: (q.half() * s.half()).float(), "expected 4.17233e-07, got 0 at [0, 0]"),
        (checks.dequantized, lambda q, s: (q.bfloat16() * s.bfloat16()).float(), "got 0.902344 at [1, 3] for"),
        (checks.nvfp4_scales, lambda x: quantize(x.abs().amax(-1) / 6, "fp8_e4m3"), "got 0.171875 at [0] for"),
        (checks.nvfp4_scales, lambda x: x.abs().amax(-1) / 6, "expected 44, got 44.8 at [2]"),
    ],
)
def test_the_usual_mistake_is_told_apart(check, wrong, told, capsys):
    wrong.__name__ = check.__name__
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line
