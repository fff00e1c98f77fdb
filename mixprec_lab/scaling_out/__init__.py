"""Many processes train one model: what mixed precision must agree on, and what the messages between them round.

A rank that skips a step alone, or takes a scale from its own data, holds another model from then on: infinities, scales
and amaxes are decided together (``DistributedLossScaler``).  A sum over ranks is a sum in the format of its messages,
and stalls as sums do (``simulate_reduction``); moving values is harmless, in FP8 too (``eight_bits``).  ``launch`` runs
jobs in several processes of this machine, with gloo on CPUs and NCCL on GPUs.  The jobs are modules: ``ddp``,
``skipping``, ``sharded``, ``wire`` and ``checkpoints`` have a function ``run`` and start under ``torchrun -m`` as well.
"""

from mixprec_lab.scaling_out.group import Group, process_group
from mixprec_lab.scaling_out.launcher import Launched, LaunchTimeout, RankFailed, launch
from mixprec_lab.scaling_out.reduction import (
    ORDERS,
    error_bound,
    exact_sum,
    gradients,
    on_the_wire,
    reduction_error,
    simulate_reduction,
)
from mixprec_lab.scaling_out.scaler import DistributedLossScaler

__all__ = [
    "ORDERS",
    "DistributedLossScaler",
    "Group",
    "LaunchTimeout",
    "Launched",
    "RankFailed",
    "error_bound",
    "exact_sum",
    "gradients",
    "launch",
    "on_the_wire",
    "process_group",
    "reduction_error",
    "simulate_reduction",
]
