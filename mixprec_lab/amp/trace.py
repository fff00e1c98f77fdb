"""The autocast microscope: what autocast did to every operator of one forward pass, as data and as a table."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixprec_lab.amp.casting import tensors_in
from mixprec_lab.amp.policy import DISPATCH_KEYS, TORCH_VERSION, check_policy, dtype_name
from mixprec_lab.amp.watch import Event, Watch
from mixprec_lab.formats import text_table
from mixprec_lab.untouched import untouched

_ONE_AT_A_TIME = threading.Lock()  # the watched kernels are registered for the whole process


@dataclass(frozen=True)
class AutocastCall:
    """One operator call of a traced forward pass."""

    index: int  #: position in the trace, from 0
    module: str  #: path as in ``named_modules()``; "" for the model's own forward, "loss" for the loss function
    operation: str  #: name of the operator, without its overload
    inputs: tuple[torch.dtype, ...]  #: dtypes of its tensor arguments, as the caller passed them
    output: torch.dtype  #: dtype of its (first floating-point) result
    rule: str  #: the autocast list that decided, a key of ``policy.RULES``; "none" where autocast did nothing
    backward: torch.dtype | None  #: dtype of the gradient that came back to the result; None if none came
    casts: int  #: casts that autocast made for this call
    reused: int  #: casts of parameters that it found in the weight cache

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values: dtypes by their short names, for tables and for JSON."""
        return {
            "index": self.index, "module": self.module, "operation": self.operation,
            "inputs": [dtype_name(d) for d in self.inputs], "output": dtype_name(self.output), "rule": self.rule,
            "backward": None if self.backward is None else dtype_name(self.backward),
            "casts": self.casts, "reused": self.reused,
        }  # fmt: skip


@dataclass(frozen=True)
class AutocastTrace:
    """All calls of one forward pass, in order, and where the answer comes from.  ``str()`` is a table."""

    calls: tuple[AutocastCall, ...]
    policy: str  #: whose lists: "cpu" or "cuda"
    dtype: torch.dtype  #: the autocast dtype
    source: str  #: one sentence: torch's own autocast on which device, or lists applied where

    def as_rows(self) -> list[dict[str, Any]]:
        """One ``as_dict()`` for each call."""
        return [call.as_dict() for call in self.calls]

    def __str__(self) -> str:
        headers = ["module", "operation", "inputs", "output", "rule", "backward", "casts", "reused"]
        rows = []
        for row in self.as_rows():
            row |= {"inputs": " ".join(row["inputs"]) or "-", "backward": row["backward"] or "-"}
            rows.append([row[key] for key in headers])
        return f"{text_table(headers, rows)}\n{self.policy} lists, {dtype_name(self.dtype)}: {self.source}"


def trace_autocast(
    model: nn.Module,
    inputs: torch.Tensor | tuple[Any, ...],
    dtype: torch.dtype = torch.float16,
    policy: str = "cpu",
    *,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    targets: Any = None,
    backward: bool = True,
) -> AutocastTrace:
    """Every operator call of ``model(*inputs)`` under autocast: dtypes in, out and back, the list that decided, casts.

    The model really runs, once, where its parameters are.  If ``policy`` is that device, torch's own autocast answers;
    if not, its lists (of torch 2.13) are applied to the operators of the device that is there, and ``source`` says so.

    A row is an operator that is on an autocast list, or else a call as Python made it: a call such as ``nn.LSTM`` or
    ``cross_entropy`` that is on no list, but is made of operators that are, gives one row for each of its parts.
    Left out are views, copies that only move memory, and operators without any floating-point tensor.

    With ``loss_fn``, ``loss_fn(output, targets)`` (``loss_fn(output)`` for None) is part of the trace, under the
    module path "loss".  The backward pass starts at the loss, or at all outputs with gradients of one, outside of
    autocast; it is left out for ``backward=False``, under ``no_grad`` and where nothing requires a gradient.

    Nothing stays behind: parameters, ``.grad`` fields, buffers, training mode, hooks and the state of the random
    generators are what they were.  A nested ``torch.autocast(device, enabled=False)`` in the model is honoured.

    Raises TypeError for a model or inputs of the wrong kind, ValueError for another dtype or policy, for ``targets``
    without ``loss_fn``, or for tensors on several devices, RuntimeError inside a running autocast region; and what
    the model itself raises.  Needs torch 2.9 or later, in eager mode.
    """
    host = _check(model, inputs, dtype, policy, loss_fn, targets)
    return _trace(model, inputs, dtype, Watch(host, policy, host != policy), loss_fn, targets, backward)


