"""Lost updates, the master-weight optimizer and pure 16-bit AdamW against brute force, torch and hand-written steps."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from oracles import table_round
from torch import nn

from mixprec_lab.exhibits.stalling_sum import _mulberry32
from mixprec_lab.formats import FORMATS, FloatFormat, all_values, get_format
from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.master_weights import (
    UPDATE_METHODS,
    BF16AdamW,
    MasterWeightOptimizer,
    adamw,
    lost_updates,
    simulate_weight,
    unchanged,
    update_threshold,
)
from mixprec_lab.rounding import running_sum

NARROW = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp6_e2m3", "fp4_e2m1")
BRUTE_FORCE = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp4_e2m1")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestUpdateThreshold:
    @pytest.mark.parametrize("name", BRUTE_FORCE)
    @pytest.mark.parametrize("direction", ["away", "toward"])
    def test_every_value_moves_beyond_its_threshold_and_not_below(self, name, direction):
        w = all_values(name)
        size, tie_moves = update_threshold(w, name, direction)
        stuck = size.isinf()
        expected_stuck = (w.abs() == w.max()) & (FORMATS[name].specials == "none" and direction == "away")
        assert torch.equal(stuck, expected_stuck)
        w, size, tie_moves = (t[~stuck].numpy() for t in (w, size, tie_moves))
        outward = np.where(w < 0, -1.0, 1.0) * (1 if direction == "away" else -1)
        tie = w + outward * size
        further = np.nextafter(tie, outward * np.inf)
        nearer = np.nextafter(tie, -outward * np.inf)
        moved = [table_round(x, name, "nearest_even", saturate=False) != w for x in (nearer, tie, further)]
        assert not moved[0].any() and moved[2].all()
        assert np.array_equal(moved[1], tie_moves)

    def test_known_thresholds(self):
        # 1.0 in BF16: the gap above is 2**-7, below 2**-8; a tie goes back to the even 1.0.
        assert update_threshold(1.0, "bf16") == (2.0**-8, False)
        assert update_threshold(1.0, "bf16", "toward") == (2.0**-9, False)
        assert update_threshold(1 + 2.0**-10, "fp16") == (2.0**-11, True)
        assert update_threshold(-448.0, "fp8_e4m3") == (16.0, False)
        assert update_threshold(0.0, "fp16") == (2.0**-25, False) == update_threshold(-0.0, "fp16", "toward")
        assert update_threshold(math.inf, "fp16") == (math.inf, False)
        assert update_threshold(math.nan, "fp16").size.isnan()

    @pytest.mark.parametrize(("name", "low", "high"), [("fp16", 2048, 4095), ("bf16", 256, 511)])
    def test_the_ratio_of_weight_to_threshold_is_the_published_one(self, name, low, high):
        values = all_values(name)
        values = values[(values >= 1) & (values < 2)]
        size, tie_moves = update_threshold(values, name)
        ratio = values / size  # an integer: an update of exactly 1/ratio is the tie
        first_lost = ratio + tie_moves
        assert (int(first_lost.min()), int(first_lost.max())) == (low, high)
        dtype = FORMATS[name].torch_dtype
        for w, r in ((values[0], low), (values[-1], high)):
            assert (w + w / r).to(dtype) == w.to(dtype) != (w + w / (r - 1)).to(dtype)

    def test_weights_are_rounded_and_keep_their_shape(self):
        size, tie_moves = update_threshold(torch.full((2, 3), 1.001), "bf16")
        assert size.shape == tie_moves.shape == (2, 3) and bool((size == 2.0**-8).all())

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: update_threshold(1.0, "bf16", "up"), ValueError, "away"),
            (lambda: update_threshold(1.0, "e8m0"), ValueError, "no sign"),
            (lambda: update_threshold(1.0, "bf17"), KeyError, "bf17"),
            (lambda: update_threshold(torch.ones(2).int(), "bf16"), TypeError, "int32"),
            (lambda: update_threshold("1", "bf16"), TypeError, "str"),
            (lambda: update_threshold(True, "bf16"), TypeError, "bool"),
        ],
    )
    def test_bad_input_gets_a_clear_error(self, call, error, message):
        with pytest.raises(error, match=message):
            call()


class TestLostUpdates:
    @pytest.mark.parametrize("name", NARROW)
    def test_agrees_with_the_threshold(self, name):
        scale = min(get_format(name).largest, 1e30) / 4
        w = torch.randn(20_000, generator=seeded(1)) * scale
        d = torch.randn(20_000, generator=seeded(2)) * scale * torch.rand(20_000, generator=seeded(3)) ** 8
        away = w.sign() == d.sign()
        thresholds = [update_threshold(w, name, direction) for direction in ("away", "toward")]
        size, tie = (torch.where(away, a, b) for a, b in zip(*thresholds, strict=True))
        expected = (d.abs() < size) | ((d.abs() == size) & ~tie)
        stored = torch.tensor(table_round(w.double().numpy(), name, "nearest_even", False))
        keep = (stored != 0) & stored.isfinite()
        w, d, expected = w[keep], d[keep], expected[keep]
        assert torch.equal(unchanged(w, d, name), expected)
        share = int((expected & (d != 0)).sum()) / int((d != 0).sum())
        assert lost_updates(w, d, name) == share and 0.05 < share < 0.95

    def test_torch_additions_agree(self):
        w = (torch.randn(50_000, generator=seeded()) * 0.02).bfloat16()
        d = (torch.randn(50_000, generator=seeded(1)) * 1e-5).bfloat16()
        share = int(((w + d == w) & (d != 0)).sum()) / int((d != 0).sum())
        assert lost_updates(w, d, torch.bfloat16) == share > 0.5

    def test_only_updates_that_are_not_zero_count(self):
        w, d = torch.ones(4), torch.tensor([0.0, 1e-3, 1e-2, -0.0])
        assert lost_updates(w, d, "bf16") == 0.5
        assert math.isnan(lost_updates(w, torch.zeros(4), "bf16"))

    def test_shapes_broadcast(self):
        w, d = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5])
        assert unchanged(w, d, "bf16").sum(1).tolist() == [1, 2, 3] and lost_updates(w, d, "bf16") == 0.5

    def test_directed_and_stochastic_rounding(self):
        w, d = torch.ones(100_000), torch.full((100_000,), 2.0**-10)
        assert lost_updates(w, d, "bf16", "toward_zero") == 1.0 and lost_updates(w, d, "bf16", "up") == 0.0
        share = lost_updates(w, d, "bf16", "stochastic", seeded())
        assert abs(share - 7 / 8) < 5 * math.sqrt(7 / 64 / 100_000)

    def test_a_non_finite_update_is_a_change(self):
        assert not unchanged(torch.ones(3), torch.tensor([math.nan, math.inf, -math.inf]), "bf16").any()

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: lost_updates(torch.tensor([math.nan]), torch.ones(1), "bf16"), ValueError, "finite in BF16"),
            (lambda: lost_updates(torch.tensor([1e6]), torch.ones(1), "fp16"), ValueError, "overflow"),
            (lambda: lost_updates(torch.ones(3), torch.ones(4), "bf16"), ValueError, "broadcast"),
            (lambda: lost_updates(torch.ones(3), torch.ones(3), "e8m0"), ValueError, "no sign"),
            (lambda: lost_updates(torch.ones(3), torch.ones(3), "bf16", "nearest"), ValueError, "nearest_even"),
            (lambda: lost_updates(torch.ones(3).int(), torch.ones(3), "bf16"), TypeError, "int32"),
            (lambda: lost_updates(torch.ones(3), torch.ones(3).long(), "bf16"), TypeError, "updates"),
        ],
    )
    def test_bad_input_gets_a_clear_error(self, call, error, message):
        with pytest.raises(error, match=message):
            call()


class TestSimulateWeight:
    @pytest.mark.parametrize("name", ["bf16", "fp16"])
    def test_nearest_equals_torch_arithmetic(self, name):
        dtype = FORMATS[name].torch_dtype
        w, expected = torch.tensor(0.7, dtype=dtype), []
        for _ in range(60):
            expected.append(float(w))
            w = (w.double() + 0.0123).to(dtype)
        assert simulate_weight(0.7, 0.0123, 59, name).tolist() == expected

    def test_a_weight_of_one_never_moves_in_bf16_unless_helped(self):
        paths = {m: simulate_weight(1.0, 1e-3, 1000, "bf16", m, seeded()) for m in UPDATE_METHODS}
        assert set(paths["nearest"].tolist()) == {1.0}
        assert paths["kahan"][-1] == paths["fp32_master"][-1] == 2.0
        many = simulate_weight(torch.ones(4000), 1e-3, 1000, "bf16", "stochastic", seeded())[:, -1]
        assert abs(float(many.mean()) - 2.0) < 5 * float(many.std()) / math.sqrt(4000)

    @pytest.mark.parametrize("name", ["bf16", "fp16", "fp8_e4m3"])
    def test_kahan_never_owes_more_than_half_a_gap(self, name):
        path = simulate_weight(1.0, 3e-4, 3000, name, "kahan")
        exact = 1.0 + 3e-4 * torch.arange(3001, dtype=torch.float64)
        half_gap = update_threshold(path, name).size
        # The compensation itself is rounded: a relative error of unit_roundoff of half a gap, each step.
        slack = half_gap.cummax(0).values * get_format(name).unit_roundoff * torch.arange(3001)
        assert bool(((path - exact).abs() <= half_gap + slack).all())

    @pytest.mark.parametrize("name", ["bf16", "fp8_e4m3"])
    def test_fp32_master_is_a_rounded_fp32_sum(self, name):
        addends = torch.cat([torch.ones(1), torch.full((500,), 2.0**-13)])
        expected = running_sum(addends, name, "fp32")  # 2**-13 is a value of FP32 and BF16; E4M3 would flush it
        if name == "bf16":
            assert torch.equal(simulate_weight(1.0, 2.0**-13, 500, name, "fp32_master"), expected)
        master = np.float32(1.0)
        for _ in range(500):
            master = np.float32(master + np.float32(2.0**-13))
        path = simulate_weight(1.0, 2.0**-13, 500, name, "fp32_master")
        assert float(path[-1]) == float(table_round(np.float64([master]), name, "nearest_even", False)[0])

    def test_stochastic_follows_the_draws(self):
        # 1 + 2**-9 lies a quarter of the gap above 1: below 0.25 it goes up to 1 + 2**-7, else back.
        draws = torch.tensor([0.25, 0.2499, 0.9, 0.0], dtype=torch.float64)
        path = simulate_weight(1.0, 2.0**-9, 4, "bf16", "stochastic", draws=draws)
        assert path.tolist() == [1.0, 1.0, 1 + 2.0**-7, 1 + 2.0**-7, 1 + 2.0**-6]
        mirrored = simulate_weight(-1.0, -(2.0**-9), 4, "bf16", "stochastic", draws=draws)
        assert torch.equal(mirrored, -path)

    def test_stochastic_equals_the_sum_of_the_exhibit(self):
        from mixprec_lab.exhibits.stalling_sum import _stochastic_sums

        random = _mulberry32(3)
        draws = torch.tensor([next(random) for _ in range(700)], dtype=torch.float64)
        for name, addend in (("bf16", 1.0), ("fp8_e4m3", 2.0), ("fp16", 0.25), ("fp8_e5m2", 1024.0)):
            expected = list(_stochastic_sums(addend, 700, FORMATS[name], 3))
            got = simulate_weight(0.0, addend, 700, name, "stochastic", draws=draws)[1:]
            assert np.array_equal(got.numpy(), np.array(expected), equal_nan=True)

    def test_seeded_generators_repeat_and_cells_of_a_batch_are_independent(self):
        one, two = (simulate_weight(torch.ones(8), 2.0**-9, 50, "bf16", "stochastic", seeded(5)) for _ in range(2))
        assert torch.equal(one, two) and len({tuple(row) for row in one.tolist()}) == 8

    @pytest.mark.parametrize("method", UPDATE_METHODS)
    def test_a_batch_equals_its_cells(self, method):
        weights, updates = torch.tensor([[0.5], [3.0]]), torch.tensor([1e-3, -1e-2, 0.25])
        draws = torch.rand(2, 3, 20, generator=seeded(), dtype=torch.float64) if method == "stochastic" else None
        path = simulate_weight(weights, updates, 20, "fp16", method, draws=draws)
        assert path.shape == (2, 3, 21)
        for i in range(2):
            for j in range(3):
                cell = None if draws is None else draws[i, j]
                alone = simulate_weight(weights[i, 0], updates[j], 20, "fp16", method, draws=cell)
                assert torch.equal(path[i, j], alone)

    @pytest.mark.parametrize("method", UPDATE_METHODS)
    def test_overflow_is_the_formats_own(self, method):
        e4m3 = simulate_weight(440.0, 64.0, 3, "fp8_e4m3", method, seeded())
        assert bool(e4m3[1:].isnan().all()) and e4m3[0] == 448.0
        fp16 = simulate_weight(65504.0, 1e5, 1, "fp16", method, seeded())
        assert fp16[-1] == math.inf

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: simulate_weight(1.0, 0.1, 3, "bf16", "sr"), ValueError, "nearest, stochastic, kahan"),
            (lambda: simulate_weight(1.0, 0.1, 0, "bf16"), ValueError, "at least one step"),
            (lambda: simulate_weight(1.0, 0.1, 3, "e8m0"), ValueError, "no sign"),
            (lambda: simulate_weight(torch.ones(2).int(), 0.1, 3, "bf16"), TypeError, "int32"),
            (lambda: simulate_weight(1.0, "0.1", 3, "bf16"), TypeError, "update"),
            (lambda: simulate_weight(1.0, 0.1, 3, "bf16", draws=torch.rand(3)), ValueError, "no use"),
            (lambda: simulate_weight(1.0, 0.1, 3, "bf16", "stochastic", draws=torch.rand(4)), ValueError, "shape"),
            (lambda: simulate_weight(1.0, 0.1, 3, "bf16", "stochastic", draws=torch.ones(3)), ValueError, "outside"),
        ],
    )
    def test_bad_input_gets_a_clear_error(self, call, error, message):
        with pytest.raises(error, match=message):
            call()

    def test_any_format_of_your_own(self):
        assert simulate_weight(1.0, 2.0**-4, 4, FloatFormat("e3m4", 3, 4))[-1] == 1.25


class Net(nn.Module):
    """Two linear layers, a norm, and a head tied to the first layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner, self.outer, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)
            self.tied = nn.Linear(6, 8, bias=False)
        self.tied.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.norm(self.outer(torch.tanh(self.inner(x)))))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 6, generator=seeded(100 + step))
    return model(x.to(dtype)).float().square().mean()


