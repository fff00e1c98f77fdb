"""Detect, name and localise what makes a mixed-precision run unstable, and go on from there.

A run dies in one step and was ill for many.  ``NumericalStabilityMonitor`` looks at every step, cheaply: one read of
the device, a ledger of the order of calls, a look at dtypes; and when something is not as it should be, it runs that
step again, operation by operation, to the place where the first bad value was born.  A ``Finding`` names the fault.
``NumericalStabilityFixer`` skips, rolls back and resumes.  ``faults`` holds the catalogue as seeded runs with repaired
twins, ``detectors`` the tools of others, and ``detection_matrix`` judges any of them over any faults.
"""

from mixprec_lab.nan_debugging.findings import KINDS, Finding, TensorFacts
from mixprec_lab.nan_debugging.fixer import NumericalStabilityFixer
from mixprec_lab.nan_debugging.matrix import detection_matrix
from mixprec_lab.nan_debugging.monitor import NumericalStabilityMonitor

__all__ = [
    "KINDS",
    "Finding",
    "NumericalStabilityFixer",
    "NumericalStabilityMonitor",
    "TensorFacts",
    "detection_matrix",
]
