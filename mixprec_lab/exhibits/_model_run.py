"""A model, a batch and a loss on a device: their gradients, recorded again whenever an exhibit asks."""

import contextlib
import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mixprec_lab import device as devices
from mixprec_lab.exhibits._live import place_of
from mixprec_lab.formats import FormatLike
from mixprec_lab.loss_scaling import GradientRecord, MagnitudeHistogram, record_gradients


class ModelRun:
    """``loss_fn(model(inputs), targets)``, ready to be recorded on ``place``.

    A model that is elsewhere is copied there; inputs and targets (tensors, or tuples, lists and dicts of them) follow.
    ``layers`` are names of ``model.named_modules()``; None means every layer with parameters of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        device: torch.device | str | None = None,
        layers: Iterable[str] | None = None,
    ) -> None:
        self.place = _place(model, device)
        self._given = model, inputs, targets
        self._loss_fn = loss_fn
        self._layers = None if layers is None else list(layers)
        self._here: tuple[nn.Module, Any, Any] | None = None

    def record(self, dtype: torch.dtype | None = None, log2_scale: int = 0) -> dict[str, MagnitudeHistogram]:
        """The histograms of the gradients of ``loss * 2**log2_scale`` by layer and kind, "0 Linear: weights".

        ``dtype`` turns autocast on; None leaves that to the caller.  KeyError for unknown layers.
        """
        formats: Iterable[FormatLike] | None = None if dtype is None else ("fp32",)
        model, inputs, targets = self._on_device()
        with contextlib.nullcontext() if dtype is None else torch.autocast(self.place.type, dtype):
            record = record_gradients(
                model, inputs, targets, self._loss_fn, loss_scale=2.0**log2_scale, formats=formats
            )
        return named(record, model, self._layers)

    def park(self) -> None:
        """Drop the copies on the device; the next recording makes new ones, of the model as it is then."""
        self._here = None

    def _on_device(self) -> tuple[nn.Module, Any, Any]:
        if self._here is None:
            model, inputs, targets = self._given
            if any(p.device != self.place for p in model.parameters()):
                model = copy.deepcopy(model).to(self.place)
            self._here = model, _moved(inputs, self.place), _moved(targets, self.place)
        return self._here


def named(
    record: GradientRecord, model: nn.Module, layers: Iterable[str] | None = None
) -> dict[str, MagnitudeHistogram]:
    """The histograms of the chosen layers, named after the layer, its class and the kind of gradient."""
    modules = dict(model.named_modules())
    chosen = list(record.weights) if layers is None else list(layers)
    if unknown := [layer for layer in chosen if layer not in record.weights and layer not in record.activations]:
        recorded = sorted({*record.weights, *record.activations})
        raise KeyError(f"expected layers with a recorded gradient ({', '.join(recorded)}), got {', '.join(unknown)}")
    return {
        f"{layer} {type(modules[layer]).__name__}: {kind}".strip(): found[layer]
        for layer in chosen
        for kind, found in (("weights", record.weights), ("activations", record.activations))
        if layer in found
    }


def _place(model: nn.Module, wanted: torch.device | str | None) -> torch.device:
    """The device to record on; ValueError for a model without parameters or values, else as ``place_of``."""
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("expected a model with values, got parameters on the meta device: load its weights first")
    if wanted is None:
        here = {p.device for p in model.parameters()}
        if len(here) != 1:
            got = ", ".join(sorted(map(str, here))) or "no parameters"
            raise ValueError(f"expected a model on one device, got {got}: say with device= where to record")
        wanted = devices.pick().device if here == {torch.device("cpu")} else here.pop()
    return place_of(wanted)


def _moved(x: Any, place: torch.device) -> Any:
    if isinstance(x, dict):
        return {key: _moved(value, place) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_moved(value, place) for value in x)
    return x.to(place) if isinstance(x, torch.Tensor) else x