def groups_of(model: nn.Module, **rest: float) -> list[dict]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], **rest},
    ]


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.5, centered=True),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}
SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
    "chain": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
}
HALVES = (torch.float16, torch.bfloat16)


def agree(optimizer: MasterWeightOptimizer) -> bool:
    """Whether every parameter of the model is its master, rounded by torch's own cast."""
    names = dict(optimizer.model.named_parameters())
    masters = optimizer.named_masters()
    return all(torch.equal(names[name], master.detach().to(names[name].dtype)) for name, master in masters.items())


def train_with_masters(model: nn.Module, optimizer: MasterWeightOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        optimizer.scale_loss(loss_of(model, step)).backward()
        optimizer.step()


class TestMasterWeightOptimizer:
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
    @pytest.mark.parametrize("dtype", HALVES)
    def test_equals_a_hand_written_loop_on_fp32_copies_bit_by_bit(self, make, dtype):
        model, reference = Net().to(dtype), Net().to(dtype)
        optimizer = MasterWeightOptimizer(make(groups_of(model, lr=2e-3)), model)
        masters = {p: p.detach().float().requires_grad_() for p in reference.parameters()}
        by_hand = make([{**g, "params": [masters[p] for p in g["params"]]} for g in groups_of(reference, lr=2e-3)])
        for step in range(8):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            assert optimizer.step() is True
            reference.zero_grad()
            loss_of(reference, step).backward()
            for p, master in masters.items():
                master.grad = p.grad.float()
            by_hand.step()
            for p, master in masters.items():
                p.data = master.detach().to(dtype)
            for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                assert torch.equal(p, q)
            for ours, theirs in zip(optimizer.named_masters().values(), optimizer_parameters(by_hand), strict=True):
                assert torch.equal(ours, theirs) and ours.dtype == torch.float32
        assert model.tied.weight is model.inner.weight and agree(optimizer)

    def test_adamw_by_its_formula(self):
        # Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, in float64: masters follow it to FP32's precision.
        model = Net().to(torch.bfloat16)
        weight = model.outer.weight
        w = weight.detach().double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        optimizer = MasterWeightOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), model)
        for step in range(1, 11):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            g = weight.grad.double()
            optimizer.step()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - 0.01 * (0.1 * w + m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        assert torch.allclose(optimizer.named_masters()["outer.weight"].double(), w, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
    def test_an_fp32_model_trains_as_without_it(self, make):
        model, plain = Net(), Net()
        optimizer, alone = MasterWeightOptimizer(make(groups_of(model)), model), make(groups_of(plain))
        for step in range(5):
            for net, opt in ((model, optimizer), (plain, alone)):
                opt.zero_grad()
                loss_of(net, step).backward()
                opt.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        assert all(optimizer.named_masters()[n] is p for n, p in model.named_parameters())

    def test_wide_parameters_are_their_own_masters(self):
        model = Net().to(torch.bfloat16)
        model.norm.float()
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model)
        masters = optimizer.named_masters()
        assert masters["norm.weight"] is model.norm.weight and masters["outer.weight"] is not model.outer.weight
        before = model.norm.weight.detach().clone()
        model.norm.weight.grad = torch.full((6,), 0.25)
        optimizer.step()
        assert torch.equal(model.norm.weight, before - 0.125) and agree(optimizer)

    def test_the_run_that_stalls_without_it(self):
        def run(wrap: bool) -> float:
            weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
            model = nn.ParameterList([weight])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1.9e-3, weight_decay=0.0)
            optimizer = MasterWeightOptimizer(optimizer, model) if wrap else optimizer
            for _ in range(300):
                optimizer.zero_grad()
                (weight.float() - 0.75).square().sum().backward()
                optimizer.step()
            return weight.item()

        assert run(wrap=False) == 1.0 and abs(run(wrap=True) - 0.75) < 0.02

    def test_state_from_earlier_steps_moves_along_in_fp32(self):
        model = Net().to(torch.bfloat16)
        plain = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss_of(model, 0).backward()
        plain.step()
        before = {n: plain.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
        optimizer = MasterWeightOptimizer(plain, model)
        assert set(optimizer.state) == set(optimizer.named_masters().values())
        for name, master in optimizer.named_masters().items():
            moved = optimizer.state[master]["exp_avg"]
            assert moved.dtype == torch.float32 and torch.equal(moved, before[name].float())
        train_with_masters(model, optimizer, range(3))
        assert agree(optimizer) and optimizer.state[master]["step"] == 4

    def test_gradients_move_and_accumulate_in_fp32(self):
        model = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.bfloat16))])
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
        (master,) = optimizer.named_masters().values()
        for _ in range(512):
            model[0].grad = torch.ones(1, dtype=torch.bfloat16)
            optimizer.copy_grads_to_master()
            assert model[0].grad is None
        assert master.grad.item() == 512.0  # in BF16 the sum would have stopped at 256
        optimizer.copy_grads_to_master()
        assert master.grad.item() == 512.0
        optimizer.step()
        assert (master.item(), model[0].item()) == (-511.0, -512.0)  # 511 is not a BF16 number; the tie goes to 512

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad_clears_both(self, set_to_none):
        model = Net().to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        loss_of(model, 0).backward()
        optimizer.copy_grads_to_master()
        loss_of(model, 1).backward()
        optimizer.zero_grad(set_to_none)
        tensors = [*model.parameters(), *optimizer.named_masters().values()]
        if set_to_none:
            assert all(t.grad is None for t in tensors)
        else:
            assert not any(t.grad.any() for t in tensors)
        # Kept memory must not leak old gradients into the next step.
        loss_of(model, 2).backward()
        fresh = {n: p.grad.float() for n, p in model.named_parameters()}
        optimizer.copy_grads_to_master()
        assert all(torch.equal(m.grad, fresh[n]) for n, m in optimizer.named_masters().items())

    def test_a_parameter_without_gradient_stays(self):
        model = Net().to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), model)
        before = model.norm.weight.detach().clone()
        model.outer.weight.grad = torch.ones_like(model.outer.weight)
        optimizer.step()
        assert torch.equal(model.norm.weight, before) and agree(optimizer)

    @pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
    @pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
    def test_schedulers_hold_the_inner_optimizer(self, make, first):
        rates = []
        for wrap in (False, True):
            model = Net().to(torch.bfloat16)
            inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            scheduler = make(inner) if first else None
            optimizer = MasterWeightOptimizer(inner, model) if wrap else inner
            scheduler = scheduler or make(inner)
            rates.append([])
            for step in range(6):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
                scheduler.step()
                rates[-1].append(optimizer.param_groups[0]["lr"])
        assert rates[0] == rates[1] and len(set(rates[0])) > 3

    def test_plateau_scheduler(self):
        model = Net().to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer.optimizer, patience=1)
        for _ in range(4):
            scheduler.step(1.0)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)

    @pytest.mark.parametrize("named", [False, True])
    def test_a_group_added_later_gets_masters(self, named):
        model = Net().to(torch.bfloat16)
        first = [("outer.weight", model.outer.weight)] if named else [model.outer.weight]
        optimizer = MasterWeightOptimizer(torch.optim.SGD(first, lr=0.1), model)
        added = [("norm.weight", model.norm.weight)] if named else model.norm.weight
        group = {"params": added, "lr": 0.5}
        optimizer.add_param_group(group)
        assert group["params"] is added and len(optimizer.named_masters()) == 2
        model.norm.weight.grad = torch.ones_like(model.norm.weight)
        before = model.norm.weight.detach().float()
        optimizer.step()
        assert torch.equal(model.norm.weight.float(), before - 0.5) and agree(optimizer)
        with pytest.raises(ValueError, match="more than one"):
            optimizer.add_param_group({"params": [model.norm.weight]})
        with pytest.raises(ValueError, match="does not hold"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        with pytest.raises(TypeError, match="params"):
            optimizer.add_param_group([model.inner.weight])
        with pytest.raises(ValueError, match="with/without names"):
            optimizer.add_param_group({"params": [model.inner.weight] if named else [("w", model.inner.weight)]})
        assert len(optimizer.named_masters()) == len(optimizer.param_groups) == 2


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Breaks(torch.optim.SGD):
    """SGD that raises ``error`` half way through its second step."""

    error: BaseException = KeyboardInterrupt()

    @torch.no_grad()
    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        parameters = optimizer_parameters(self)
        for i, p in enumerate(parameters):
            if self.calls == 2 and i == len(parameters) // 2:
                raise self.error
            if p.grad is not None:
                p -= 0.1 * p.grad


class TestExceptions:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA error"), MemoryError()])
    @pytest.mark.parametrize("scaled", [None, "ours", "torch"])
    def test_model_and_masters_agree_after_an_optimizer_that_raises_half_way(self, error, scaled):
        model = Net().to(torch.bfloat16)
        inner = Breaks(model.parameters(), lr=0.1)
        inner.error = error
        scaler = {"ours": DynamicLossScaler(8.0), "torch": torch.amp.GradScaler("cpu", 8.0), None: None}[scaled]
        optimizer = MasterWeightOptimizer(inner, model, scaler=scaler)
        train_with_masters(model, optimizer, range(1))
        start = {n: m.detach().clone() for n, m in optimizer.named_masters().items()}
        with pytest.raises(type(error)):
            train_with_masters(model, optimizer, range(1, 2))
        moved = [not torch.equal(m, start[n]) for n, m in optimizer.named_masters().items()]
        assert any(moved) and not all(moved) and agree(optimizer)
        train_with_masters(model, optimizer, range(2, 4))  # and it goes on
        assert agree(optimizer) and inner.calls == 4

    def test_weights_written_by_others_are_noticed(self):
        model, other = Net().to(torch.bfloat16), Net(1).to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(other.state_dict())
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="sync_master_from_model"):
            optimizer.step()
        optimizer.sync_master_from_model()
        assert agree(optimizer) and torch.equal(model.outer.weight, other.outer.weight)
        optimizer.step()
        model.load_state_dict(kept)
        optimizer.copy_master_to_model()  # undoes it
        train_with_masters(model, optimizer, range(2))
        # Weights that were swapped out and in again (an EMA evaluated in between) are no change.
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(other.state_dict())
        model.load_state_dict(kept)
        train_with_masters(model, optimizer, range(2))

    def test_replaced_and_cast_parameters_are_noticed(self):
        model = Net().to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        loss_of(model, 0).backward()
        model.float()
        with pytest.raises(RuntimeError, match="move and cast the model before"):
            optimizer.step()
        model = Net().to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        model.outer = nn.Linear(8, 6, dtype=torch.bfloat16)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match=r"no longer holds the parameter 'outer\.weight'"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="no longer holds"):
            optimizer.sync_master_from_model()

    def test_no_gradient_at_all_is_an_error(self):
        model = Net().to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        with pytest.raises(RuntimeError, match="no parameter of the optimizer has a gradient"):
            optimizer.step()

    def test_sparse_gradients_and_closures_are_refused(self):
        model = nn.Embedding(10, 4, sparse=True).to(torch.bfloat16)
        optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        model(torch.tensor([1, 2])).float().sum().backward()
        with pytest.raises(TypeError, match="sparse=False"):
            optimizer.step()
        with pytest.raises(TypeError, match="without a closure"):
            optimizer.step(lambda: 1.0)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda m: MasterWeightOptimizer(m.parameters(), m), TypeError, "Optimizer, got generator"),
            (lambda m: MasterWeightOptimizer(torch.optim.SGD(m.parameters()), [m]), TypeError, "nn.Module"),
            (lambda m: MasterWeightOptimizer(torch.optim.LBFGS(m.parameters()), m), TypeError, "LBFGS"),
            (lambda m: MasterWeightOptimizer(torch.optim.SGD(m.parameters()), Net()), ValueError, "does not hold"),
            (lambda m: MasterWeightOptimizer(torch.optim.SGD(m.parameters()), m, max_norm=0), ValueError, "max_norm"),
            (lambda m: MasterWeightOptimizer(torch.optim.SGD(m.parameters()), m, max_norm=math.nan), ValueError, "nan"),
            (lambda m: MasterWeightOptimizer(torch.optim.SGD(m.parameters()), m, scaler=2.0), TypeError, "scale_loss"),
            (
                lambda m: MasterWeightOptimizer(MasterWeightOptimizer(torch.optim.SGD(m.parameters()), m), m),
                TypeError,
                "got MasterWeightOptimizer",
            ),
        ],
    )
    def test_bad_arguments_get_a_clear_error_and_change_nothing(self, make, error, message):
        model = Net().to(torch.bfloat16)
        with pytest.raises(error, match=message):
            make(model)

    def test_a_refused_takeover_leaves_the_optimizer_as_it_was(self):
        model = Net().to(torch.bfloat16)
        model.extra = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        before = optimizer_parameters(inner)
        with pytest.raises(TypeError, match="complex64 for 'extra'"):
            MasterWeightOptimizer(inner, model)
        assert all(p is q for p, q in zip(optimizer_parameters(inner), before, strict=True))


