"""The live exhibits one by one: on the reader's tensor, against oracles of their own; all of them let go of it."""

import copy
import gc
import json
import weakref
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
import traitlets
from kernel_front import FAKE_KERNEL, entry_of, opened, state_of
from oracles import table_round
from torch import nn
from widget_page import SAID, said

from mixprec_lab import models
from mixprec_lab.block_scaling import SCHEMES, block_report
from mixprec_lab.exhibits import (
    LossScaleLab,
    LostUpdateMap,
    OneTensorEveryScheme,
    ScaleHistory,
    TrainingKnobs,
    Windows,
)
from mixprec_lab.exhibits.lost_update_map import RATES
from mixprec_lab.exhibits.one_tensor import decibels
from mixprec_lab.loss_scaling import StaticLossScaler
from mixprec_lab.master_weights import simulate_weight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
MAKE = {
    "loss-scale-lab": lambda x, **o: LossScaleLab({"x": x}, name="live", **o),
    "windows": lambda x, **o: Windows.from_tensors({"x": x}, name="live", **o),
    "one-tensor": lambda x, **o: OneTensorEveryScheme(tensor=x, name="live", **o),
    "lost-update-map": lambda x, **o: LostUpdateMap(weights=x, name="live", **o),
    "scale-history": lambda x, **o: ScaleHistory(tensor=x, name="live", **o),
}
NUMPY = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}


