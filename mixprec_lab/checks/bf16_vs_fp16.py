"""The exercises of the chapter ``bf16_vs_fp16``."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from mixprec_lab.bf16_vs_fp16 import NORM_TYPES, paired_comparison
from mixprec_lab.checks._verdict import Case, check
from mixprec_lab.formats import get_format
from mixprec_lab.rounding import quantize


def exact_from(function: Callable[[int, float], float]) -> None:
    """``bf16_vs_fp16``: the power of two from which values of so many mantissa bits are exact in a narrower range."""

    def cases() -> Iterator[Case]:
        for bits, name in ((7, "fp16"), (3, "fp16"), (10, "fp16"), (2, "fp8_e4m3"), (1, "fp8_e5m2")):
            fmt = get_format(name)
            fractions = 1 + torch.arange(2**bits, dtype=torch.float64) / 2**bits
            exponent = 0
            while torch.equal(quantize(fractions * 2.0 ** (exponent - 1), fmt), fractions * 2.0 ** (exponent - 1)):
                exponent -= 1
            yield (bits, fmt.smallest_subnormal), 2.0**exponent

    check(function, cases())


def clip_in_fp32(function: Callable[[list[nn.Parameter], float], object]) -> None:
    """``bf16_vs_fp16``: clipping that clips: BF16 gradients scaled in place, their FP32 norm before comes back.

    What is compared is the norm that came back and the norm the gradients have afterwards, within the rounding of BF16.
    """

    def clip(seed: int, max_norm: float) -> object:
        parameters = _parameters(seed)
        result = function(parameters, max_norm)
        number = isinstance(result, float) or (isinstance(result, torch.Tensor) and result.numel() == 1)
        return torch.tensor([float(result), _norm(parameters)]) if number else result

    def case(seed: int, max_norm: float) -> Case:
        norm = _norm(_parameters(seed))
        return (seed, max_norm), torch.tensor([norm, min(norm, max_norm)])

    check(clip, (case(seed, limit) for seed in (0, 1) for limit in (1.0, 100.0)), relative=2.0**-7)


def norms_by_type(function: Callable[[nn.Module], Sequence[str]]) -> None:
    """``bf16_vs_fp16``: the names of all normalization layers of a model, whatever they are called."""

    models = {
        "a decoder": _decoder(),
        "a CNN": nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        "a layer": nn.Linear(2, 2),
    }

    def norms(name: str) -> object:
        result = function(models[name])
        return ", ".join(sorted(result)) if isinstance(result, list | tuple | set) else result

    def names(model: nn.Module) -> str:
        return ", ".join(sorted(n for n, m in model.named_modules() if isinstance(m, NORM_TYPES)))

    check(norms, (((name,), names(model)) for name, model in models.items()))


def sign_flip_p(function: Callable[[list[float]], float]) -> None:
    """``bf16_vs_fp16``: the share of sign patterns whose mean is at least as far from zero as the observed one."""
    samples = ([0.1, 0.2, 0.3], [0.5, -0.25, 0.25, 0.75, 1.0], [1.0] * 6, [-2.0, -1.0, -1.0, 0.5], [0.0, 0.0])
    check(function, (((d,), paired_comparison([0.0] * len(d), d).p_value) for d in samples), relative=1e-9)


def _parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (3, 40, 500)]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
    return parameters


def _norm(parameters: list[nn.Parameter]) -> float:
    return float(torch.cat([p.grad.double() for p in parameters]).norm())


def _decoder() -> nn.Module:
    block = {"input_layernorm": nn.RMSNorm(4), "proj": nn.Linear(4, 4), "ln_2": nn.LayerNorm(4)}
    return nn.ModuleDict(
        {
            "wte": nn.Embedding(8, 4),
            "h": nn.ModuleDict(block),
            "layer_norm_gate": nn.Linear(4, 4),
            "gn": nn.GroupNorm(2, 4),
        }
    )
