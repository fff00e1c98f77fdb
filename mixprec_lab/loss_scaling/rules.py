"""The rules by which frameworks move a dynamic loss scale, as data, and a simulator that runs any of them.

Four questions tell the rules apart: after how many clean steps the scale grows, how many overflows it takes to back
off, when that patience is refilled, and what happens at the floor.  Read in the sources of PyTorch 2.13
(``aten/src/ATen/native/cuda/AmpKernels.cu``, ``amp_update_scale_cuda_kernel``, and ``torch/amp/grad_scaler.py``),
DeepSpeed (``deepspeed/runtime/fp16/loss_scaler.py``, ``DynamicLossScaler.update_scale``) and Megatron-LM
(``megatron/core/optimizer/grad_scaler.py``, ``DynamicGradScaler.update``), late 2025.
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from mixprec_lab.formats import FORMATS, FloatFormat, FormatLike, get_format

LARGEST_SCALE = FORMATS["fp32"].largest
Refill = Literal["growth", "clean_step"]


class LossScaleAtMinimum(RuntimeError):
    """An overflow asks for a scale below the floor of a rule that ends the run there."""


class ScalerState(NamedTuple):
    """What a rule remembers between steps."""

    scale: float
    clean: int  #: steps without overflow since the last overflow
    hysteresis_left: int  #: the next overflow backs off if this is 1; else it costs one


@dataclass(frozen=True)
class ScalerRule:
    """When a dynamic loss scale grows and when it backs off.  Scales are rounded to FP32 after every change.

    A growth beyond ``max_scale`` is refused: the scale stays, and the next window starts.  ``min_scale`` 0 means no
    floor: the scale can reach 0.  Raises ValueError, naming the field, for a rule that makes no sense.
    """

    name: str
    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    window: int = 2000  #: clean steps to a growth
    grace: int = 0  #: clean steps after an overflow (and at the start) that do not count toward the window
    hysteresis: int = 1  #: overflows that it takes to back off; 1: every one does
    refill: Refill = "growth"  #: what gives the full hysteresis back: a growth, or every clean step
    min_scale: float = 0.0
    max_scale: float = LARGEST_SCALE
    raises_at_minimum: bool = False  #: an overflow that should back off at ``min_scale`` ends the run

    def __post_init__(self) -> None:
        checks = {
            "min_scale": (0 <= self.min_scale < math.inf, "at least 0 and finite"),
            "max_scale": (0 < self.max_scale <= LARGEST_SCALE, "positive and at most FP32's largest"),
            "init_scale": (
                0 < self.init_scale < math.inf and self.min_scale <= self.init_scale <= self.max_scale,
                f"positive, finite and within [{self.min_scale:g}, {self.max_scale:g}]",
            ),
            "growth_factor": (1 < self.growth_factor < math.inf, "above 1 and finite"),
            "backoff_factor": (0 < self.backoff_factor < 1, "between 0 and 1"),
            "window": (_whole(self.window) and self.window >= 1, "a whole number of at least 1"),
            "grace": (_whole(self.grace) and self.grace >= 0, "a whole number of at least 0"),
            "hysteresis": (_whole(self.hysteresis) and self.hysteresis >= 1, "a whole number of at least 1"),
            "refill": (self.refill in ("growth", "clean_step"), "'growth' or 'clean_step'"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise ValueError(f"expected {name} to be {wanted}, got {getattr(self, name)!r}")

    def start(self) -> ScalerState:
        """The state before the first step."""
        return ScalerState(to_fp32(self.init_scale), 0, self.hysteresis)

    def update(self, state: ScalerState, overflow: bool) -> ScalerState:
        """The state after a step whose gradients were finite, or were not (``overflow``).

        Raises LossScaleAtMinimum where the rule says so.
        """
        return self._after_overflow(state) if overflow else self._after_clean_step(state)

    def _after_overflow(self, state: ScalerState) -> ScalerState:
        if state.hysteresis_left > 1:
            return ScalerState(state.scale, 0, state.hysteresis_left - 1)
        if self.raises_at_minimum and state.scale <= self.min_scale:
            raise LossScaleAtMinimum(
                f"Current loss scale already at minimum ({self.min_scale:g}), and the gradients still overflow: a "
                f"smaller scale cannot cure this. Look for a NaN or inf in the data, the loss or the weights, or "
                f"train in BF16"
            )
        backed_off = max(to_fp32(state.scale * self.backoff_factor), self.min_scale)
        return ScalerState(backed_off, 0, state.hysteresis_left)

    def _after_clean_step(self, state: ScalerState) -> ScalerState:
        clean = state.clean + 1
        counted = clean - self.grace
        grows = counted > 0 and counted % self.window == 0
        grown = to_fp32(state.scale * self.growth_factor) if grows else state.scale
        refilled = grows or self.refill == "clean_step"
        return ScalerState(
            grown if grown <= self.max_scale else state.scale,
            clean,
            self.hysteresis if refilled else state.hysteresis_left,
        )


def _whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def to_fp32(x: float) -> float:
    """``x`` rounded to FP32 (JavaScript's ``Math.fround``); inf beyond its range."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.inf


#: torch: no hysteresis, no floor; its kernel refuses a growth that FP32 cannot hold.
#: deepspeed: its window skips the first clean step; ``consecutive_hysteresis`` is off; the run ends at the floor.
#: megatron: as started by its command line (``--initial-loss-scale``, ``--loss-scale-window``, ``--hysteresis``, ...).
RULES = MappingProxyType({
    rule.name: rule
    for rule in (
        ScalerRule("torch"),
        ScalerRule("deepspeed", window=1000, grace=1, hysteresis=2, min_scale=1.0, raises_at_minimum=True),
        ScalerRule("megatron", init_scale=2.0**32, window=1000, hysteresis=2, min_scale=1.0),
    )
})  # fmt: skip


def get_rule(x: "str | ScalerRule") -> ScalerRule:
    """The rule that ``x`` names, or ``x`` itself; KeyError, listing the names, for anything else."""
    if isinstance(x, ScalerRule):
        return x
    if x not in RULES:
        raise KeyError(f"expected a ScalerRule or one of {', '.join(RULES)}, got {x!r}")
    return RULES[x]


@dataclass(frozen=True)
class ScalerRun:
    """What a rule did, step by step; the lists have one entry for each step that was run."""

    rule: ScalerRule
    format: FloatFormat
    batch_size: int
    scale_before: list[float] = field(repr=False)
    overflow: list[bool] = field(repr=False)  #: the step was skipped
    scale_after: list[float] = field(repr=False)
    hysteresis_left: list[int] = field(repr=False)  #: after the step
    ended_at: int | None = None  #: the step at which a rule with ``raises_at_minimum`` ended the run

    @property
    def skipped(self) -> int:
        """Number of skipped steps."""
        return sum(self.overflow)

    @property
    def lost_samples(self) -> int:
        """Samples whose gradients were thrown away."""
        return self.skipped * self.batch_size

    @property
    def final_scale(self) -> float:
        """The scale after the last step; the initial one if there was none."""
        return self.scale_after[-1] if self.scale_after else self.rule.start().scale


def simulate_scaler(
    rule: "str | ScalerRule",
    gradient_stream: Iterable[float],
    fmt: FormatLike = "fp16",
    batch_size: int = 1,
) -> ScalerRun:
    """What ``rule`` does on a stream of each step's largest |gradient|, unscaled.

    A step overflows if its value times the scale, rounded to nearest, lies beyond the largest value of ``fmt``, or if
    the value is inf or NaN.  The product is taken in float64.  Raises ValueError for a negative value, a batch size
    below 1 and an unsigned format; KeyError for an unknown rule or format.
    """
    rule, fmt = get_rule(rule), get_format(fmt)
    if not fmt.signed:
        raise ValueError(f"{fmt.title} is an unsigned scale format: gradients need a sign")
    if not _whole(batch_size) or batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size!r}")
    edge, on_it = fmt.nearest_edges[2]
    run = ScalerRun(rule, fmt, batch_size, [], [], [], [])
    state, ended_at = rule.start(), None
    for step, amax in enumerate(map(float, gradient_stream)):
        if amax < 0:
            raise ValueError(f"expected magnitudes, got {amax} at step {step}: take the largest |gradient| of a step")
        scaled = amax * state.scale
        overflow = not (scaled < edge or (scaled == edge and not on_it))  # NaN is neither
        run.scale_before.append(state.scale)
        run.overflow.append(overflow)
        try:
            state = rule.update(state, overflow)
        except LossScaleAtMinimum:
            ended_at = step
        run.scale_after.append(state.scale)
        run.hysteresis_left.append(state.hysteresis_left)
        if ended_at is not None:
            break
    return replace(run, ended_at=ended_at)
