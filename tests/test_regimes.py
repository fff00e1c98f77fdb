"""``regimes``: pairs are pairs to the last bit, regimes are what they say, and what comes of them is kept whole."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab import regimes
from mixprec_lab.block_scaling import quantize_blocks
from mixprec_lab.regimes import (
    ABLATIONS,
    REGIMES,
    VARIANTS,
    EmulatedProducts,
    Regime,
    Task,
    build,
    changed_component,
    compare,
    differences,
    diverged,
    get_regime,
    get_task,
    regime_table,
    run_all,
    train,
)
from mixprec_lab.regimes import training as training_module
from mixprec_lab.regimes.training import learning_rate
from mixprec_lab.rounding import quantize

ALL = {**REGIMES, **VARIANTS}


MADE = {name: get_task(name) for name in ("images", "text")}


def tiny(name="images", steps=3, **changes):
    """A task of the chapter, short, with little held out."""
    task = MADE[name]
    held_out = tuple(t[:64] for t in task.held_out)
    return replace(task, **({"steps": steps, "evaluations": 1, "held_out": held_out} | changes))


class Spy(TorchDispatchMode):
    """The operands of every product of matrices, in the order of the calls."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "matmul"):  # matmul: what an emulation calls in their place
            self.operands.append(tuple(t.detach() for t in (args[1:] if name == "addmm" else args)))
        return func(*args, **(kwargs or {}))


# -- pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "text"])
def test_all_regimes_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(name):
    task, seen = tiny(name, steps=2), []

    def loss(output, targets):
        seen.append(targets.clone())
        return MADE[name].loss(output, targets)

    task = replace(task, loss=loss, metric=MADE[name].loss)
    wanted = [targets for _, targets in task.batches(7)][:2]
    initial = task.model(7).state_dict()
    for regime in ALL.values():
        seen.clear()
        engine = build(regime, task, 7)
        for key, value in engine.model.state_dict().items():
            if key in initial:  # scales of FP8 layers come on top
                assert torch.equal(value, initial[key].to(value.dtype)), (regime.name, key)
        run = train(task, regime, 7)
        assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True)), regime.name
        assert run.pair == training_module.fingerprint(task, 7)


def test_another_seed_is_another_pair_and_the_same_seed_the_same_run():
    task = tiny()
    first, again, other = (train(task, "fp8_delayed", seed) for seed in (0, 0, 1))
    assert first == again
    assert first.pair != other.pair and first.held_out != other.held_out


def test_runs_that_are_no_pairs_are_not_compared():
    runs = run_all([tiny()], ["fp32", "bf16_autocast"], [0, 1], progress=False)
    broken = [*runs[:-1], replace(runs[-1], pair="0" * 16)]
    with pytest.raises(ValueError, match="expected pairs, got other weights or batches under 'bf16_autocast'"):
        differences(broken)


def test_training_leaves_the_global_generator_and_the_threads_as_they_were():
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(tiny(), "bf16_stochastic", 0)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


# -- a regime is what it says --------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def after_two_steps(regime, name="text"):
    """The engine, the operands of its second step, and dtypes of gradients and optimizer state when it stepped."""
    task = tiny(name)
    engine, stepped = build(regime, task, 0), []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: stepped.append(optimizer)
    )
    gradients = []
    for p in engine.model.parameters():
        p.register_hook(lambda g: gradients.append(g.dtype))
    batches = iter(task.batches(0))
    try:
        engine.step(*next(batches))
        with Spy() as spy:
            engine.step(*next(batches))
    finally:
        handle.remove()
    return engine, spy.operands, set(gradients), set(stepped)


@pytest.mark.parametrize("regime", ALL.values(), ids=ALL)
def test_weights_gradients_masters_and_moments_have_the_width_that_the_name_says(regime):
    engine, _, gradients, stepped = after_two_steps(regime, "images")
    narrow = regime.update != "fp32"
    own = torch.bfloat16 if narrow else torch.float32
    assert {p.dtype for p in engine.model.parameters()} == {own} == gradients
    masters = [p for o in stepped for g in o.param_groups for p in g["params"]]
    state = {v.dtype for o in stepped for s in o.state.values() for v in s.values()
             if isinstance(v, torch.Tensor) and v.dim()}  # fmt: skip
    wide = regime.update in ("fp32", "master")
    assert {p.dtype for p in masters} == state == {torch.float32 if wide else torch.bfloat16}
    kahan = any("compensation" in key for o in stepped for s in o.state.values() for key in s)
    assert kahan == (regime.update == "kahan")


