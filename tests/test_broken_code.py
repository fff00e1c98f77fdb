"""The museum: every broken function fails its check, every cure passes it, and every symptom is gone with the cure."""

import ast
import contextlib
import io
import re
from functools import cache

import nbformat
import pytest
import torch
import yaml
from conftest import ROOT
from torch import nn

from mixprec_lab.checks import broken_code
from mixprec_lab.checks.broken_code import LEVELS, ROOMS, THEMES, Room
from mixprec_lab.checks.broken_code.stand_ins import HostReads, timer, transformer_engine, without_gpu
from mixprec_lab.speed import SimulatedGPU

EACH = pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
ERROR = re.compile(r""", got ['"]\w+Error: """)


@cache
def cells() -> list:
    return nbformat.read(ROOT / "book" / "broken_code.ipynb", as_version=4).cells


@cache
def setup() -> str:
    return "\n".join(c.source for c in cells() if "setup" in c.metadata.get("tags", []))


@cache
def places() -> dict[str, int]:
    """The position of every room's exercise cell on the page, by the name of its check, in the order of the page."""
    found = {}
    for at, cell in enumerate(cells()):
        if "exercise" in cell.metadata.get("tags", []):
            module, _, name = ast.unparse(ast.parse(cell.source).body[-1].value.func).partition(".")
            assert module == "broken_code", cell.source
            found[name] = at
    return found


def code_of(room: Room) -> tuple:
    """The three code cells of a room: broken, symptom, solution."""
    three = [c for c in cells()[places()[room.name] :] if c.cell_type == "code"][:3]
    assert [c.metadata.tags for c in three] == [["exercise"], ["symptom"], ["solution"]]
    return tuple(three)


def run(*sources: str) -> str:
    """What the sources print after the page's setup."""
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for source in (setup(), *sources):
            exec(source, names)
    return printed.getvalue()


def verdict(room: Room, function) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        getattr(broken_code, room.name)(function)
    return printed.getvalue()


def named(name: str) -> Room:
    return next(room for room in ROOMS if room.name == name)


def test_every_defect_of_the_list_has_a_room():
    assert {defect for room in ROOMS for defect in room.defects} == set(range(1, 65))
    assert all(room.defects for room in ROOMS)


def test_rooms_and_checks_are_one_to_one_and_ordered():
    names = [room.name for room in ROOMS]
    assert sorted(names) == sorted(set(broken_code.__all__) - {"LEVELS", "ROOMS", "THEMES", "Room"})
    assert len({room.title for room in ROOMS}) == len({room.anchor for room in ROOMS}) == len(names)
    keys = [(list(THEMES).index(room.theme), room.difficulty) for room in ROOMS]
    assert keys == sorted(keys)
    chapters = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    assert {f"book/{room.chapter}" for room in ROOMS} <= {c["file"] for part in chapters for c in part["chapters"]}


def test_the_page_shows_the_catalogue():
    assert list(places()) == [room.name for room in ROOMS]
    assert len(ROOMS) >= 45


@EACH
def test_the_heading_of_a_room_is_its_entry_in_the_catalogue(room):
    above = cells()[places()[room.name] - 1].source
    heading = f"({room.anchor})=\n### {room.title}\n\n{LEVELS[room.difficulty]}.\nTaught in {{doc}}`{room.chapter}`.\n"
    assert heading in above + "\n"
    assert above.count("exercise-start") == 1


@EACH
def test_broken_code_fails_and_its_cure_passes(room):
    broken, _, solution = code_of(room)
    failed = run(broken.source)
    assert failed.startswith("Not yet: expected ") and failed.count("\n") == 1
    assert bool(ERROR.search(failed)) == room.crashes
    assert run(solution.source) == "Correct.\n"


@EACH
def test_the_symptom_is_as_printed_and_gone_with_the_cure(room):
    broken, symptom, solution = code_of(room)
    shown = "".join(output.text for output in symptom.outputs)
    assert run(broken.source, symptom.source).removeprefix(run(broken.source)) == shown
    assert len(symptom.source.splitlines()) <= 10
    try:
        cured = run(solution.source, symptom.source).removeprefix("Correct.\n")
    except (TypeError, ValueError) as error:  # two cures refuse what the broken code let through
        assert room.name in ("bare_except", "missing_case"), error
        return
    assert cured != shown


