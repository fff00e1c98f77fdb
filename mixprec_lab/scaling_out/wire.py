"""What really travels: sums of seeded gradients in every dtype, and gathered FP8 tensors (a job for two ranks).

    torchrun --nproc-per-node 2 -m mixprec_lab.scaling_out.wire

The sums are those that ``simulate_reduction`` gives; the gathered tensor is what quantizing on the spot gives.
"""

from typing import Any

import torch
from torch import distributed, nn

from mixprec_lab.fp8 import DelayedScaling, FP8Linear, update_scales
from mixprec_lab.scaling_out.eight_bits import all_gather, pack, unpack
from mixprec_lab.scaling_out.group import Group, process_group
from mixprec_lab.scaling_out.reduction import gradients

DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16, "E4M3": torch.float8_e4m3fn}


def run(size: int = 4096) -> dict[str, Any]:
    """The sums by dtype (or the refusal), the gathered tensor, and the FP8 scales of every rank."""
    with process_group() as group:
        results: dict[str, Any] = {"sums": sums(group, size), **gathered(group), "scales": scales(group)}
        for name, total in results["sums"].items():
            print(f"{name}: {total if isinstance(total, str) else f'{total.numel()} sums'}")
        print(f"E4M3 gathered: {results['bytes']:,} bytes for {results['gathered'].numel():,} values, "
              f"exact: {results['exact']}")  # fmt: skip
        for name, told in results["scales"].items():
            print(f"FP8 scales {name}: {told['differ']} of {told['count']} differ between ranks")
        return results


def sums(group: Group, size: int) -> dict[str, Any]:
    """By dtype: the sum over the ranks of ``gradients(ranks, size)``, float32, or the words of the refusal."""
    own = gradients(group.size, size)[group.rank].to(group.device)
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        total = own.to(dtype, copy=True)
        try:
            distributed.all_reduce(total)
        except RuntimeError as error:  # a backend without this dtype; any other failure of a rank ends the job
            found[name] = f"refused, {str(error).splitlines()[0]}"
        else:
            found[name] = total.float().cpu()
    return found


def gathered(group: Group, size: int = 512) -> dict[str, Any]:
    """An FP8 all-gather of shards of different size of values, and whether it equals quantizing them on the spot."""
    shards = [gradients(1, size, seed=rank)[0].to(group.device) * 4.0**rank for rank in range(group.size)]
    got = all_gather(shards[group.rank])
    local = torch.cat([unpack(pack(shard)) for shard in shards])
    together = all_gather(shards[group.rank], same_scale=True)
    whole = unpack(pack(torch.cat(shards)))
    return {
        "gathered": got.cpu(), "exact": torch.equal(got, local) and torch.equal(together, whole),
        "bytes": got.numel() + 4 * group.size,
    }  # fmt: skip


def scales(group: Group, steps: int = 3) -> dict[str, Any]:
    """With and without a common amax: the delayed scales of one layer on every rank, and how many of them differ."""
    found = {}
    for name, reduce_amax in (("from each rank's own amax", False), ("from the largest of all", True)):
        torch.manual_seed(0)
        layer = FP8Linear.from_linear(nn.Linear(32, 32).to(group.device), DelayedScaling(reduce_amax=reduce_amax))
        generator = torch.Generator().manual_seed(group.rank)
        for _ in range(steps):
            x = torch.randn(16, 32, generator=generator).to(group.device) * (1 + group.rank)
            layer(x).square().mean().backward()
            update_scales(layer)
        own = [layer.quantizers[role].scale.item() for role in layer.quantizers]
        by_rank = group.everywhere(own)
        differ = sum(len(set(column)) > 1 for column in zip(*by_rank, strict=True))
        found[name] = {"count": len(own), "differ": differ, "by_rank": by_rank}
    return found


if __name__ == "__main__":
    run()
