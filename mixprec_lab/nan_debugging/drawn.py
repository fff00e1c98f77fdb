"""Patients that one draws: the same small training run under a learning rate, a precision, a scaler and a spike.

Nothing says what is wrong with such a run: that is for its examinations.  So they are not judged.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch.nn import functional as F

from mixprec_lab import device
from mixprec_lab.nan_debugging.faults import Probe, Run
from mixprec_lab.nan_debugging.faults._networks import mlp, regression, sgd
from mixprec_lab.nan_debugging.records import PatientRecord, Result, recorded

STEPS, SPIKE_STEP, SPIKE = 12, 6, 1e5

#: what may be chosen, by parameter; the first is the gentlest
DRAWN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "rate": {"0.001": "0.001", "0.1": "0.1", "100": "100"},
        "precision": {"fp32": "FP32", "bf16": "BF16 weights", "fp16": "FP16 autocast"},
        "scaler": {"off": "none", "on": "GradScaler"},
        "spike": {"off": "none", "on": f"at step {SPIKE_STEP}"},
    }
)


def draw(rate: str, precision: str, scaler: str, spike: str, seed: int = 0) -> PatientRecord:
    """The record of 12 steps of SGD on a small regression, as chosen; no examination is judged.

    Raises ValueError for a choice that ``DRAWN`` has not.
    """
    chosen = {"rate": rate, "precision": precision, "scaler": scaler, "spike": spike}
    for key, value in chosen.items():
        if value not in DRAWN[key]:
            raise ValueError(f"expected {key} to be one of {', '.join(DRAWN[key])}, got {value!r}")
    return _drawn(rate, precision, scaler, spike, seed)


@functools.cache
def _drawn(rate: str, precision: str, scaler: str, spike: str, seed: int) -> PatientRecord:
    with device.one_thread():
        found = recorded(lambda: _run(float(rate), precision, scaler == "on", spike == "on", seed), seed, None)
    spiked = f"at step {SPIKE_STEP} a batch {SPIKE:,.0f} times too large" if spike == "on" else "no spike"
    scaled = "a GradScaler that starts at 65,536" if scaler == "on" else "no scaler"
    unjudged = {key: Result(result.text, "unjudged") for key, result in found.results.items()}
    title = f"SGD with learning rate {rate}, {DRAWN['precision'][precision]}, {scaled}, {spiked}"
    return replace(found, name="own", title=title, family="", place="", results=MappingProxyType(unjudged))


def _run(rate: float, precision: str, scaled: bool, spiked: bool, seed: int) -> Run:
    model, (x, y) = mlp(seed), regression(seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    optimizer = sgd(model.to(dtype), rate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)

    def step(i: int, probe: Probe) -> None:
        optimizer.zero_grad()
        batch = x * SPIKE if spiked and i == SPIKE_STEP else x
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            out = model(batch.to(dtype))
        loss = F.mse_loss(out.float(), y)
        probe.loss(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        probe.gradients()
        scaler.step(optimizer)
        scaler.update()

    return Run(model, [optimizer], step, STEPS, scaler if scaled else None)
