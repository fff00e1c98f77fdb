"""Rounding is the only place where a low-precision format does harm, so the course has one function for it.

``quantize`` puts any tensor on the grid of any format, in six rounding modes and with two overflow policies; the rest
of the module is built on it.  One rounding costs at most half a gap: a relative error of ``unit_roundoff`` in the
normal range.  Sums are where that small error turns into a large one, because the gap grows with the running sum while
the addends do not: at a ratio of ``2**(mantissa_bits + 1)`` or a little more the sum stalls.  ``accumulate`` and
``dot`` reproduce that, and the four cures: pairwise and Kahan summation, stochastic rounding, a wider accumulator.
"""

from mixprec_lab.rounding.fake import fake_quantize
from mixprec_lab.rounding.measures import relative_error, sqnr_db, ulp
from mixprec_lab.rounding.quantizer import (
    OVERFLOW_POLICIES,
    ROUNDING_MODES,
    Overflow,
    Rounding,
    quantize,
    quantize_scaled,
    rounder,
)
from mixprec_lab.rounding.sums import METHODS, Method, accumulate, dot, running_sum

__all__ = [
    "METHODS",
    "OVERFLOW_POLICIES",
    "ROUNDING_MODES",
    "Method",
    "Overflow",
    "Rounding",
    "accumulate",
    "dot",
    "fake_quantize",
    "quantize",
    "quantize_scaled",
    "relative_error",
    "rounder",
    "running_sum",
    "sqnr_db",
    "ulp",
]
