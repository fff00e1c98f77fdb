"""A slow scalar reading of the block formats, in exact fractions and numpy's float32: what the tests compare with.

It shares no code with mixprec_lab: grids come from the tables of the specifications, scales from their formulas.
"""

import math
from bisect import bisect_left
from fractions import Fraction

import numpy as np

#: name -> (exponent bits, fraction bits, bias, largest value), from OCP OFP8 1.0 and OCP MX 1.0
ELEMENTS = {
    "fp8_e4m3": (4, 3, 7, 448),
    "fp8_e5m2": (5, 2, 15, 57344),
    "fp6_e3m2": (3, 2, 3, 28),
    "fp6_e2m3": (2, 3, 1, Fraction(15, 2)),
    "fp4_e2m1": (2, 1, 1, 6),
}


def grid(name: str) -> list[Fraction]:
    """The magnitudes of an element format, ascending; their indices are their codes."""
    if name == "int8":
        return [Fraction(n) for n in range(128)]
    e_bits, m_bits, bias, top = ELEMENTS[name]
    values = []
    for field in range(2**e_bits):
        for fraction in range(2**m_bits):
            lead = fraction + (2**m_bits if field else 0)
            values.append(Fraction(lead, 2**m_bits) * Fraction(2) ** (max(field, 1) - bias))
    return [v for v in values if v <= top]


def round_to(value: Fraction, values: list[Fraction]) -> Fraction:
    """``value`` to the nearest of ``values`` (with both signs), ties to the even index, saturating."""
    magnitude = abs(value)
    above = min(bisect_left(values, magnitude), len(values) - 1)
    below = above - 1 if above and values[above] > magnitude else above
    low, high = magnitude - values[below], values[above] - magnitude
    index = below if low < high or (low == high and below % 2 == 0) else above
    return values[index] if value >= 0 else -values[index]


def floor_log2(value: Fraction) -> int:
    """The largest ``n`` with ``2**n <= value``."""
    n = value.numerator.bit_length() - value.denominator.bit_length()
    return n if Fraction(2) ** n <= value else n - 1


def mx_block(block: list[float], element: str, rule: str = "floor") -> list[float]:
    """One MX block after a round trip, by section 6.3 of the specification (or another rule for the scale)."""
    values = grid(element)
    exact = [Fraction(v) for v in block]
    largest = max(map(abs, exact))
    if largest == 0:
        return [0.0] * len(block)
    if rule == "round_up":
        n = -200
        while Fraction(2) ** n * values[-1] < largest:
            n += 1
    else:
        if rule == "even":
            step = Fraction(2) ** (floor_log2(largest) - ELEMENTS[element][1])
            largest = math.floor(largest / step + Fraction(1, 2)) * step
        n = floor_log2(largest) - floor_log2(values[-1])
    scale = Fraction(2) ** min(max(n, -127), 127)
    return [float(round_to(v / scale, values) * scale) for v in exact]


def scaled_block(block: list[float], element: str) -> list[float]:
    """One block with an FP32 scale ``amax / largest``: division and multiplication are those of float32."""
    values, x = grid(element), np.array(block, dtype=np.float32)
    scale = max(np.abs(x).max() / np.float32(float(values[-1])), np.float32(2.0**-126))
    rounded = [float(round_to(Fraction(float(v)), values)) for v in x / scale]
    return (np.array(rounded, dtype=np.float32) * scale).tolist()


def nvfp4(x: np.ndarray, size: int = 16) -> np.ndarray:
    """A float32 vector of full blocks after a round trip through NVFP4: E4M3 block scales under an FP32 scale."""
    values, scales = grid("fp4_e2m1"), grid("fp8_e4m3")
    x = x.astype(np.float32).reshape(-1, size)
    tensor_scale = max(np.abs(x).max() / np.float32(448 * 6), np.float32(2.0**-126))
    out = np.zeros_like(x)
    for i, block in enumerate(x):
        wanted = np.abs(block).max() / tensor_scale / np.float32(6)
        total = np.float32(float(round_to(Fraction(float(wanted)), scales))) * tensor_scale
        if total:
            rounded = [float(round_to(Fraction(float(v)), values)) for v in block / total]
            out[i] = np.array(rounded, dtype=np.float32) * total
    return out.reshape(-1)
