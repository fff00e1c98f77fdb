"""One scale a tensor is enough for eight bits of floating point; with four bits every small block needs its own.

A scaled format stores ``x / scale`` in a narrow element format and keeps the scale beside it.  What differs between
per-tensor FP8, DeepSeek-V3's tiles, MXFP8, MXFP4 and NVFP4 is four choices, and a ``BlockScheme`` is just these: the
element format, the block that shares a scale, the format of the scale with the rule that rounds it, and whether a
second scale serves the whole tensor.  ``quantize_blocks`` applies a scheme, ``block_quantize`` also shows its parts,
``block_report`` says what was lost, and ``BlockScaling`` trains with it.  A float has an exponent of its own, so an
outlier costs its neighbours nothing until it pushes them below the element format's range: block scaling is about that
range, and the narrower the element format, the smaller the block has to be.

Sources: OCP MX specification 1.0; Rouhani et al., arXiv:2310.10537; DeepSeek-AI, arXiv:2412.19437 (tiles and blocks);
NVIDIA, arXiv:2509.25149 (NVFP4, stochastic rounding and random Hadamard transforms in training).
"""

from mixprec_lab.block_scaling.hadamard import hadamard_matrix, random_hadamard, random_signs, undo_random_hadamard
from mixprec_lab.block_scaling.quantized import BlockQuantized, block_quantize, quantize_blocks
from mixprec_lab.block_scaling.recipe import BlockScaling
from mixprec_lab.block_scaling.report import BlockReport, block_report
from mixprec_lab.block_scaling.schemes import (
    INT8,
    SCALE_RULES,
    SCHEMES,
    BlockScheme,
    ScaleRule,
    SchemeLike,
    block_scales,
    get_scheme,
)

__all__ = [
    "INT8",
    "SCALE_RULES",
    "SCHEMES",
    "BlockQuantized",
    "BlockReport",
    "BlockScaling",
    "BlockScheme",
    "ScaleRule",
    "SchemeLike",
    "block_quantize",
    "block_report",
    "block_scales",
    "get_scheme",
    "hadamard_matrix",
    "quantize_blocks",
    "random_hadamard",
    "random_signs",
    "undo_random_hadamard",
]
