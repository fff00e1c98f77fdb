"""The autocast microscope: a small transformer as its operators, and what autocast makes of each in every setting."""

import contextlib
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import traitlets as t
from torch import nn
from torch.overrides import TorchFunctionMode

from mixprec_lab.amp import RULES, AutocastCall, AutocastTrace, trace_autocast
from mixprec_lab.device import one_thread
from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.formats import FORMATS
from mixprec_lab.models import transformer

AUTOCAST = ("off", "fp16", "bf16")
POLICIES = ("cuda", "cpu")
MANUAL = ("none", "half", "bfloat16")
SOFTMAX = ("inside", "outside", "float")
PASSES = ("first", "second")
NONE = "\u2014"


class Step(NamedTuple):
    """One operator of the model, in the order of the forward pass."""

    label: str
    lane: str  #: the part of the model it is drawn in
    module: str
    operations: tuple[str, ...]  #: what it may be called in a trace


_BLOCK, _ATTENTION = "blocks.0", "blocks.0.attention"
STEPS = (
    Step("embed", "embedding", "embed", ("linear",)),
    Step("+ position", "embedding", "", ("add",)),
    Step("norm 1", "attention", f"{_BLOCK}.norm1", ("layer_norm",)),
    Step("query", "attention", f"{_ATTENTION}.query", ("linear",)),
    Step("key", "attention", f"{_ATTENTION}.key", ("linear",)),
    Step("value", "attention", f"{_ATTENTION}.value", ("linear",)),
    Step("scale", "attention", _ATTENTION, ("mul",)),
    Step("logits", "attention", _ATTENTION, ("matmul",)),
    Step("float()", "attention", _ATTENTION, ("float",)),
    Step("softmax", "attention", _ATTENTION, ("softmax",)),
    Step("weighted sum", "attention", _ATTENTION, ("matmul",)),
    Step("output", "attention", f"{_ATTENTION}.out", ("linear",)),
    Step("residual 1", "attention", _BLOCK, ("add",)),
    Step("norm 2", "MLP", f"{_BLOCK}.norm2", ("layer_norm",)),
    Step("expand", "MLP", f"{_BLOCK}.expand", ("linear",)),
    Step("gelu", "MLP", _BLOCK, ("gelu",)),
    Step("contract", "MLP", f"{_BLOCK}.contract", ("linear",)),
    Step("residual 2", "MLP", _BLOCK, ("add",)),
    Step("norm 3", "head and loss", "norm", ("layer_norm",)),
    Step("mean", "head and loss", "", ("mean",)),
    Step("head", "head and loss", "head", ("linear",)),
    Step("log-softmax", "head and loss", "", ("log_softmax",)),
    Step("loss", "head and loss", "", ("cross_entropy", "cross_entropy_loss", "nll_loss")),
)
LABELS = tuple(step.label for step in STEPS)
_BESIDE = ("query", "key", "value")  # drawn one above the other
_OPTIONAL = ("float()", "log-softmax")  # not in every setting