@pytest.mark.parametrize("regime", [r for r in ALL.values() if r.recipe is None and r.sums == "fp32"],
                         ids=lambda r: r.name)  # fmt: skip
def test_every_product_takes_operands_of_the_regimes_width(regime):
    _, operands, _, _ = after_two_steps(regime)
    assert len(operands) == 39  # 2 blocks of 4 linear layers and 2 attention products, and the head; 3 products each
    assert {t.dtype for pair in operands for t in pair} == {DTYPES[regime.compute]}
    rounded = all(torch.equal(quantize(t.float(), "tf32"), t.float()) for pair in operands for t in pair)
    assert rounded == (regime.compute != "fp32")  # FP16 and BF16 values are TF32 values too


@pytest.mark.parametrize("name", ["fp8_delayed", "fp8_current", "fp8_e4m3_gradients", "fp8_unscaled"])
def test_fp8_layers_multiply_values_of_their_formats(name):
    _, operands, _, _ = after_two_steps(ALL[name])
    inside = [pair for pair in operands if pair[0].dtype == torch.float32]
    assert len(inside) == 24  # 2 blocks, 4 layers, 3 products
    e4m3 = [all(torch.equal(quantize(t, "fp8_e4m3"), t) for t in pair) for pair in inside]
    either = [
        all(any(torch.equal(quantize(t, f), t) for f in ("fp8_e4m3", "fp8_e5m2")) for t in pair) for pair in inside
    ]
    assert all(either)
    assert all(e4m3) == (name == "fp8_e4m3_gradients")


@pytest.mark.parametrize(("name", "scheme", "other"), [("mxfp8", "mxfp8", "mxfp4"), ("mxfp4_forward", "mxfp4", None)])
def test_block_layers_multiply_values_of_their_schemes(name, scheme, other):
    _, operands, _, _ = after_two_steps(ALL[name])
    forward = [pair for pair in operands if pair[0].dtype == torch.float32][:8]
    for a, b in forward:  # the sum runs over the last axis of the first operand and the first axis of the second
        assert torch.equal(quantize_blocks(a, scheme, 1), a) and torch.equal(quantize_blocks(b.T, scheme, 1), b.T)
        if other is not None:
            assert not torch.equal(quantize_blocks(a, other, 1), a)


def test_the_components_that_a_table_names_are_those_that_run():
    table = regime_table()
    assert all(name in table for name in REGIMES)
    assert ALL["bf16_kahan"].components()["optimizer"] == "BF16 AdamW, Kahan"
    for name, scaling in {"fp32": "none", "fp16_dynamic": "dynamic", "fp8_delayed": "delayed", "fp8_current": "current",
                          "fp8_unscaled": "fixed", "mxfp8": "blocks", "fp8_block": "blocks"}.items():  # fmt: skip
        assert ALL[name].components()["scaling"] == scaling
    # the table leaves gradients out
    assert all(r.components()["gradients"] == r.components()["weights"] for r in ALL.values())
    assert {r.name: r.emulated for r in ALL.values() if r.emulated} == {
        "tf32": "TF32 operands", "bf16_short_sums": "short sums",
        **{r.name: "quantized products" for r in ALL.values() if r.recipe},
    }  # fmt: skip


def test_stochastic_rounding_and_nearest_part_from_the_masters():
    finals = {name: train(tiny(steps=20), name, 0).final
              for name in ("bf16_master", "bf16_nearest", "bf16_stochastic", "bf16_kahan")}  # fmt: skip
    assert len(set(finals.values())) == 4


# -- the reason it exists ------------------------------------------------------------------------------------------


def test_without_a_scale_fp16_learns_nothing_from_small_gradients_and_with_one_it_does():
    runs = {name: train("images", name, 0) for name in ("fp32", "fp16_unscaled", "fp16_dynamic")}
    start, end = runs["fp32"].held_out[0], runs["fp32"].final
    assert end < start / 4
    assert runs["fp16_unscaled"].final == pytest.approx(start, rel=1e-3) and runs["fp16_unscaled"].skipped == 0
    assert runs["fp16_dynamic"].final == pytest.approx(end, rel=0.01)


