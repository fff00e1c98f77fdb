"""What the monitor says: one finding for one fault, with its place, its evidence and what to do."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mixprec_lab.formats import text_table

Severity = Literal["info", "warning", "fault"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "fault")
Answer = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class TensorFacts:
    """One tensor in numbers."""

    dtype: str
    shape: tuple[int, ...]
    amax: float  #: largest finite magnitude
    nan: int
    inf: int
    zero: int
    size: int

    def __str__(self) -> str:
        bad = ", ".join(f"{n} {word}" for n, word in ((self.nan, "NaN"), (self.inf, "inf")) if n) or "all finite"
        return f"{self.dtype} {tuple(self.shape)}, amax {self.amax:.3g}, {bad}, {self.zero} of {self.size} zero"


@dataclass(frozen=True)
class Finding:
    """One fault: its class, where and when it began, and what follows."""

    kind: str  #: a class of the catalogue (``KINDS``), or "unknown"
    severity: Severity
    step: int  #: the first step at which it is visible
    phase: str  #: data, forward, backward, optimizer or checkpoint
    module: str  #: path of the module; "input", "loss", "optimizer" or "scaler" for what is no module; "" if unknown
    op: str  #: the operation, such as "aten.exp" or "SqrtBackward0"; "" if unknown
    parameter: str  #: the parameter, by name; "" if there is no single one
    evidence: str  #: what was seen, in numbers
    advice: str  #: what to do
    tensor: TensorFacts | None = None
    handled: bool = False  #: the loop dealt with it: a scaler skipped the step
    reproducible: Answer = "unknown"  #: whether a replay of the step showed it again
    scale_dependent: Answer = "unknown"  #: whether it depends on the loss scale
    count: int = 1  #: steps at which it was seen
    last_step: int = -1  #: the last of them

    def __str__(self) -> str:
        place = " ".join(part for part in (self.module or self.parameter, self.op) if part)
        seen = "" if self.count == 1 else f", seen at {self.count} steps up to {self.last_step}"
        head = f"[{self.severity}] step {self.step}{seen}, {self.phase}: {self.kind}"
        head += f" in {place}" if place else ""
        lines = [head, f"  seen: {self.evidence}", f"  do: {self.advice}"]
        if self.tensor is not None:
            lines.insert(2, f"  tensor: {self.tensor}")
        return "\n".join(lines)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two findings the same fault, seen twice."""
        return self.kind, self.module or self.parameter, self.op

    def again(self, step: int) -> "Finding":
        """The same fault, seen once more."""
        return replace(self, count=self.count + (step != max(self.last_step, self.step)), last_step=step)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has; infinities as text."""
        return asdict(self)


def report(findings: Iterable[Finding]) -> str:
    """All findings as a short text, the worst first; one line if there are none."""
    ordered = sorted(findings, key=lambda f: (-SEVERITIES.index(f.severity), f.step))
    return "\n".join(map(str, ordered)) if ordered else "no findings"


def table(findings: Iterable[Finding]) -> str:
    """All findings as a text table, one line each."""
    rows = [(f.step, f.severity, f.kind, f.phase, f.module or f.parameter, f.op, f.count) for f in findings]
    return text_table(("step", "severity", "kind", "phase", "where", "operation", "seen"), rows)


def as_json(findings: Iterable[Finding]) -> str:
    """All findings as a JSON array."""
    return json.dumps([f.as_dict() for f in findings], indent=1)


#: kind -> (phase, what to do); the first column of the catalogue, and a few more
KINDS: dict[str, tuple[str, str]] = {
    "loss_scale_too_high": ("backward",
        "lower init_scale (2**16 is usual) or let dynamic scaling settle; alarm on skips in a row"),
    "static_scale_no_check": ("optimizer",
        "use a GradScaler, which looks before it steps, or skip the step when a gradient is not finite"),
    "grad_underflow": ("backward", "scale the loss (GradScaler), or use BF16"),
    "clip_before_unscale": ("optimizer", "call scaler.unscale_(optimizer) before clip_grad_norm_"),
    "optimizer_step_bypasses_scaler": ("optimizer",
        "call scaler.step(optimizer), never optimizer.step(), on scaled gradients"),
    "missing_scaler_update": ("optimizer", "call scaler.update() once after the last scaler.step() of a step"),
    "partial_loss_scaling": ("backward", "scale the sum of the losses, or every term: scaler.scale(a + b)"),
    "unscale_per_micro_batch": ("backward", "unscale once a step, after the last backward of the accumulation"),
    "scheduler_on_skipped_step": ("optimizer",
        "step the scheduler only when the optimizer has stepped: compare the scale before and after update()"),
    "scaler_state_not_restored": ("checkpoint", "save and load scaler.state_dict() with the model and the optimizer"),
    "scale_not_representable": ("backward", "compute the loss in FP32: cast the output before the reduction"),
    "fp16_overflow": ("forward", "compute this operation in FP32, scale its input down, or use BF16"),
    "log_of_zero": ("forward",
        "use log_softmax or cross_entropy on the logits, or clamp the argument away from zero"),
    "masked_softmax": ("forward", "use a finite mask value, or give fully masked rows a value of their own"),
    "division_by_zero": ("forward", "add an epsilon that the format holds, or mask the element before the division"),
    "log_of_negative": ("forward", "clamp the argument, or use log1p and expm1 where it comes close to zero"),
    "sqrt_of_negative": ("forward", "clamp the argument at zero: a difference of nearly equal numbers went below it"),
    "zero_over_zero": ("forward", "leave out empty groups, or add one to the count"),
    "inf_times_zero": ("forward", "select with torch.where instead of multiplying by a mask"),
    "acos_at_one": ("backward", "clamp the argument a little inside of -1 and 1, or use atan2"),
    "all_labels_ignored": ("data", "skip the batch, or divide by max(1, number of labels)"),
    "batchnorm_one_value": ("forward", "drop the last small batch, or use a norm that needs no batch"),
    "scheduler_before_optimizer": ("optimizer", "step the optimizer first, then the scheduler"),
    "update_before_step": ("optimizer", "call scaler.update() once, after scaler.step()"),
    "zero_grad_missing": ("optimizer", "call optimizer.zero_grad() once a step, before backward"),
    "parameter_not_in_optimizer": ("optimizer", "build the optimizer after the layers are replaced"),
    "no_gradients": ("backward", "compute this part with gradients enabled, or freeze it with requires_grad_(False)"),
    "master_not_copied": ("optimizer", "copy the masters back into the model after each step"),
    "optimizer_state_not_restored": ("checkpoint", "save and load optimizer.state_dict() with the model"),
    "scheduler_state_not_restored": ("checkpoint", "save and load scheduler.state_dict() with the optimizer"),
    "optimizer_state_cast": ("checkpoint", "keep the optimizer state in FP32: load the checkpoint without a cast"),
    "second_moment_underflow": ("optimizer", "keep the optimizer state in FP32: squares of gradients leave FP16"),
    "invalid_argument": ("forward", "keep the argument inside the domain of the function: clamp it first"),
    "exploding_lr": ("optimizer", "lower the learning rate, warm it up, or clip the gradients"),
    "sqrt_zero_grad": ("backward",
        "use sqrt(x + eps), or a norm whose gradient at zero is defined: torch.linalg.vector_norm"),
    "where_trap": ("backward", "make the argument safe before the function: torch.where(mask, x, 1).log()"),
    "clip_spreads_nan": ("optimizer", "clip with error_if_nonfinite=True, or look at the norm and skip the step"),
    "eps_underflow": ("optimizer",
        "keep FP32 master weights, use fused=True, or an eps that the format holds (1e-4 in FP16)"),
    "update_swamping": ("optimizer",
        "keep FP32 master weights, or round stochastically, or carry a Kahan compensation"),
    "weight_decay_lost": ("optimizer", "keep FP32 master weights: 1 - lr * weight_decay rounds to 1 in this format"),
    "ema_stagnation": ("optimizer", "keep the average in FP32"),
    "fp16_master_weights_with_scaler": ("optimizer",
        "keep the parameters in FP32 and use autocast: GradScaler refuses FP16 gradients"),
    "second_moment_frozen": ("optimizer", "keep the optimizer state in FP32, or beta2 at 0.95 or below"),
    "residual_swamping": ("forward",
        "keep the residual stream in FP32: autocast does, .bfloat16() on the model does not"),
    "nan_in_data": ("data", "check batches before they are used; report and drop the sample"),
    "inf_in_label": ("data", "check the targets before the loss"),
    "index_out_of_range": ("forward", "compare ids with num_embeddings before the device sees them"),
    "ids_cast_to_low_precision": ("data", "cast floating-point tensors only; keep ids in int64"),
    "fp8_stale_amax": ("forward", "use current scaling, a shorter history, a margin, or block scaling"),
    "fp8_grad_underflow": ("backward", "scale gradients before the cast, and take E5M2 for them"),
    "fp8_alignment": ("forward", "fill dimensions up to multiples of 16 (32 for MXFP8)"),
    "bad_parameters": ("optimizer", "restore a checkpoint: parameters or buffers are not finite"),
    "spike": ("forward", "look at the batch; if it repeats, lower the learning rate"),
    "unknown": ("forward", "run this step at level 'deep', or with torch.autograd.detect_anomaly"),
}  # fmt: skip


def finding(kind: str, severity: Severity, step: int, evidence: str, **details: Any) -> Finding:
    """A finding of ``kind`` with the phase and the advice of ``KINDS``, unless ``details`` say otherwise."""
    phase, advice = KINDS[kind]
    chosen = {"phase": phase, "advice": advice, "module": "", "op": "", "parameter": "", "last_step": step} | details
    return Finding(kind=kind, severity=severity, step=step, evidence=evidence, **chosen)
