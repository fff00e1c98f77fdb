"""Checkpoints: resumed runs against runs that were never interrupted, bit for bit; broken files; full disks."""

import errno
import itertools
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stability_runs import RUNS, Run, batches, grad_scaler, network, one
from torch import nn, optim

from mixprec_lab.nan_debugging.checkpoint import capture, first_difference, parts_of
from mixprec_lab.nan_debugging.checkpoint_store import digest, read
from mixprec_lab.nan_debugging.fixer import NumericalStabilityFixer
from mixprec_lab.nan_debugging.rollback import Rollback

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def own_generators():
    """The tests seed the global generators, and leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@pytest.mark.parametrize("where", ["memory", "in place", "disk"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_rolled_back_past_bad_batches_is_bitwise_the_run_that_never_saw_them(name, where, tmp_path):
    data = batches(14)
    straight = RUNS[name]()
    for i in (0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13):
        straight.step(data[i])

    run = RUNS[name]()
    fixer = run.fixer(**{"memory": {}, "in place": {"device": None}, "disk": {"directory": tmp_path}}[where])
    for i in range(8):
        if i in (0, 3, 5, 7):
            fixer.create_checkpoint(i)
        run.step((data[i][0] * 1e6, data[i][1]) if i in (5, 6, 7) else data[i])
    plan = fixer.rollback_and_skip(range(5, 8))
    assert (plan, fixer.checkpoints) == (Rollback(5, frozenset({5, 6, 7})), (3, 5))
    run.losses, run.scales = run.losses[:5], run.scales[:5]
    for _, batch in plan.remaining(data):
        run.step(batch)

    assert [i for i, _ in plan.remaining(data)] == [8, 9, 10, 11, 12, 13]
    assert (run.losses, run.scales) == (straight.losses, straight.scales)
    assert run.bits() == straight.bits()


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_does_not_follow_training_and_can_be_restored_again_and_again(name):
    data, run = batches(6), RUNS[name]()
    fixer = run.fixer()
    for batch in data[:3]:
        run.step(batch)
    saved = run.bits()
    fixer.create_checkpoint(3)
    for _ in range(2):
        for batch in data[3:]:
            run.step(batch)
        assert run.bits() != saved
        assert fixer.restore_checkpoint() == 3
        assert run.bits() == saved


@pytest.mark.parametrize("name", RUNS)
def test_a_new_run_goes_on_from_the_files_of_another(name, tmp_path):
    data, run = batches(8), RUNS[name]()
    fixer = run.fixer(directory=tmp_path)
    for batch in data[:4]:
        run.step(batch)
    fixer.create_checkpoint(4, extra={"place": [4, "epoch 0"], "generator": torch.arange(3)})
    for batch in data[4:]:
        run.step(batch)
    expected = run.bits()
    other = RUNS[name]()
    resumed = other.fixer(directory=tmp_path)
    assert (resumed.checkpoints, resumed.restore_checkpoint()) == ((4,), 4)
    assert resumed.extra["place"] == [4, "epoch 0"] and resumed.extra["generator"].tolist() == [0, 1, 2]
    for batch in data[4:]:
        other.step(batch)
    assert other.bits() == expected


# -- what a checkpoint is made of --------------------------------------------------------------------------------------


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def test_no_tensor_of_a_checkpoint_has_a_graph_or_shares_memory_with_training():
    run = RUNS["several"]()
    run.step(batches(1)[0])
    state = capture(parts_of(run.model, run.optimizers, run.scaler, run.schedulers), 1)
    live = {t.data_ptr() for t in tensors([run.model.state_dict(), *(o.state_dict() for o in run.optimizers)])}
    kept = list(tensors(state))
    assert len(kept) > 20
    assert not any(t.requires_grad or t.grad_fn or t.data_ptr() in live for t in kept)


def test_buffers_come_back_the_persistent_and_the_others():
    model = nn.BatchNorm1d(2)
    model.register_buffer("cache", torch.tensor([1.0, -INF]), persistent=False)
    fixer = NumericalStabilityFixer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fixer.create_checkpoint()
    model(torch.randn(4, 2) + 9)
    model.cache += 5
    fixer.restore_checkpoint()
    assert model.running_mean.tolist() == [0, 0] and model.num_batches_tracked == 0
    assert model.cache.tolist() == [1.0, -INF]  # an infinity that was there from the start is no fault


def test_gradients_are_cleared_and_a_scaler_can_unscale_again_after_a_restore_within_a_step():
    for name in ("adamw, scaler", "own scaler", "masters"):
        run, data = RUNS[name](), batches(2)
        fixer = run.fixer()
        run.step(data[0])
        fixer.create_checkpoint(1)
        saved = run.bits()
        loss = run.loss(data[1])
        if name == "adamw, scaler":
            run.scaler.scale(loss).backward()
            run.scaler.unscale_(run.optimizers[0])
        elif name == "own scaler":
            run.scaler.scale_loss(loss).backward()
            run.scaler.unscale_gradients(run.optimizers[0])
            with pytest.raises(RuntimeError, match="save after update_scale"):
                fixer.create_checkpoint(2)
        else:
            loss.backward()
            run.optimizers[0].copy_grads_to_master()
        fixer.restore_checkpoint()
        assert run.bits() == saved
        held = [p for o in run.optimizers for group in o.param_groups for p in group["params"]]
        assert all(p.grad is None for p in (*run.model.parameters(), *held))
        run.step(data[1])  # raises if the scaler still thinks that gradients are unscaled


def test_gradients_of_parameters_without_an_optimizer_are_cleared_too():
    model = network()
    fixer = NumericalStabilityFixer(model, optim.SGD(model[4].parameters(), lr=0.1))
    fixer.create_checkpoint()
    model(torch.ones(2, 6)).sum().backward()
    fixer.restore_checkpoint()
    assert all(p.grad is None for p in model.parameters())


def test_a_module_that_asks_for_the_version_of_its_state_is_told():
    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            assert local_metadata["version"] == 7
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    model = Versioned(2, 2)
    fixer = NumericalStabilityFixer(model, optim.SGD(model.parameters(), lr=0.1))
    fixer.create_checkpoint()
    assert fixer.restore_checkpoint() == 0


def test_the_last_ones_are_kept_and_the_same_step_is_replaced(tmp_path):
    for settings in ({}, {"directory": tmp_path}):
        run = RUNS["momentum"]()
        fixer = run.fixer(keep=2, **settings)
        for step in (None, None, 1, None):
            fixer.create_checkpoint(step)
        assert fixer.checkpoints == (1, 2)
        fixer.restore_checkpoint(1)
        assert fixer.checkpoints == (2, 1)  # the one to go back to is the one restored last
        fixer.create_checkpoint(7)
        assert fixer.checkpoints == (1, 7)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-00000001.pt", "checkpoint-00000007.pt"]


def test_a_broken_state_is_no_checkpoint():
    run = RUNS["adamw, scaler"]()
    run.step(batches(1)[0])
    fixer = run.fixer()
    fixer.create_checkpoint(1)
    weight, bias = run.model[0].weight, run.model[0].bias
    for tensor, what in (
        (weight.data, "parameter 0.weight"), (run.model[1].running_var, "buffer 1.running_var"),
        (run.optimizers[0].state[bias]["exp_avg"], "exp_avg of 0.bias"),
    ):  # fmt: skip
        for value in (NAN, INF, -INF):
            kept = tensor.flatten()[0].item()
            tensor.view(-1)[0] = value
            with pytest.raises(ValueError, match=f"expected a finite state, got NaN or inf in {what}: restore"):
                fixer.create_checkpoint(2)
            tensor.view(-1)[0] = kept
    assert fixer.checkpoints == (1,)


@pytest.mark.parametrize(
    "extra",
    [lambda: 0, {1, 2}, SimpleNamespace(a=1), [object()], torch.eye(2).to_sparse()],
    ids=["function", "set", "namespace", "object", "sparse"],
)
def test_what_could_not_be_read_safely_is_refused_when_it_is_saved(extra, tmp_path):
    fixer = RUNS["momentum"]().fixer(directory=tmp_path)
    with pytest.raises(TypeError, match="expected extra.* to be made of dense tensors"):
        fixer.create_checkpoint(0, extra=extra)
    assert os.listdir(tmp_path) == []


# -- files that are broken, and disks ----------------------------------------------------------------------------------


def on_disk(tmp_path, name="adamw, scaler"):
    run = RUNS[name]()
    fixer = run.fixer(directory=tmp_path)
    for step, batch in enumerate(batches(2), 1):
        run.step(batch)
        fixer.create_checkpoint(step)
    return run, fixer, tmp_path / "checkpoint-00000002.pt"


def test_a_file_is_read_by_torch_itself_without_running_code(tmp_path):
    run, _, path = on_disk(tmp_path)
    content = torch.load(path, weights_only=True)
    assert (content["format"], content["state"]["version"]) == ("mixprec_lab checkpoint", 1)
    assert torch.equal(content["state"]["model"]["0.weight"], run.model[0].weight)
    assert content["sha256"] == digest(content["state"])


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    run, fixer, path = on_disk(tmp_path)
    whole, before = path.read_bytes(), run.bits()
    for length in (0, 1, 3, 4, 30, 1000, len(whole) // 2, len(whole) - 300, len(whole) - 22, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"expected a whole checkpoint in .*{path.name}, got {length} bytes"):
            fixer.restore_checkpoint(2)
        assert run.bits() == before
    assert fixer.restore_checkpoint(1) == 1  # the one before still works


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path):
    run, _, path = on_disk(tmp_path)
    whole, expected = bytearray(path.read_bytes()), read(path)
    g, refused = torch.Generator().manual_seed(0), 0
    places = torch.randint(len(whole), (150,), generator=g).tolist()
    weight = bytes(run.model[0].weight.detach().numpy().tobytes())
    places.append(whole.index(weight) + 3)  # a sign of the first weight: nothing but the checksum can find it
    for place in places:
        whole[place] ^= 1 << (place % 8)
        path.write_bytes(whole)
        try:
            assert first_difference(expected, read(path)) == ""  # a byte of padding, or a date
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            last = str(error)
        whole[place] ^= 1 << (place % 8)
    assert refused > 50
    assert "expected content with the checksum" in last or "torch cannot read" in last


@pytest.mark.parametrize(
    "write, match",
    [
        (lambda p: torch.save({"model": {}}, p), "expected a mixprec_lab checkpoint"),
        (lambda p: torch.save(torch.eye(2), p), "expected a mixprec_lab checkpoint"),
        (lambda p: torch.save(SimpleNamespace(), p), "torch cannot read"),
        (lambda p: p.write_text("not a checkpoint"), "torch cannot read"),
    ],
)
def test_a_file_of_another_kind_is_refused(write, match, tmp_path):
    run, fixer, path = on_disk(tmp_path)
    before = run.bits()
    write(path)
    with pytest.raises(ValueError, match=match):
        fixer.restore_checkpoint()
    assert run.bits() == before


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    run, fixer, path = on_disk(tmp_path)
    state = {**read(path), "version": 2}
    torch.save({"format": "mixprec_lab checkpoint", "sha256": digest(state), "state": state}, path)
    before = run.bits()
    with pytest.raises(ValueError, match="expected a checkpoint of version 1, got version 2"):
        fixer.restore_checkpoint()
    assert run.bits() == before


def test_parameter_groups_with_other_settings_are_refused(tmp_path):
    run, fixer, path = on_disk(tmp_path)
    state = read(path)
    del state["optimizers"][0]["param_groups"][0]["maximize"]
    torch.save({"format": "mixprec_lab checkpoint", "sha256": digest(state), "state": state}, path)
    before = run.bits()
    with pytest.raises(ValueError, match="expected parameter groups with .*'maximize'.*: was the checkpoint made by"):
        fixer.restore_checkpoint()
    assert run.bits() == before


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file that takes ten bytes."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(bytes(data[:10]))
        full()


@pytest.mark.parametrize("when", ["write", "fsync", "replace", "interrupt"])
def test_a_full_disk_leaves_the_old_file_whole_and_no_other(when, tmp_path, monkeypatch):
    run, fixer, path = on_disk(tmp_path)
    old, run_before = path.read_bytes(), run.bits()
    names = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patch:
        if when == "write":
            patch.setattr("builtins.open", lambda *a, _open=open, **k: FullFile(_open(*a, **k)))
        elif when == "interrupt":
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(os, when, full)
        for step in (2, 3):  # over an old file, and a new one
            with pytest.raises(KeyboardInterrupt if when == "interrupt" else OSError):
                fixer.create_checkpoint(step)
    assert (sorted(os.listdir(tmp_path)), path.read_bytes(), fixer.checkpoints) == (names, old, (1, 2))
    assert fixer.restore_checkpoint() == 2
    assert run.bits() == run_before


# -- checkpoints that do not fit ---------------------------------------------------------------------------------------


def wider(run):
    run.model[4] = nn.Linear(8, 4)
    run.optimizers = one(lambda p: optim.AdamW(p, lr=0.01, amsgrad=True))(run.model)


def deeper(run):
    run.model.append(nn.Linear(3, 3))


def half(run):
    run.model[1].running_mean = run.model[1].running_mean.half()


def frozen_differently(run):
    run.optimizers = one(lambda _: optim.AdamW(run.model[0].parameters(), lr=0.01, amsgrad=True))(run.model)


def other_order(run):
    run.optimizers = one(lambda p: optim.AdamW(list(p)[::-1], lr=0.01, amsgrad=True))(run.model)


def other_optimizer(run):
    run.optimizers = one(lambda p: optim.Adam(p, lr=0.01, amsgrad=True))(run.model)


def no_scaler(run):
    run.scaler = None


def scaler_off(run):
    run.scaler = grad_scaler(enabled=False)


def no_scheduler(run):
    run.schedulers = []


@pytest.mark.parametrize(
    "change, match",
    [
        (wider, r"expected '4.weight' to be \(torch.float32, \(4, 8\)\) as in this model, got .*\(3, 8\)"),
        (deeper, r"expected a checkpoint of this model, got one without \['5.bias', '5.weight'\]"),
        (half, r"expected '1.running_mean' to be \(torch.float16, \(8,\)\)"),
        (frozen_differently, "with the groups .*'0.weight', '0.bias'.*, got"),
        (other_order, "with the groups .*'4.bias', '4.weight'"),
        (other_optimizer, "with the kinds .*'Adam'.*, got .*'AdamW'"),
        (no_scaler, "with the kinds .*'scaler': \\[\\].*, got .*'scaler': \\['GradScaler'\\]"),
        (scaler_off, r"expected a scaler state with \[\], got \['_growth_tracker'"),
        (no_scheduler, "with the kinds .*'schedulers': \\[\\].*, got .*'CosineAnnealingLR'"),
    ],
)
def test_a_checkpoint_of_other_objects_changes_nothing(change, match, tmp_path):
    on_disk(tmp_path)
    run = RUNS["adamw, scaler"]()
    change(run)
    before, fixer = run.bits(), run.fixer(directory=tmp_path)
    with pytest.raises(ValueError, match=match):
        fixer.restore_checkpoint()
    assert run.bits() == before


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["scheduler", "scaler", "optimizer"])
def test_a_part_that_fails_while_it_loads_undoes_the_restore(part, error, monkeypatch):
    run, data = RUNS["adamw, scaler"](), batches(3)
    fixer = run.fixer()
    for i, batch in enumerate(data):
        fixer.create_checkpoint(i) if i == 1 else None
        run.step(batch)
    before = run.bits()
    target = {"scheduler": run.schedulers[0], "scaler": run.scaler, "optimizer": run.optimizers[0]}[part]
    load, calls = type(target).load_state_dict, itertools.count()

    def fails_once(self, state):
        if next(calls) == 0:
            raise error
        load(self, state)

    monkeypatch.setattr(type(target), "load_state_dict", fails_once)
    with pytest.raises(type(error)):
        fixer.restore_checkpoint()
    assert run.bits() == before


def test_a_part_that_does_not_take_its_state_exactly_is_found():
    class Forgetful(optim.SGD):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            for entry in self.state.values():
                entry["momentum_buffer"] = entry["momentum_buffer"] * 0

    run = Run(one(lambda p: Forgetful(p, lr=0.1, momentum=0.9)))
    run.step(batches(1)[0])
    fixer = run.fixer()
    fixer.create_checkpoint()
    before = run.model.state_dict()["0.weight"].clone()
    with pytest.raises(RuntimeError, match=r"got another optimizers\[0\].state.0.momentum_buffer"):
        fixer.restore_checkpoint()
    assert torch.equal(run.model[0].weight, before)


def test_there_must_be_a_checkpoint():
    fixer = RUNS["momentum"]().fixer()
    with pytest.raises(RuntimeError, match="expected a checkpoint to go back to, got none"):
        fixer.restore_checkpoint()
    fixer.create_checkpoint(5)
    with pytest.raises(RuntimeError, match=r"expected one of the checkpoints \[5\], got step 4"):
        fixer.restore_checkpoint(4)
