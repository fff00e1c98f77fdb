"""The jobs that ``test_scaling_out_jobs`` launches: they must be importable by another process."""

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from mixprec_lab import models
from mixprec_lab.scaling_out import DistributedLossScaler, checkpoints, ddp, process_group, sharded, skipping, wire
from mixprec_lab.scaling_out.group import Group


def everything(folder: str, data: list[torch.Tensor]) -> dict[str, Any]:
    """Every job of the package, one after the other in one process group, and what else needs two ranks."""
    with process_group() as group:
        return {
            "ddp": ddp.run(steps=30, data=data),
            "overflow": ddp.train(group, models.Digits(*data), torch.float16, False, 3, overflow_at=1),
            "skipping": skipping.run(data=data),
            "sharded": sharded.run(data=data),
            "wire": wire.run(),
            "checkpoints": checkpoints.run(folder, data=data),
            "hooks": hook_gradients(),
            "refusal": refusal(group),
            "agree": [group.agree([torch.ones(2)]), group.agree([torch.full((2,), float(group.rank))])],
        }


def on_gpus(folder: str, data: list[torch.Tensor]) -> dict[str, Any]:
    """Every job of the package, on whatever device the process group chose."""
    with process_group() as group:
        return {
            "device": str(group.device),
            "ddp": ddp.run(steps=5, data=data),
            "skipping": skipping.run(data=data),
            "sharded": sharded.run(data=data),
            "wire": wire.run(),
            "checkpoints": checkpoints.run(folder, data=data),
        }


def hook_gradients() -> dict[str, torch.Tensor]:
    """A gradient reduced by our BF16 hook, by torch's (under a name that DDP lets pass on a CPU), and by none."""

    def torchs(group, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return default_hooks.bf16_compress_hook(group, bucket)

    found = {}
    for name, hook in (("ours", ddp.bf16_hook), ("torch's", torchs), ("none", None)):
        torch.manual_seed(0)
        parallel = DistributedDataParallel(nn.Linear(33, 17))
        if hook:
            parallel.register_comm_hook(None, hook)
        x = torch.randn(8, 33, generator=torch.Generator().manual_seed(distributed.get_rank()))
        parallel(x).square().sum().backward()
        found[name] = parallel.module.weight.grad
    return found


def refusal(group: Group) -> dict[str, Any]:
    """The last rank has no gradient to check: it raises, and the others, instead of waiting, skip."""
    weight = nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), DistributedLossScaler(init_scale=4.0)
    if group.rank < group.size - 1:
        weight.grad = torch.ones(1)
    try:
        stepped, error = scaler.step(optimizer), ""
    except RuntimeError as e:
        stepped, error = False, str(e)
    return {"stepped": stepped, "error": error, "weight": weight.item(), "scale": scaler.scale}
