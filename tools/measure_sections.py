"""What ``make measure`` measures, section by section: a ``Plan`` in, the rows of a record out."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.fp8 import FP8Trainer, why_not
from mixprec_lab.memory import LiveBytes
from mixprec_lab.models import Block
from mixprec_lab.rounding import quantize
from mixprec_lab.speed import (
    Spread,
    benchmark,
    benchmark_fp8_vs_bf16,
    cache_bytes,
    rotating,
    timer_for,
)
from mixprec_lab.speed.linear import _precision

Rows = list[dict[str, Any]]


class Skipped(Exception):
    """A section that cannot run here; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Where to measure and how much of it."""

    device: torch.device
    quick: bool  #: small sizes and few rounds: a test of the path, not a measurement

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """Rounds of every benchmark."""
        return 3 if self.quick else 15

    def pick(self, quick: Any, cpu: Any, cuda: Any) -> Any:
        """One of three sizes: for a quick run, for a CPU, for a GPU."""
        return quick if self.quick else cuda if self.cuda else cpu


def _timed(plan: Plan, call: Callable[[], object], number: int = 1) -> dict[str, float]:
    """Quartiles of one call's seconds, after three calls that do not count."""
    timer = timer_for(plan.device)

    def repeated() -> None:
        for _ in range(number):
            call()

    for _ in range(3):
        call()
    return asdict(Spread.of([timer(repeated) / number for _ in range(plan.rounds)]))


def copy(plan: Plan) -> Rows:
    """A copy in memory: the bandwidth that this machine really has, bytes read plus bytes written."""
    size = plan.pick(2**16, 2**26, 2**28)
    source, target = (torch.empty(size, device=plan.device).normal_() for _ in range(2))
    seconds = _timed(plan, lambda: target.copy_(source))
    rate = 8 * size / seconds["median"] / 1e9
    return [{"name": f"copy of {size} FP32 values", "seconds": seconds, "gigabytes_per_second": rate}]


def matmul(plan: Plan) -> Rows:
    """Square products by dtype and size; inputs rotate so that they outgrow the cache of a GPU."""
    sizes = plan.pick((64, 128), (256, 512, 1024, 2048), (256, 512, 1024, 2048, 4096, 8192))
    dtypes = ["fp32", "bf16", "fp16"] + (["tf32"] if plan.cuda else [])
    dtypes += ["fp8"] if plan.cuda and torch.cuda.get_device_capability(plan.device) >= (8, 9) else []
    return [row for dtype in dtypes for n in sizes if (row := _square(plan, dtype, n))]


