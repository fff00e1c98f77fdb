"""A weight moves by whole gaps of its format, and an update below half a gap is rounded away.

What counts is not the size of the update but its ratio to the weight: BF16 loses what is 256 to 511 times smaller,
FP16 what is 2048 to 4095 times smaller, and ``update_threshold`` gives the exact edge for every weight and format.
Training makes such updates all the time: Adam's are about lr, whatever the gradient.  The remedy is to keep what the
optimizer adds to in more bits than what the model multiplies with: FP32 masters (``MasterWeightOptimizer``), a
compensation in BF16, or stochastic rounding, which keeps the small updates on average (``BF16AdamW``).

The moments of Adam are a second, separate decision.  A second moment kept in BF16 ratchets: it rises with a gradient
and cannot fall again, because beta2 * v rounds back to v.
"""

from mixprec_lab.master_weights.adamw import BF16AdamW
from mixprec_lab.master_weights.lost import (
    UPDATE_METHODS,
    UpdateMethod,
    UpdateThreshold,
    lost_updates,
    simulate_weight,
    unchanged,
    update_threshold,
)
from mixprec_lab.master_weights.optimizer import MasterWeightOptimizer

__all__ = [
    "UPDATE_METHODS",
    "BF16AdamW",
    "MasterWeightOptimizer",
    "UpdateMethod",
    "UpdateThreshold",
    "lost_updates",
    "simulate_weight",
    "unchanged",
    "update_threshold",
]
