"""Data in, Axes out: one file a chapter, and ``style`` for what they share.

``pyplot`` is imported when a figure is drawn, not before.
"""

from mixprec_lab.plots.amp import gradient_scale, pillars, training_step
from mixprec_lab.plots.formats import bit_layouts, exponent_histogram, relative_gaps, windows
from mixprec_lab.plots.memory import TERM_COLOURS, memory_bars
from mixprec_lab.plots.rounding import error_against_magnitude, rounding_steps, running_sums
from mixprec_lab.plots.style import FIELD_COLOURS, FORMAT_COLOURS, axes, colour, use_style

__all__ = [
    "FIELD_COLOURS",
    "FORMAT_COLOURS",
    "TERM_COLOURS",
    "axes",
    "bit_layouts",
    "colour",
    "error_against_magnitude",
    "exponent_histogram",
    "gradient_scale",
    "memory_bars",
    "pillars",
    "relative_gaps",
    "rounding_steps",
    "running_sums",
    "training_step",
    "use_style",
    "windows",
]