def _square(plan: Plan, dtype: str, n: int) -> dict[str, Any]:
    kinds = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
             "fp8": torch.bfloat16}  # fmt: skip
    one = torch.ones((), device=plan.device)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(n, n, device=plan.device).to(kinds[dtype]) for _ in range(2))
        return (a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)) if dtype == "fp8" else (a, b)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if dtype == "fp8":
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return a @ b.t()

    sets = rotating(make, 2 * cache_bytes(plan.device) if plan.cuda else 0, most=32)
    number = max(1, min(20, 2**31 // n**3)) if not plan.quick else 1
    used = iter(range(10**9))
    with _precision("high" if dtype == "tf32" else "highest"):
        seconds = _timed(plan, lambda: product(*sets[next(used) % len(sets)]), number)
    rate = 2 * n**3 / seconds["median"] / 1e12
    return {"name": f"{dtype} {n}", "dtype": dtype, "shape": [n, n, n], "seconds": seconds, "teraflops": rate}


def _layers(plan: Plan, *backends: str) -> Rows:
    shapes = plan.pick(
        ((64, 64, 64),),
        ((256, 256, 256), (1024, 1024, 1024), (2048, 1024, 4096)),
        ((1024, 1024, 1024), (1024, 2048, 1024), (4096, 4096, 4096), (4096, 8192, 16384), (15872, 4096, 16384)),
    )
    settings = {"device": plan.device, "rounds": plan.rounds, "backends": backends}
    return [row for shape in shapes for row in benchmark_fp8_vs_bf16(*shape, **settings).rows()]


def linear(plan: Plan) -> Rows:
    """One linear layer forward and backward in every format of torch, with and without casts."""
    return _layers(plan, "scaled_mm")


def transformer_engine(plan: Plan) -> Rows:
    """The same with Transformer Engine's FP8; a section of its own, so that its failure costs the other nothing."""
    if reason := why_not("transformer_engine", plan.device):
        raise Skipped(reason)
    return _layers(plan, "transformer_engine")


def block(plan: Plan) -> Rows:
    """A transformer block forward and backward under autocast, against FP32."""
    width, tokens, batch = plan.pick((32, 16, 2), (256, 256, 4), (2048, 2048, 4))
    torch.manual_seed(0)
    layer = Block(width, max(1, width // 64)).to(plan.device)
    x = torch.randn(batch, tokens, width, device=plan.device)
    parameters = list(layer.parameters())

    def arm(dtype: torch.dtype | None) -> Callable[[], tuple[torch.Tensor, ...]]:
        def step() -> tuple[torch.Tensor, ...]:
            with torch.autocast(plan.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                y = layer(x)
            gradients = torch.autograd.grad(y.float().square().mean(), parameters)
            # compared are matrices: the exact gradient of the keys' bias is zero, and what is left of it is rounding
            return y, *(g for g in gradients if g.dim() > 1)

        return step

    arms = {"fp32": arm(None), "bf16 autocast": arm(torch.bfloat16)}
    if plan.cuda:
        arms["fp16 autocast"] = arm(torch.float16)
    result = benchmark(arms, tolerance=0.1, rounds=plan.rounds, device=plan.device)
    shape = [batch, tokens, width]
    return [
        {"name": name, "shape": shape, "seconds": found["seconds"], "ratio": found["ratio"]}
        for name, found in result.as_dict()["arms"].items()
    ]


class GPT(nn.Module):
    """A decoder with learned positions and causal attention through torch's fused kernel."""

    def __init__(self, vocabulary: int, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "mix": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                "norm2": nn.LayerNorm(width), "expand": nn.Linear(width, 4 * width),
                "contract": nn.Linear(4 * width, width),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.heads, self.norm, self.head = max(1, width // 64), nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, context) -> logits (batch * context, vocabulary)."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for b in self.blocks:
            q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in b["mix"](b["norm1"](x)).chunk(3, -1))
            x = x + b["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + b["contract"](F.gelu(b["expand"](b["norm2"](x))))
        return self.head(self.norm(x)).flatten(0, 1)


def _gpt_steps(plan: Plan) -> Mapping[str, Callable[[], tuple[Callable[[], torch.Tensor], list[Any]]]]:
    """By regime: a maker of (one training step that returns its loss, what lives from step to step)."""
    vocabulary, width, depth, context, batch = plan.pick(
        (256, 32, 1, 16, 2), (2048, 256, 4, 128, 4), (32768, 1024, 12, 1024, 8)
    )
    tokens = torch.randint(vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(0)).to(plan.device)

    def fresh(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = GPT(vocabulary, width, depth, context).to(plan.device, dtype)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def plain(dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None, precision: str = "highest") -> Any:
        model, optimizer = fresh(dtype)
        scaler = torch.amp.GradScaler(plan.device.type, enabled=cast == torch.float16)

        def step() -> torch.Tensor:
            on = torch.autocast(plan.device.type, dtype=cast or torch.bfloat16, enabled=cast is not None)
            with _precision(precision), on:
                loss = F.cross_entropy(model(tokens[:, :-1]).float(), tokens[:, 1:].flatten())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss.detach()

        return step, [model, optimizer]

    def fp8() -> Any:
        model, optimizer = fresh()
        trainer = FP8Trainer(model, optimizer, max_norm=None)
        return lambda: trainer.train_step(tokens[:, :-1], tokens[:, 1:].flatten()).loss, [model, optimizer]

    makers = {
        "fp32": plain,
        "bf16 autocast": lambda: plain(cast=torch.bfloat16),
        "bf16 weights": lambda: plain(torch.bfloat16),
    }
    if plan.cuda:
        makers |= {"tf32": lambda: plain(precision="high"), "fp16 autocast": lambda: plain(cast=torch.float16)}
    return makers | {"fp8" if plan.cuda else "fp8, emulated": fp8}


def _peak(plan: Plan, make: Callable[[], tuple[Callable[[], torch.Tensor], list[Any]]]) -> int:
    """Peak bytes of the third step, when all states exist."""
    step, held = make()
    for _ in range(2):
        step()
    if plan.cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
        step()
        return torch.cuda.max_memory_allocated(plan.device)
    with LiveBytes(*held) as live:
        step()
    return live.peak


def gpt(plan: Plan) -> Rows:
    """A training step of a small GPT by regime, with its peak memory; ratios against FP32."""
    makers, peaks = _gpt_steps(plan), {}
    for name, make in makers.items():
        peaks[name] = _peak(plan, make)
        gc.collect()
        if plan.cuda:
            torch.cuda.empty_cache()
    made = {name: make() for name, make in makers.items()}
    arms = {name: step for name, (step, _) in made.items()}
    result = benchmark(arms, tolerance=0.02, rounds=plan.rounds, warmup=2, device=plan.device).as_dict()["arms"]
    return [
        {"name": name, "seconds": result[name]["seconds"], "ratio": result[name]["ratio"], "peak_bytes": peaks[name]}
        for name in arms
    ]


def quantizer(plan: Plan) -> Rows:
    """The quantizer of this book against a copy of the same tensor."""
    size = plan.pick(2**12, 2**22, 2**26)
    x = torch.randn(size, device=plan.device)
    out = torch.empty_like(x)
    arms: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(x)}
    for fmt in ("fp8_e4m3", "fp8_e5m2", "bf16", "fp4_e2m1"):
        arms[f"quantize to {fmt}"] = lambda fmt=fmt: quantize(x, fmt, out=out)
    result = benchmark(arms, tolerance=None, rounds=plan.rounds, device=plan.device).as_dict()["arms"]
    return [
        {"name": name, "seconds": found["seconds"], "ratio": found["ratio"],
         "gigabytes_per_second": 8 * size / found["seconds"]["median"] / 1e9}
        for name, found in result.items()
    ]  # fmt: skip


def exhibits(plan: Plan) -> Rows:
    """What the Python side of an exhibit needs to answer a slider: a change of state and all its texts."""
    from mixprec_lab.exhibits import BitExplorer, MemoryCalculator, PrecisionChooser, ScalerSimulator, WillItBeFaster

    moves = {"BitExplorer": (BitExplorer(), "code"), "MemoryCalculator": (MemoryCalculator(), "batch"),
             "ScalerSimulator": (ScalerSimulator(), "seed"), "WillItBeFaster": (WillItBeFaster(), "share")}  # fmt: skip
    chooser, rows = PrecisionChooser(), []
    host = Plan(torch.device("cpu"), plan.quick)

    def turn(exhibit: Any, trait: str) -> None:
        setattr(exhibit, trait, 1 + getattr(exhibit, trait) % 2)
        exhibit.result()

    for name, (exhibit, trait) in moves.items():
        rows.append({"name": name, "seconds": _timed(host, lambda e=exhibit, k=trait: turn(e, k))})
    return [*rows, {"name": "PrecisionChooser", "seconds": _timed(host, chooser.result)}]


def noise(plan: Plan) -> Rows:
    """The same product timed as two arms: what differs between them is the noise of this run."""
    n = plan.pick(64, 1024, 4096)
    x = torch.randn(n, n, device=plan.device)
    result = benchmark({"one": lambda: x @ x, "the same": lambda: x @ x}, tolerance=0.0, rounds=2 * plan.rounds,
                       device=plan.device)  # fmt: skip
    return [{"name": "one product against itself", "ratio": asdict(result.ratio("the same"))}]


SECTIONS: dict[str, Callable[[Plan], Rows]] = {
    f.__name__: f for f in (noise, copy, matmul, linear, transformer_engine, block, gpt, quantizer, exhibits)
}
