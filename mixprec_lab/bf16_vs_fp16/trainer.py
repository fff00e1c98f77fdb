"""Training in BF16 with what BF16 cannot do done elsewhere: ``BF16Trainer``."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import distributed, nn

from mixprec_lab.bf16_vs_fp16.conversion import Keep, bf16_autocast, cast_floating, to_bf16
from mixprec_lab.bf16_vs_fp16.updates import (
    MasterUpdate,
    NarrowUpdate,
    bf16_adamw_for,
    check_followable,
    gradient_slots,
)
from mixprec_lab.untouched import evaluating

Update = Literal["master", "stochastic", "kahan", "nearest"]
UPDATES: tuple[str, ...] = ("master", "stochastic", "kahan", "nearest")


class BF16Step(NamedTuple):
    """What one call of ``train_step`` did."""

    loss: torch.Tensor  #: FP32, detached, on the device of the model
    grad_norm: torch.Tensor | None  #: FP32 norm of the summed gradients before clipping; None in mid-accumulation
    stepped: bool  #: whether the weights were updated


class BF16Trainer:
    """``model`` in BF16, trained by ``optimizer``, which was built on the model's parameters before or after.

    - Parameters become BF16, except normalization layers (found by type) and ``keep_fp32``: see ``to_bf16``.
    - Floating-point inputs are cast where they meet BF16 parameters; integers never.
    - The model's output is cast to FP32 and the loss computed there.
    - Gradients of micro-batches are added in FP32, averaged over the ranks of ``torch.distributed`` in FP32 where it is
      initialized, and clipped in FP32 to a total norm of ``max_norm`` (None: not clipped).
    - ``update`` says how weights change.  ``master``: FP32 masters, any optimizer (``MasterWeightOptimizer``).
      ``stochastic`` and ``kahan``: no masters, ``BF16AdamW`` for the BF16 parameters, with the hyper-parameters of
      ``optimizer``, a ``torch.optim.AdamW``, followed step by step.  ``nearest``: ``optimizer`` on the BF16 weights
      themselves, which loses updates; it is there to show that.

    No loss scaling: BF16 has the exponent range of FP32.  A step whose gradients are not finite is skipped and counted
    in ``skipped_steps``; it does not touch the weights.  Learning-rate schedulers hold ``optimizer``.

    Raises TypeError for a model wrapped in DistributedDataParallel, which would reduce in BF16, and for an optimizer
    that ``update`` cannot use; ValueError for an unknown ``update``, ``max_norm`` <= 0, ``accumulation_steps`` < 1, a
    generator without stochastic rounding, and parameters that are not the model's; and as ``to_bf16``.  The model is
    converted only when all of that is in order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], torch.Tensor] = nn.functional.cross_entropy,
        *,
        update: Update = "master",
        keep_fp32: Iterable[Keep] = (),
        max_norm: float | None = 1.0,
        accumulation_steps: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        _check(model, optimizer, update, max_norm, accumulation_steps, generator)
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.update, self.max_norm, self.accumulation_steps = update, max_norm, accumulation_steps
        self.micro_steps = self.steps = self.skipped_steps = 0
        exact = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.is_floating_point()}
        self.dtypes = to_bf16(model, keep_fp32)
        if update == "master":
            self._updater: MasterUpdate | NarrowUpdate = MasterUpdate(optimizer, model, exact)
        else:
            own = None if update == "nearest" else bf16_adamw_for(optimizer, update, generator)
            self._updater = NarrowUpdate(optimizer, own, gradient_slots(model, optimizer, own))

    def train_step(self, inputs: Any, targets: Any) -> BF16Step:
        """Forward, backward, and after every ``accumulation_steps`` calls one update.

        ``inputs`` is one argument, or several if it is a tuple.  Raises ValueError if the loss is not a scalar.
        """
        self.model.train()
        outputs = cast_floating(self._forward(inputs), torch.float32)
        loss = self.loss_fn(outputs, targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"expected loss_fn to return a scalar, got {got}")
        (loss.float() / self.accumulation_steps).backward()
        self._updater.collect()
        self.micro_steps += 1
        norm, stepped = self._update() if self.micro_steps % self.accumulation_steps == 0 else (None, False)
        return BF16Step(loss.detach().float(), norm, stepped)

    @torch.no_grad()
    def predict(self, inputs: Any) -> Any:
        """The model's output in FP32, in evaluation mode and without gradients; the model's mode is restored."""
        with evaluating(self.model):
            return cast_floating(self._forward(inputs), torch.float32)

    def _forward(self, inputs: Any) -> Any:
        with bf16_autocast(self.model):
            return self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)

    def _update(self) -> tuple[torch.Tensor, bool]:
        gradients = self._updater.gradients(complete=_ranks() > 1)
        if not gradients:
            raise RuntimeError("no parameter of the optimizer has a gradient: the loss does not depend on any")
        _average_over_ranks(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        stepped = bool(norm.isfinite())
        if stepped:
            if self.max_norm is not None:
                torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
            self._updater.step()
            self.steps += 1
        else:
            self.skipped_steps += 1
        self._updater.zero()
        return norm, stepped

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs, in mid-accumulation too; by reference, as in torch: copy to keep.

        The global random state (dropout, data order) is the caller's.
        """
        counts = {name: getattr(self, name) for name in ("micro_steps", "steps", "skipped_steps")}
        return {"update": self.update, "counts": counts, "model": self.model.state_dict(), **self._updater.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved.

        Raises ValueError for the state of another ``update`` or without the expected keys, and what model and optimizer
        raise for their parts.
        """
        expected = {"update", "counts", "model", "optimizer", "narrow", "gradients"}
        if set(state) != expected or state["update"] != self.update:
            got = f"update {state.get('update')!r} and keys {sorted(state)}"
            raise ValueError(f"expected update {self.update!r} and keys {sorted(expected)}, got {got}")
        self.model.load_state_dict(state["model"])
        self._updater.load_state_dict(state)
        for name, count in state["counts"].items():
            setattr(self, name, count)


def _check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    update: str,
    max_norm: float | None,
    accumulation_steps: int,
    generator: torch.Generator | None,
) -> None:
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        got = f"{type(model).__name__} and {type(optimizer).__name__}"
        raise TypeError(f"expected an nn.Module and a torch.optim.Optimizer, got {got}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "DistributedDataParallel reduces gradients in BF16: give its .module, this trainer reduces in FP32"
        )
    if update not in UPDATES:
        raise ValueError(f"expected update to be one of {', '.join(UPDATES)}, got {update!r}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"expected max_norm to be positive or None, got {max_norm}")
    if accumulation_steps < 1:
        raise ValueError(f"expected accumulation_steps to be at least 1, got {accumulation_steps}")
    if generator is not None and update != "stochastic":
        raise ValueError(f"a generator has no use with update={update!r}: leave it out")
    known = set(model.parameters())
    for group in optimizer.param_groups:
        if not known.issuperset(group["params"]):
            raise ValueError("expected an optimizer built on the parameters of the model, got one with others")
    if update in ("stochastic", "kahan"):
        check_followable(optimizer, update)
    if update != "master" and optimizer.state:
        raise ValueError(
            f"expected a fresh optimizer for update={update!r}, got one with state: its FP32 moments would be lost"
        )


def _ranks() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _average_over_ranks(gradients: list[torch.Tensor]) -> None:
    """The mean of each gradient over the ranks, in place and in the dtype it has: FP32."""
    if (ranks := _ranks()) > 1:
        for gradient in gradients:
            distributed.all_reduce(gradient)
        torch._foreach_div_(gradients, ranks)
