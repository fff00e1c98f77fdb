"""Detect, name and localise what makes a mixed-precision run unstable.

A run dies in one step and was ill for many.  ``NumericalStabilityMonitor`` looks at every step, cheaply: one read of
the device, a ledger of the order of calls, a look at dtypes; and when something is not as it should be, it runs that
step again, operation by operation, to the place where the first bad value was born.  A ``Finding`` names the fault.
"""

from mixprec_lab.nan_debugging.findings import KINDS, Finding, TensorFacts
from mixprec_lab.nan_debugging.monitor import NumericalStabilityMonitor

__all__ = ["KINDS", "Finding", "NumericalStabilityMonitor", "TensorFacts"]
