"""A model in BF16 whose FP32 islands do not raise: which modules stay wide, and how tensors cross the borders."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

#: every normalization layer of torch.nn, by type: whether it is called ``norm1``, ``ln_f`` or ``input_layernorm``
NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d,
    nn.modules.batchnorm._NormBase,  # BatchNorm, InstanceNorm, SyncBatchNorm and their lazy forms
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)  # fmt: skip

Keep = str | type[nn.Module] | nn.Module


def to_bf16(model: nn.Module, keep_fp32: Iterable[Keep] = ()) -> dict[str, str]:
    """Turn the parameters of ``model`` into BF16 in place, some excepted; "bf16" or "fp32" by name comes back.

    FP32 stay the normalization layers of ``NORM_TYPES``, whatever they are called, and all modules in ``keep_fp32``:
    names as in ``named_modules()``, types (your own ``RMSNorm`` class, ``nn.Embedding``), or modules themselves, each
    with everything inside.  A parameter that a kept and another module share stays FP32.  Buffers are left alone:
    rotary tables and running statistics in BF16 are wrong tables.

    Kept modules compute in FP32 from then on: their inputs are widened, autocast is off inside.  A normalization layer
    returns the dtype it was given; other kept modules return FP32.  Other modules cast the floating inputs they are
    given to the dtype of their parameters, where no kept module is inside them.  Integer inputs pass unchanged.
    What is left, products of tensors of two dtypes in your own ``forward``, autocast settles: see ``bf16_autocast``.

    Parameters remain the same objects, so an optimizer built before keeps working; their gradients are dropped.
    Raises KeyError for a name that is no module, ValueError for a type or module that does not occur.
    """
    kept = _kept_modules(model, keep_fp32)
    wide = {p for module in kept for p in module.parameters()}
    dtypes = {}
    for name, p in model.named_parameters():
        if p.is_floating_point():
            p.data, p.grad = p.data.to(torch.float32 if p in wide else torch.bfloat16), None
            dtypes[name] = "fp32" if p in wide else "bf16"
    for module in kept:
        _compute_in_fp32(module, returns_input_dtype=isinstance(module, NORM_TYPES))
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.dtype == torch.bfloat16]
        if own and kept.isdisjoint(module.modules()) and _cast_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    return dtypes


def bf16_autocast(model: nn.Module) -> torch.autocast:
    """The context to run a converted ``model`` in: BF16 autocast on the device of its parameters, nothing cached."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, cache_enabled=False)


def _kept_modules(model: nn.Module, keep_fp32: Iterable[Keep]) -> set[nn.Module]:
    modules = dict(model.named_modules())
    chosen = [m for m in modules.values() if isinstance(m, NORM_TYPES)]
    for keep in [keep_fp32] if isinstance(keep_fp32, str) else keep_fp32:
        if isinstance(keep, str):
            if keep not in modules:
                raise KeyError(f"expected the name of a module, got {keep!r}; the names are {', '.join(modules)}")
            chosen.append(modules[keep])
            continue
        found = [m for m in modules.values() if m is keep or (isinstance(keep, type) and isinstance(m, keep))]
        if not found:
            raise ValueError(f"expected a name, a type or a module of the model to keep in FP32, got {keep!r:.80}")
        chosen += found
    return {inner for module in chosen for inner in module.modules()}


def _compute_in_fp32(module: nn.Module, *, returns_input_dtype: bool) -> None:
    forward = module.forward
    if not (isinstance(forward, functools.partial) and forward.func is _in_fp32):
        module.forward = functools.partial(_in_fp32, forward, returns_input_dtype)


def _in_fp32(forward: Callable, returns_input_dtype: bool, *args: Any, **kwargs: Any) -> Any:
    given = _first_floating((args, kwargs))
    device = "cpu" if given is None else given.device.type
    with torch.autocast(device, enabled=False):
        output = forward(*cast_floating(args, torch.float32), **cast_floating(kwargs, torch.float32))
    return cast_floating(output, given.dtype) if returns_input_dtype and given is not None else output


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return cast_floating(args, torch.bfloat16), cast_floating(kwargs, torch.bfloat16)


def cast_floating(x: Any, dtype: torch.dtype) -> Any:
    """``x`` with every floating-point tensor in it, at any depth of tuples, lists and dicts, cast to ``dtype``."""
    if isinstance(x, torch.Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, dict):
        return type(x)({key: cast_floating(value, dtype) for key, value in x.items()})
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(cast_floating(value, dtype) for value in x))
    if isinstance(x, list | tuple):
        return type(x)(cast_floating(value, dtype) for value in x)
    return x


def _first_floating(x: Any) -> torch.Tensor | None:
    if isinstance(x, torch.Tensor):
        return x if x.is_floating_point() else None
    items = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return next((found for item in items if (found := _first_floating(item)) is not None), None)
