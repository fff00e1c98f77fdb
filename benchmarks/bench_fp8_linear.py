"""What an emulated FP8 linear layer costs, forward and backward, as ratios over ``nn.Linear`` in FP32 in one run.

    python benchmarks/bench_fp8_linear.py [--threads 1] [--rounds 15] [--sizes 1024,1024,4096 2048,2048,2048]

Sizes are rows, in_features, out_features.  Candidates are timed in turn, round by round, and medians compared, so that
a busy neighbour slows all of them alike.  First it is checked that the candidates compute the same layer.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.formats import text_table
from mixprec_lab.fp8 import CurrentScaling, DelayedScaling, FP8Linear

BASE = "nn.Linear, FP32"
BF16 = torch.bfloat16


class NativeCasts(torch.autograd.Function):
    """The usual tutorial: torch's own FP8 casts there and back, current scaling, FP32 products."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = (_there_and_back(t, torch.float8_e4m3fn, 448.0) for t in (x, weight))
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = _there_and_back(grad, torch.float8_e5m2, 57344.0)
        return grad @ weight, grad.T @ x


def _there_and_back(x: torch.Tensor, dtype: torch.dtype, largest: float) -> torch.Tensor:
    scale = largest / x.abs().max()
    return (x * scale).clamp(-largest, largest).to(dtype).float() / scale


def candidates(rows: int, in_features: int, out_features: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> forward and backward on the same data; the output comes back."""
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False)
    x, grad = torch.randn(rows, in_features, requires_grad=True), torch.randn(rows, out_features)
    narrow = linear.weight.detach().bfloat16().requires_grad_()
    x16, grad16 = x.detach().bfloat16().requires_grad_(), grad.bfloat16()

    def of(layer: Callable, x: torch.Tensor = x, grad: torch.Tensor = grad) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            x.grad = linear.weight.grad = narrow.grad = None
            output = layer(x)
            output.backward(grad)
            return output.detach()

        return run

    def fp8(recipe, **options) -> Callable[[], torch.Tensor]:
        return of(FP8Linear.from_linear(linear, recipe, **options))

    return {
        BASE: of(linear),
        "FP8Linear, delayed, FP32 products": fp8(DelayedScaling()),
        "FP8Linear, current, FP32 products": fp8(CurrentScaling()),
        "FP8Linear, delayed, BF16 products": fp8(DelayedScaling(), product_dtype=BF16),
        "FP8Linear, current, BF16 products": fp8(CurrentScaling(), product_dtype=BF16),
        "torch's casts, current, FP32 products": of(lambda t: NativeCasts.apply(t, linear.weight)),
        "F.linear, BF16": of(lambda t: nn.functional.linear(t, narrow), x16, grad16),
    }


def check(arms: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Every arm computes the layer: within 6 % in FP8, 1 % in BF16."""
    exact = arms[BASE]()
    for name, run in arms.items():
        run()  # delayed scales need a step
        error = float((run().float() - exact).norm() / exact.norm())
        assert error < (0.06 if "FP32, " not in name and name != "F.linear, BF16" else 0.01), (name, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", default=["1024,256,1024", "1024,1024,4096", "2048,2048,2048"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {arguments.threads} thread(s)")
    rows = []
    for size in arguments.sizes:
        arms = candidates(*map(int, size.split(",")))
        check(arms)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(arguments.rounds):
            for name, run in arms.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rows += [(size, name, f"{1e3 * m:.1f}", f"{m / medians[BASE]:.2f}") for name, m in medians.items()]
    print(text_table(("rows, in, out", "layer", "ms", "over FP32"), rows))


if __name__ == "__main__":
    main()
