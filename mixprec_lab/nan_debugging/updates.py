"""State in 16 bits that is written and does not move: samples of it before and after each step."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from mixprec_lab.formats import get_format
from mixprec_lab.nan_debugging.findings import Finding, finding
from mixprec_lab.nan_debugging.lint import LOW
from mixprec_lab.nan_debugging.sensors import Sensors

_SAMPLE = 512  # elements a tensor
_AT_ONCE = 0.95  # share of unchanged elements that is a fault in one step
_IN_THE_LONG_RUN = 0.75  # and over _PATIENCE steps
_PATIENCE = 10


class _Followed(NamedTuple):
    """A parameter over the steps: what it was at first, and which sampled elements have moved since."""

    since: int
    steps: int
    start: torch.Tensor
    moved: torch.Tensor


class UpdateWatch:
    """Looks at up to ``_SAMPLE`` elements of 16-bit parameters that an optimizer steps, and of other 16-bit state.

    Counts stay on the device until the next step's read.
    """

    def __init__(self, model: nn.Module, names: dict[int, str]) -> None:
        self.model, self.names = model, names
        self._before: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        self._followed: dict[int, _Followed] = {}
        self._state: dict[str, torch.Tensor] = {}
        tensors = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
        self._low_state = any(t.dtype in LOW for t in tensors)

    def begin(self) -> None:
        """A new step: remember running statistics in 16 bits."""
        self._state = {}
        if self._low_state:
            for name, t in [*self.model.named_buffers(), *self.model.named_parameters()]:
                if t.dtype in LOW and not t.requires_grad and self._is_statistic(name):
                    self._state[name] = _sample(t).clone()

    def end(self, step: int, sensors: Sensors) -> None:
        """Count elements of running statistics that hold what they held before the step."""
        tensors = dict(self.model.named_buffers()) | dict(self.model.named_parameters())
        for name, old in self._state.items():
            t = tensors.get(name)
            if t is not None:
                nonzero = old != 0
                _defer(sensors, f"state|{step}|{name}|{t.dtype}", (_sample(t) == old) & nonzero, nonzero)

    def _is_statistic(self, name: str) -> bool:
        """Running statistics of a module in training: their kernel writes them without counting it."""
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        return last.startswith("running_") and module.training and bool(getattr(module, "track_running_stats", False))

    def before(self, optimizer: Any) -> None:
        """Remember a sample of each 16-bit parameter that has a gradient."""
        moving = [p for g in optimizer.param_groups if float(g["lr"]) != 0 for p in g["params"] if id(p) in self.names]
        low = [p for p in moving if p.dtype in LOW and p.grad is not None]
        self._before[id(optimizer)] = [
            (p, _sample(p).clone(), _sample(p.grad.to_dense() if p.grad.is_sparse else p.grad) != 0) for p in low
        ]

    def after(self, optimizer: Any, step: int, sensors: Sensors) -> None:
        """Count the sampled elements with a gradient that stayed, in this step and since the parameter is followed.

        Optimizers that are not torch's may round stochastically or keep a compensation: only the long run judges them.
        """
        own = type(optimizer).__module__.startswith("torch.optim")
        same, relevant, moved, since = [], [], [], step
        sampled = self._before.pop(id(optimizer), [])
        for p, old, has_gradient in sampled:
            here = has_gradient & (old != 0)
            same.append((_sample(p) == old) & here)
            relevant.append(here)
            known = self._followed.get(id(p)) or _Followed(step, 0, old, torch.zeros_like(here))
            known = known._replace(steps=known.steps + 1, moved=known.moved | (_sample(p) != known.start) | ~here)
            self._followed[id(p)] = known
            if known.steps >= _PATIENCE:
                moved.append(known.moved)
                since = min(since, known.since)
        if not sampled:
            return
        first = sampled[0][0]
        tail = f"{self.names.get(id(first), '')}|{first.dtype}"
        if own:
            _defer(sensors, f"step|{step}|{tail}", torch.cat(same), torch.cat(relevant))
        if moved:
            never = ~torch.cat(moved)
            _defer(sensors, f"long|{since}|{tail}", never, torch.ones_like(never))

    def judge(self, read: list[tuple[str, float]]) -> Iterator[Finding]:
        """Findings from the counts: nearly all elements stayed in one step, or most of them in ten."""
        for (name, part), (_, whole) in zip(read[::2], read[1::2], strict=True):
            kind, step, tensor, dtype = name.split("|")
            title = get_format(getattr(torch, dtype.removeprefix("torch."))).title
            share = part / whole if whole >= 4 else 0.0
            if kind == "state" and share >= _AT_ONCE:
                where = {"module": tensor.rpartition(".")[0] or tensor, "parameter": tensor, "op": "mul_, add_, lerp_"}
                evidence = f"{tensor} is {title}, was written, and did not change"
                yield finding("ema_stagnation", "fault", int(step), evidence, **where)
            elif (kind == "step" and share >= _AT_ONCE) or (kind == "long" and share >= _IN_THE_LONG_RUN):
                when = "in this step" if kind == "step" else f"in {_PATIENCE} steps or more"
                lost = f"{share:.0%} of the sampled {title} weights did not change {when}"
                evidence = f"{lost}: an update below half a gap is lost"
                where = {"module": "optimizer", "op": "add_, addcdiv_", "parameter": tensor}
                yield finding("update_swamping", "fault", int(step), evidence, **where)


def _defer(sensors: Sensors, name: str, part: torch.Tensor, whole: torch.Tensor) -> None:
    sensors.defer("update", name, part.sum())
    sensors.defer("update", name, whole.sum())


def _sample(x: torch.Tensor) -> torch.Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
