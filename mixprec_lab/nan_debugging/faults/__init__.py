"""Faults of mixed-precision training as runs in small, each with a twin in which nothing but the cure differs.

A fault of the catalogue is a seeded training run of a few steps, written with torch's ordinary calls: autocast,
GradScaler, optimizers, clipping, schedules, checkpoints.  ``FAULTS`` maps names to them, ``HEALTHY`` maps names to
builders of runs in which nothing is wrong, and ``run_fault`` runs one.  All of it is for the CPU, takes less than two
seconds a run, and works for any seed.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mixprec_lab.nan_debugging.faults import checkpoints, data, fp8, loop, operations, overflow, scaling, state
from mixprec_lab.nan_debugging.faults._run import Fault, Outcome, Probe, Run, run_fault
from mixprec_lab.nan_debugging.faults.healthy import HEALTHY

_THEMES = (scaling, loop, checkpoints, overflow, operations, state, data, fp8)

FAULTS: Mapping[str, Fault] = MappingProxyType(
    {value.name: value for theme in _THEMES for value in vars(theme).values() if isinstance(value, Fault)}
)

__all__ = ["FAULTS", "HEALTHY", "Fault", "Outcome", "Probe", "Run", "run_fault"]
