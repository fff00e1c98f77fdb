"""FP8 training: two 8-bit formats, and a scale for every tensor that moves it onto them.

E4M3 has 18 binades and E5M2 has 32, fewer than the tensors of a training run need together; each alone fits, once it
is multiplied by a scale of its own.  That is loss scaling, tensor by tensor (``CurrentScaling``, ``DelayedScaling``).
Weights and activations take E4M3, gradients E5M2.  Only the operands of matrix products are FP8: sums are FP32,
weights have FP32 masters, and everything else stays in BF16 (``FP8Linear``, ``FP8Trainer``).  Overflow saturates and
no step is skipped; what a stale scale costs is measured by ``simulate_scaling``, what a short accumulator costs by
``tensor_core_matmul``.
"""

from mixprec_lab.fp8.accumulator import tensor_core_matmul
from mixprec_lab.fp8.backends import BACKENDS, Chosen, available_backends, choose_backend, why_not
from mixprec_lab.fp8.conversion import Conversion, convert_linears
from mixprec_lab.fp8.experiment import train_transformer
from mixprec_lab.fp8.linear import FP8Linear, update_scales
from mixprec_lab.fp8.recipes import ROLES, CurrentScaling, DelayedScaling, FixedScaling, Recipe, format_of
from mixprec_lab.fp8.scaling import Scaled, amax, delayed_update
from mixprec_lab.fp8.simulate import ScalingRun, lognormal_shape, normal_shape, simulate_scaling
from mixprec_lab.fp8.trainer import FP8Step, FP8Trainer

__all__ = [
    "BACKENDS",
    "ROLES",
    "Chosen",
    "Conversion",
    "CurrentScaling",
    "DelayedScaling",
    "FP8Linear",
    "FP8Step",
    "FP8Trainer",
    "FixedScaling",
    "Recipe",
    "Scaled",
    "ScalingRun",
    "amax",
    "available_backends",
    "choose_backend",
    "convert_linears",
    "delayed_update",
    "format_of",
    "lognormal_shape",
    "normal_shape",
    "simulate_scaling",
    "tensor_core_matmul",
    "train_transformer",
    "update_scales",
    "why_not",
]
