"""AdamW in pure BF16 against torch's in FP32: one rounding, no bias, no drift, and the failures it exists to show."""

import copy
import io
import math
import pickle

import pytest
import torch
from master_nets import same_state, seeded
from torch import nn

from mixprec_lab.master_weights import BF16AdamW, adamw, update_threshold


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
