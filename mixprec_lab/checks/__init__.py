"""One function an exercise: it runs the reader's function and prints one line.  One file a chapter.

The line is ``Correct.``, ``Not done yet.`` (the function still returns None or ``...``, or raises NotImplementedError)
or ``Not yet: expected ..., got ... for f(...)`` with the first case that differs.  An exception in the reader's code is
shown as what was got: a check never fails with a traceback.
"""

from mixprec_lab.checks.all_regimes import mean_gaps, paired_interval, seeded_batches, seeds_for_width
from mixprec_lab.checks.amp import accumulated_step, fp16_tools, fresh_casts, logits_loss, snapshot
from mixprec_lab.checks.bf16_vs_fp16 import clip_in_fp32, exact_from, norms_by_type, sign_flip_p
from mixprec_lab.checks.block_scaling import dequantized, mx_scale, nvfp4_scales, own_blocks, transposed_operand
from mixprec_lab.checks.formats import decode_e4m3, first_lost_integer, flushed_share, reports_overflow
from mixprec_lab.checks.fp8 import convert, delayed_scale, fp8_product, resumed_scale, saturating_cast
from mixprec_lab.checks.loss_scaling import clipped_step, next_scale, scaled_loss, unscaled_in_fp32, unscales_all
from mixprec_lab.checks.master_weights import (
    first_lost_ratio,
    moving_average,
    state_bytes,
    train_on_masters,
    unscaled_step,
)
from mixprec_lab.checks.memory import adapter_states, largest_batch, saved_once, sharded_states
from mixprec_lab.checks.nan_debugging import first_bad_module, guarded_step, masked_softmax, rms_norm, safe_log
from mixprec_lab.checks.rounding import kahan_bf16, stall_point, stochastic_grid, true_sum_in_bf16, worst_relative_error
from mixprec_lab.checks.scaling_out import clipped_shards, fp16_mean, one_verdict, wide_sum
from mixprec_lab.checks.speed import drift_free_ratio, honest_ratio, kernel_time, ridge_tokens, share_of_step

__all__ = [
    "accumulated_step",
    "adapter_states",
    "clip_in_fp32",
    "clipped_shards",
    "clipped_step",
    "convert",
    "decode_e4m3",
    "delayed_scale",
    "dequantized",
    "drift_free_ratio",
    "exact_from",
    "first_bad_module",
    "first_lost_integer",
    "first_lost_ratio",
    "flushed_share",
    "fp8_product",
    "fp16_mean",
    "fp16_tools",
    "fresh_casts",
    "guarded_step",
    "honest_ratio",
    "kahan_bf16",
    "kernel_time",
    "largest_batch",
    "logits_loss",
    "masked_softmax",
    "mean_gaps",
    "moving_average",
    "mx_scale",
    "next_scale",
    "norms_by_type",
    "nvfp4_scales",
    "one_verdict",
    "own_blocks",
    "paired_interval",
    "reports_overflow",
    "resumed_scale",
    "ridge_tokens",
    "rms_norm",
    "safe_log",
    "saturating_cast",
    "saved_once",
    "scaled_loss",
    "seeded_batches",
    "seeds_for_width",
    "sharded_states",
    "share_of_step",
    "sign_flip_p",
    "snapshot",
    "stall_point",
    "state_bytes",
    "stochastic_grid",
    "train_on_masters",
    "transposed_operand",
    "true_sum_in_bf16",
    "unscaled_in_fp32",
    "unscaled_step",
    "unscales_all",
    "wide_sum",
    "worst_relative_error",
]