@EACH
def test_a_stub_is_not_done_and_a_crash_or_nonsense_is_shown(room):
    def unfinished(*_):
        raise NotImplementedError

    for stub in (lambda *_: None, lambda *_: ..., unfinished):
        assert verdict(room, stub) == "Not done yet.\n"
    assert "ZeroDivisionError" in verdict(room, lambda *_: 1 / 0)
    for nonsense in ("nonsense", 10**6, [], object):
        assert verdict(room, lambda *_, it=nonsense: it).startswith("Not yet: expected ")


def half_clip(scaler, optimizer, weight, loss):
    scaler.scale(loss).backward()
    norm = nn.utils.clip_grad_norm_([weight], scaler.get_scale())  # clips at the right place, does not report it
    scaler.step(optimizer)
    scaler.update()
    return norm


def shallow(optimizer):
    return dict(optimizer.state_dict())


def skips_only_nan(optimizer, parameters):
    finite = not any(bool(p.grad.isnan().any()) for p in parameters)
    if finite:
        optimizer.step()
    return finite


def drops_the_bad_gradient(optimizer, parameters):
    bad = [p for p in parameters if not p.grad.isfinite().all()]
    for p in bad:
        p.grad = None
    optimizer.step()
    return not bad


def warms_up_without_waiting(gpu, kernel):
    kernel()
    start = gpu.perf_counter_ns()
    for _ in range(1000):
        kernel()
    gpu.synchronize()
    return (gpu.perf_counter_ns() - start) / 1000


def set_before_use(scaler, scale):
    scaler.scale(torch.ones(()))
    scaler.update(scale / 2)
    return scaler


def excuses_texts(x):
    try:
        return "overflow" if torch.tensor(x, dtype=torch.float16).isinf() else "fine"
    except TypeError:
        return "not a number"


def rounds_at_the_end(addend, steps, dtype):
    return torch.tensor(steps * addend).to(dtype).item()


def forgets_to_subtract(weight, update, steps, dtype):
    total = torch.tensor(weight, dtype=dtype)
    for _ in range(steps):
        total += update
    return 1 - total.item() / (steps * update)


def records_the_start_too(scaler, overflows):
    scales = [scaler.scale]
    for overflow in overflows:
        scaler.update_scale(overflow)
        scales.append(scaler.scale)
    return scales


def clips_what_is_small_too(parameters, max_norm):
    parameters = list(parameters)
    norm = sum(p.grad.square().sum() for p in parameters).sqrt()
    for p in parameters:
        p.grad *= max_norm / norm
    return norm


def steps_copies_of_the_masters(model, lr):
    masters = [p.detach().float() for p in model.parameters()]
    return masters, torch.optim.SGD([master.clone() for master in masters], lr=lr)


def trained_in_fp16(weight, lr, steps):
    p = nn.Parameter(torch.tensor(weight, dtype=torch.float16))
    optimizer = torch.optim.SGD([p], lr=lr)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.item()


def two_floors(model):
    return [
        f"{name}.{inner}" if inner else name
        for name, child in model.named_children()
        for inner, module in [("", child), *child.named_children()]
        if isinstance(module, nn.Linear)
    ]


def tools_without_a_scale(device):
    return torch.autocast(device, dtype=torch.float16), torch.amp.GradScaler(device, enabled=False)


def forgets_the_momentum(model, optimizer, good):
    model.load_state_dict(good["model"])
    optimizer.state.clear()
    return model


def checkpoint_without(key):
    def checkpoint(model, optimizer, scaler, scheduler):
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "scheduler": scheduler}
        saved = {name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}
        other = torch.Generator().manual_seed(5).get_state()
        empty = {"rng": other, "scaler": torch.amp.GradScaler("cpu").state_dict()}
        return {**saved, key: empty[key]} if key in empty else {k: v for k, v in saved.items() if k != key}

    return checkpoint


