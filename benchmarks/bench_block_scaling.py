"""How fast ``quantize_blocks`` is, as ratios in one run: over ``copy_``, over plain torch, over torchao if installed.

    python benchmarks/bench_block_scaling.py [--threads 1] [--rounds 15] [--sizes 1024 4096]

Candidates are timed in turn, round by round, and medians compared, so that a busy neighbour slows all of them alike.
Every rival's result is compared with ours first, bit by bit; where it differs the table says so.
"""

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mixprec_lab.block_scaling import SCHEMES, get_scheme, quantize_blocks
from mixprec_lab.formats import text_table

Run = Callable[[], torch.Tensor]
UP = {name: replace(get_scheme(name), rule="round_up") for name in ("mxfp8", "mxfp4")}


def plain_tiles(x: torch.Tensor) -> torch.Tensor:
    """1x128 tiles as a tutorial writes them: torch's own casts, one temporary an operation."""
    tiles = x.view(x.shape[0], -1, 128)
    scale = tiles.abs().amax(-1, keepdim=True) / 448
    return ((tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).view_as(x)


def rivals(x: torch.Tensor) -> dict[str, tuple[Run, Run]]:
    """name -> (the rival, ours doing the same)."""
    found = {"plain torch, 1x128": (lambda: plain_tiles(x), lambda: quantize_blocks(x, "tile_1x128"))}
    if not importlib.util.find_spec("torchao"):
        return found
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def mx(dtype: torch.dtype, mode: str) -> Run:
        return lambda: MXTensor.to_mx(x, dtype, 32, ScaleCalculationMode[mode]).dequantize(torch.float32)

    def nvfp4() -> torch.Tensor:
        scale = per_tensor_amax_to_scale(x.abs().max())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    e4m3, e2m1 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
    return found | {
        "torchao, MXFP8 floor": (mx(e4m3, "FLOOR"), lambda: quantize_blocks(x, "mxfp8")),
        "torchao, MXFP8 round up": (mx(e4m3, "RCEIL"), lambda: quantize_blocks(x, UP["mxfp8"])),
        "torchao, MXFP4 floor": (mx(e2m1, "FLOOR"), lambda: quantize_blocks(x, "mxfp4")),
        "torchao, NVFP4": (nvfp4, lambda: quantize_blocks(x, "nvfp4")),
    }


def medians(candidates: dict[str, Run], rounds: int) -> dict[str, float]:
    """Seconds a call, each candidate timed once a round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(size: int, rounds: int) -> None:
    """Print both tables for a matrix of ``size`` by ``size``."""
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    out, pairs = torch.empty_like(x), rivals(x)
    ours: dict[str, Run] = {name: lambda name=name: quantize_blocks(x, name) for name in SCHEMES}
    others = {name: rival for name, (rival, _) in pairs.items()}
    twins = {f"ours for {name}": own for name, (_, own) in pairs.items()}
    agree = {name: torch.equal(rival(), own()) for name, (rival, own) in pairs.items()}
    found = medians({"copy_": lambda: out.copy_(x)} | ours | others | twins, rounds)
    base, n = found["copy_"], x.numel()
    rows = [[name, f"{n / found[name] / 1e6:.0f}", f"{base / found[name]:.3f}"] for name in ["copy_", *ours]]
    print(text_table([f"{size} x {size}", "M/s", "of copy_"], rows), "\n")
    rows = [[name, f"{found[name] / found[f'ours for {name}']:.1f}", "yes" if agree[name] else "no"] for name in others]
    print(text_table(["rival", "time / ours", "same bits"], rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="rows and columns")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    print(f"{machine}, {arguments.threads} thread(s), median of {arguments.rounds} rounds\n")
    for size in arguments.sizes:
        measure(size, arguments.rounds)


if __name__ == "__main__":
    main()