def make_scaler(kind: str, scale: float):
    return DynamicLossScaler(scale) if kind == "ours" else torch.amp.GradScaler("cpu", init_scale=scale)


def scale_of(scaler) -> float:
    return scaler.get_scale() if isinstance(scaler, torch.amp.GradScaler) else scaler.scale


@pytest.mark.parametrize("kind", ["ours", "torch"])
class TestWithAScaler:
    def test_a_power_of_two_scale_changes_nothing_but_what_would_underflow(self, kind):
        # One FP16 weight whose gradient is 2**-26: zero unscaled, exact with a scale of 2**10.
        results = []
        for scaler in (None, make_scaler(kind, 2.0**10)):
            model = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float16))])
            optimizer = MasterWeightOptimizer(torch.optim.SGD(model.parameters(), lr=2.0**20), model, scaler=scaler)
            loss = (model[0] * torch.tensor([2.0**-13], dtype=torch.float16)).float().sum() * 2.0**-13
            optimizer.scale_loss(loss).backward()
            optimizer.step()
            results.append(model[0].item())
        assert results == [1.0, 1 - 2.0**-6]

    @pytest.mark.parametrize("fused", [False, True])
    def test_overflow_skips_the_step_and_backs_off(self, kind, fused):
        model = Net().to(torch.float16)
        scaler = make_scaler(kind, 2.0**22)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        optimizer = MasterWeightOptimizer(inner, model, scaler=scaler, max_norm=1.0)
        before = copy.deepcopy(optimizer.named_masters())
        taken = []
        for step in range(30):
            optimizer.zero_grad()
            optimizer.scale_loss(loss_of(model, step)).backward()
            taken.append(optimizer.step())
            if not any(taken):
                assert all(torch.equal(m, before[n]) for n, m in optimizer.named_masters().items())
                assert scale_of(scaler) == 2.0 ** (22 - len(taken))
            assert agree(optimizer) and all(bool(m.isfinite().all()) for m in optimizer.named_masters().values())
        assert not taken[0] and taken[-1] and taken == sorted(taken)
        steps = {float(s["step"]) for s in inner.state.values()}
        assert steps == {float(sum(taken))}

    def test_clipping_acts_on_unscaled_fp32_gradients(self, kind):
        norms, weights = [], []
        for scaler in (None, make_scaler(kind, 2.0**12)):
            model = Net().to(torch.bfloat16)
            optimizer = MasterWeightOptimizer(
                torch.optim.SGD(model.parameters(), lr=1.0), model, scaler=scaler, max_norm=0.01
            )
            before = torch.cat([m.detach().flatten() for m in optimizer.named_masters().values()])
            optimizer.scale_loss(loss_of(model, 0)).backward()
            optimizer.step()
            after = torch.cat([m.detach().flatten() for m in optimizer.named_masters().values()])
            assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3) and optimizer.grad_norm > 0.1
            norms.append(float(optimizer.grad_norm))
            weights.append(after)
        assert norms[0] == norms[1] and torch.equal(*weights)

    def test_gradients_that_overflow_the_norm_are_an_error_and_training_goes_on(self, kind):
        model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
        scaler = make_scaler(kind, 1.0)
        optimizer = MasterWeightOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.5), model, scaler=scaler, max_norm=1.0
        )
        optimizer.scale_loss(model[0].float().sum()).backward()
        model[0].grad.fill_(3e30)
        with pytest.raises(RuntimeError, match="total norm of the gradients is inf"):
            optimizer.step()
        assert model[0].tolist() == [1.0, 1.0]
        optimizer.zero_grad()
        optimizer.scale_loss(model[0].float().sum()).backward()
        assert optimizer.step() and model[0].float().max() < 1.0

    def test_resume_is_bit_exact(self, kind):
        straight, first = (Net().to(torch.float16) for _ in range(2))

        def build(model):
            inner = torch.optim.AdamW(groups_of(model), lr=1e-2)
            return MasterWeightOptimizer(inner, model, scaler=make_scaler(kind, 2.0**20), max_norm=1.0)

        optimizer = build(straight)
        train_with_masters(straight, optimizer, range(20))
        half = build(first)
        train_with_masters(first, half, range(11))
        saved = io.BytesIO()
        torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        resumed = Net(5).to(torch.float16)
        resumed.load_state_dict(state["model"])
        other = build(resumed)
        other.load_state_dict(state["optimizer"])
        train_with_masters(resumed, other, range(11, 20))
        for name, master in optimizer.named_masters().items():
            assert torch.equal(master, other.named_masters()[name])
        assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
        assert scale_of(optimizer.scaler) == scale_of(other.scaler) < 2.0**20

    def test_several_optimizers_share_a_scaler_by_hand(self, kind):
        model, scaler = Net().to(torch.float16), make_scaler(kind, 2.0**8)
        halves = [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]]
        optimizers = [MasterWeightOptimizer(torch.optim.SGD(ps, lr=0.1), model) for ps in halves]
        scale = scaler.scale if kind == "torch" else scaler.scale_loss
        scale(loss_of(model, 0)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        for optimizer in optimizers:
            optimizer.copy_grads_to_master()
            scaler.unscale_(optimizer) if kind == "torch" else scaler.unscale_gradients(optimizer)
        for optimizer in optimizers:
            scaler.step(optimizer) if kind == "torch" else scaler.step(optimizer, update=False)
        scaler.update() if kind == "torch" else scaler.update_scale()
        assert all(map(agree, optimizers))
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class TestStateDict:
    def build(self, seed: int = 0, lr: float = 1e-2, **rest) -> MasterWeightOptimizer:
        model = Net(seed).to(torch.bfloat16)
        return MasterWeightOptimizer(torch.optim.AdamW(groups_of(model), lr=lr), model, **rest)

    def test_loading_brings_masters_model_and_rates_back(self):
        one = self.build()
        train_with_masters(one.model, one, range(4))
        two = self.build(seed=9, lr=5.0)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        assert agree(two) and two.param_groups[0]["lr"] == 1e-2
        for optimizer in (one, two):
            train_with_masters(optimizer.model, optimizer, range(4, 8))
        assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))

    def test_masters_hold_more_than_the_model(self):
        one = self.build()
        train_with_masters(one.model, one, range(4))
        saved = one.state_dict()["masters"]
        assert {m.dtype for m in saved.values()} == {torch.float32}
        assert any(not torch.equal(saved[n], p.float()) for n, p in one.model.named_parameters())

    @pytest.mark.parametrize(
        ("damage", "error"),
        [
            (lambda s: s.pop("masters"), ValueError),
            (lambda s: s.update(kind="SGD"), ValueError),
            (lambda s: s["groups"].reverse(), ValueError),
            (lambda s: s["masters"].pop("outer.bias"), ValueError),
            (lambda s: s["masters"].update({"outer.bias": torch.ones(7)}), ValueError),
            (lambda s: s["masters"].update({"outer.bias": torch.ones(6).bfloat16()}), ValueError),
            (lambda s: s["masters"].update({"outer.bias": 1.0}), ValueError),
            (lambda s: s.update(scaler={"scale": 1.0}), ValueError),
            (lambda s: s["optimizer"]["param_groups"].pop(), ValueError),
            (lambda s: s["optimizer"].pop("state"), KeyError),
        ],
    )
    def test_a_state_that_does_not_fit_is_refused_whole(self, damage, error):
        one, two = self.build(), self.build(seed=4)
        train_with_masters(one.model, one, range(3))
        train_with_masters(two.model, two, range(2))
        state = copy.deepcopy(one.state_dict())
        damage(state)
        before = copy.deepcopy(two.state_dict())
        with pytest.raises(error):
            two.load_state_dict(state)
        assert same_state(two.state_dict(), before) and agree(two)

    def test_a_scaler_that_refuses_its_part_leaves_all_as_it_was(self):
        one, two = (self.build(seed=s, scaler=DynamicLossScaler(2.0**s)) for s in (3, 4))
        train_with_masters(one.model, one, range(3))
        for damage in (lambda s: s["scaler"].pop("kind"), lambda s: s["optimizer"]["param_groups"].pop()):
            state = copy.deepcopy(one.state_dict())
            damage(state)
            before = copy.deepcopy(two.state_dict())
            with pytest.raises(ValueError):
                two.load_state_dict(state)
            assert same_state(two.state_dict(), before) and two.scaler.scale == 16.0

    def test_not_a_state_at_all(self):
        with pytest.raises(ValueError, match="expected a state with the keys"):
            self.build().load_state_dict([1])


