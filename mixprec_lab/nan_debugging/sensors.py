"""What is measured in every step: a list of numbers on the device that is read once."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from mixprec_lab.nan_debugging.lossgraph import Saved, nodes_of_loss, saved_by_loss
from mixprec_lab.nan_debugging.scopes import tensors_in

_MEASURED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def measurable(x: torch.Tensor) -> bool:
    """Whether ``x`` is a dense tensor of ordinary floating-point numbers that exist, and is not empty."""
    if not isinstance(x, torch.Tensor) or isinstance(x, UninitializedTensorMixin) or x.is_nested:
        return False
    return x.layout == torch.strided and x.dtype in _MEASURED and x.numel() > 0


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

    def output(self, path: str, module: nn.Module, output: Any, outer_grad: bool) -> None:
        """A module has returned ``output``: its norm; and whether it ran without gradients in a call that had them."""
        if self.muted or id(module) not in self.leaves:
            return
        if outer_grad and not torch.is_grad_enabled() and next(module.parameters(recurse=False), None) is not None:
            self.without_grad.append(path)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for tensor in tensors_in(output)[:1]:
                if measurable(tensor):
                    self.note("output", path, _norm(tensor.detach()))

    def loss(self, loss: torch.Tensor | float, stop: list[Any]) -> None:
        """The loss, and what its nodes keep."""
        tensor = loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss))
        self.loss_dtypes.append(tensor.dtype)
        self.note("loss", str(len(self.losses)), tensor.reshape(()).double())
        self.losses.append(tensor)
        if isinstance(loss, torch.Tensor) and loss.grad_fn is not None:
            self.saved += saved_by_loss(loss, stop)
            self.loss_nodes += nodes_of_loss(loss, stop)

    def norms(self, kind: str, named: dict[str, torch.Tensor]) -> None:
        """The norm of every tensor, with one launch for those of one device and dtype."""
        groups: dict[tuple, list[str]] = defaultdict(list)
        for name, tensor in named.items():
            dense = tensor.coalesce().values() if tensor.is_sparse else tensor
            if measurable(dense):
                named[name] = dense
                groups[dense.device, dense.dtype].append(name)
        for (_, dtype), names in groups.items():
            tensors = [named[name].detach() for name in names]
            norms = [_norm(t) for t in tensors] if dtype.itemsize < 4 else torch._foreach_norm(tensors)
            for name, norm in zip(names, norms, strict=True):
                self.note(kind, name, norm)

    def read(self) -> dict[str, list[tuple[str, float]]]:
        """Everything noted since the last read: kind -> (name, number) as time went; one read of the device."""
        by_kind: dict[str, list[tuple[str, float]]] = defaultdict(list)
        numbers = self._deferred + self._numbers
        if numbers:
            device = numbers[-1][2].device
            stacked = torch.stack([v.detach().to(device, torch.float64).reshape(()) for _, _, v in numbers])
            for (kind, name, _), value in zip(numbers, stacked.tolist(), strict=True):
                by_kind[kind].append((name, value))
        self._numbers, self._deferred = [], []
        return by_kind


def _norm(x: torch.Tensor) -> torch.Tensor:
    """The norm of ``x``, in FP32 or wider."""
    return torch.linalg.vector_norm(x, dtype=torch.float32 if x.dtype.itemsize < 4 else None)
