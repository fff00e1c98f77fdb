"""Small training runs of every kind, for the tests of checkpoints and of the fixer."""

import random

import numpy as np
import torch
from torch import nn

from mixprec_lab.fp8 import DelayedScaling, FP8Linear
from mixprec_lab.loss_scaling import DynamicLossScaler, StaticLossScaler
from mixprec_lab.master_weights import BF16AdamW, MasterWeightOptimizer
from mixprec_lab.nan_debugging.fixer import NumericalStabilityFixer

optim, lr = torch.optim, torch.optim.lr_scheduler


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def fp8_network() -> nn.Sequential:
    recipe = DelayedScaling(amax_history_len=4)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), FP8Linear(16, 16, recipe=recipe), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(count)]


def grad_scaler(**settings) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 256.0, "growth_interval": 3, **settings})


class Run:
    """A training run that draws from every generator there is."""

    def __init__(
        self, make_optimizers, make_scaler=None, make_schedulers=None, *, dtype=torch.float32, device="cpu", build=None
    ):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        self.model = (build or network)().to(device=device, dtype=dtype)
        self.device, self.dtype = device, dtype
        self.optimizers = make_optimizers(self.model)
        self.scaler = make_scaler() if make_scaler else None
        self.schedulers = make_schedulers(self.optimizers) if make_schedulers else []
        self.losses: list[float] = []
        self.scales: list[float] = []

    def fixer(self, **settings) -> NumericalStabilityFixer:
        return NumericalStabilityFixer(self.model, self.optimizers, self.scaler, self.schedulers, **settings)

    def loss(self, batch) -> torch.Tensor:
        x, y = (t.to(self.device) for t in batch)
        noise = random.random() + np.random.standard_normal()
        output = self.model((x + 0.01 * noise).to(self.dtype)).float()
        return nn.functional.cross_entropy(output, y)

    def step(self, batch) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        if isinstance(self.scaler, torch.amp.GradScaler):
            self.scaler.scale(loss).backward()
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            self.scales.append(self.scaler.get_scale())
        elif self.scaler is not None:
            self.scaler.scale_loss(loss).backward()
            for optimizer in self.optimizers:
                self.scaler.step(optimizer, update=False)
            self.scaler.update_scale()
            self.scales.append(self.scaler.scale)
        else:
            self.backward(loss)
            for optimizer in self.optimizers:
                optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward without the scaler of the run; a master optimizer has its own."""
        scale_loss = getattr(self.optimizers[0], "scale_loss", None)
        (scale_loss(loss) if scale_loss else loss).backward()

    def bits(self) -> dict[str, bytes]:
        """All tensors and numbers of the run by their path, and one draw of each generator (a copy of each)."""
        everything = {
            "model": self.model.state_dict(), "buffers": dict(self.model.named_buffers()),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "rng": [torch.get_rng_state(), list(random.getstate()[1]), np.random.get_state()[1].tolist()],
        }  # fmt: skip
        return dict(flatten(everything, ""))


def flatten(value, path):
    if isinstance(value, torch.Tensor):
        yield path, f"{value.dtype} {tuple(value.shape)} {value.detach().cpu().reshape(-1).tolist()}".encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flatten(item, f"{path}/{i}")
    else:
        yield path, repr(value).encode()


class WideAdam(torch.optim.Optimizer):
    """Adam whose moments are FP32 whatever the parameter is: ``load_state_dict`` of torch would cast them down."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            g, state = p.grad.float(), self.state[p]
            state["m"] = 0.9 * state.get("m", torch.zeros_like(g)) + 0.1 * g
            state["v"] = 0.99 * state.get("v", torch.zeros_like(g)) + 0.01 * g * g
            p.copy_(p.float() - 0.01 * state["m"] / (state["v"].sqrt() + 1e-3))


def one(make):
    return lambda model: [make(model.parameters())]


def two(model):
    return [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW([{"params": model[1].parameters(), "lr": 1e-3}, {"params": model[4].parameters()}], lr=1e-2),
    ]


def each(make):
    return lambda optimizers: [make(o) for o in optimizers]


RUNS = {
    "momentum": lambda: Run(one(lambda p: optim.SGD(p, lr=0.1, momentum=0.9)), None, each(lambda o: lr.StepLR(o, 4))),
    "adamw, scaler": lambda: Run(
        one(lambda p: optim.AdamW(p, lr=0.01, amsgrad=True)), grad_scaler, each(lambda o: lr.CosineAnnealingLR(o, 20))
    ),
    "fused adamw": lambda: Run(one(lambda p: optim.AdamW(p, lr=0.01, fused=True)), grad_scaler),
    "tensor learning rate": lambda: Run(one(lambda p: optim.Adam(p, lr=torch.tensor(0.01)))),
    "adafactor": lambda: Run(
        one(lambda p: optim.Adafactor(p, lr=0.01)), None, each(lambda o: lr.LinearLR(o, total_iters=7))
    ),
    "one cycle": lambda: Run(
        one(lambda p: optim.SGD(p, lr=0.1, momentum=0.9)), grad_scaler,
        each(lambda o: lr.OneCycleLR(o, max_lr=0.2, total_steps=40)),
    ),
    "milestones": lambda: Run(
        one(lambda p: optim.RMSprop(p, lr=0.01)), None, each(lambda o: lr.MultiStepLR(o, [3, 7]))
    ),
    "several": lambda: Run(two, grad_scaler, each(lambda o: lr.LambdaLR(o, lambda t: 1 / (1 + t)))),
    "own scaler": lambda: Run(two, lambda: DynamicLossScaler(256.0, scale_window=3), each(lambda o: lr.StepLR(o, 4))),
    "static scaler": lambda: Run(two, lambda: StaticLossScaler(8.0)),
    "stochastic rounding": lambda: Run(one(lambda p: BF16AdamW(p, lr=0.01)), dtype=torch.bfloat16),
    "stochastic rounding, own generator": lambda: Run(
        one(lambda p: BF16AdamW(p, lr=0.01, generator=torch.Generator().manual_seed(3))), dtype=torch.bfloat16
    ),
    "kahan": lambda: Run(one(lambda p: BF16AdamW(p, lr=0.01, update="kahan")), dtype=torch.bfloat16),
    "fp8, delayed scaling": lambda: Run(one(lambda p: optim.AdamW(p, lr=0.01)), grad_scaler, build=fp8_network),
    "wide state": lambda: Run(one(WideAdam), dtype=torch.bfloat16),
    "masters, scaler": lambda: Run(
        lambda m: [
            MasterWeightOptimizer(
                optim.AdamW(m.parameters(), lr=0.01, fused=True), m, scaler=grad_scaler(), max_norm=1.0
            )
        ], dtype=torch.bfloat16,
    ),
    "masters": lambda: Run(
        lambda m: [MasterWeightOptimizer(optim.AdamW(m.parameters(), lr=0.01, fused=True), m)],
        None, lambda opts: [lr.StepLR(opts[0].optimizer, 4)], dtype=torch.bfloat16,
    ),
}  # fmt: skip
