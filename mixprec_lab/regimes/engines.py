"""One face for the four trainers of the package: a step, a prediction, and the optimizer that really steps."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mixprec_lab.amp import MixedPrecisionTrainer
from mixprec_lab.bf16_vs_fp16 import BF16Trainer
from mixprec_lab.fp8 import FP8Trainer, choose_backend
from mixprec_lab.fp8.trainer import apply_model
from mixprec_lab.loss_scaling import StaticLossScaler
from mixprec_lab.regimes.emulation import EmulatedProducts
from mixprec_lab.regimes.regime import Regime
from mixprec_lab.regimes.tasks import Task
from mixprec_lab.untouched import evaluating


@dataclass(frozen=True)
class Engine:
    """A model under a regime."""

    regime: Regime
    model: nn.Module
    optimizer: torch.optim.Optimizer  #: its groups hold the learning rate
    step: Callable[[Any, Any], torch.Tensor]  #: (inputs, targets) -> detached loss
    predict: Callable[[Any], Any]  #: inputs -> output in FP32, in evaluation mode
    skipped: Callable[[], int]  #: steps that were left out because a gradient was not finite
    backend: str  #: how narrow products run: "native" or what emulates them
    sums: Callable[[], Iterable[torch.Tensor]] = tuple  #: gradients that the trainer holds beside ``.grad``


def build(regime: Regime, task: Task, seed: int) -> Engine:
    """``task``'s model of ``seed`` and the trainer of ``regime`` around it."""
    model = task.model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate, eps=task.eps, weight_decay=task.weight_decay)
    makers = {"FP32 loop": _fp32, "MixedPrecisionTrainer": _autocast, "BF16Trainer": _bf16, "FP8Trainer": _fp8}
    return makers[regime.engine](regime, model, optimizer, task, seed)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextlib.contextmanager
def tf32_products(device: torch.device) -> Iterator[str]:
    """Inside, FP32 products take TF32 operands: on the matrix units of a GPU that has them, emulated elsewhere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        with _native_products("tf32"):
            yield "native"
        return
    with EmulatedProducts("tf32"):
        yield "emulated TF32"


@contextlib.contextmanager
def _native_products(precision: Literal["tf32", "ieee"]) -> Iterator[str]:
    """FP32 products on CUDA as asked for, whatever the process allows: cuDNN's convolutions take TF32 by default."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [b.fp32_precision for b in backends]
    try:
        for b in backends:
            b.fp32_precision = precision
        yield "native"
    finally:
        for b, value in zip(backends, before, strict=True):
            b.fp32_precision = value


def _fp32(regime: Regime, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, seed: int) -> Engine:
    skipped, device = [], _device(model)

    def products() -> contextlib.AbstractContextManager[str]:
        return tf32_products(device) if regime.compute == "tf32" else _native_products("ieee")

    def step(inputs: Any, targets: Any) -> torch.Tensor:
        with products():
            loss = task.loss(apply_model(model, inputs), targets)
            optimizer.zero_grad()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
        else:
            skipped.append(norm)
        return loss.detach()

    def predict(inputs: Any) -> Any:
        with evaluating(model), torch.no_grad(), products():
            return apply_model(model, inputs)

    with products() as backend:
        return Engine(regime, model, optimizer, step, predict, lambda: len(skipped), backend)


def _autocast(regime: Regime, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, seed: int) -> Engine:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[regime.compute]
    scaler = StaticLossScaler(1.0) if regime.compute == "fp16" and regime.scaling == "none" else None
    trainer = MixedPrecisionTrainer(model, optimizer, task.loss, dtype=dtype, scaler=scaler, max_norm=1.0)

    def products() -> contextlib.AbstractContextManager:
        return EmulatedProducts(sums=torch.bfloat16) if regime.sums == "bf16" else contextlib.nullcontext()

    def step(inputs: Any, targets: Any) -> torch.Tensor:
        with products():
            return trainer.train_step(inputs, targets).loss

    def predict(inputs: Any) -> Any:
        with products(), evaluating(model), torch.no_grad(), torch.autocast(_device(model).type, dtype):
            return apply_model(model, inputs).float()

    backend = "emulated sums" if regime.sums == "bf16" else "native"
    return Engine(regime, model, optimizer, step, predict, lambda: trainer.skipped_steps, backend)


def _bf16(regime: Regime, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, seed: int) -> Engine:
    draws = torch.Generator(_device(model)).manual_seed(seed) if regime.update == "stochastic" else None
    trainer = BF16Trainer(model, optimizer, task.loss, update=regime.update, max_norm=1.0, generator=draws)

    def sums() -> Iterable[torch.Tensor]:
        return trainer.state_dict()["gradients"].values()

    return Engine(regime, model, optimizer, lambda x, y: trainer.train_step(x, y).loss, trainer.predict,
                  lambda: trainer.skipped_steps, "native", sums)  # fmt: skip


def _fp8(regime: Regime, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, seed: int) -> Engine:
    wanted = choose_backend("auto", _device(model)).name
    backend = wanted if wanted in regime.recipe.backends else "emulated"
    layers = {} if task.wide is None else {"skip": task.wide, "keep_first_and_last": False}
    trainer = FP8Trainer(model, optimizer, task.loss, recipe=regime.recipe, backend=backend, max_norm=1.0, pad=True,
                         **layers)  # fmt: skip
    trainer.convert_to_fp8()
    return Engine(regime, model, optimizer, lambda x, y: trainer.train_step(x, y).loss, trainer.predict,
                  lambda: trainer.skipped_steps, backend)  # fmt: skip
