"""The regimes under bad input: damaged files, foreign runs, levels and tails beyond what arithmetic gives."""

import copy
import json
import math
import os

import pytest
import torch
from regime_record import small_record
from scipy import stats
from torch import nn

from mixprec_lab.regimes import __main__ as command
from mixprec_lab.regimes import compare, load_record, run_all, validate_record
from mixprec_lab.regimes.statistics import power, t_quantile
from mixprec_lab.regimes.tasks import Task
from mixprec_lab.regimes.training import fingerprint
from mixprec_lab.speed import BrokenRecord


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 2)


def batches(seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)) for _ in range(2)]


def task(**changed) -> Task:
    own = {"name": "own", "title": "own", "model": model, "batches": batches, "loss": nn.functional.mse_loss,
           "held_out": batches(99)[0], "steps": 2, "evaluations": 1}  # fmt: skip
    return Task(**(own | changed))


def stored(folder, own: Task | None = None) -> list:
    return run_all([own or task()], ["fp32"], [0], folder=folder, progress=False)


# -- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "alpha", "shift"),
    [(10**6, 0.05, 2.0), *((n, a, s) for n, a in ((2, 1e-3), (2, 1e-5), (3, 1e-4), (20, 1e-8)) for s in (0.3, 2, 5))],
)
def test_power_holds_for_few_seeds_at_strict_levels_and_for_a_million(seeds, alpha, shift):
    critical = stats.t.ppf(1 - alpha / 2, seeds - 1)
    expected = stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift)
    assert power(shift / math.sqrt(seeds), 1.0, seeds, alpha) == pytest.approx(expected, rel=2e-4, abs=1e-12)


@pytest.mark.parametrize("df", [1, 2, 5, 30])
def test_quantiles_are_right_in_the_tail_and_refused_beyond_it(df):
    for p in (1e-9, 1e-6, 1 - 1e-9):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-6)
    for p in (1e-12, 1e-300, 1 - 1e-16, math.nan):
        with pytest.raises(ValueError, match=f"expected a probability from 1e-09 to 1 - 1e-09, got {p!r}"):
            t_quantile(p, df)
    with pytest.raises(ValueError, match="expected alpha from 2e-09 to 1, got 1e-15"):
        power(1.0, 1.0, 3, 1e-15)


# -- runs that are stored --------------------------------------------------------------------------------------------


def broken(change):
    def made(text: str) -> bytes:
        content = json.loads(text)
        change(content)
        return json.dumps(content).encode()

    return made


