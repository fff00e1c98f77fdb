"""One run: a task, a regime, a seed; and what came of it."""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from mixprec_lab.device import one_thread
from mixprec_lab.regimes.engines import Engine, build
from mixprec_lab.regimes.regime import Regime, get_regime
from mixprec_lab.regimes.tasks import Batch, Task, get_task

WARMUP = 10  #: steps over which the learning rate rises
KINDS = ("weights", "gradients", "masters", "moments")


@dataclass(frozen=True)
class Run:
    """A finished run; losses that are not finite are None."""

    task: str
    regime: str
    seed: int
    steps: tuple[int, ...]  #: after which the held-out loss was computed; 0 is before the first
    held_out: tuple[float | None, ...]  #: the task's metric there, in the regime's own forward pass
    training: tuple[float | None, ...]  #: mean training loss since the evaluation before; the first is None
    skipped: int  #: steps left out because a gradient was not finite
    bytes: dict[str, int]  #: of weights, gradients, masters, moments, at the first step taken; 0 if none was
    pair: str  #: fingerprint of initial weights and batches: equal in all regimes of a seed
    backend: str  #: how narrow products ran

    @property
    def final(self) -> float:
        """The last held-out loss; NaN if it was not finite."""
        return math.nan if self.held_out[-1] is None else self.held_out[-1]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Run":
        """The run that ``as_dict`` described."""
        lists = {key: tuple(found[key]) for key in ("steps", "held_out", "training")}
        return cls(**{**found, **lists})


def learning_rate(task: Task, step: int) -> float:
    """The rate of step 0, 1, ...: a linear rise over ``WARMUP`` steps, then half a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / WARMUP)
    done = step / max(1, task.steps - 1)
    return task.learning_rate * rise * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@one_thread()
def train(
    task: "str | Task", regime: "str | Regime", seed: int, *, quick: bool = True,
    watch: Callable[[Engine, int], None] | None = None,
) -> Run:  # fmt: skip
    """Train ``task`` under ``regime`` with ``seed``.

    ``watch(engine, step)`` is called when the weights have changed.  The global generator is seeded inside, and as
    before afterwards.  One CPU thread works, so that results do not depend on the number of cores.
    """
    task, regime = get_task(task, quick), get_regime(regime)
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        engine = build(regime, task, seed)
        steps, held_out, training = [0], [_number(evaluate(engine, task))], [None]
        size, recent = dict.fromkeys(KINDS, 0), []
        for step, (inputs, targets) in enumerate(_batches(task, seed)):
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(task, step)
            with contextlib.nullcontext() if any(size.values()) else _Counted(engine, size):
                recent.append(engine.step(inputs, targets))
            if watch is not None:
                watch(engine, step)
            if (step + 1) * task.evaluations // task.steps > step * task.evaluations // task.steps:
                steps.append(step + 1)
                held_out.append(_number(evaluate(engine, task)))
                training.append(_number(torch.stack(recent).float().mean()))
                recent.clear()
    return Run(task.name, regime.name, seed, tuple(steps), tuple(held_out), tuple(training), engine.skipped(), size,
               fingerprint(task, seed), engine.backend)  # fmt: skip


def _batches(task: Task, seed: int) -> Iterator[Batch]:
    found = 0
    for batch in itertools.islice(task.batches(seed), task.steps):
        found += 1
        yield batch
    if found < task.steps:
        raise ValueError(f"expected {task.steps} batches of seed {seed}, got {found}: let batches(seed) yield more")


def evaluate(engine: Engine, task: Task) -> torch.Tensor:
    """The task's metric on its held-out data, in FP32, on the output of the regime's own forward pass."""
    inputs, targets = task.held_out
    with torch.no_grad():
        return (task.metric or task.loss)(engine.predict(inputs), targets)


def fingerprint(task: Task, seed: int) -> str:
    """A digest of the initial weights and of every batch of ``seed``: what makes two runs a pair."""
    digest = hashlib.sha256()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        whole = (*task.model(seed).state_dict().values(), *tree_leaves(list(_batches(task, seed))))
    for tensor in whole:
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Counted:
    """Inside, the bytes of weights, gradients, masters and moments are taken when an optimizer has stepped.

    The hook is that of all optimizers, so that one which a trainer made for itself is seen too.
    """

    def __init__(self, engine: Engine, size: dict[str, int]) -> None:
        self._engine, self._size = engine, size
        self._stepped: list[torch.optim.Optimizer] = []

    def __enter__(self) -> None:
        self._handle = register_optimizer_step_post_hook(self._note)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _note(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._stepped.append(optimizer)
        own = list(self._engine.model.parameters())
        stepped = [p for o in self._stepped for group in o.param_groups for p in group["params"]]
        state = [v for o in self._stepped for values in o.state.values() for v in values.values()]
        gradients = [p.grad for p in (*own, *stepped) if p.grad is not None]
        self._size |= {
            "weights": _bytes(own),
            "gradients": _bytes([*gradients, *self._engine.sums()]),
            "masters": _bytes(stepped) - _bytes({*stepped} & {*own}),
            "moments": _bytes(v for v in state if isinstance(v, torch.Tensor) and v.dim()),
        }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages under ``tensors``."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def _number(x: torch.Tensor) -> float | None:
    """Six digits of a loss: what a record keeps, so that a resumed run equals an uninterrupted one; None if lost."""
    value = float(x)
    return float(f"{value:.6g}") if math.isfinite(value) else None
