"""Mixed precision halves activations, not the model: where the bytes of a training step go, term by term.

A parameter in training is several numbers: the weight the forward pass reads, its gradient, perhaps a second gradient
buffer, perhaps an FP32 master, one or two moments.  Counted over torch's own ``autocast`` or over 16-bit weights with
FP32 masters the sum is 16 bytes, as it is in FP32; 18 and 20 are the same training counted with other gradient
buffers.  What shrinks with the width of the arithmetic is what the forward pass saves for the backward pass.
``REGIMES`` holds the conventions as data with their sources, ``training_memory`` applies one of them to a model and a
sharding, and the functions of ``measure`` count the same terms on real modules, so that the model can be checked.
"""

from mixprec_lab.memory.activations import Saved, end_activations, layer_activations, logit_bytes
from mixprec_lab.memory.measure import LiveBytes, SavedBytes, StateBytes, saved_bytes, state_bytes
from mixprec_lab.memory.model import NF4_BYTES, TERMS, Term, TrainingMemory, training_memory
from mixprec_lab.memory.regimes import REGIMES, Regime, get_regime, regime_table
from mixprec_lab.memory.shapes import (
    GPUS,
    MODELS,
    Experts,
    Gpu,
    LatentAttention,
    ModelShape,
    get_model,
    lora_parameters,
)

__all__ = [
    "GPUS",
    "MODELS",
    "NF4_BYTES",
    "REGIMES",
    "TERMS",
    "Experts",
    "Gpu",
    "LatentAttention",
    "LiveBytes",
    "ModelShape",
    "Regime",
    "Saved",
    "SavedBytes",
    "StateBytes",
    "Term",
    "TrainingMemory",
    "end_activations",
    "get_model",
    "get_regime",
    "layer_activations",
    "logit_bytes",
    "lora_parameters",
    "regime_table",
    "saved_bytes",
    "state_bytes",
    "training_memory",
]
