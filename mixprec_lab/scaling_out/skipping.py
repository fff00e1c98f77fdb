"""One infinity on one rank, when each rank holds a part of the gradient (a job for two ranks).

    torchrun --nproc-per-node 2 -m mixprec_lab.scaling_out.skipping

ZeRO's first two stages by hand: the gradients of a batch are reduced and scattered, each rank unscales, checks and
steps its own slice of the weights, and the slices are gathered again.  In one step the last rank's slice overflows.
With a scaler of its own (``DynamicLossScaler``) that rank alone skips, and its scale falls away from the others'; with
``DistributedLossScaler`` all ranks skip.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn

from mixprec_lab import models
from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.scaling_out.group import Group, digits_of, process_group
from mixprec_lab.scaling_out.scaler import DistributedLossScaler

SCALERS = {"each for itself": DynamicLossScaler, "all together": DistributedLossScaler}


def run(steps: int = 4, spike: int = 1, data: Sequence[torch.Tensor] | None = None) -> dict[str, Any]:
    """What ``train`` returns with each of ``SCALERS``; ``data`` are the tensors of ``models.digits()``, if at hand."""
    with process_group() as group:
        own = digits_of(group, data).train_images.flatten(1)[group.rank :: group.size][:32]
        results = {}
        for name, kind in SCALERS.items():
            results[name] = result = train(group, own, kind(), steps, spike)
            print(f"{name}: steps {''.join('x' if s else '-' for s in result['stepped'])}, "
                  f"scale 2^{result['log2_scale']:.0f}, gradients off by {result['gradient_error']:.0%}")  # fmt: skip
        return results


def train(
    group: Group, images: torch.Tensor, scaler: DynamicLossScaler, steps: int, spike: int
) -> dict[str, Any]:
    """Which steps this rank took, its scale, the weights, and how wrong its unscaled gradient was at worst.

    The autoencoder of 7,856 parameters, FP32 SGD; at step ``spike`` one element of the last rank's slice is infinite.
    The true gradient is the mean of the ranks' own, never scaled; the error is relative to its norm.
    """
    model = models.autoencoder().to(group.device)
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    own = nn.Parameter(flat.chunk(group.size)[group.rank].clone())  # 7,856 is a multiple of 16
    optimizer = torch.optim.SGD([own], lr=0.1)
    stepped, errors = [], []
    for step in range(steps):
        nn.utils.vector_to_parameters(flat, model.parameters())
        true, scaled = (_reduced(group, model, images, scale) for scale in (1.0, scaler.scale))
        own.grad = scaled
        if step == spike and group.rank == group.size - 1:
            own.grad[0] = torch.inf
        scaler.unscale_gradients([own])
        errors.append(float((own.grad - true).norm() / true.norm()))
        stepped.append(scaler.step(optimizer))
        flat = _gathered(group, own.detach())
    finite = [e for e, s in zip(errors, stepped, strict=True) if s]
    return {
        "stepped": stepped, "skipped": scaler.skipped, "log2_scale": math.log2(scaler.scale),
        "gradient_error": max(finite), "weights": flat.cpu(),
    }  # fmt: skip


def _reduced(group: Group, model: nn.Module, images: torch.Tensor, scale: float) -> torch.Tensor:
    """This rank's slice of the mean over the ranks of ``scale`` times their gradients."""
    loss = (model(images) - images).square().mean()
    gradients = torch.autograd.grad(loss * scale, list(model.parameters()))
    flat = nn.utils.parameters_to_vector(gradients) / group.size
    distributed.all_reduce(flat)  # ZeRO's reduce-scatter sends half as much and gives this slice
    return flat.chunk(group.size)[group.rank].clone()


def _gathered(group: Group, own: torch.Tensor) -> torch.Tensor:
    slices = [torch.empty_like(own) for _ in range(group.size)]
    distributed.all_gather(slices, own)
    return torch.cat(slices)


if __name__ == "__main__":
    run()
