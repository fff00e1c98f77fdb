"""Loss scaling moves the gradients into FP16's range: one multiplication before backward, one division after it.

FP16 turns every gradient of at most 2**-25 into zero and keeps few digits below 2**-14, while its upper half mostly
stays empty.  Multiplying the loss by S shifts the whole histogram of gradients by log2 S binades, nothing else; what
was flushed becomes representable, and the price is that the largest gradient may now overflow.  So S is chosen just
below that (``choose_scale``), or searched for while training: try, skip the step when something overflowed, back off,
grow again after a quiet window (``DynamicLossScaler``, ``ScalerRule``, ``simulate_scaler``).
"""

from mixprec_lab.loss_scaling.gradients import UnderflowReport, choose_scale, underflow_report
from mixprec_lab.loss_scaling.histograms import MagnitudeHistogram
from mixprec_lab.loss_scaling.recording import GradientRecord, record_gradients
from mixprec_lab.loss_scaling.rules import (
    RULES,
    LossScaleAtMinimum,
    ScalerRule,
    ScalerRun,
    ScalerState,
    get_rule,
    simulate_scaler,
)
from mixprec_lab.loss_scaling.scaler import DynamicLossScaler, StaticLossScaler

__all__ = [
    "RULES",
    "DynamicLossScaler",
    "GradientRecord",
    "LossScaleAtMinimum",
    "MagnitudeHistogram",
    "ScalerRule",
    "ScalerRun",
    "ScalerState",
    "StaticLossScaler",
    "UnderflowReport",
    "choose_scale",
    "get_rule",
    "record_gradients",
    "simulate_scaler",
    "underflow_report",
]
