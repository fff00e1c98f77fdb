"""One function an exercise: it runs the reader's function and prints one line.  One file a chapter.

The line is ``Correct.``, ``Not done yet.`` (the function still returns None or ``...``, or raises NotImplementedError)
or ``Not yet: expected ..., got ... for f(...)`` with the first case that differs.  An exception in the reader's code is
shown as what was got: a check never fails with a traceback.
"""

from mixprec_lab.checks.formats import decode_e4m3, first_lost_integer, flushed_share, reports_overflow
from mixprec_lab.checks.rounding import kahan_bf16, stall_point, stochastic_grid, true_sum_in_bf16, worst_relative_error

__all__ = [
    "decode_e4m3",
    "first_lost_integer",
    "flushed_share",
    "kahan_bf16",
    "reports_overflow",
    "stall_point",
    "stochastic_grid",
    "true_sum_in_bf16",
    "worst_relative_error",
]
