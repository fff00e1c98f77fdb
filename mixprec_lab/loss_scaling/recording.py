"""The gradients of one batch, recorded layer by layer without leaving a trace and without waiting for the device."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import nn

from mixprec_lab.formats import FormatLike
from mixprec_lab.loss_scaling.histograms import MagnitudeHistogram, _boundaries, _check, _table, _thresholds
from mixprec_lab.untouched import untouched

KINDS = ("weights", "activations")


@dataclass(frozen=True)
class GradientRecord:
    """Histograms of one batch's gradients by layer: of each layer's own parameters and of each layer's output."""

    weights: dict[str, MagnitudeHistogram]
    activations: dict[str, MagnitudeHistogram]
    loss_scale: float = 1.0  #: what the loss was multiplied by before backward

    def total(self, kind: str = "activations") -> MagnitudeHistogram:
        """All layers of one kind together; KeyError for a kind other than "weights" and "activations"."""
        if kind not in KINDS:
            raise KeyError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
        return reduce(add, getattr(self, kind).values())


def record_gradients(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    *,
    loss_scale: float = 1.0,
    formats: Iterable[FormatLike] | None = None,
) -> GradientRecord:
    """Histograms of the gradients of ``loss_fn(model(inputs), targets) * loss_scale``, from one forward and backward.

    ``inputs`` is passed as one argument, or as several if it is a tuple.  A layer is a module without children; its
    activation gradients are those of the tensors it returns, summed over its calls.  Weight gradients are filed under
    the module that owns the parameter ("" is the model itself), a shared one under its first owner.  Gradients are
    counted in the dtype they have: under ``torch.autocast`` (the caller's context is in force) those of the low
    precision operators are in that precision, flushed values and all.

    Counting happens on the device of the gradient; the counts of all layers are read together at the end.  ``.grad``
    fields, hooks, buffers, and the random state of the CPU and of the model's devices are left as they were.

    Raises ValueError if the loss is not a scalar, does not depend on a parameter that requires a
    gradient, or if ``loss_scale`` is not positive and finite; KeyError and ValueError for formats as
    ``MagnitudeHistogram.of``.
    """
    if not 0 < loss_scale < float("inf"):
        raise ValueError(f"expected a positive, finite loss_scale, got {loss_scale}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("expected a model with a parameter that requires a gradient, got none")
    recorder = _Recorder(formats)
    with untouched(model), torch.enable_grad():
        with recorder.watching(model):
            outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            loss = loss_fn(outputs, targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"expected a scalar loss that depends on the model's parameters, got {got}")
        scaled = loss.float() * loss_scale if loss.dtype.itemsize < 4 else loss * loss_scale
        gradients = torch.autograd.grad(scaled.reshape(()), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            recorder.add("weights", name.rpartition(".")[0], gradient)
    return GradientRecord(**recorder.read(), loss_scale=loss_scale)


class _Recorder:
    """Tables of counts by kind and layer, kept on the devices until ``read``."""

    def __init__(self, formats: Iterable[FormatLike] | None) -> None:
        self.thresholds = _thresholds(formats)
        self.boundaries: dict[torch.device, torch.Tensor] = {}
        self.tables: dict[tuple[str, str], torch.Tensor] = {}

    def add(self, kind: str, layer: str, gradient: torch.Tensor) -> None:
        device = _check(gradient).device
        if device not in self.boundaries:
            self.boundaries[device] = _boundaries(self.thresholds, device)
        table = _table(gradient, self.boundaries[device])
        known = self.tables.get((kind, layer))
        self.tables[kind, layer] = table if known is None else known + table.to(known.device, non_blocking=True)

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, every tensor that a layer returns gets a hook that counts its gradient."""

        def watch(layer: str, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                if output.requires_grad and output.is_floating_point():
                    output.register_hook(lambda g: self.add("activations", layer, g))
            elif isinstance(output, dict | list | tuple):
                for item in output.values() if isinstance(output, dict) else output:
                    watch(layer, item)

        layers = [(name, m) for name, m in model.named_modules() if not any(True for _ in m.children())]
        hooks = [m.register_forward_hook(lambda _m, _i, out, n=name: watch(n, out)) for name, m in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def read(self) -> dict[str, dict[str, MagnitudeHistogram]]:
        """The histograms: one copy to the host per device."""
        found: dict[str, dict[str, MagnitudeHistogram]] = {kind: {} for kind in KINDS}
        by_device: dict[torch.device, list[tuple[str, str]]] = defaultdict(list)
        for key, table in self.tables.items():
            by_device[table.device].append(key)
        for keys in by_device.values():
            tables = torch.stack([self.tables[key] for key in keys]).cpu()
            for (kind, layer), table in zip(keys, tables, strict=True):
                found[kind][layer] = MagnitudeHistogram(self.thresholds, table)
        return {k: {layer: found[k][layer] for kind, layer in self.tables if kind == k} for k in KINDS}
