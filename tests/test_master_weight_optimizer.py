"""The master-weight optimizer equals a hand-written loop on FP32 copies, and keeps model and masters together."""

import copy
import math

import pytest
import torch
from master_nets import HALVES, Net, agree, groups_of, loss_of, optimizer_parameters, train_with_masters
from torch import nn

from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.master_weights import MasterWeightOptimizer

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
