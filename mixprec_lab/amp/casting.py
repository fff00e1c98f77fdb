"""Autocast rebuilt: kernels that apply one device's lists while the tensors live on another.

torch registers one kernel per listed operator under the dispatch key of the device; the key sits above autograd, so
the casts are recorded and their gradients cast back.  The kernels here do the same in Python.  Registered over the
key of the device where the tensors are, they show what the lists of the *other* device would do, with real results in
real dtypes.  What cannot be had that way are the other device's kernels: on a CPU ``nn.LSTM`` is made of the pieces
the CPU makes it of.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from mixprec_lab.amp.policy import DISPATCH_KEYS

#: ``wrap(operator, rule, run)`` -> the kernel to register; ``run(keyset, *args, **kwargs)`` calls the operator.
Run = Callable[..., Any]
Wrap = Callable[[str, str, Run], Run]

# The overloads that take the output dtype which "fp32 output" wants, for operators that have no such argument.
_WITH_DTYPE = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}


def overload(name: str) -> torch._ops.OpOverload:
    """The ATen operator of a name such as ``"linear"`` or ``"softmax.int"``."""
    base, _, suffix = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), suffix or "default")


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to its tensors, through lists, tuples and dicts; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """Every tensor in nested lists, tuples and dicts, in order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, list(values))
    return found


def eligible(x: torch.Tensor) -> bool:
    """Whether autocast touches a tensor at all: floating-point, and not float64."""
    return x.is_floating_point() and x.dtype != torch.float64


class WeightCache:
    """Casts of FP32 parameters to the autocast dtype, kept for as long as the autocast region lasts.

    As in torch, only leaves that require a gradient are kept (intermediate results change, parameters do not), never
    in inference mode, and the cast is recorded by autograd even when it is first asked for under ``no_grad``.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the source is held so that its id stays taken

    def cast(self, x: torch.Tensor, to: torch.dtype, low: torch.dtype) -> torch.Tensor:
        """``x`` in dtype ``to``; ``low`` is the autocast dtype, the only one whose casts are kept."""
        if not eligible(x) or x.dtype == to:
            return x
        parameter = x.dtype == torch.float32 and x.requires_grad and x.is_leaf and not x._is_view()
        if not (parameter and to == low and torch.is_autocast_cache_enabled()) or torch.is_inference_mode_enabled():
            return x.to(to)
        if id(x) not in self._kept:
            with torch.enable_grad():
                self._kept[id(x)] = x, x.to(to)
        return self._kept[id(x)][1]


def target_dtype(rule: str, inputs: Iterable[torch.Tensor], low: torch.dtype) -> torch.dtype | None:
    """The dtype to which a rule casts the inputs of an operator; None for rules that cast nothing.

    ``low`` is the autocast dtype.  "widest" is FP32 if any input is, else ``low``; float64 does not count.
    Raises RuntimeError, in torch's own words, where "widest" meets the other 16-bit dtype.
    """
    if rule != "widest":
        return {"lower precision": low, "fp32": torch.float32}.get(rule)
    to = low
    for x in filter(eligible, inputs):
        if torch.float32 in (to, x.dtype):
            to = torch.float32
        elif x.dtype != low:
            raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
    return to


def _ask_for_fp32(operator: torch._ops.OpOverload, name: str, args: tuple, kwargs: dict) -> Any:
    arguments = operator._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    first = given["self"]
    if name in _WITH_DTYPE:
        return overload(_WITH_DTYPE[name])(**given, dtype=torch.float32 if eligible(first) else first.dtype)
    if eligible(first) and given["dtype"] is None:
        given["dtype"] = torch.float32
    return operator(**given)


def emulated(name: str, rule: str, policy: str, host: str, cache: WeightCache) -> Run:
    """What the operator ``name`` does under ``rule`` when its tensors are on ``host``: a ``run`` for ``wrap``.

    A nested ``torch.autocast(..., enabled=False)`` is honoured for either device type.
    """
    operator = overload(name)

    def run(keyset: object, *args: Any, **kwargs: Any) -> Any:
        low, active = torch.get_autocast_dtype(host), torch.is_autocast_enabled(policy)
        with torch.autocast(host, enabled=False):
            if not active:
                return operator(*args, **kwargs)
            if rule == "banned":
                raise RuntimeError(
                    f"torch.nn.functional.{name} and torch.nn.BCELoss are unsafe to autocast on {policy}, and torch "
                    f"refuses them there: leave the sigmoid out and use {name}_with_logits"
                )
            if rule == "fp32 output":
                return _ask_for_fp32(operator, name, args, kwargs)
            to = target_dtype(rule, tensors_in(args, kwargs), low)
            args, kwargs = map_tensors(lambda x: cache.cast(x, to, low), (args, kwargs))
            return operator(*args, **kwargs)

    return run


def original(name: str, host: str) -> Run:
    """torch's own autocast kernel for the operator ``name``, as a ``run`` for ``wrap``."""
    return torch.library.get_kernel(f"aten::{name}", DISPATCH_KEYS[host]).call_boxed


@contextlib.contextmanager
def kernels(runs: Mapping[str, Run | None], rules: Mapping[str, str], host: str, wrap: Wrap) -> Iterator[None]:
    """Register ``wrap(operator, rule, run)`` over the autocast kernels of ``host`` while the context lasts.

    None for a run takes the operator off the list.  The registration holds for the whole process: no other thread
    should run autocast on ``host`` meanwhile.  torch's own kernels are back when the context ends.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            # torch warns, once a process, that a kernel is being registered over its own: that is what we want.
            warnings.filterwarnings("ignore", message=r"\s*Warning only once for all operators")
            for name, run in runs.items():
                if run is None:
                    library.impl(name, torch.library.fallthrough_kernel, DISPATCH_KEYS[host])
                else:
                    library.impl(name, wrap(name, rules.get(name, "none"), run), DISPATCH_KEYS[host], with_keyset=True)
        yield
    finally:
        library._destroy()