#: Repairs that look right and are not.
HALF_CURES = {
    "any_shape": [lambda module: module.in_features % 16 == 0, lambda module: module.in_features % 8 == 0],
    "backward_dtype": [lambda x, w, dtype: dtype, lambda x, w, dtype: (x.to(dtype) @ w.to(dtype)).dtype],
    "bare_except": [excuses_texts],
    "blamed_sum": [lambda addend, steps, dtype: 0.0],
    "by_name": [lambda model: [n for n in model if n in ("wte", "embedding")]],
    "clipped_copies": [lambda parameters, norm: nn.utils.clip_grad_norm_(parameters, 0.5)],
    "direct_children": [two_floors],
    "forgotten_cast": [lambda x, name: x.bfloat16().float(), lambda x, name: x.half().bfloat16().float()],
    "forgotten_issue": [lambda report: [name for name in ("loss_nan", "grad_nan", "param_nan") if report[name]]],
    "forward_only": [
        lambda time, arms: sum(time(arms["bf16"][i]) / time(arms["fp8"][i]) for i in (0, 1)) / 2,
        lambda time, arms: time(arms["bf16"][1]) / time(arms["fp8"][1]),
    ],
    "half_a_checkpoint": [checkpoint_without(key) for key in ("model", "optimizer", "scaler", "scheduler", "rng")],
    "half_everything": [trained_in_fp16],
    "half_parameters": [lambda size: nn.Linear(size, 1, dtype=torch.bfloat16), lambda size: nn.Linear(size, 1).half()],
    "half_quotient": [
        lambda gradients, scale: [(g / scale).float() for g in gradients],
        lambda gradients, scale: [g.float() for g in gradients],
    ],
    "ignored_argument": [lambda recipes, steps: recipes.DelayedScaling(amax_history_len=16)],
    "late_record": [records_the_start_too],
    "missing_import": [lambda logits, targets: nn.functional.cross_entropy(logits, targets)],
    "narrow_sample": [
        lambda dtype: torch.exp2(torch.arange(-40.0, 41.0)).to(dtype).isfinite().double().mean(),
        lambda dtype: (torch.exp2(torch.arange(-40.0, 41.0)).to(dtype) != 0).double().mean(),
    ],
    "no_buffers": [lambda model: dict(model.state_dict()), lambda model: dict(model.named_buffers())],
    "old_name": [lambda device: torch.autocast("cuda", dtype=torch.bfloat16, enabled=False)],
    "one_format": [lambda history: broken_code.eight_bits.DelayedScaling(0, history, fp8_format="e5m2")],
    "poisoned_state": [forgets_the_momentum, lambda model, optimizer, good: model.requires_grad_()],
    "promoted_sum": [rounds_at_the_end],
    "raised_scale": [lambda scale: scale, lambda scale: min(scale, 64.0), lambda scale: max(scale, 2048.0)],
    "scaled_threshold": [lambda norm, scale: "fine", lambda norm, scale: "explodes" if norm / 2**16 > 100 else "fine"],
    "silent_cpu": [tools_without_a_scale],
    "spent_generator": [clips_what_is_small_too],
    "swallowed_error": [lambda layer, x: layer.bfloat16()(x.bfloat16()), lambda layer, x: layer(x)],
    "tensor_format": [lambda x: f"largest error {(x - x.half()).max().item():.2e}"],
    "three_reads": [lambda tensors: {k: torch.stack([g.norm(), g.abs().max()]).tolist() for k, g in tensors.items()}],
    "two_dtypes": [lambda embedding, linear, ids: linear.float()(embedding(ids))],
    "uncalled_report": [lambda g: [f"{g.numel()} gradients", f"flushed {(g.abs() < 2**-14).double().mean():.0%}"]],
    "walk_around_zero": [forgets_to_subtract],
    "wrong_parameters": [steps_copies_of_the_masters],
    "clipped_too_early": [half_clip],
    "cold_start": [lambda gpu, kernel: (kernel(), gpu.perf_counter_ns())[1]],
    "early_optimizer": [lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr)],
    "habit": [lambda peaks: max(peaks, key=peaks.get), lambda peaks: "bf16" if "bf16" in peaks else "fp16"],
    "live_copy": [
        lambda model: {name: p.detach() for name, p in model.named_parameters()},
        lambda model: {name: p.data for name, p in model.named_parameters()},
    ],
    "lost_share": [lambda x, dtype: (x.to(dtype) == 0).double().mean()],
    "mean_of_norms": [lambda tensors: sum(t.norm() for t in tensors)],
    "missing_case": [lambda gpu: "fp16" if gpu == "V100" else "bf16"],
    "moving_checkpoint": [shallow, lambda optimizer: {**optimizer.state_dict()}],
    "no_ceiling": [lambda scale: (scale * 2).clamp(max=torch.finfo(torch.float32).max), lambda scale: scale],
    "no_floor": [lambda scale, n: max(scale / 2**n, 0.5), lambda scale, n: 1.0],
    "one_read_a_step": [lambda losses: sum(map(float, losses)) / len(losses), lambda losses: losses[-1]],
    "overflowing_loss": [lambda a, b, scale: ((a + b) * scale).float(), lambda a, b, scale: (a + b).float() * scale],
    "private_scale": [set_before_use],
    "punished_rate": [lambda lr, events: lr, lambda lr, events: lr / 2 if "bad loss" in events else lr],
    "range_verdict": [
        lambda x, dtype: "underflow" if abs(x) < torch.finfo(dtype).tiny else "fine",
        lambda x, dtype: {0.0: "underflow", torch.inf: "overflow"}.get(abs(float(torch.tensor(x).to(dtype))), "fine"),
    ],
    "raw_half_gradient": [
        lambda g, scale: (True, g.float() / scale),
        lambda g, scale: (bool(g.isfinite()), g / scale),
        lambda g, scale: (not bool(g.isnan()), g.float() / scale),
    ],
    "read_per_tensor": [
        lambda gradients: any(not g.isfinite().all().item() for g in gradients),
        lambda gradients: not torch.stack([g.sum() for g in gradients]).isnan().any().logical_not().item(),
    ],
    "rounded_ids": [lambda batch: {k: x.bfloat16().to(x.dtype) for k, x in batch.items()}],
    "running_queue": [warms_up_without_waiting],
    "smallest_value": [lambda dtype: torch.finfo(dtype).eps, lambda dtype: 2.0**-24],
    "stable_nan": [lambda loss: "not finite" if loss != loss else "unusually high" if loss > 100 else "fine"],
    "unequal_arms": [lambda time, cast, bf16, fp8: time(cast, bf16) / time(cast, fp8)],
    "zeroed_step": [skips_only_nan, drops_the_bad_gradient],
}