def test_memory_is_what_the_arithmetic_says_for_7856_parameters():
    per = {
        "fp32": (4, 4, 0, 8), "fp16_dynamic": (4, 4, 0, 8), "fp8_current": (4, 4, 0, 8),
        # gradients: BF16 as backward makes them, and the trainer's FP32 sum of them
        "bf16_nearest": (2, 6, 0, 4), "bf16_stochastic": (2, 6, 0, 4), "bf16_kahan": (2, 6, 0, 8),
        "bf16_master": (2, 4, 4, 8),
    }  # fmt: skip
    for name, bytes_ in per.items():
        run = train(tiny(steps=2), name, 0)
        assert tuple(run.bytes.values()) == tuple(7856 * b for b in bytes_), name


def test_the_rate_rises_for_ten_steps_and_falls_to_a_tenth():
    task = tiny("images", steps=100)
    rates = [learning_rate(task, step) for step in range(100)]
    assert rates[0] == pytest.approx(task.learning_rate / 10, rel=1e-3)
    assert rates.index(max(rates)) == 9 and rates[-1] == pytest.approx(task.learning_rate / 10, rel=1e-12)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    seen = []
    train(tiny(steps=5), "bf16_stochastic", 0, watch=lambda engine, step: seen.append(engine.optimizer.param_groups[0]))
    assert seen[-1]["lr"] == learning_rate(tiny(steps=5), 4)


def test_a_run_whose_loss_is_lost_is_a_result_of_its_own():
    def explode(output, targets):
        return MADE["images"].loss(output, targets) * math.inf

    task = tiny(steps=2, loss=explode, metric=explode)
    runs = run_all([task], ["fp32", "bf16_autocast"], [0, 1], progress=False)
    assert runs[0].held_out == (None, None) and math.isnan(runs[0].final) and runs[0].skipped == 2
    assert runs[0].bytes == dict.fromkeys(training_module.KINDS, 0)
    assert diverged(runs) == {("images", "fp32"): [0, 1], ("images", "bf16_autocast"): [0, 1]}
    with pytest.raises(ValueError, match="expected finished runs of the baseline 'fp32'"):
        differences(runs)


# -- emulated products ---------------------------------------------------------------------------------------------


def test_tf32_operands_are_rounded_forward_and_backward_and_sums_are_not():
    a = (1 + torch.arange(1, 5).double() * 2**-12).float().reshape(2, 2).requires_grad_()  # TF32 has 10 fraction bits
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    with EmulatedProducts("tf32") as mode:
        (a @ b).backward(torch.full((2, 2), 1 + 2**-12))
        product = a @ b
    # 1 + {1, 2, 3, 4} * 2**-12 lie between 1 and 1 + 2**-10; the tie goes to even, to 1
    assert product.tolist() == [[1.0, 1.0], [1 + 2**-10, 1 + 2**-10]]
    assert a.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert b.grad.tolist() == [[2 + 2**-10] * 2, [2 + 2**-10] * 2]
    assert mode.seen == {"mm": 4}


def test_convolutions_take_tf32_operands_too():
    image, kernel = torch.full((1, 1, 1, 1), 1 + 2**-12, requires_grad=True), torch.ones(1, 1, 1, 1, requires_grad=True)
    with EmulatedProducts("tf32"):
        out = nn.functional.conv2d(image, kernel)
        out.backward(torch.full_like(out, 1 + 2**-12))
    assert (float(out.detach()), float(image.grad), float(kernel.grad)) == (1.0, 1.0, 1.0)


def test_short_sums_stall_where_bf16_does_and_long_ones_do_not():
    a, b = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    with EmulatedProducts(sums=torch.bfloat16):
        short = a @ b
    # eight at a time: at 2048 the gap is 16, and half of it is rounded to even, to 2048
    assert float(short) == 2048.0 and float(a @ b) == 4096.0


def test_short_sums_start_from_the_bias():
    layer = nn.Linear(8, 1).bfloat16()
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.bias, 2048.0)
    with EmulatedProducts(sums=torch.bfloat16):
        assert float(layer(torch.ones(1, 8, dtype=torch.bfloat16)).detach()) == 2048.0