class AutocastMicroscope(Exhibit):
    """A transformer of one block (``models.transformer``) as its operators, each in the dtype of its result.

    ``autocast`` is off, fp16 or bf16; ``policy`` says whose lists, cuda or cpu (where there is no CUDA device they are
    applied to the operators of the CPU, see ``amp.trace_autocast``); ``manual`` is what was done to the model before:
    none, half (``model.half()``) or bfloat16; ``softmax`` runs inside of autocast, outside
    (``autocast(enabled=False)``) or as float (outside, on ``logits.float()``).  Images and labels stay FP32 and int64.
    Two batches go through one autocast region, and ``forward_pass`` (first, second) says which is shown: the second
    finds the weights in the cache.  ``operator`` is one of ``LABELS``; one that a setting does not have gives the
    operator after it.

    Every setting is run when the first microscope is made (a second or two).  TraitError for any other value.
    """

    _esm = es_module("autocast_microscope")
    _kind = "autocast-microscope"

    steps = t.List(help="label, lane, module and whether it stands beside the one before").tag(sync=True)
    rules = t.Dict(help="autocast list -> what it does, in a sentence").tag(sync=True)
    calls = t.List(help="step, operation, inputs, output, list, backward, casts, reused; each different one once").tag(
        sync=True
    )
    settings = t.Dict(help="setting -> calls of both passes, verdict, source").tag(sync=True)
    autocast = t.Unicode("fp16").tag(sync=True)
    policy = t.Unicode("cuda").tag(sync=True)
    manual = t.Unicode("none").tag(sync=True)
    softmax = t.Unicode("inside").tag(sync=True)
    forward_pass = t.Unicode("first").tag(sync=True)
    operator = t.Unicode("softmax").tag(sync=True)

    def __init__(
        self,
        autocast: str = "fp16",
        policy: str = "cuda",
        manual: str = "none",
        softmax: str = "inside",
        *,
        forward_pass: str = "first",
        operator: str = "softmax",
        name: str | None = None,
    ) -> None:
        state = {"autocast": autocast, "policy": policy, "manual": manual, "softmax": softmax}
        state |= {"forward_pass": forward_pass, "operator": operator}
        super().__init__(table_of(("fp32", "fp16", "bf16")), name, **state)
        self.steps = [[s.label, s.lane, s.module, s.label in _BESIDE[1:]] for s in STEPS]
        self.rules = dict(RULES)
        self.calls, self.settings = _packed()

    _check_autocast = t.validate("autocast")(choice("autocast", lambda self: AUTOCAST))
    _check_policy = t.validate("policy")(choice("policy", lambda self: POLICIES))
    _check_manual = t.validate("manual")(choice("manual", lambda self: MANUAL))
    _check_softmax = t.validate("softmax")(choice("softmax", lambda self: SOFTMAX))
    _check_pass = t.validate("forward_pass")(choice("forward_pass", lambda self: PASSES))
    _check_operator = t.validate("operator")(choice("operator", lambda self: LABELS))

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        found = _setting(*_key(self.autocast, self.policy, self.manual, self.softmax))
        calls = found.passes[PASSES.index(self.forward_pass)]
        call = next(c for c in calls if c.step >= LABELS.index(self.operator))
        given = sorted((c.output for c in calls if c.output), key=("fp32", "fp16", "bf16").index)
        counts = [f"{given.count(name)} in {_title(name)}" for name in dict.fromkeys(given)]
        return {
            "verdict": found.verdict,
            "operation": f"{LABELS[call.step]}: {call.operation}",
            "module": STEPS[call.step].module or "the model itself",
            "inputs": ", ".join(map(_title, call.inputs)) or NONE,
            "output": _title(call.output) if call.output else NONE,
            "rule": f"{call.rule}: {RULES[call.rule]}" if call.rule in RULES else call.rule,
            "backward": _title(call.backward) if call.backward else NONE,
            "op-casts": f"{call.casts} made, {call.reused} reused",
            "counts": ", ".join(counts) or NONE,
            "casts": f"{sum(c.casts for c in calls)} made, {sum(c.reused for c in calls)} reused",
            "source": found.source,
        }


class Call(NamedTuple):
    """One operator of one pass, as page and ``result()`` read it; dtypes by name, ``""`` for none."""

    step: int
    operation: str
    inputs: tuple[str, ...]
    output: str
    rule: str  #: an autocast list, or "fails" or "not reached"
    backward: str
    casts: int
    reused: int


class Setting(NamedTuple):
    """What happened in one setting."""

    passes: tuple[tuple[Call, ...], tuple[Call, ...]]
    verdict: str
    source: str