def sample(rows: int = 40, columns: int = 300) -> torch.Tensor:
    """Values of about 1 over 20 binades, a few zeros and one negative largest."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(rows, columns, generator=draw) * torch.exp2(torch.randn(rows, columns, generator=draw) * 3)
    x[0, :5], x[0, 5] = 0.0, -500.0
    return x.clamp_(-500, 400)


@pytest.fixture
def front(monkeypatch):
    return partial(opened, monkeypatch)


# ------------------------------------------------------------------------------------------------- whatever exhibit


@pytest.mark.parametrize("kind", MAKE)
def test_an_answer_is_json_and_holds_every_text_of_result(front, kind):
    exhibit, page = front(lambda: MAKE[kind](sample(), device="cpu"))
    answer = page.ask(state_of(exhibit))
    assert answer["texts"] == exhibit.result() and answer["device"] == "cpu" and answer["path"].startswith("cpu: ")
    assert answer["elements"] == 12_000 and answer["said"]
    json.dumps(answer)


def test_close_frees_the_memory_of_the_tensor():
    memory = {kind: sample().numpy() for kind in MAKE}
    alive = {kind: weakref.ref(array) for kind, array in memory.items()}
    exhibits = [make(torch.from_numpy(memory[kind])) for kind, make in MAKE.items()]
    for exhibit in exhibits:
        exhibit.recompute()
    del memory
    gc.collect()
    assert all(array() is not None for array in alive.values())
    for exhibit in exhibits:
        exhibit.close()
    gc.collect()
    assert [kind for kind, array in alive.items() if array() is not None] == []


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_every_float_dtype_is_taken(kind, dtype):
    x = sample().to(dtype)
    exhibit, same = MAKE[kind](x), MAKE[kind](x.float())
    assert exhibit.result() == same.result()
    assert exhibit.recompute()["said"] == same.recompute()["said"]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("wrong", [torch.ones(4, 4, dtype=torch.int8), [[1.0, 2.0], [3.0, 4.0]], torch.empty(0, 2)])
def test_what_is_no_tensor_of_floats_is_refused(kind, wrong):
    with pytest.raises((TypeError, ValueError), match=r"(?i)expected .*(, got |, not )"):
        MAKE[kind](wrong)


@pytest.mark.parametrize("kind", MAKE)
def test_a_device_that_is_not_there_is_refused(kind):
    with pytest.raises(ValueError, match="expected a device of this machine"):
        MAKE[kind](sample(), device="tpu9")


def test_every_page_asks_for_its_controls_and_shows_the_answer(pages):
    exhibits = {kind: make(sample()) for kind, make in MAKE.items()}
    visit = pages([exhibits["one-tensor"]])
    for kind, exhibit in exhibits.items():
        visit.page.evaluate(FAKE_KERNEL, json.loads(json.dumps(entry_of(exhibit))))
        first = visit.page.evaluate("live.sent[0]")
        assert first["kind"] == "compute" and first["state"] == state_of(exhibit), kind
        texts = {key: f"text {at}" for at, key in enumerate(exhibit.result())}
        answer = {
            "kind": "answer", "view": first["view"], "id": first["id"], "texts": texts, "said": "Said by the kernel.",
            "device": "cpu", "path": "cpu: a path", "elements": 7, "milliseconds": 2.0,
        }  # fmt: skip
        root = visit.page.locator("#live")
        assert root.evaluate(SAID) == exhibit.result(), kind
        visit.page.evaluate("(a) => live.answer(a)", answer)
        assert root.evaluate(SAID) == texts, kind
        assert root.locator("[data-live=said]").inner_text() == "Said by the kernel."
        assert root.locator("[data-live=line]").inner_text().endswith(" on cpu, a path: 7 values in 2.0 ms.")
        visit.page.evaluate("live.end()")
        assert visit.page.evaluate("live.held()") == 0
    assert visit.problems == {}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", MAKE)
def test_a_gpu_finds_what_the_cpu_finds_and_gives_its_memory_back(kind):
    gc.collect()
    here, before = MAKE[kind](sample(), device="cpu").recompute(), torch.cuda.memory_allocated()
    exhibit = MAKE[kind](sample(), device="cuda")
    there = exhibit.recompute()
    assert there["texts"] == here["texts"] and there["said"] == here["said"] and there["device"].startswith("cuda:0 (")
    exhibit._park()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert exhibit.recompute()["said"] == here["said"]
    exhibit.close()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


# ---------------------------------------------------------------------------------------- one tensor, every scheme


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_whole_of_a_large_tensor_goes_through_the_scheme(scheme, axis):
    x, exhibit = sample(), OneTensorEveryScheme(tensor=sample(), scheme=scheme, axis=axis)
    report = block_report(x, scheme, -1 if axis == "rows" else 0)
    told = exhibit.recompute()["said"]
    assert told.startswith(f"All 40 x 300 values of your tensor, as they are, in {report.scheme.title}: SQNR ")
    assert told.endswith(f"SQNR {decibels(report.relative_rms)} dB, {round(report.flushed * 12_000)} flushed to zero.")


def test_the_page_carries_a_corner_of_a_large_tensor_and_says_so(pages):
    exhibit = OneTensorEveryScheme(tensor=sample())
    corner = OneTensorEveryScheme(tensor=sample()[:32, :256])
    assert torch.equal(exhibit.tensor()[0], sample()[:32, :256])
    words = exhibit.result()
    assert words.pop("summary") == corner.result()["summary"] + " They are the first of your 40 x 300 values."
    assert words == {key: text for key, text in corner.result().items() if key != "summary"}
    visit = pages([exhibit])
    assert said(visit) == exhibit.result() and visit.problems == {}


def test_a_small_tensor_is_on_the_page_as_a_whole():
    exhibit = OneTensorEveryScheme(tensor=sample()[:32, :256])
    assert exhibit.recompute()["said"] == "" and exhibit.recompute()["elements"] == 32 * 256


def test_what_changes_in_place_is_seen_in_the_whole_and_not_in_the_page():
    x = sample()
    exhibit = OneTensorEveryScheme(tensor=x)
    before = exhibit.recompute()
    x.mul_(torch.linspace(1, 2, 300))
    after = exhibit.recompute()
    assert after["texts"] == before["texts"] and after["said"] != before["said"]
    assert after["said"] == OneTensorEveryScheme(tensor=x).recompute()["said"]


# ------------------------------------------------------------------------------------------------- lost-update map


def weights() -> torch.Tensor:
    w = torch.randn(4000, generator=torch.Generator().manual_seed(2)) * torch.exp2(torch.arange(4000) % 16 - 12.0)
    w[0], w[1] = 0.0, -0.0
    return w.clamp_(-16, 16)


@pytest.mark.parametrize("direction", ["away", "toward"])
@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2", "fp8_e4m3"])
def test_lost_updates_are_counted_weight_by_weight(name, direction):
    exhibit = LostUpdateMap(name, weights=weights(), direction=direction)
    stored = table_round(weights().double().numpy(), name, "nearest_even", saturate=False)
    way = np.where(stored < 0, -1.0, 1.0) * (1 if direction == "away" else -1)
    for rate in RATES[::4]:
        u = float(np.float32(rate))
        exhibit.rate = rate
        for method in ("nearest", "fp32_master"):
            exhibit.method = method
            total = stored + way * u
            after = table_round(total, name, "nearest_even", saturate=False) if method == "nearest" else total
            after = after if method == "nearest" else after.astype(np.float32).astype(np.float64)
            told, sense = exhibit.recompute()["said"], "away from" if direction == "away" else "toward"
            assert f"Of your 4000 weights in {exhibit._format(name).title}, {(after == stored).sum()} (" in told
            assert told.endswith(f"lose every update of {rate} {sense} zero.")


def test_kahan_loses_what_a_thousand_updates_do_not_move():
    exhibit = LostUpdateMap("bf16", "kahan", weights=weights())
    stored = weights().bfloat16().double()
    for rate in ("1e-5", "1e-3", "5e-2"):
        exhibit.rate = rate
        update = torch.where(stored < 0, -1.0, 1.0).double() * float(np.float32(rate))
        path = simulate_weight(stored, update, 1000, "bf16", "kahan")
        lost = int((path == stored[:, None]).all(dim=1).sum())
        assert f" {lost} (" in exhibit.recompute()["said"]


def test_stochastic_rounding_loses_none():
    told = LostUpdateMap("bf16", "stochastic", weights=weights()).recompute()["said"]
    assert told == "Of your 4000 weights, none loses an update on average."


def test_the_weights_of_a_model_are_counted_as_they_are_now():
    model = models.convnet()
    exhibit, n = LostUpdateMap(weights=model, rate="1e-3"), sum(p.numel() for p in model.parameters())
    before = exhibit.recompute()
    assert before["elements"] == n and exhibit.recompute()["said"] == before["said"]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(64)
    after = exhibit.recompute()["said"]
    every = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert before["said"] != after == LostUpdateMap(weights=every, rate="1e-3").recompute()["said"]


def test_weights_are_counted_again_only_when_they_changed(monkeypatch):
    exhibit, counted = LostUpdateMap(weights=weights()), []
    real = LostUpdateMap._occupied.__globals__["_tally"]
    monkeypatch.setitem(LostUpdateMap._occupied.__globals__, "_tally", lambda *a: counted.append(a) or real(*a))
    for rate in RATES[:5]:
        exhibit.rate = rate
        exhibit.recompute()
    assert len(counted) == 1
    exhibit.format = "fp16"
    exhibit.recompute()
    exhibit.format = "bf16"
    exhibit.recompute()
    assert len(counted) == 2


def test_weights_that_a_format_cannot_hold_are_an_error_in_the_exhibit(front):
    exhibit, page = front(lambda: LostUpdateMap("fp8_e4m3", weights=torch.tensor([1.0, 1000.0])))
    wrong = page.ask(state_of(exhibit))
    assert wrong["error"].startswith("ValueError: expected weights that are finite in FP8 E4M3, got NaN, infinity or")
    assert page.ask(state_of(exhibit, format="bf16"), 2)["said"].startswith("Of your 2 weights in BF16, ")


def test_a_map_without_weights_says_nothing_of_them():
    assert LostUpdateMap().recompute()["said"] == "" and LostUpdateMap().recompute()["elements"] == 0


# --------------------------------------------------------------------------------------------------- scale history


@pytest.mark.parametrize("name", NUMPY)
def test_the_cast_of_a_step_is_that_of_ml_dtypes(name):
    x, exhibit = sample(), ScaleHistory("40:6:3", tensor=sample(), format=name)
    run = exhibit.run()
    for step in (0, 39, 40, 41, 43, 90):
        exhibit.step = step
        values = (x.double().numpy() * (run.amax[step] / 500.0)).astype(np.float32)
        with np.errstate(over="ignore"):
            scaled = values * np.float32(run.scale[step])
            cast = scaled.astype(NUMPY[name]).astype(np.float32)
        clip, flushed = (~np.isfinite(cast)).sum(), ((cast == 0) & (values != 0)).sum()
        told = exhibit.recompute()["said"]
        assert told.startswith(f"Step {step}, cast for real: of your 12000 values {clip} clip")
        assert told.endswith(f" and {flushed} become zero.") and ("the first becomes" in told) == (clip > 0)


def test_the_shape_of_a_tensor_is_its_quantiles_with_the_largest_magnitude_among_them():
    x = sample()
    shape = torch.tensor(ScaleHistory(tensor=x).data["shapes"]["own"])
    inner = x.double().flatten().sort().values[((torch.arange(128) + 0.5) / 128 * 12_000).long()] / 500
    assert len(shape) == 128 and float(shape[0]) == -1.0 and torch.equal(shape[1:].double(), inner[1:].float().double())
    exact = torch.linspace(-0.5, 1, 128)
    assert ScaleHistory(tensor=exact.flip(0)).data["shapes"]["own"] == exact.double().tolist()


def test_the_page_computes_with_the_shape_of_a_tensor(pages):
    exhibit = ScaleHistory(tensor=sample(), name="own")
    assert exhibit.shape == "own"
    visit = pages([exhibit])
    assert said(visit) == exhibit.result() and visit.problems == {}
    visit.page.get_by_label("Values", exact=True).select_option("normal")
    exhibit.shape = "normal"
    assert said(visit) == exhibit.result()


def test_nothing_is_cast_at_an_infinite_amax():
    answer = ScaleHistory("40:21:1", tensor=sample(), step=40).recompute()
    assert answer["said"] == "Step 40: nothing is cast at an infinite amax." and answer["path"] == "cpu: no cast"


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan])])
def test_a_tensor_without_an_amax_is_refused(bad):
    with pytest.raises(ValueError, match="expected finite values that are not all zero"):
        ScaleHistory(tensor=bad)


# -------------------------------------------------------------------------------------------- knobs of a training loop


def test_knobs_follow_the_exhibit_both_ways_until_they_are_unlinked():
    lab = LossScaleLab({"x": torch.ones(4)}, log2_scale=3)
    knobs = TrainingKnobs(lab)
    assert (knobs.read().scale, knobs.read().dtype) == (8.0, torch.float16)
    lab.log2_scale, lab.format = -8, "bf16"
    assert (knobs.read().scale, knobs.read().dtype) == (2.0**-8, torch.bfloat16)
    knobs.log2_scale = 40
    assert lab.log2_scale == 40
    knobs.unlink()
    lab.log2_scale = 0
    assert knobs.read().scale == 2.0**40


def test_knobs_refuse_what_autocast_has_not():
    lab = LossScaleLab({"x": torch.ones(4)}, format="fp8_e4m3")
    with pytest.raises(ValueError, match="expected FP16 or BF16, as autocast has, got FP8 E4M3"):
        TrainingKnobs(lab).read()
    with pytest.raises(traitlets.TraitError):
        TrainingKnobs(LossScaleLab({"x": torch.ones(4)})).log2_scale = 41


def test_a_loop_that_reads_the_knobs_skips_its_steps_while_the_scale_is_too_large(front):
    model, loss_fn = nn.Linear(4, 1), nn.functional.mse_loss
    x, y = torch.ones(8, 4), torch.full((8, 1), 3.0)
    lab, page = front(lambda: LossScaleLab({"x": x}, formats=["fp16", "bf16"]))
    knobs, optimizer, start = TrainingKnobs(lab), torch.optim.SGD(model.parameters(), 0.01), copy.deepcopy(model)

    def step() -> bool:
        now = knobs.read()
        scaler = StaticLossScaler(now.scale)
        optimizer.zero_grad()
        with torch.autocast("cpu", now.dtype):
            loss = loss_fn(model(x), y)
        scaler.scale_loss(loss).backward()
        return scaler.step(optimizer, model.parameters())

    page.ask(state_of(lab, log2_scale=40))
    assert not step() and all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    page.ask(state_of(lab, log2_scale=8), 2)
    assert step() and not torch.equal(model.weight, start.weight)