def _trace(model, inputs, dtype, watch: Watch, loss_fn=None, targets=None, backward=True) -> AutocastTrace:
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with _ONE_AT_A_TIME, untouched(model):
        with watch.listening(model), _region(watch.host, watch.policy, dtype):
            result = model(*arguments)
            if loss_fn is not None:
                watch.path.append("loss")
                result = loss_fn(result) if targets is None else loss_fn(result, targets)
        if backward:
            _run_backward(model, arguments, result)
    calls = tuple(_row(index, event) for index, event in enumerate(watch.events))
    return AutocastTrace(calls, watch.policy, dtype, _source(watch.policy, watch.host, watch.emulate))


def _check(model, inputs, dtype, policy, loss_fn, targets) -> str:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, torch.Tensor | tuple):
        raise TypeError(f"expected inputs to be a tensor or a tuple of arguments, got {type(inputs).__name__}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"expected dtype to be torch.float16 or torch.bfloat16, got {dtype}")
    check_policy(policy)
    if targets is not None and loss_fn is None:
        raise ValueError("got targets without a loss_fn: pass both, or neither")
    devices = {x.device for x in tensors_in(list(model.parameters()), list(model.buffers()), inputs)}
    if len(devices) != 1 or next(iter(devices)).type not in DISPATCH_KEYS:
        found = ", ".join(sorted(map(str, devices))) or "no tensor at all"
        raise ValueError(f"expected parameters, buffers and inputs on one CPU or CUDA device, got {found}")
    host = next(iter(devices)).type
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError("trace_autocast opens an autocast region of its own: call it outside of any other")
    return host


def _source(policy: str, host: str, emulate: bool) -> str:
    here = "the CPU" if host == "cpu" else torch.cuda.get_device_name()
    if not emulate:
        return f"torch {torch.__version__.split('+')[0]}'s own autocast on {here}"
    absent = " (torch sees no CUDA device)" if policy == "cuda" and not torch.cuda.is_available() else ""
    return f"the {policy.upper()} lists of torch {TORCH_VERSION} applied to the operators of {here}{absent}"


@contextlib.contextmanager
def _region(host: str, policy: str, dtype: torch.dtype) -> Iterator[None]:
    """Autocast on ``host``; for another ``policy`` its switch is on too, so that a nested region can turn it off."""
    with torch.autocast(host, dtype=dtype):
        before = torch.is_autocast_enabled(policy), torch.get_autocast_dtype(policy)
        torch.set_autocast_enabled(policy, True)
        torch.set_autocast_dtype(policy, dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled(policy, before[0])
            torch.set_autocast_dtype(policy, before[1])


def _run_backward(model: nn.Module, arguments: tuple, result: Any) -> None:
    """The backward pass by ``autograd.grad``, which runs the hooks on results and writes no ``.grad``."""
    ends = [x for x in tensors_in(result) if x.requires_grad]
    leaves = [x for x in (*model.parameters(), *tensors_in(arguments)) if x.requires_grad]
    if ends and leaves:
        torch.autograd.grad(ends, leaves, [torch.ones_like(x) for x in ends], allow_unused=True)


def _row(index: int, event: Event) -> AutocastCall:
    inputs = tuple(x.dtype for x in event.inputs)
    output = event.outputs[0].dtype
    return AutocastCall(
        index, event.module, event.name, inputs, output, event.rule, event.backward, event.casts, event.reused
    )
