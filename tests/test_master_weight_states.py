"""Master weights under a loss scaler, saved and loaded, and on a GPU."""

import copy
import io

import pytest
import torch
from master_nets import HALVES, Net, agree, groups_of, loss_of, same_state, train_with_masters
from torch import nn

from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.master_weights import MasterWeightOptimizer


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
