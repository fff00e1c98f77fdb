"""A weight moves by whole gaps of its format, and an update below half a gap is rounded away.

What counts is not the size of the update but its ratio to the weight: BF16 loses what is 256 to 511 times smaller,
FP16 what is 2048 to 4095 times smaller, and ``update_threshold`` gives the exact edge for every weight and format.
"""

from mixprec_lab.master_weights.lost import (
    UPDATE_METHODS,
    UpdateMethod,
    UpdateThreshold,
    lost_updates,
    simulate_weight,
    unchanged,
    update_threshold,
)

__all__ = [
    "UPDATE_METHODS",
    "UpdateMethod",
    "UpdateThreshold",
    "lost_updates",
    "simulate_weight",
    "unchanged",
    "update_threshold",
]