@pytest.mark.parametrize(
    ("name", "cure"),
    [pytest.param(name, cure, id=f"{name}-{i}") for name, cures in HALF_CURES.items() for i, cure in enumerate(cures)],
)
def test_half_a_cure_is_refused(name, cure):
    assert verdict(named(name), cure).startswith("Not yet: expected ")


READS = {
    "item": lambda t: t.sum().item(),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(force=True),
    "cpu": lambda t: t.cpu(),
    "bool": lambda t: bool(t.sum() > 0),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum()),
    "any": lambda t: any(x < 0 for x in t[:1]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_way_to_read_a_tensor_counts_once(read):
    with HostReads() as reads:
        read(torch.ones(3))
    assert reads.count == 1


def test_computing_is_no_read():
    with HostReads() as reads:
        torch.stack([torch.ones(2).norm(), torch.zeros(2).sum()]).mul_(2).isfinite().all()
    assert reads.count == 0


@pytest.mark.gpu
@pytest.mark.parametrize("read", [read for name, read in READS.items() if name != "numpy"])
def test_what_counts_as_a_read_makes_the_host_wait_for_a_gpu(read):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            read(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_stand_in_keeps_the_contracts_it_stands_for():
    recipe = transformer_engine.common.recipe.DelayedScaling(interval=16)
    assert recipe.amax_history_len == 1024 and not hasattr(recipe, "interval")
    with pytest.raises(AttributeError, match="'transformer_engine.pytorch' has no attribute 'recipe'"):
        _ = transformer_engine.pytorch.recipe
    with pytest.warns(DeprecationWarning, match="autocast"), transformer_engine.pytorch.fp8_autocast() as active:
        assert active.amax_history_len == 1024
    with transformer_engine.pytorch.autocast(enabled=False, recipe=recipe) as active:
        assert active is None
    layer = transformer_engine.pytorch.Linear(2, 2)
    with pytest.raises(TypeError, match="Found input dtype: torch.float16"):
        layer(torch.ones(1, 2).half())


@pytest.mark.parametrize("durations", [(800_000,), (700_000, 300_000)])
def test_the_timer_measures_what_a_round_takes(durations):
    gpu = SimulatedGPU()
    kernels = [gpu.kernel(str(d), d) for d in durations]
    assert timer(gpu)(*kernels) == pytest.approx(sum(durations), rel=0.01)


def test_without_a_gpu_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with without_gpu():
        assert not torch.cuda.is_available()
    assert torch.cuda.is_available()


def test_a_timer_without_repeats_or_kernels_is_refused():
    with pytest.raises(ValueError, match="expected at least 1 repeat, got 0"):
        timer(SimulatedGPU(), 0)
    with pytest.raises(ValueError, match="expected at least 1 kernel, got none"):
        timer(SimulatedGPU())()
