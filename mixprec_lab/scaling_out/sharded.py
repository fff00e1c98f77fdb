"""FSDP2 in mixed precision: which dtype computes, which one is reduced, what each rank keeps (a job for two ranks).

    torchrun --nproc-per-node 2 -m mixprec_lab.scaling_out.sharded

``fully_shard`` keeps FP32 shards, which are the master weights; ``MixedPrecisionPolicy`` says in which dtype parameters
are gathered and used (``param_dtype``) and in which one gradients are reduced (``reduce_dtype``).  The latter defaults
to the former: BF16 parameters alone make BF16 reductions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mixprec_lab import models
from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.memory import StateBytes, state_bytes
from mixprec_lab.scaling_out.group import Group, digits_of, process_group

POLICIES = {
    "nothing": {},
    "param BF16": {"param_dtype": torch.bfloat16},
    "param BF16, reduce FP32": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
}
WIDTH = {"width": 64, "heads": 4, "depth": 2}


def run(steps: int = 2, data: Sequence[torch.Tensor] | None = None) -> dict[str, Any]:
    """What ``train`` returns under each of ``POLICIES``, and what FSDP2 makes of an infinity in one shard.

    ``data`` are the tensors of ``models.digits()``, if at hand.
    """
    with process_group() as group:
        own = digits_of(group, data)
        results: dict[str, Any] = {}
        for name, policy in POLICIES.items():
            results[name] = result = train(group, own, MixedPrecisionPolicy(**policy), steps)
            adds = "BF16" if result["reduced_in_bf16"] else result["gradient"]
            print(f"{name}: computes {result['computes']}, adds {adds}, keeps {result['gradient']}")  # fmt: skip
        results["overflow"] = overflow(group, own)
        for name, told in results["overflow"].items():
            print(f"one infinity, {name}: {told}")
        return results


def sharded_transformer(group: Group, policy: MixedPrecisionPolicy | None = None, seed: int = 0) -> nn.Module:
    """The transformer of the digits, each block and the whole sharded over all ranks of ``group``."""
    model = models.transformer(seed, **WIDTH).to(group.device)
    return shard(model, group, policy)


def shard(model: nn.Module, group: Group, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """``model`` with each of its ``blocks`` and the whole fully sharded, in place."""
    mesh = init_device_mesh(group.device.type, (group.size,))
    policy = policy or MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def loss_of(model: nn.Module, group: Group, data: models.Digits, step: int = 0) -> torch.Tensor:
    """The loss of this rank's part of a batch of 32 images, FP32."""
    batch = torch.randint(len(data.train_labels), (32,), generator=torch.Generator().manual_seed(step))
    batch = batch[group.rank :: group.size]
    return nn.functional.cross_entropy(model(data.train_images[batch]).float(), data.train_labels[batch])


def train(group: Group, data: models.Digits, policy: MixedPrecisionPolicy, steps: int) -> dict[str, Any]:
    """The dtype of a layer's input and of the gradients, whether BF16 holds them all, and the bytes on this rank."""
    model = sharded_transformer(group, policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[torch.dtype] = []
    hook = model.blocks[0].expand.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].dtype))
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, group, data, step).backward()
        optimizer.step()
    hook.remove()
    local = [p.grad.to_local() for p in model.parameters()]
    values = torch.cat([g.flatten() for g in local])
    states = local_state_bytes(model, optimizer)
    return {
        "computes": _name(seen[0]), "gradient": _name(local[0].dtype),
        "reduced_in_bf16": bool((values.bfloat16().float() == values).all()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": {k: getattr(states, k) for k in ("weights", "gradients", "masters", "moments", "counters", "total")},
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}[dtype]


class _Local(nn.Module):
    """The shards of a model on this rank, as plain parameters with plain gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shards = nn.ParameterList()
        for p in model.parameters():
            own = nn.Parameter(p.detach().to_local())
            own.grad = None if p.grad is None else p.grad.to_local()
            self.shards.append(own)


def local_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> StateBytes:
    """``memory.state_bytes`` of what this rank keeps of a sharded model and its optimizer."""
    held = _Local(model)
    inner = torch.optim.SGD(held.parameters(), lr=1.0)
    for own, p in zip(held.parameters(), model.parameters(), strict=True):
        inner.state[own] = {
            key: value.to_local() if hasattr(value, "to_local") else value for key, value in optimizer.state[p].items()
        }
    return state_bytes(held, inner)


def overflow(group: Group, data: models.Digits) -> dict[str, str]:
    """Which ranks skip when the last rank's shard of a gradient is infinite, by scaler."""
    told = {}
    scalers = {"torch.amp.GradScaler": torch.amp.GradScaler(group.device.type, init_scale=2.0**16),
               "DynamicLossScaler": DynamicLossScaler()}  # fmt: skip
    for name, scaler in scalers.items():
        model = sharded_transformer(group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ours = isinstance(scaler, DynamicLossScaler)
        before = [p.detach().to_local().clone() for p in model.parameters()]
        loss = loss_of(model, group, data)
        (scaler.scale_loss(loss) if ours else scaler.scale(loss)).backward()
        if group.rank == group.size - 1:
            next(model.parameters()).grad.to_local()[0] = torch.inf
        scaler.step(optimizer)
        if not ours:
            scaler.update()
        moved = any(not torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
        told[name] = _verdict(group.everywhere(not moved))
    return told


def _verdict(skipped: list[bool]) -> str:
    if len(set(skipped)) == 1:
        return "every rank skipped" if skipped[0] else "no rank skipped"
    return "skipped on rank " + ", ".join(str(rank) for rank, s in enumerate(skipped) if s)


if __name__ == "__main__":
    run()
