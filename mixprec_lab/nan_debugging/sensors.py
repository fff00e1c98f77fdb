"""What is measured in every step: a list of numbers on the device that is read once."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from mixprec_lab.nan_debugging.lossgraph import Saved, nodes_of_loss, saved_by_loss
from mixprec_lab.nan_debugging.scopes import tensors_in


class Sensors:
    """Numbers on the device, by kind and name; ``read`` brings them over in one go."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.leaves = {id(m) for m in model.modules() if next(m.children(), None) is None}
        self._deferred: list[tuple[str, str, torch.Tensor]] = []
        self.begin()
        self.muted = True

    def begin(self) -> None:
        """A new step."""
        self._numbers: list[tuple[str, str, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []
        self.saved: list[Saved] = []
        self.loss_nodes: list[str] = []
        self.loss_dtypes: list[torch.dtype] = []
        self.without_grad: list[str] = []  #: modules with parameters that ran under no_grad
        self.muted = False

    def forget(self) -> None:
        """Let go of the tensors of the step."""
        self.muted = True
        self._numbers, self.losses, self.saved = [], [], []

    def note(self, kind: str, name: str, value: torch.Tensor) -> None:
        """Keep a 0-dim tensor for the next read."""
        self._numbers.append((kind, name, value))

    def defer(self, kind: str, name: str, value: torch.Tensor) -> None:
        """Keep a 0-dim tensor for the read of the next step: it came too late for this one's."""
        self._deferred.append((kind, name, value))

    def output(self, path: str, module: nn.Module, output: Any) -> None:
        """A module has returned ``output``: its norm, in FP32, and the largest magnitude of what it was given."""
        if self.muted or id(module) not in self.leaves:
            return
        if not torch.is_grad_enabled() and next(module.parameters(recurse=False), None) is not None:
            self.without_grad.append(path)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for tensor in tensors_in(output)[:1]:
                if tensor.is_floating_point() and tensor.numel():
                    self.note("output", path, torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32))

    def loss(self, loss: torch.Tensor | float, stop: list[Any]) -> None:
        """The loss, and what its nodes keep."""
        tensor = loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss))
        self.loss_dtypes.append(tensor.dtype)
        self.note("loss", str(len(self.losses)), tensor.reshape(()).float().clone())
        self.losses.append(tensor)
        if isinstance(loss, torch.Tensor) and loss.grad_fn is not None:
            self.saved += saved_by_loss(loss, stop)
            self.loss_nodes += nodes_of_loss(loss, stop)

    def norms(self, kind: str, named: dict[str, torch.Tensor]) -> None:
        """The norm of every tensor, with one launch for those of one device and dtype."""
        groups: dict[tuple, list[str]] = defaultdict(list)
        for name, tensor in named.items():
            if tensor.is_floating_point() and tensor.numel():
                dense = tensor.coalesce().values() if tensor.is_sparse else tensor
                named[name] = dense
                groups[dense.device, dense.dtype].append(name)
        for (_, dtype), names in groups.items():
            tensors = [named[name].detach() for name in names]
            if dtype.itemsize < 4:
                norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]
            else:
                norms = torch._foreach_norm(tensors)
            for name, norm in zip(names, norms, strict=True):
                self.note(kind, name, norm)

    def read(self) -> dict[str, list[tuple[str, float]]]:
        """Everything noted since the last read: kind -> (name, number) as time went; one read of the device."""
        by_kind: dict[str, list[tuple[str, float]]] = defaultdict(list)
        numbers = self._deferred + self._numbers
        if numbers:
            device = numbers[-1][2].device
            stacked = torch.stack([v.detach().to(device, torch.float32).reshape(()) for _, _, v in numbers])
            for (kind, name, _), value in zip(numbers, stacked.tolist(), strict=True):
                by_kind[kind].append((name, value))
        self._numbers, self._deferred = [], []
        return by_kind
