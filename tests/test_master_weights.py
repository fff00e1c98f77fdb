"""Thresholds, shares of lost updates and a weight over many steps, against brute force and torch."""

import math

import numpy as np
import pytest
import torch
from master_nets import seeded
from oracles import table_round

from mixprec_lab.exhibits.stalling_sum import _mulberry32
from mixprec_lab.formats import FORMATS, FloatFormat, all_values, get_format
from mixprec_lab.master_weights import UPDATE_METHODS, lost_updates, simulate_weight, unchanged, update_threshold
from mixprec_lab.rounding import running_sum

NARROW = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp6_e2m3", "fp4_e2m1")
BRUTE_FORCE = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp4_e2m1")


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
        many = simulate_weight(torch.ones(400), 1e-3, 1000, "bf16", "stochastic", seeded())[:, -1]
        assert abs(float(many.mean()) - 2.0) < 5 * float(many.std()) / math.sqrt(400)

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