def test_a_product_that_cannot_be_emulated_raises():
    with EmulatedProducts("tf32"), pytest.raises(RuntimeError, match="expected a product that can be emulated"):
        torch.mv(torch.ones(2, 2), torch.ones(2))
    image = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    with EmulatedProducts(sums=torch.bfloat16), pytest.raises(RuntimeError, match="got a convolution"):
        nn.functional.conv2d(image, image)
    for arguments in ({}, {"operands": "tf32", "sums": torch.bfloat16}):
        with pytest.raises(ValueError, match="expected either operands or sums"):
            EmulatedProducts(**arguments)


# -- sets of runs --------------------------------------------------------------------------------------------------


def test_a_set_that_was_interrupted_ends_as_one_that_was_not(tmp_path, monkeypatch):
    arguments = [tiny("text", 2), tiny("images")], ["fp32", "bf16_stochastic", "fp8_delayed"], [0, 1]
    whole = run_all(*arguments, progress=False)
    real, calls = train, []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("mixprec_lab.regimes.runs.train", counted)
    with pytest.raises(KeyboardInterrupt):
        run_all(*arguments, folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 4
    resumed = run_all(*arguments, folder=tmp_path, progress=False)
    assert len(calls) == 5 + 8 and resumed == whole
    assert run_all(*arguments, folder=tmp_path, progress=False) == whole and len(calls) == 13
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"] * 12


def test_a_stored_run_of_other_settings_is_refused_and_stays(tmp_path):
    run_all([tiny()], ["fp32"], [0], folder=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another task: delete it, or give another folder"):
        run_all([tiny(steps=4)], ["fp32"], [0], folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another regime"):
        run_all([tiny()], [replace(REGIMES["tf32"], name="fp32")], [0], folder=tmp_path, progress=False)
    assert path.read_bytes() == before
    path.write_text("{", "utf-8")
    with pytest.raises(ValueError, match="expected a stored run in .*: delete the file"):
        run_all([tiny()], ["fp32"], [0], folder=tmp_path, progress=False)


def test_a_run_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError):
        regimes.runs.write_whole(tmp_path / "x.json", {"x": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told_on_stderr(capsys):
    run_all([tiny(steps=2)], ["fp32", "tf32"], [0])
    told = capsys.readouterr()
    assert told.out == "" and "1/2 images, tf32, seed 0" in told.err and "2/2 done" in told.err


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"regimes": ["fp33"]}, KeyError, "the names are fp32, tf32"),
        ({"tasks": ["cats"]}, KeyError, "the names are text, images"),
        ({"regimes": ["fp32", "fp32"]}, ValueError, "regimes of different names"),
        ({"seeds": []}, ValueError, "seeds of different names, at least one"),
        ({"seeds": [-1]}, ValueError, "whole numbers of at least 0"),
        ({"seeds": [0.5]}, ValueError, "whole numbers of at least 0"),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        run_all(**({"tasks": ["images"], "regimes": ["fp32"], "seeds": [0]} | arguments), progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compute": "int8"}, "compute to be one of"),
        ({"update": "never"}, "update to be one of"),
        ({"scaling": "dynamic"}, "loss scaling is for compute='fp16'"),
        ({"update": "kahan"}, "BF16 weights need compute='bf16'"),
        ({"compute": "fp16", "recipe": REGIMES["mxfp8"].recipe}, "a recipe needs"),
        ({"sums": "bf16"}, "sums='bf16' is for"),
        ({"compute": "bf16", "recipe": REGIMES["mxfp8"].recipe}, "expected layers to say"),
    ],
)
def test_a_regime_that_no_trainer_runs_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Regime("x", "X", **arguments)


@pytest.mark.parametrize("changes", [{"steps": 1}, {"learning_rate": 0.0}, {"evaluations": 0}, {"evaluations": 9}])
def test_a_task_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        replace(tiny(), **changes)


def test_too_few_batches_are_an_error_not_a_shorter_run():
    task = tiny(batches=lambda seed: list(MADE["images"].batches(seed))[:2])
    with pytest.raises(ValueError, match="expected 3 batches of seed 0, got 2"):
        train(task, "fp32", 0)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    def missing(device):
        raise ModuleNotFoundError("No module named 'sklearn'")

    monkeypatch.setattr("mixprec_lab.regimes.tasks.digits", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        get_task("images")


# -- ablation and your own model -----------------------------------------------------------------------------------


def test_an_ablation_changes_one_component():
    for row in ABLATIONS:
        assert changed_component(get_regime(row.base), get_regime(row.variant))
    with pytest.raises(ValueError, match="differ in one component, got compute, scaling"):
        changed_component(REGIMES["fp32"], REGIMES["fp16_dynamic"])
    with pytest.raises(ValueError, match="got none"):
        changed_component(REGIMES["fp32"], REGIMES["fp32"])


def test_taking_the_scale_away_is_what_breaks_fp16():
    found = regimes.ablate("fp16_dynamic", ["fp16_unscaled"], tiny(steps=40), [0, 1, 2])
    assert found["fp16_unscaled"].excludes_zero and found["fp16_unscaled"].mean > 0.1


def own_model(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def own_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        x = torch.randn(32, 4, generator=generator)
        yield x, x.square().sum(1, keepdim=True)


def test_your_own_model_is_compared_in_pairs():
    held_out = next(iter(own_batches(99)))
    found = compare(own_model, own_batches, nn.functional.mse_loss, ["fp32", "bf16_master", "fp8_current"],
                    held_out=held_out, seeds=range(3), learning_rate=0.01)  # fmt: skip
    assert set(found.differences) == {"bf16_master", "fp8_current"} and found.diverged == {}
    by_hand = []
    for seed in range(3):
        ends = [r.final for r in found.runs if r.seed == seed and r.regime in ("fp32", "bf16_master")]
        by_hand.append(ends[1] - ends[0])
    assert found.differences["bf16_master"].differences == tuple(by_hand)
    lines = str(found).splitlines()
    assert lines[2].startswith("fp32") and "baseline" in lines[2] and len(lines) == 5


def test_a_model_that_is_not_seeded_is_no_pair():
    def unseeded(seed):
        return nn.Linear(4, 1)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="expected pairs"):
        compare(lambda seed: _drawn(unseeded), own_batches, nn.functional.mse_loss, ["fp32", "bf16_master"],
                held_out=next(iter(own_batches(9))), seeds=[0, 1], steps=2)  # fmt: skip


DRAWS = iter(range(10**6))


def _drawn(make):
    """A model of other weights at every call, whatever the seed."""
    torch.manual_seed(next(DRAWS))
    return make(0)


@pytest.mark.parametrize("changes", [{"regimes": ["fp32"]}, {"seeds": [0]}])
def test_a_comparison_needs_two_regimes_and_two_seeds(changes):
    arguments = {"regimes": ["fp32", "tf32"], "held_out": next(iter(own_batches(9)))} | changes
    with pytest.raises(ValueError, match="at least two regimes and two seeds"):
        compare(own_model, own_batches, nn.functional.mse_loss, **arguments)


# -- a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpu_trains_every_regime_and_keeps_its_own_record(tmp_path):
    from mixprec_lab.regimes.__main__ import main

    path = tmp_path / "gpu.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["--quick", "--device", "cuda", "--folder", str(tmp_path / "f"), "--output", str(path)]) == 0
    record = regimes.load_record(path)
    assert record["device_type"] == "cuda" and "threads" in record["provenance"]
    backends = {r["regime"]: r["backend"] for r in record["runs"]}
    if torch.cuda.get_device_capability() >= (8, 9):
        assert backends["tf32"] == "native" and backends["fp8_current"] in ("scaled_mm", "transformer_engine")
    ends = {r["regime"]: r["held_out"][-1] for r in record["runs"] if r["task"] == "images" and r["seed"] == 0}
    assert ends["fp16_unscaled"] > 4 * ends["fp16_dynamic"]


def test_a_task_is_moved_as_a_whole():
    """The CPU's part of the test above: every tensor of a task is on the device it was made for."""
    task = get_task("text", True, "meta")
    inputs, targets = next(iter(task.batches(0)))
    tensors = [*task.model(0).parameters(), *task.held_out, inputs, targets]
    assert {t.device.type for t in tensors} == {"meta"} and isinstance(task, Task)
