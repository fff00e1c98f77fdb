"""What real modules, optimizers and steps take, counted in bytes on any device: the model's other half."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The distinct storages under ``tensors``, by identity: views and tied weights count once."""
    storages = (t.untyped_storage() for t in tensors)
    return {s._cdata: s for s in storages if s.nbytes()}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(s.nbytes() for s in _storages(tensors).values())


@dataclass(frozen=True)
class StateBytes:
    """Bytes of what lives from step to step."""

    weights: int
    gradients: int
    masters: int  #: parameters of the optimizer that are not the model's
    moments: int  #: optimizer state of one dimension or more
    counters: int  #: optimizer state of no dimension: step counts

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.masters + self.moments + self.counters


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> StateBytes:
    """The bytes of a model's parameters and gradients and of an optimizer's masters and state, storages once each.

    Parameters of the optimizer that are not the model's are masters; their gradients count as gradients.  Buffers
    (BatchNorm statistics) are not parameters and are not counted.
    """
    own = list(model.parameters())
    held = {id(p) for p in own}
    stepped = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
    masters = [p for p in stepped if id(p) not in held]
    state = [v for s in optimizer.state.values() for v in s.values()] if optimizer else []
    tensors = [v for v in state if isinstance(v, torch.Tensor)]
    gradients = [p.grad for p in (*own, *masters) if p.grad is not None]
    return StateBytes(_bytes(own), _bytes(gradients), _bytes(masters), _bytes(v for v in tensors if v.dim()),
                      _bytes(v for v in tensors if not v.dim()))  # fmt: skip


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that a forward pass keeps for its backward pass, parameters themselves not counted."""

    activations: int
    casts: int  #: copies of parameters in another dtype
    tensors: tuple[tuple[str, tuple[int, ...], int], ...]  #: dtype, shape and bytes of each storage when first saved


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> SavedBytes:
    """What ``forward()`` saves for its backward pass, each storage counted once with all its bytes.

    A view keeps its whole storage alive, so the whole storage counts.  ``forward`` is called once, with gradients.
    """
    parameters = _storages(model.parameters())
    saved: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage._cdata not in parameters:
            saved.setdefault(storage._cdata, (storage, t.detach()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _Casts(parameters) as casts:
        forward()
    cast = [s.nbytes() for key, (s, _) in saved.items() if key in casts.found]
    rows = tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape), s.nbytes()) for s, t in saved.values())
    return SavedBytes(sum(s.nbytes() for s, _ in saved.values()) - sum(cast), sum(cast), rows)


class _Casts(TorchDispatchMode):
    """Notes the storages that are conversions of given ones."""

    def __init__(self, sources: dict[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self._sources = sources
        self.found: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage takes its identity

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._sources:
            self.found |= _storages([out])
        return out


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make while it is active, and their peak, on any device.

    ``with LiveBytes(model, optimizer) as live: step()`` then ``live.peak``; the tensors of the arguments (modules,
    optimizers, tensors) count from the start.  It sees what operators return, not the workspaces inside them.
    """

    def __init__(self, *held: nn.Module | torch.optim.Optimizer | torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        for thing in held:
            self._count(_tensors_of(thing))

    def reset_peak(self) -> None:
        """Start a new phase: the peak becomes what is alive now."""
        self.peak = self.now

    def _count(self, tensors: Iterable[torch.Tensor]) -> None:
        for key, storage in _storages(tensors).items():
            if key not in self._alive:
                size = storage.nbytes()
                self._alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size))
                self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._count(t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def _tensors_of(thing: nn.Module | torch.optim.Optimizer | torch.Tensor) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.buffers()
        for p in thing.parameters():
            yield from (p,) if p.grad is None else (p, p.grad)
    elif isinstance(thing, torch.optim.Optimizer):
        yield from (p for group in thing.param_groups for p in group["params"])
        yield from (v for s in thing.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    else:
        raise TypeError(f"expected a module, an optimizer or a tensor, got {type(thing).__name__}")
