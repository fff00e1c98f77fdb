"""From what an operation did to the name of the fault: rules that follow from the mechanism, not from a network."""

from mixprec_lab.nan_debugging.findings import Finding, finding
from mixprec_lab.nan_debugging.tracer import Event

_SOFTMAX = ("_softmax", "_log_softmax", "_scaled_dot_product", "_safe_softmax", "logsumexp", "_flash_attention")
_DIVISIONS = ("div", "reciprocal", "rsqrt", "true_divide")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "mv", "addmv", "dot", "_scaled_dot_product")
#: infinities in 16 bits that may vanish harmlessly: 1 / (1 + exp(-x)) is right where exp overflows
_MAY_VANISH = ("exp", "expm1", "cosh", "sinh", "log", "log2", "log10", "log1p")


def base(op: str) -> str:
    """"aten.exp_" -> "exp"."""
    return op.removeprefix("aten.").rstrip("_") if not op.endswith("__") else op.removeprefix("aten.")


def kind_of_birth(event: Event, behind_where: bool = False, grown: bool = False) -> str:
    """The fault class of a birth; "unknown" where no rule applies."""
    return _backward_kind(event, behind_where) if event.phase == "backward" else _forward_kind(event, grown)


def _forward_kind(event: Event, grown: bool) -> str:
    op, nan = base(event.op), event.extra["born"] == "nan"
    inputs = event.inputs
    last_zero = inputs[-1].zero if inputs else 0
    if op in ("xlogy", "logit") or (op.startswith("log") and not nan and op not in _SUMS_OF_LOGS):
        return "log_of_zero"
    if op.startswith("log") and op not in _SUMS_OF_LOGS and not op.startswith(_SOFTMAX):
        return "log_of_negative"
    if op in _SUMS_OF_LOGS or (nan and op.startswith(_SOFTMAX)):
        return "masked_softmax"
    if nan and op == "mul" and any(f.inf for f in inputs) and any(f.zero for f in inputs):
        return "inf_times_zero"
    if nan and op in _DIVISIONS and last_zero and event.extra.get("constant_lost"):
        return "eps_underflow"
    if nan and op in ("sub", "add", "rsub") and sum(f.inf > 0 for f in inputs) >= 2:
        return "masked_softmax"
    if nan and (op in ("std", "var", "std_mean", "var_mean", "mean") or (op in _DIVISIONS and last_zero)):
        return "zero_over_zero"
    if op in _DIVISIONS and last_zero:
        return "eps_underflow" if event.extra.get("constant_lost") else "division_by_zero"
    if nan and op in _DOMAINS:
        return _DOMAINS[op]
    if event.output.dtype == "float16" and not nan:
        return "fp16_overflow"
    if op.startswith(_PRODUCTS) or grown:
        return "exploding_lr"
    return "unknown"


def _backward_kind(event: Event, behind_where: bool) -> str:
    node, nan = event.node, event.extra["born"] == "nan"
    zero_gradient = any(f.zero for f in event.inputs)
    if behind_where and nan and zero_gradient:
        return "where_trap"
    if node.startswith(("Acos", "Asin", "Atanh")):
        return "acos_at_one"
    if node.startswith(("Sqrt", "LinalgVectorNorm", "Norm", "Cdist", "Pow", "Std", "Rsqrt")):
        return "sqrt_zero_grad"
    if node.startswith(("Log", "Div", "Reciprocal", "Xlogy", "SpecialEntr")):
        return "where_trap" if nan and zero_gradient else "division_by_zero"
    if event.output.dtype == "float16":
        return "fp16_overflow"
    return "unknown"


_SUMS_OF_LOGS = ("logsumexp", "logaddexp", "logaddexp2", "_logcumsumexp")
_DOMAINS = {
    "sqrt": "sqrt_of_negative", "rsqrt": "sqrt_of_negative", "pow": "sqrt_of_negative",
    "acos": "acos_at_one", "asin": "acos_at_one", "acosh": "acos_at_one", "atanh": "acos_at_one",
    "erfinv": "acos_at_one",
}  # fmt: skip


def matters(event: Event, loss_bad: bool, gradients_bad: bool) -> bool:
    """Whether a birth did harm: the loss or a gradient shows it, or it vanished in 16 bits where it should not."""
    if event.phase == "backward":
        return gradients_bad
    if loss_bad or gradients_bad:
        return True
    narrow = event.output.dtype in ("float16", "bfloat16")
    return narrow and event.extra["born"] == "inf" and not base(event.op).startswith(_MAY_VANISH)


def place(event: Event) -> dict[str, str]:
    """Module and operation of an event, as a finding has them."""
    outside = {"forward": "model", "loss": "loss", "optimizer": "optimizer", "backward": "loss"}[event.phase]
    return {"module": event.module or outside, "op": f"{event.op} ({event.node})" if event.node else event.op}


def birth_finding(event: Event, kind: str, step: int, severity: str = "fault", **details: object) -> Finding:
    """The finding for a birth."""
    word = "NaN" if event.extra["born"] == "nan" else "infinity"
    shown = "; ".join(map(str, event.inputs)) or "no floating-point input"
    phase = "backward" if event.phase == "backward" else "forward"
    return finding(
        kind, severity, step, f"first {word}, from {shown}", phase=phase, tensor=event.output, **place(event), **details
    )


def precision_findings(events: list[Event], step: int) -> list[Finding]:
    """Findings for digits that vanished: swamped sums, flushed and saturated casts, zeroed products."""
    found = []
    for event in events:
        kind = _precision_kind(event)
        if kind is not None:
            evidence = f"{event.share:.0%} of the elements {_WORDS[event.what]}: {event.output}"
            where = {"tensor": event.output} | place(event)
            if kind == "ids_cast_to_low_precision":
                where["module"] = event.module or "input"
            elif event.phase == "backward":
                where["phase"] = "backward"
            found.append(finding(kind, "fault", step, evidence, **where))
    return found


_WORDS = {
    "swamped": "did not change although something was added",
    "flushed": "became zero in the cast",
    "saturated": "were cut off at the largest value",
    "zeroed": "are zero although the exact product is not",
    "misaligned": "belong to operands whose sizes are no multiples of 16",
    "merged": "are whole numbers that the format cannot tell from their neighbours",
}

def _precision_kind(event: Event) -> str | None:
    backward, dtype = event.phase == "backward", event.output.dtype
    if event.what == "misaligned":
        return "fp8_alignment"
    if event.what == "merged":
        return None if backward else "ids_cast_to_low_precision"
    if event.what == "swamped":
        if event.op.endswith("_"):
            return None if backward else "update_swamping" if event.phase == "optimizer" else "ema_stagnation"
        return "residual_swamping" if event.phase == "forward" and event.module else None
    if event.what == "saturated":
        return "fp8_stale_amax"
    if event.what == "flushed" and dtype.startswith("float8"):
        return "fp8_grad_underflow" if backward else "fp8_stale_amax"
    if event.what in ("flushed", "zeroed") and backward and dtype == "float16":
        return "grad_underflow"
    return None
