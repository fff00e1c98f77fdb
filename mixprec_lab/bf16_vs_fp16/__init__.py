"""BF16 bought the range of FP32 for three bits of precision, and most choices between the two formats follow from that.

``compare_bf16_fp16`` measures both sides of the trade on weights, gradients, sums and updates.  ``check_conversion``
says what a checkpoint loses on its way from one format to the other.  ``recommend`` turns hardware, task and priority
into one recommendation, every part with its reason and source; its knowledge is a table of rules.  ``BF16Trainer``
trains in BF16 and keeps in FP32 what needs it.  ``paired_comparison`` tells a loss of precision from seed noise.
"""

from mixprec_lab.bf16_vs_fp16.ablation import PairedComparison, paired_comparison
from mixprec_lab.bf16_vs_fp16.checkpoints import ConversionReport, check_conversion
from mixprec_lab.bf16_vs_fp16.compare import (
    BF16FP16Comparison,
    RoundingCost,
    compare_bf16_fp16,
    layer_outputs,
    recorded_tensors,
    rounding_cost,
)
from mixprec_lab.bf16_vs_fp16.conversion import NORM_TYPES, bf16_autocast, to_bf16
from mixprec_lab.bf16_vs_fp16.hardware import (
    HARDWARE,
    Detected,
    Hardware,
    bf16_support,
    cpu_flags,
    detect_hardware,
    get_hardware,
)
from mixprec_lab.bf16_vs_fp16.rules import RULES, TASKS, Rule, Task
from mixprec_lab.bf16_vs_fp16.selector import (
    Decision,
    PrecisionSelector,
    Recommendation,
    get_task,
    recommend,
    tables,
)
from mixprec_lab.bf16_vs_fp16.sources import SOURCES, Source
from mixprec_lab.bf16_vs_fp16.trainer import UPDATES, BF16Step, BF16Trainer

__all__ = [
    "HARDWARE",
    "NORM_TYPES",
    "RULES",
    "SOURCES",
    "TASKS",
    "UPDATES",
    "BF16FP16Comparison",
    "BF16Step",
    "BF16Trainer",
    "ConversionReport",
    "Decision",
    "Detected",
    "Hardware",
    "PairedComparison",
    "PrecisionSelector",
    "Recommendation",
    "RoundingCost",
    "Rule",
    "Source",
    "Task",
    "bf16_autocast",
    "bf16_support",
    "check_conversion",
    "compare_bf16_fp16",
    "cpu_flags",
    "detect_hardware",
    "get_hardware",
    "get_task",
    "layer_outputs",
    "paired_comparison",
    "recommend",
    "recorded_tensors",
    "rounding_cost",
    "tables",
    "to_bf16",
]
