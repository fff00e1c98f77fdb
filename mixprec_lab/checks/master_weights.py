"""The exercises of the chapter ``master_weights``."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from mixprec_lab.checks._verdict import Case, check
from mixprec_lab.formats import all_values
from mixprec_lab.master_weights import MasterWeightOptimizer, update_threshold

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def first_lost_ratio(function: Callable[[float, str], int]) -> None:
    """``master_weights``: the smallest whole ratio of weight to update at which the update, away from 0, is lost."""

    def cases() -> Iterator[Case]:
        for name in ("fp16", "bf16", "fp8_e4m3"):
            values = all_values(name)
            values = values[(values >= 1) & (values < 2)]
            for w in (values[0], values[1], values[len(values) // 2], values[-1]):
                size, tie_moves = update_threshold(w, name)
                yield (float(w), name), int(w / size) + int(tie_moves)

    check(function, cases())


def train_on_masters(function: Callable[[nn.Module, Batches, float], object]) -> None:
    """``master_weights``: SGD on FP32 masters of a BF16 model, as ``train(model, batches, lr)`` returning the model.

    The weights have to be those that ``MasterWeightOptimizer`` makes of the same batches, bit by bit.
    """

    def train(steps: int, lr: float) -> torch.Tensor | None:
        model = _network()
        result = function(model, _batches(steps), lr)
        return None if result is None or result is ... else _weights(model)

    def expected(steps: int, lr: float) -> torch.Tensor:
        model = _network()
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=lr), model)
        for x, y in _batches(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x).float(), y).backward()
            optimizer.step()
        return _weights(model)

    check(train, ((case, expected(*case)) for case in ((1, 0.5), (2, 0.5), (6, 0.05))))


def unscaled_step(function: Callable[[torch.Tensor, torch.Tensor, float, float], object]) -> None:
    """``master_weights``: one SGD step of an FP32 master from an FP16 gradient of a scaled loss; a bad one is skipped.

    ``step(master, gradient, scale, lr)`` changes the master in place and returns whether it stepped.
    """
    start, lr = [1.0, -2.0, 0.5], 2.0**10

    def step(gradient: torch.Tensor, scale: float) -> torch.Tensor | None:
        master = torch.tensor(start)
        taken = function(master, gradient, scale, lr)
        return None if taken is None or taken is ... else torch.cat([master, torch.tensor([float(taken)])])

    def expected(gradient: torch.Tensor, scale: float) -> torch.Tensor:
        good = bool(gradient.isfinite().all())
        master = torch.tensor(start) - (lr * (gradient.float() / scale) if good else 0.0)
        return torch.cat([master, torch.tensor([float(good)])])

    gradients = ([2.0**-20, -3.0, 2.0**-24], [2.0**-24, 5 * 2.0**-24, 7.0], [1.0, math.inf, 2.0], [math.nan, 1.0, 1.0])
    cases = [(torch.tensor(g, dtype=torch.float16), scale) for g in gradients for scale in (2.0**10, 2.0**4)]
    check(step, ((case, expected(*case)) for case in cases))


def state_bytes(function: Callable[[bool, str], int]) -> None:
    """``master_weights``: bytes a parameter of a BF16 model under Adam, with a master or not, by format of the moments.

    Counted are weight, gradient, master and both moments, as tensors of that format take them.
    """
    sizes = {"bf16": torch.bfloat16.itemsize, "fp32": torch.float32.itemsize}
    cases = [(master, moments) for master in (True, False) for moments in sizes]
    check(function, ((c, 2 * sizes["bf16"] + c[0] * sizes["fp32"] + 2 * sizes[c[1]]) for c in cases))


def moving_average(function: Callable[[list[torch.Tensor], float], torch.Tensor]) -> None:
    """``master_weights``: an exponential moving average of BF16 weights that keeps what BF16 would round away."""
    generator = torch.Generator().manual_seed(0)
    streams = {
        "1, then 500 times 2": [torch.full((3,), v).bfloat16() for v in (1.0, *[2.0] * 500)],
        "50 random weights": [(3 + torch.randn(4, generator=generator)).bfloat16() for _ in range(50)],
    }

    def average(stream: str, decay: float) -> torch.Tensor:
        return function([weights.clone() for weights in streams[stream]], decay)

    def expected(stream: str, decay: float) -> torch.Tensor:
        first, *rest = streams[stream]
        mean = first.double()
        for weights in rest:
            mean = decay * mean + (1 - decay) * weights.double()
        return mean

    cases = [(stream, decay) for stream in streams for decay in (0.999, 0.9)]
    check(average, ((case, expected(*case)) for case in cases), relative=1e-4)


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(torch.bfloat16)


def _batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 5, generator=generator) for _ in range(count)]
    return [(x.bfloat16(), x[:, :2] - x[:, 2:4]) for x in inputs]


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])