DAMAGE = {
    "no text": lambda text: b"\xff\xfe\x00",
    "half": lambda text: text[: len(text) // 2].encode(),
    "no settings": broken(lambda c: c.update(settings=None)),
    "another seed": broken(lambda c: c["run"].update(seed=7)),
    "another regime": broken(lambda c: c["run"].update(regime="tf32")),
    "another task": broken(lambda c: c["run"].update(task="text")),
    "a loss as text": broken(lambda c: c["run"].update(held_out=["1.0", "2.0"])),
    "an infinite loss": broken(lambda c: c["run"].update(held_out=[1.0, math.inf])),
    "no losses": broken(lambda c: c["run"].update(held_out=[])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_run_is_named_and_left_as_it_is(tmp_path, damage):
    stored(tmp_path)
    path = tmp_path / "own-fp32-0.json"
    path.write_bytes(left := DAMAGE[damage](path.read_text("utf-8")))
    with pytest.raises(ValueError, match=r"expected a stored run in .*own-fp32-0.json, got .*: delete the file"):
        stored(tmp_path)
    assert path.read_bytes() == left and os.listdir(tmp_path) == [path.name]


def test_a_run_with_settings_that_this_version_has_not_is_refused_by_their_names(tmp_path):
    stored(tmp_path)
    path = tmp_path / "own-fp32-0.json"
    path.write_bytes(broken(lambda c: c["settings"].update(momentum=0.9))(path.read_text("utf-8")))
    with pytest.raises(ValueError, match="one with another momentum: delete it"):
        stored(tmp_path)


def test_a_run_of_another_model_or_other_batches_under_the_same_name_is_refused(tmp_path):
    first = stored(tmp_path)
    assert stored(tmp_path) == first
    for other in (task(model=lambda seed: model(seed + 1)), task(batches=lambda seed: batches(seed + 1))):
        with pytest.raises(ValueError, match="one with another model or batches: delete it"):
            stored(tmp_path, other)


def test_resuming_leaves_the_global_generator_as_it_was(tmp_path):
    stored(tmp_path)
    before = torch.get_rng_state()
    stored(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["../own", "a/b", "", "nul\0", "x" * 300])
def test_a_name_that_is_no_part_of_a_file_name_is_refused_before_anything_is_trained(tmp_path, name):
    folder = tmp_path / "runs"
    with pytest.raises(ValueError, match="expected names of up to 80 letters"):
        stored(folder, task(name=name, model=lambda seed: pytest.fail("trained")))
    assert os.listdir(tmp_path) == []


def test_batches_in_bf16_have_a_fingerprint():
    def narrow(seed):
        return [(x.bfloat16(), y) for x, y in batches(seed)]

    own = task(batches=narrow)
    assert fingerprint(own, 0) == fingerprint(own, 0) != fingerprint(own, 1)


@pytest.mark.parametrize("rate", [math.inf, math.nan, 0.0])
def test_a_learning_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="expected a positive learning rate"):
        task(learning_rate=rate)
    with pytest.raises(ValueError, match="expected a positive learning rate"):
        compare(model, batches, nn.functional.mse_loss, ["fp32", "tf32"], held_out=batches(9)[0], seeds=range(2),
                learning_rate=rate)  # fmt: skip


@pytest.mark.parametrize("seeds", ["0", "1", "-3"])
def test_the_command_refuses_too_few_seeds_before_it_trains(seeds, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        command.main(["--seeds", seeds, "--output", str(tmp_path / "record.json")])
    assert left.value.code == 2 and f"expected --seeds of at least 2, got {seeds}" in capsys.readouterr().err


def test_the_command_refuses_a_device_and_a_record_that_are_not_here(capsys, tmp_path):
    path = tmp_path / "record.json"
    for words, said in (
        (["--device", "nowhere"], "expected --device of this machine (cpu, cuda, cuda:1, ...), got 'nowhere'"),
        (["--speed"], f"expected a record in {path}, which --speed completes"),
    ):
        with pytest.raises(SystemExit) as left:
            command.main([*words, "--output", str(path)])
        assert left.value.code == 2 and said in capsys.readouterr().err


# -- records ---------------------------------------------------------------------------------------------------------

JUNK = (None, True, -1, 1.5, math.nan, math.inf, "", "x", [], {}, [None], {"a": 1}, [[]], 10**400)


def places(x, before: tuple = ()):
    """The way to every value, of a list to its first two."""
    yield before
    for key in x if isinstance(x, dict) else range(min(2, len(x))) if isinstance(x, list) else ():
        yield from places(x[key], (*before, key))


def test_whatever_stands_in_a_record_it_is_valid_or_broken_and_nothing_else():
    record, tried = copy.deepcopy(small_record()), 0
    for way in list(places(record))[1:]:
        *upper, last = way
        inner = record
        for key in upper:
            inner = inner[key]
        kept = inner[last]
        for junk in JUNK:
            inner[last] = junk
            try:
                validate_record(record)
            except BrokenRecord as error:
                assert "expected" in str(error)
            tried += 1
        if isinstance(inner, dict):
            del inner[last]
            try:
                validate_record(record)
            except BrokenRecord as error:
                assert "expected" in str(error)
        inner[last] = kept
    assert record == small_record() and tried > 1000


@pytest.mark.parametrize("key", ["title", "metric_title", "steps", "parameters"])
def test_a_task_of_a_record_is_described(key):
    record = copy.deepcopy(small_record())
    del record["tasks"]["text"][key]
    with pytest.raises(BrokenRecord, match=f"expected a task 'text' with {key}"):
        validate_record(record)


def test_a_record_that_is_no_text_is_named(tmp_path):
    (path := tmp_path / "regimes_x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BrokenRecord, match="regimes_x.json"):
        load_record(path)
