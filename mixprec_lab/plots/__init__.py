"""Data in, Axes out: one file a chapter, and ``style`` for what they share.

``pyplot`` is imported when a figure is drawn, not before.
"""

from mixprec_lab.plots.amp import gradient_scale, pillars, training_step
from mixprec_lab.plots.bf16_vs_fp16 import losses, paired_differences, updates_lost
from mixprec_lab.plots.block_scaling import bits_and_errors, block_shapes, outlier_errors, scale_rules
from mixprec_lab.plots.formats import bit_layouts, exponent_histogram, relative_gaps, windows
from mixprec_lab.plots.fp8 import accumulator_errors, scale_chase
from mixprec_lab.plots.interview import answers_per_day
from mixprec_lab.plots.loss_scaling import gradient_windows, training_curves
from mixprec_lab.plots.master_weights import METHOD_STYLES, seed_ranges, update_thresholds
from mixprec_lab.plots.memory import TERM_COLOURS, memory_bars
from mixprec_lab.plots.nan_debugging import decision_tree, detection_bars, health_history
from mixprec_lab.plots.regimes import REGIME_STYLES, gap_intervals, power_curves, regime_colours, regime_curves
from mixprec_lab.plots.rounding import error_against_magnitude, rounding_steps, running_sums
from mixprec_lab.plots.scaling_out import reduction_errors
from mixprec_lab.plots.speed import (
    PART_COLOURS,
    amdahl_curves,
    matmul_rates,
    published_ratios,
    rooflines,
    source_line,
    time_splits,
)
from mixprec_lab.plots.style import FIELD_COLOURS, FORMAT_COLOURS, axes, colour, use_style

__all__ = [
    "FIELD_COLOURS",
    "FORMAT_COLOURS",
    "METHOD_STYLES",
    "PART_COLOURS",
    "REGIME_STYLES",
    "TERM_COLOURS",
    "accumulator_errors",
    "amdahl_curves",
    "answers_per_day",
    "axes",
    "bit_layouts",
    "bits_and_errors",
    "block_shapes",
    "colour",
    "decision_tree",
    "detection_bars",
    "error_against_magnitude",
    "exponent_histogram",
    "gap_intervals",
    "gradient_scale",
    "gradient_windows",
    "health_history",
    "losses",
    "matmul_rates",
    "memory_bars",
    "outlier_errors",
    "paired_differences",
    "pillars",
    "power_curves",
    "published_ratios",
    "reduction_errors",
    "regime_colours",
    "regime_curves",
    "relative_gaps",
    "rooflines",
    "rounding_steps",
    "running_sums",
    "scale_chase",
    "scale_rules",
    "seed_ranges",
    "source_line",
    "time_splits",
    "training_curves",
    "training_step",
    "update_thresholds",
    "updates_lost",
    "use_style",
    "windows",
]
