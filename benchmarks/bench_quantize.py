"""How fast ``quantize`` is, as ratios in one run: over ``copy_`` (the limit) and over the rivals that are installed.

    python benchmarks/bench_quantize.py [--threads 1] [--rounds 15] [--sizes 20 24]

Candidates are timed in turn, round by round, and medians compared, so that a busy neighbour slows all of them alike.
Every rival's result is compared with ours first; where it differs (another rounding, lost -0, ...) the table says so.
Rivals: torch's own cast, ml_dtypes, gfloat, qtorch, pychop; the last two only where they are installed.
"""

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable

import torch

from mixprec_lab.formats import FloatFormat, text_table
from mixprec_lab.rounding import quantize

E3M4 = FloatFormat("e3m4", 3, 4)


def ours(x: torch.Tensor, out: torch.Tensor, generator: torch.Generator) -> dict[str, Callable[[], torch.Tensor]]:
    """Our candidates: formats, overflow policies and modes that take different paths."""
    cases = {
        "E4M3 saturating": ("fp8_e4m3", "nearest_even", "saturate"),
        "E4M3 NaN on overflow": ("fp8_e4m3", "nearest_even", "native"),
        "E3M4 saturating": (E3M4, "nearest_even", "saturate"),
        "FP16 inf on overflow": ("fp16", "nearest_even", "native"),
        "BF16": ("bf16", "nearest_even", "native"),
        "TF32 saturating": ("tf32", "nearest_even", "saturate"),
        "E4M3 toward zero": ("fp8_e4m3", "toward_zero", "saturate"),
        "E4M3 stochastic": ("fp8_e4m3", "stochastic", "saturate"),
    }
    return {
        f"ours, {name}": lambda c=case: quantize(x, *c, generator if "stochastic" in c else None, out=out)
        for name, case in cases.items()
    }


def rivals(x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Each installed rival doing E4M3, round to nearest, there and back."""
    found: dict[str, Callable[[], torch.Tensor]] = {
        "torch, .to(float8_e4m3fn).float()": lambda: x.to(torch.float8_e4m3fn).float()
    }
    array = x.numpy()
    if importlib.util.find_spec("ml_dtypes"):
        import ml_dtypes

        found["ml_dtypes, astype twice"] = lambda: torch.from_numpy(
            array.astype(ml_dtypes.float8_e4m3fn).astype("float32")
        )
    if importlib.util.find_spec("gfloat"):
        import gfloat
        from gfloat.formats import format_info_ocp_e4m3

        found["gfloat, round_ndarray"] = lambda: torch.from_numpy(
            gfloat.round_ndarray(format_info_ocp_e4m3, array, gfloat.RoundMode.TiesToEven, True)
        ).float()
    if importlib.util.find_spec("qtorch"):
        from qtorch.quant import float_quantize

        found["qtorch, float_quantize"] = lambda: float_quantize(x, exp=4, man=3, rounding="nearest")
    if importlib.util.find_spec("pychop"):
        import pychop

        pychop.backend("torch")
        chop = pychop.Chop(exp_bits=4, sig_bits=3, rmode=1)
        found["pychop, Chop"] = lambda: chop(x)
    return found


def measure(n: int, rounds: int) -> None:
    """Print the table for ``n`` elements."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator) * 3
    out = torch.empty_like(x)
    expected = quantize(x, "fp8_e4m3")
    others = rivals(x)
    agree = {name: "" if torch.equal(run(), expected) else "other result" for name, run in others.items()}
    candidates = {"copy_": lambda: out.copy_(x)} | ours(x, out, generator) | others
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    base, main = median["copy_"], median["ours, E4M3 saturating"]
    rows = [
        [name, f"{n / t / 1e6:.0f}", f"{base / t:.3f}", f"{t / main:.1f}", agree.get(name, "")]
        for name, t in median.items()
    ]
    print(text_table([f"{n:,} elements", "M/s", "of copy_", "time / ours", ""], rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 24], help="log2 of the element counts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    print(f"{machine}, {arguments.threads} thread(s), median of {arguments.rounds} rounds\n")
    for size in arguments.sizes:
        measure(2**size, arguments.rounds)


if __name__ == "__main__":
    main()
