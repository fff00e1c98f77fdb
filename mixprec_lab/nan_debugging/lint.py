"""Faults that can be read off dtypes and hyper-parameters, and off the ids of a batch."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mixprec_lab.formats import get_format
from mixprec_lab.nan_debugging.findings import Finding, finding

LOW = (torch.float16, torch.bfloat16)


def lint_optimizer(optimizer: Any, step: int, used_scaler: bool, names: dict[int, str]) -> Iterator[Finding]:
    """What the dtypes of an optimizer's parameters and state make of its hyper-parameters.

    Only torch's own optimizers are judged, and not their fused kernels, which compute in FP32: others may round
    stochastically or carry a compensation.
    """
    own = type(optimizer).__module__.startswith("torch.optim")
    for group in optimizer.param_groups:
        low = [p for p in group["params"] if p.dtype in LOW and id(p) in names]
        if not low:
            continue
        if used_scaler and any(p.dtype == torch.float16 for p in low):
            first = next(p for p in low if p.dtype == torch.float16)
            yield finding(
                "fp16_master_weights_with_scaler", "fault", step,
                f"{len(low)} parameters are FP16 and a GradScaler is in use",
                module="scaler", op="unscale_", parameter=names.get(id(first), ""),
            )  # fmt: skip
        if own and not group.get("fused"):
            yield from _lint_group(optimizer, group, low, step, names)


def _lint_group(optimizer: Any, group: dict, low: list, step: int, names: dict[int, str]) -> Iterator[Finding]:
    kind = type(optimizer).__name__
    dtype = low[0].dtype
    title, half_ulp = get_format(dtype).title, get_format(dtype).unit_roundoff / 2
    where = {"module": "optimizer", "parameter": names.get(id(low[0]), "")}
    eps = group.get("eps")
    if eps and torch.tensor(eps, dtype=dtype).item() == 0:
        yield finding("eps_underflow", "fault", step, f"{kind}: eps {eps:g} is 0 in {title}", op="addcdiv", **where)
    decay = group.get("weight_decay") or 0.0
    decoupled = kind == "AdamW" or group.get("decoupled_weight_decay")
    rate = float(group["lr"]) * decay
    if decoupled and 0 < rate < half_ulp:
        evidence = f"{kind}: 1 - lr * weight_decay = 1 - {rate:.1e} rounds every weight back to itself in {title}"
        yield finding("weight_decay_lost", "fault", step, evidence, op="mul_", **where)
    betas = group.get("betas")
    narrow = [p for p in low if _second_moment(optimizer, p) in LOW]
    if betas and narrow and 1 - betas[1] < half_ulp:
        evidence = f"{kind}: exp_avg_sq is {title}, and {betas[1]:g} times a value rounds back to it: it cannot decay"
        where["parameter"] = names.get(id(narrow[0]), "")
        yield finding("second_moment_frozen", "fault", step, evidence, op="mul_ exp_avg_sq", **where)


def _second_moment(optimizer: Any, p: torch.Tensor) -> torch.dtype | None:
    state = optimizer.state.get(p, {})
    moment = state.get("exp_avg_sq")
    return moment.dtype if isinstance(moment, torch.Tensor) else None


def lint_moments(optimizer: Any, step: int, names: dict[int, str]) -> Iterator[Finding]:
    """Second moments in 16 bits that are zero where the gradient is not: its square left the format."""
    for group in optimizer.param_groups:
        low = [p for p in group["params"] if p.grad is not None and _second_moment(optimizer, p) in LOW]
        zero = total = 0
        for p in low:
            moved = p.grad != 0
            lost = moved & (optimizer.state[p]["exp_avg_sq"] == 0)
            zero, total = zero + int(lost.sum()), total + int(moved.sum())
        if total >= 8 and zero / total > 0.5:
            title = get_format(_second_moment(optimizer, low[0])).title
            evidence = f"{zero / total:.0%} of exp_avg_sq are zero in {title} although the gradient is not"
            where = {"module": "optimizer", "op": "addcmul_ exp_avg_sq", "parameter": names.get(id(low[0]), "")}
            yield finding("second_moment_underflow", "fault", step, evidence, **where)


def lint_inputs(inputs: Iterable[torch.Tensor], model: nn.Module, step: int) -> Iterator[Finding]:
    """Ids that went through 16 bits: integers above the last one that the format can tell from its neighbour.

    Reads from the device: for a first look, not for every step.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    for x in inputs:
        if x.numel() == 0 or not embeddings:
            continue
        if x.dtype in LOW:
            whole = bool((x == x.round()).all())
            exact = 256 if x.dtype == torch.bfloat16 else 2048
            if whole and float(x.float().abs().max()) > exact:
                title = get_format(x.dtype).title
                evidence = f"the model's input is {title} and holds whole numbers only, up to {float(x.max()):g}"
                yield finding("ids_cast_to_low_precision", "fault", step, evidence, module="input", op="_to_copy")
        elif x.dtype in (torch.int64, torch.int32):
            large, small = x[x.abs() > 256].unique(), x[x.abs() <= 256]
            finer = bool((small % 2 != 0).any())  # ids that are all even need no explanation
            if len(large) >= 12 and finer and bool((large == large.float().bfloat16().long()).all()):
                evidence = f"{len(large)} different ids above 256, and every one is a BF16 number"
                yield finding("ids_cast_to_low_precision", "fault", step, evidence, module="input", op="_to_copy")
