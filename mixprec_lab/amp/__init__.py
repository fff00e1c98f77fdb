"""Automatic mixed precision: the dtype of every operator is decided by lists, and the training loop pays for it.

``autocast`` is not a cast of the model.  It casts the *inputs of operators*, each by the list it is on: matrix products
and convolutions to 16 bits, what adds up many terms or grows fast to FP32, and everything else takes what comes.
Parameters, and therefore gradients and optimizer states, stay FP32.  The lists of CUDA and of the CPU differ, so
``trace_autocast`` shows both, operator by operator.

In FP16 the gradients also need a scaled loss, and with it an order: unscale, then look (clip, log), then step, then
update the scale.  ``MixedPrecisionTrainer`` keeps that order under accumulation, clipping, schedules and checkpoints.

Sources: Micikevicius et al., arXiv:1710.03740; PyTorch 2.13, ``torch.amp`` and ``ATen/autocast_mode.h``.
"""

from mixprec_lab.amp.policy import DISPATCH_KEYS, OPERATORS, RULES, TORCH_VERSION, Policy, Rule, policy_table, rule_of
from mixprec_lab.amp.trace import AutocastCall, AutocastTrace, trace_autocast
from mixprec_lab.amp.trainer import MixedPrecisionTrainer, StepResult, choose_dtype

__all__ = [
    "DISPATCH_KEYS",
    "OPERATORS",
    "RULES",
    "TORCH_VERSION",
    "AutocastCall",
    "AutocastTrace",
    "MixedPrecisionTrainer",
    "Policy",
    "Rule",
    "StepResult",
    "choose_dtype",
    "policy_table",
    "rule_of",
    "trace_autocast",
]