class _Softmax(TorchFunctionMode):
    """Runs every softmax where ``how`` says: inside of autocast, outside, or outside on ``.float()``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ != "softmax" or self.how == "inside":
            return function(*args, **(kwargs or {}))
        logits, *rest = args
        with torch.autocast(logits.device.type, enabled=False):
            return function(logits.float() if self.how == "float" else logits, *rest, **(kwargs or {}))


class _TwoBatches(nn.Module):
    """The losses of two batches in one autocast region; what stopped the forward pass stays in ``error``."""

    def __init__(self, model: nn.Module, enabled: bool, softmax: str) -> None:
        super().__init__()
        self.model, self.enabled, self.softmax = model, enabled, softmax
        self.error: RuntimeError | None = None

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """Two losses, or none if torch refused an operator."""
        region = contextlib.nullcontext() if self.enabled else torch.autocast(images.device.type, enabled=False)
        try:
            with region, _Softmax(self.softmax):
                return [nn.functional.cross_entropy(self.model(images), labels) for _ in PASSES]
        except RuntimeError as error:  # a reader's mistake is what we came to see: the verdict quotes it
            self.error = error
            return []


def _key(autocast: str, policy: str, manual: str, softmax: str) -> tuple[str, str, str, str]:
    """The setting itself; without autocast neither the lists nor the place of the softmax matter."""
    return ("off", "cpu", manual, "inside") if autocast == "off" else (autocast, policy, manual, softmax)


@cache
def _setting(autocast: str, policy: str, manual: str, softmax: str) -> Setting:
    """One setting, run."""
    model = transformer(seed=0, depth=1)
    if manual != "none":
        getattr(model, manual)()
    region = _TwoBatches(model, autocast != "off", softmax)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16 if autocast == "bf16" else torch.float16
    trace = trace_autocast(region, (images, torch.tensor([3, 7])), dtype, policy)
    passes = _passes(trace, failed=region.error is not None)
    source = "no autocast: " + trace.source.split("'s own")[0] if autocast == "off" else trace.source
    return Setting(passes, _verdict(passes[0], region.error, model, autocast), source)


def _passes(trace: AutocastTrace, failed: bool) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    calls = trace.calls
    if failed:
        done = tuple(_matched(calls))
        return (*done, *_rest(done[-1].step if done else -1, "fails")), tuple(_rest(-1, "not reached"))
    half = len(calls) // 2
    return tuple(_matched(calls[:half])), tuple(_matched(calls[half:]))


def _matched(calls: tuple[AutocastCall, ...]) -> Iterator[Call]:
    """The calls with their steps.  Raises RuntimeError for a call that the drawing has no place for."""
    steps = iter(enumerate(STEPS))
    for call in calls:
        row, module = call.as_dict(), call.module.removeprefix("model").removeprefix(".")
        at = next((i for i, s in steps if s.module == module and call.operation in s.operations), None)
        if at is None:
            raise RuntimeError(
                f"torch {torch.__version__} calls {call.operation!r} in {module!r}, and the drawing has no place for "
                f"it: add it to STEPS"
            )
        dtypes = row["output"], row["rule"], row["backward"] or ""
        yield Call(at, call.operation, tuple(row["inputs"]), *dtypes, call.casts, call.reused)


def _rest(last: int, first_rule: str) -> Iterator[Call]:
    """Empty calls for what comes after step ``last``."""
    rule = first_rule
    for at, step in enumerate(STEPS):
        if at > last and step.label not in _OPTIONAL:
            yield Call(at, step.operations[0], (), "", rule, "", 0, 0)
            rule = "not reached"


def _verdict(calls: tuple[Call, ...], error: Exception | None, model: nn.Module, autocast: str) -> str:
    if error is not None:
        at = next(LABELS[call.step] for call in calls if call.rule == "fails")
        return f"Stops at {at}: {type(error).__name__}: {str(error).strip()}"
    kept = next(model.parameters()).dtype
    softmax = f" The softmax gives {_title(next(c.output for c in calls if LABELS[c.step] == 'softmax'))}."
    if autocast == "off":
        return "Runs in FP32 from end to end."
    if refusal := _refusal(model):
        return f"Forward and backward run, then GradScaler.unscale_ stops: {refusal}{softmax}"
    if kept != torch.float32:
        lost = "parameters, gradients and optimizer state are BF16: no FP32 copy holds small updates."
        return f"Runs, but {lost}{softmax}"
    scaler = "GradScaler.unscale_ accepts them" if autocast == "fp16" else "BF16 has their range, so no loss is scaled"
    return f"Runs. Parameters and gradients stay FP32: {scaler}.{softmax}"


def _refusal(model: nn.Module) -> str:
    """What ``GradScaler.unscale_`` says to gradients of the model, which have its parameters' dtypes; "" if nothing."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    try:
        scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@cache
def _packed() -> tuple[list[list[Any]], dict[str, dict[str, Any]]]:
    """Every setting, with each different call written once."""
    numbers: dict[Call, int] = {}
    packed = {}
    with one_thread():
        for setting in product(AUTOCAST, POLICIES, MANUAL, SOFTMAX):
            if setting == _key(*setting):
                found = _setting(*setting)
                first, second = ([numbers.setdefault(call, len(numbers)) for call in calls] for calls in found.passes)
                packed["/".join(setting)] = found._asdict() | {"passes": {"first": first, "second": second}}
    return [[*call[:2], list(call.inputs), *call[3:]] for call in numbers], packed


def _title(name: str) -> str:
    return FORMATS[name].title if name in FORMATS else name