def same_state(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU tests run the same code")
@pytest.mark.parametrize("dtype", HALVES)
def test_cuda_masters_equal_a_hand_written_loop(dtype):
    model, reference = Net().to("cuda", dtype), Net().to("cuda", dtype)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    optimizer = MasterWeightOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), model, scaler=scaler)
    masters = [p.detach().float().requires_grad_() for p in reference.parameters()]
    by_hand = torch.optim.AdamW(masters, lr=1e-3, fused=True)
    for _ in range(5):
        x = torch.randn(16, 6, device="cuda", dtype=dtype)
        optimizer.zero_grad()
        optimizer.scale_loss(model(x).float().square().mean()).backward()
        assert optimizer.step()
        reference.zero_grad()
        (reference(x).float().square().mean() * 2.0**8).backward()
        for p, master in zip(reference.parameters(), masters, strict=True):
            master.grad = p.grad.float() / 2.0**8
        by_hand.step()
        for p, master in zip(reference.parameters(), masters, strict=True):
            p.data = master.detach().to(dtype)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def bf16(*shape: int, seed: int = 0, scale: float = 0.02) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape, generator=seeded(seed)) * scale).bfloat16())


def gradients(p: torch.Tensor, steps: int, seed: int = 1) -> list[torch.Tensor]:
    generator = seeded(seed)
    return [(torch.randn(p.shape, generator=generator) * 1e-3 + 5e-4).bfloat16() for _ in range(steps)]


