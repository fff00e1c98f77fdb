"""The exercises of the chapter ``block_scaling``."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from mixprec_lab.block_scaling import block_quantize, get_scheme, quantize_blocks
from mixprec_lab.checks._verdict import check


def _blocks_of_round_scales(rows: int, columns: int, block: int, seed: int) -> torch.Tensor:
    """Values whose blocks have the largest magnitude 448 times a power of two, so that every formula rounds alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns // block, block, generator=generator).clamp(-3, 3) * 100
    x[:, :, 0] = 448.0
    power = torch.randint(-30, 30, (rows, columns // block, 1), generator=generator)
    return (x * torch.exp2(power.float())).view(rows, columns)


def own_blocks(function: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """``block_scaling``: E4M3 with one scale ``amax / 448`` for each ``block`` values of a row, there and back."""

    def case(rows: int, columns: int, block: int, seed: int) -> tuple:
        x = _blocks_of_round_scales(rows, columns, block, seed)
        return (x, block), quantize_blocks(x, replace(get_scheme("tile_1x128"), block=(1, block)))

    zeros = torch.zeros(2, 8)
    cases = [case(4, 64, 32, 0), case(3, 256, 128, 1), case(5, 12, 4, 2), ((zeros, 4), zeros)]
    check(function, cases, relative=1e-6, by_element=True)


def mx_scale(function: Callable[[float, int], float]) -> None:
    """``block_scaling``: the power of two of the MX specification, from ``amax`` and the elements' top exponent."""
    cases = [
        ((1.0, 8), 2.0**-8),
        ((1.9, 8), 2.0**-8),
        ((448.0, 8), 1.0),
        ((6.5, 2), 1.0),
        ((0.3, 2), 2.0**-4),
        ((2.0**-130, 8), 2.0**-127),
        ((float(torch.tensor(2.0**20).nextafter(torch.tensor(0.0))), 2), 2.0**17),  # a logarithm in FP32 rounds up
        ((math.nextafter(256.0, 0.0), 8), 0.5),  # and one in FP64
    ]
    check(function, cases)


def transposed_operand(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``block_scaling``: the transposed tensor, quantized along the axis that its product sums over."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(shape, generator=generator) for shape in ((128, 256), (64, 96))]
    check(function, (((x,), quantize_blocks(x.T.contiguous(), "tile_1x128")) for x in samples), by_element=True)


def dequantized(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """``block_scaling``: FP8 elements times FP32 scales, without leaving FP32's range and digits."""
    elements = torch.tensor([[448.0, -1.75, 0.0, 2.0**-9], [1.0, 2.5, -240.0, 9.0]])

    def case(scales: list[float]) -> tuple:
        scale = torch.tensor(scales).unsqueeze(1)
        return (elements.to(torch.float8_e4m3fn), scale), elements.double() * scale.double()

    cases = [case([1.0, 0.25]), case([2.0**-30, 2.0**-60]), case([2.0**10, 0.1])]
    check(function, cases, relative=1e-6, by_element=True)


def nvfp4_scales(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``block_scaling``: E4M3 block scales times the FP32 tensor scale, for gradients of any size."""

    def case(size: float) -> tuple:
        x = torch.linspace(-1, 1, 16).repeat(4, 1) * torch.tensor([1.0, 0.5, 0.1, 0.01]).unsqueeze(1) * size
        stored = block_quantize(x, "nvfp4")
        return (x,), stored.scales.flatten() * stored.tensor_scale

    check(function, [case(6 * 448.0), case(1.0), case(1e-5), case(1e6)], relative=1e-6, by_element=True)
