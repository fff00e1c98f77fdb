"""Data-parallel training in mixed precision: each rank a part of the batch, one gradient for all (a job for two ranks).

    torchrun --nproc-per-node 2 -m mixprec_lab.scaling_out.ddp

Three ways to train the same network: FP32; BF16 autocast with gradients that travel in BF16; FP16 autocast with a loss
scaler.  DDP reduces the gradients before the scaler looks at them, so that an infinity of one rank is in everybody's
gradient and all ranks skip the same step without a word.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mixprec_lab import models
from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.loss_scaling.experiment import backward_and_step
from mixprec_lab.scaling_out.group import Group, digits_of, process_group

WAYS = {"FP32": (None, False), "BF16, sent in BF16": (torch.bfloat16, True), "FP16, scaled": (torch.float16, False)}
BATCH = 64  #: images of all ranks together


def bf16_hook(
    group: distributed.ProcessGroup | None, bucket: distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """The mean gradient of a bucket, reduced in BF16 and widened again: a communication hook for DDP.

    It computes what torch's ``bf16_compress_hook`` does: cast, divide by the number of ranks, add.  DDP takes that one
    over NCCL only ("BF16 all reduce communication hook required CUDA 11+ and NCCL 2.10+", torch 2.13), while gloo adds
    BF16 as well as any.
    """
    group = group or distributed.group.WORLD
    sent = bucket.buffer().to(torch.bfloat16).div_(group.size())
    future = distributed.all_reduce(sent, group=group, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def run(steps: int = 40, overflow_at: int | None = None, data: Sequence[torch.Tensor] | None = None) -> dict[str, Any]:
    """Train in every way of ``WAYS`` and say how it ended: by way, what ``train`` returns.

    ``data`` are the tensors of ``models.digits()``, for a launcher that has read them already.
    """
    with process_group() as group:
        own = digits_of(group, data)
        results = {}
        for name, (dtype, compress) in WAYS.items():
            results[name] = result = train(group, own, dtype, compress, steps, overflow_at)
            skipped = f", {result['skipped']} skipped" if dtype == torch.float16 else ""
            print(f"{name}: loss {result['first_loss']:.1f} -> {result['last_loss']:.1f}{skipped}, "
                  f"same weights: {result['same']}")  # fmt: skip
        return results


def train(
    group: Group,
    data: models.Digits,
    dtype: torch.dtype | None,
    compress: bool,
    steps: int,
    overflow_at: int | None = None,
) -> dict[str, Any]:
    """Losses of the whole batch, the final weights, and whether they are the same on every rank, bit for bit.

    SGD, learning rate 0.1, momentum 0.9; ``dtype`` is autocast's, None for FP32; FP16 is loss scaled.  At the step
    ``overflow_at`` the last rank's loss is multiplied by infinity.
    """
    model = models.transformer().to(group.device)
    parallel = DistributedDataParallel(model)
    if compress:
        parallel.register_comm_hook(None, bf16_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = DynamicLossScaler() if dtype == torch.float16 else None
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(steps):
        batch = torch.randint(len(data.train_labels), (BATCH,), generator=generator)[group.rank :: group.size]
        with torch.autocast(group.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = parallel(data.train_images[batch])
        loss = nn.functional.cross_entropy(outputs.float(), data.train_labels[batch])
        bad = step == overflow_at and group.rank == group.size - 1
        optimizer.zero_grad()
        backward_and_step(optimizer, loss * torch.inf if bad else loss, scaler)
        losses.append(group.everywhere(loss.item()))
    mean = [sum(parts) / group.size for parts in losses]
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
    return {
        "losses": mean, "first_loss": mean[0], "last_loss": sum(mean[-5:]) / len(mean[-5:]),
        "weights": weights, "same": group.agree([weights]), "skipped": scaler.skipped if scaler else 0,
        "log2_scale": math.log2(scaler.scale) if scaler else 0.0,
    }  # fmt: skip


if __name__ == "__main__":
    run()