def fp32_trajectory(p: torch.Tensor, grads: list[torch.Tensor], **hyper: float) -> tuple[torch.Tensor, dict]:
    """torch's fused AdamW on an FP32 copy, fed the same gradients: the weight and the state after the last step."""
    q = nn.Parameter(p.detach().float())
    optimizer = torch.optim.AdamW([q], fused=True, **hyper)
    for g in grads:
        q.grad = g.float()
        optimizer.step()
    return q.detach(), optimizer.state[q]


def run(p: torch.Tensor, grads: list[torch.Tensor], update: str, **rest) -> BF16AdamW:
    optimizer = BF16AdamW([p], update=update, **rest)
    for g in grads:
        p.grad = g
        optimizer.step()
    return optimizer


class TestBF16AdamW:
    @pytest.mark.parametrize("shape", [(), (3,), (0,), (5, 7), (700, 300), (3, 2, 3, 3), (70_001,)])
    def test_nearest_is_one_fp32_step_of_torch_rounded_once(self, shape):
        p = bf16(*shape)
        state = {"m": torch.zeros(shape), "v": torch.zeros(shape)}
        optimizer = BF16AdamW([p], lr=1e-2, weight_decay=0.3, update="nearest")
        for step, g in enumerate(gradients(p, 4)):
            wide = nn.Parameter(p.detach().float())
            torch_adamw = torch.optim.AdamW([wide], lr=1e-2, weight_decay=0.3, fused=True)
            torch_adamw.state[wide] = {
                "step": torch.tensor(float(step)),
                "exp_avg": state["m"].clone(),
                "exp_avg_sq": state["v"].clone(),
            }
            wide.grad, p.grad = g.float(), g
            torch_adamw.step()
            optimizer.step()
            state = {"m": torch_adamw.state[wide]["exp_avg"], "v": torch_adamw.state[wide]["exp_avg_sq"]}
            state = {name: value.bfloat16().float() for name, value in state.items()}
            assert torch.equal(p, wide.bfloat16())
            assert torch.equal(optimizer.state[p]["exp_avg"].float(), state["m"])
            assert torch.equal(optimizer.state[p]["exp_avg_sq"].float(), state["v"])

    @pytest.mark.parametrize("update", ["nearest", "stochastic", "kahan"])
    def test_how_parameters_are_cut_and_joined_does_not_matter(self, update, monkeypatch):
        def train() -> torch.Tensor:
            shapes = ((300, 40), (7,), (), (2, 3, 5), (11,), (1000,))
            parameters = [bf16(*shape, seed=i) for i, shape in enumerate(shapes)]
            parameters[0] = nn.Parameter(parameters[0].detach().t())  # not contiguous
            optimizer = BF16AdamW(parameters, lr=1e-2, update=update, generator=seeded(3))
            for step in range(5):
                for i, p in enumerate(parameters):
                    p.grad = gradients(p, 1, seed=10 * step + i)[0] if (step + i) % 3 else None
                optimizer.step()
            return torch.cat([p.detach().flatten() for p in parameters]).float()

        whole = train()
        monkeypatch.setitem(adamw._BLOCK, "cpu", 64)
        cut = train()
        if update == "stochastic":  # other draws: the same up to rounding
            assert not torch.equal(whole, cut) and float((whole - cut).abs().max()) < 0.01
        else:
            assert torch.equal(whole, cut)

    def test_a_gain_of_one_never_moves_under_nearest(self):
        ends = {}
        for lr in (1e-4, 3e-4, 1e-3, 1.9e-3, 2e-3):
            for update in ("nearest", "kahan"):
                p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
                run(p, [torch.ones(1, dtype=torch.bfloat16)] * 200, update, lr=lr, weight_decay=0.0)
                ends[update, lr] = p.item()
        assert [ends["nearest", lr] for lr in (1e-4, 3e-4, 1e-3, 1.9e-3)] == [1.0] * 4 and ends["nearest", 2e-3] < 0.7
        for lr in (1e-4, 3e-4, 1e-3, 1.9e-3):
            assert abs(ends["kahan", lr] - (1 - 200 * lr)) < 2.0**-8 + 0.03 * 200 * lr

    def test_torch_loses_the_same_updates(self):
        for fused in (False, True):
            p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
            optimizer = torch.optim.AdamW([p], lr=1.9e-3, weight_decay=0.0, fused=fused)
            for _ in range(200):
                p.grad = torch.ones_like(p)
                optimizer.step()
            assert p.item() == 1.0

    @pytest.mark.parametrize(("kind", "stuck_at"), [("foreach", 0.5), ("fused", 0.25), ("ours", 0.25)])
    def test_the_second_moment_ratchets(self, kind, stuck_at):
        # Two roundings a step (mul_, addcmul_) let v rise to 0.5, a single one only to 0.25; neither lets it fall.
        p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        if kind == "ours":
            optimizer = BF16AdamW([p], lr=0.0, update="nearest")
        else:
            optimizer = torch.optim.AdamW([p], lr=0.0, **{kind: True})
        for gradient in (1.0, 0.0):
            for _ in range(800):
                p.grad = torch.full_like(p, gradient)
                optimizer.step()
            assert optimizer.state[p]["exp_avg_sq"].item() == stuck_at

    @pytest.mark.parametrize("update", ["stochastic", "kahan"])
    def test_the_remedies_let_the_second_moment_rise_and_fall(self, update):
        p = nn.Parameter(torch.ones(400, dtype=torch.bfloat16))
        optimizer = BF16AdamW([p], lr=0.0, update=update, generator=seeded())
        for gradient, expected in ((1.0, 1 - 0.999**600), (0.0, (1 - 0.999**600) * 0.999**600)):
            for _ in range(600):
                p.grad = torch.full_like(p, gradient)
                optimizer.step()
            v = optimizer.state[p]["exp_avg_sq"].double()
            error = abs(float(v.mean()) - expected)
            assert error < (5 * float(v.std()) / 20 if update == "stochastic" else expected * 2.0**-7)

    def test_stochastic_steps_are_unbiased(self):
        n, lr = 200_000, 1e-4
        p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        optimizer = run(
            p, [torch.ones(n, dtype=torch.bfloat16)], "stochastic", lr=lr, weight_decay=0.1, generator=seeded()
        )
        exact = 1 - lr * (1 + 0.1)
        moved, gap = (p.detach() != 1).double(), 2.0**-8
        assert set(p.detach().unique().tolist()) == {1.0, 1 - gap}
        share = (1 - exact) / gap
        assert abs(float(moved.mean()) - share) < 5 * math.sqrt(share * (1 - share) / n)
        for name, wide in (("exp_avg", 0.1), ("exp_avg_sq", 0.001)):
            stored = optimizer.state[p][name].double()
            assert abs(float(stored.mean()) - wide) < 5 * float(stored.std()) / math.sqrt(n) + wide * 1e-6
            assert len(stored.unique()) == 2

    @pytest.mark.parametrize(
        ("hyper", "missed"),
        [({"lr": 1e-4}, 0.3), ({"lr": 1e-5, "weight_decay": 0.1}, 0.9), ({"lr": 5e-5, "betas": (0.9, 0.95)}, 0.3)],
    )
    def test_kahan_stays_with_the_fp32_trajectory(self, hyper, missed):
        start = bf16(2000)
        grads = gradients(start, 150)
        exact, state = fp32_trajectory(start, grads, **hyper)
        errors = {}
        for update in ("nearest", "stochastic", "kahan"):
            p = nn.Parameter(start.detach().clone())
            optimizer = run(p, grads, update, generator=seeded(), **hyper)
            weight = p.detach().float()
            if update == "kahan":
                weight = weight + optimizer.state[p]["compensation"].float()
                v = optimizer.state[p]["exp_avg_sq"].float()
                assert float(((v - state["exp_avg_sq"]) / state["exp_avg_sq"]).abs().max()) < 2.0**-7
                # The stored weight is the sum rounded: within half a gap of it.
                assert bool(((weight - p.detach()).abs() <= update_threshold(p.detach(), "bf16").size).all())
            errors[update] = float((weight - exact).norm() / (exact - start.detach().float()).norm())
        # As shares of the length of the FP32 path: a thousandth, against what rounding to nearest misses.
        assert errors["kahan"] < 0.002 < errors["stochastic"] and errors["nearest"] > missed

    def test_weight_decay_reaches_the_weight(self):
        ends = {}
        for update in ("nearest", "stochastic", "kahan"):
            p = nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
            run(p, [torch.zeros_like(p)] * 200, update, lr=5e-3, weight_decay=0.1, generator=seeded())
            ends[update] = float(p.detach().double().mean())
        exact = (1 - 5e-4) ** 200
        # Half a gap for the stored weight, and for each step half a gap of the compensation.
        assert ends["nearest"] == 1.0 and abs(ends["kahan"] - exact) <= 2.0**-9 + 200 * 2.0**-18
        assert abs(ends["stochastic"] - exact) < 0.01

    @pytest.mark.parametrize(("update", "documented"), [("nearest", 4), ("stochastic", 4), ("kahan", 8)])
    def test_state_has_the_documented_bytes_and_no_other_format(self, update, documented):
        p = bf16(100, 10)
        optimizer = run(p, gradients(p, 2), update)
        tensors = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        assert sum(t.nbytes for t in tensors) == documented * p.numel() and {t.dtype for t in tensors} == {
            torch.bfloat16
        }

    @pytest.mark.parametrize("update", ["nearest", "stochastic", "kahan"])
    @pytest.mark.parametrize("way", ["state_dict", "file", "pickle"])
    def test_resume_is_bit_exact_with_the_same_draws(self, update, way):
        start, grads = bf16(50, 3), gradients(bf16(50, 3), 20)
        straight = nn.Parameter(start.detach().clone())
        run(straight, grads, update, generator=seeded(4))
        p = nn.Parameter(start.detach().clone())
        optimizer = run(p, grads[:9], update, generator=seeded(4))
        if way == "pickle":
            other = pickle.loads(pickle.dumps(optimizer))
            (q,) = other.param_groups[0]["params"]
        else:
            q = nn.Parameter(p.detach().clone())
            other, state = BF16AdamW([q], update=update, generator=seeded(99)), copy.deepcopy(optimizer.state_dict())
            if way == "file":
                saved = io.BytesIO()
                torch.save(state, saved)
                saved.seek(0)
                state = torch.load(saved, weights_only=True)
            other.load_state_dict(state)
        for g in grads[9:]:
            q.grad = g
            other.step()
        assert torch.equal(q, straight)

    def test_a_state_that_does_not_fit_is_refused(self):
        p, q = bf16(5), bf16(5, seed=1)
        state = run(p, gradients(p, 2), "kahan").state_dict()
        for other, message in (
            (BF16AdamW([q], update="nearest"), "update by"),
            (BF16AdamW([q], update="kahan", generator=seeded()), "generator both"),
            (BF16AdamW([q, bf16(2)], update="kahan"), "size of optimizer's group"),
        ):
            before = copy.deepcopy(other.state_dict())
            with pytest.raises(ValueError, match=message):
                other.load_state_dict(state)
            assert same_state(other.state_dict(), before)

    def test_groups_choose_their_own_rule_and_schedulers_work(self):
        p, q = (nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2))
        optimizer = BF16AdamW([{"params": [p]}, {"params": [q], "update": "kahan"}], lr=1e-3, update="nearest")
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 100)
        for _ in range(100):
            p.grad = q.grad = torch.ones(1, dtype=torch.bfloat16)
            optimizer.step()
            scheduler.step()
        assert p.item() == 1.0 and abs(q.item() - 0.95) < 0.01 and optimizer.param_groups[0]["lr"] == 0.0

    def test_closures_and_missing_gradients(self):
        p, q = bf16(4), bf16(4)
        optimizer = BF16AdamW([p, q])

        def closure():
            optimizer.zero_grad()
            loss = p.float().square().sum()
            loss.backward()
            return loss

        before = q.detach().clone()
        assert optimizer.step(closure).item() > 0 and torch.equal(q, before) and not optimizer.state.get(q)
        assert optimizer.step() is None

    def test_nan_reaches_only_its_own_weight(self):
        for update in ("nearest", "stochastic", "kahan"):
            p = bf16(3)
            run(p, [torch.tensor([math.nan, 1.0, 1.0], dtype=torch.bfloat16)], update)
            assert p.isnan().tolist() == [True, False, False]

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: BF16AdamW([bf16(2)], update="sr"), ValueError, "nearest, stochastic or kahan"),
            (lambda: BF16AdamW([bf16(2)], lr=-1), ValueError, "at least 0"),
            (lambda: BF16AdamW([bf16(2)], lr=math.nan), ValueError, "nan"),
            (lambda: BF16AdamW([bf16(2)], betas=(0.9, 1.0)), ValueError, "betas in"),
            (lambda: BF16AdamW([bf16(2)], eps=-1e-8), ValueError, "eps"),
            (lambda: BF16AdamW([]), ValueError, "empty parameter list"),
            (lambda: BF16AdamW([nn.Parameter(torch.ones(2))]), TypeError, "torch.optim.AdamW"),
            (lambda: BF16AdamW([nn.Parameter(torch.ones(2).half())]), TypeError, "float16"),
        ],
    )
    def test_bad_input_gets_a_clear_error(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_a_refused_group_changes_nothing_and_sparse_gradients_are_refused(self):
        optimizer = BF16AdamW([bf16(2)])
        with pytest.raises(TypeError, match="BF16 parameters"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert len(optimizer.param_groups) == 1
        table = nn.Embedding(10, 4, sparse=True).to(torch.bfloat16)
        table(torch.tensor([1])).float().sum().backward()
        with pytest.raises(TypeError, match="sparse=False"):
            BF16AdamW(table.parameters()).step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU tests run the same code")
@pytest.mark.parametrize("update", ["nearest", "stochastic", "kahan"])
def test_cuda_bf16_adamw_follows_fp32(update):
    start = bf16(2000)
    grads = gradients(start, 100)
    exact, _ = fp32_trajectory(start, grads, lr=1e-3)
    p = nn.Parameter(start.detach().cuda())
    generator = torch.Generator("cuda").manual_seed(0) if update == "stochastic" else None
    run(p, [g.cuda() for g in grads], update, lr=1e-3, generator=generator)
    path = (exact - start.detach().float()).norm()
    assert (
        float((p.detach().float().cpu() - exact).norm() / path)
        < {"nearest": 1.0, "stochastic": 0.5, "kahan": 0.05}[update]
    )
