"""One model under every regime: which differences are the regime's, and which are the seed's.

A ``Regime`` says what is narrow: weights, products, gradients, optimizer, and what is scaled.  ``run_all`` trains a
small GPT and a small autoencoder under each, by the trainers of the other chapters, with the same initial weights and
the same batches for each seed.  Then differences are pairs: ``differences`` gives them with intervals,
``seeds_needed`` says how many pairs a difference needs, ``ablate`` changes one component at a time, and ``compare``
does all that with a model of yours.
"""

from mixprec_lab.regimes.ablation import ABLATIONS, Ablation, ablate, changed_component
from mixprec_lab.regimes.comparison import Comparison, compare
from mixprec_lab.regimes.emulation import EmulatedProducts
from mixprec_lab.regimes.engines import Engine, build
from mixprec_lab.regimes.gpt import GPT, corpus, gpt
from mixprec_lab.regimes.records import load_record, runs_of, save_record, validate_record
from mixprec_lab.regimes.regime import REGIMES, VARIANTS, Regime, get_regime, regime_table
from mixprec_lab.regimes.runs import check_pairs, differences, diverged, finals, run_all
from mixprec_lab.regimes.statistics import (
    PairedDifference,
    paired_difference,
    power,
    seeds_needed,
    t_quantile,
    unpaired_interval,
)
from mixprec_lab.regimes.tasks import TASKS, Task, get_task
from mixprec_lab.regimes.training import Run, train

__all__ = [
    "ABLATIONS",
    "GPT",
    "REGIMES",
    "TASKS",
    "VARIANTS",
    "Ablation",
    "Comparison",
    "EmulatedProducts",
    "Engine",
    "PairedDifference",
    "Regime",
    "Run",
    "Task",
    "ablate",
    "build",
    "changed_component",
    "check_pairs",
    "compare",
    "corpus",
    "differences",
    "diverged",
    "finals",
    "get_regime",
    "get_task",
    "gpt",
    "load_record",
    "paired_difference",
    "power",
    "regime_table",
    "run_all",
    "runs_of",
    "save_record",
    "seeds_needed",
    "t_quantile",
    "train",
    "unpaired_interval",
    "validate_record",
]
