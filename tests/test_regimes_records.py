"""Intervals and numbers of seeds against scipy; records that are complete and possible, or refused."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixprec_lab import regimes
from mixprec_lab.regimes import get_task, load_record, paired_difference, power, run_all, save_record, seeds_needed
from mixprec_lab.regimes.__main__ import main
from mixprec_lab.regimes.records import make_record, provenance, runs_of, validate_record
from mixprec_lab.regimes.speed import measure_speed
from mixprec_lab.regimes.statistics import t_cdf, t_quantile
from mixprec_lab.speed import BrokenRecord, describe, load_all
from mixprec_lab.speed.provenance import slug

stats = pytest.importorskip("scipy.stats")
DATA = Path(__file__).resolve().parent.parent / "book" / "data"


# -- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 9, 30, 31, 200])
def test_students_t_is_scipys(df):
    for t in (-40.0, -3.0, -0.5, 0.0, 0.1, 1.0, 2.0, 6.0, 100.0):
        assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9, abs=1e-15)
    for p in (0.001, 0.025, 0.3, 0.5, 0.9, 0.975, 0.9999):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9, abs=1e-12)


def test_the_quantiles_of_the_printed_tables():
    assert [round(t_quantile(0.975, df), 3) for df in (1, 2, 4, 5, 9)] == [12.706, 4.303, 2.776, 2.571, 2.262]


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_interval_is_that_of_a_paired_t_test(n):
    draw = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n, generator=draw, dtype=torch.float64).tolist() for _ in range(2))
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.excludes_zero == (stats.ttest_rel(b, a).pvalue < 0.05)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 7), (5, 5)])
def test_the_interval_without_pairs_is_that_of_students_test(n, m):
    draw = torch.Generator().manual_seed(n)
    a, b = (torch.randn(k, generator=draw, dtype=torch.float64).tolist() for k in (n, m))
    expected = stats.ttest_ind(b, a, equal_var=True).confidence_interval(0.95)
    assert regimes.unpaired_interval(a, b) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "words"), [([1.0], [1.0, 2.0], "two results on each side"), ([1.0, 2.0], [1.0, math.inf], "finite")]
)
def test_results_that_make_no_interval_are_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        regimes.unpaired_interval(a, b)


def test_an_interval_by_hand():
    found = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0, 2: 6.0})
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)  # the quantile of two degrees of freedom, solved by hand
    assert (found.mean, found.deviation) == (2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-12) and not found.excludes_zero
    assert str(found) == "+2.0000 [-0.4841, +4.4841] over 3 seeds"


@pytest.mark.parametrize(
    ("baseline", "variant", "words"),
    [
        ({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0}, "the same seeds"),
        ({0: 1.0}, {0: 1.0}, "at least two seeds"),
        ({0: 1.0, 1: 1.0}, {0: 1.0, 1: math.nan}, "finite results"),
    ],
)
def test_results_that_are_no_pairs_are_refused(baseline, variant, words):
    with pytest.raises(ValueError, match=words):
        paired_difference(baseline, variant)


@pytest.mark.parametrize(
    ("seeds", "effect"), [*((n, e) for n in (2, 3, 5, 10) for e in (0.05, 0.5, 1.0, 3.0)), (40, 0.5), (300, 0.05)]
)
def test_power_is_that_of_the_noncentral_t(seeds, effect):
    df, shift = seeds - 1, effect * math.sqrt(seeds)
    critical = stats.t.ppf(0.975, df)
    expected = stats.nct.sf(critical, df, shift) + stats.nct.cdf(-critical, df, shift)
    assert power(effect * 7, 7.0, seeds) == pytest.approx(expected, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize(("effect", "chance"), [(3.0, 0.8), (1.0, 0.8), (0.5, 0.9), (-0.2, 0.8)])
def test_seeds_needed_is_the_fewest(effect, chance):
    n = seeds_needed(effect, 1.0, chance)
    assert power(effect, 1.0, n) >= chance
    assert n == 2 or power(effect, 1.0, n - 1) < chance


def test_questions_without_an_answer_are_refused():
    for call in (
        lambda: seeds_needed(0.0, 1.0), lambda: seeds_needed(1.0, 0.0), lambda: seeds_needed(1.0, 1.0, 1.0),
        lambda: seeds_needed(1e-9, 1.0), lambda: power(1.0, 1.0, 1), lambda: power(1.0, 1.0, 5, 0.0),
        lambda: t_quantile(1.0, 3), lambda: t_cdf(0.0, 0), lambda: t_cdf(0.0, 1.5),
        lambda: paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, 1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            call()


# -- records -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    tasks, under = [replace(get_task("images"), steps=4, evaluations=2)], ["fp32", "fp16_dynamic"]
    told = provenance(torch.device("cpu"), "a test", quick=True) | {"seconds": 1.0}
    speed = measure_speed(tasks, under, "a test", rounds=3, number=1)
    runs = run_all(tasks, under, [0, 1], progress=False)
    return make_record(runs, tasks, under, torch.device("cpu"), told, speed)


def test_a_record_comes_back_as_it_was_written(record, tmp_path):
    path = save_record(record, tmp_path / "deep" / "x.json")
    found = load_record(path)
    assert found == json.loads(json.dumps(record))
    assert runs_of(found) == runs_of(record) and runs_of(found)[0].regime == "fp32"
    assert [r["name"] for r in found["regimes"]] == ["fp32", "fp16_dynamic"]
    assert found["tasks"]["images"]["parameters"] == 7856
    assert load_all(tmp_path / "deep") == {}  # it is no record of ``make measure``
    first = found["speed"]["rows"][0]
    assert first["ratio"] == {"low": 1.0, "median": 1.0, "high": 1.0} and first["steps_per_second"]["median"] > 0


def broken(record, change):
    copied = copy.deepcopy(record)
    change(copied)
    return copied


CHANGES = {
    "kind": lambda r: r.update(kind="measured"),
    "schema": lambda r: r.update(schema=0),
    "device": lambda r: r.update(device=""),
    "date": lambda r: r["provenance"].update(date="2026-11-26"),
    "seconds": lambda r: r["provenance"].pop("seconds"),
    "task": lambda r: r["tasks"].clear(),
    "one regime": lambda r: r["regimes"].pop(),
    "missing run": lambda r: r["runs"].pop(),
    "run twice": lambda r: r["runs"].append(r["runs"][0]),
    "one seed": lambda r: r["runs"].__delitem__(slice(2, None)),
    "pair": lambda r: r["runs"][0].update(pair="0" * 16),
    "negative": lambda r: r["runs"][0].update(held_out=[0.1, -0.1, 0.1]),
    "huge": lambda r: r["runs"][0].update(held_out=[0.1, 1e5, 0.1]),
    "text": lambda r: r["runs"][0].update(held_out=[0.1, "low", 0.1]),
    "lengths": lambda r: r["runs"][0].update(training=[None, 0.1]),
    "steps": lambda r: r["runs"][0].update(steps=[0, 2, 3]),
    "skipped": lambda r: r["runs"][0].update(skipped=5),
    "bytes": lambda r: r["runs"][0]["bytes"].pop("masters"),
    "field": lambda r: r["runs"][0].pop("backend"),
    "no speed": lambda r: r.pop("speed"),
    "speed row": lambda r: r["speed"]["rows"].pop(),
    "speed ratio": lambda r: r["speed"]["rows"][1]["ratio"].update(median=math.inf),
    "speed order": lambda r: r["speed"]["rows"][1]["ratio"].update(low=9e9),
    "speed of when": lambda r: r["speed"].pop("provenance"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_record_that_is_incomplete_or_impossible_is_refused_before_it_is_written(record, tmp_path, name):
    validate_record(record)
    with pytest.raises(BrokenRecord, match="expected"):
        save_record(broken(record, CHANGES[name]), tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{", "utf-8")
    with pytest.raises(BrokenRecord, match="x.json"):
        load_record(tmp_path / "x.json")


def test_a_quick_record_does_not_replace_a_full_one(record, tmp_path):
    full = broken(record, lambda r: r["provenance"].update(quick=False))
    path = save_record(full, tmp_path / "x.json")
    with pytest.raises(FileExistsError, match="which holds a full record"):
        save_record(record, path)
    assert load_record(path)["provenance"]["quick"] is False


def test_a_record_without_speed_says_so(record, tmp_path):
    without = broken(record, lambda r: r.update(speed=None))
    assert load_record(save_record(without, tmp_path / "x.json"))["speed"] is None


def test_the_command_trains_and_then_measures_speed_alone(tmp_path, monkeypatch, capsys):
    for name, value in (("REGIMES", ["fp32", "bf16_autocast"]), ("VARIANTS", []), ("TASKS", ["images"])):
        monkeypatch.setattr(f"mixprec_lab.regimes.__main__.{name}", value)
    monkeypatch.setattr("mixprec_lab.regimes.__main__.get_task",
                        lambda *a: replace(get_task(*a), steps=3, evaluations=1))  # fmt: skip
    path = tmp_path / "x.json"
    given = ["--quick", "--device", "cpu", "--output", str(path)]
    assert main([*given, "--folder", str(tmp_path / "runs")]) == 0
    first = load_record(path)
    assert len(first["runs"]) == 4 and "--folder" in first["provenance"]["command"]
    assert main([*given, "--speed"]) == 0
    second = load_record(path)
    assert {k: v for k, v in second.items() if k != "speed"} == {k: v for k, v in first.items() if k != "speed"}
    assert second["speed"]["provenance"]["command"].endswith("--speed") and second["speed"] != first["speed"]
    capsys.readouterr()
    for wrong in (["--quick"], ["--output"]):
        with pytest.raises(SystemExit):
            main(wrong)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_record_has_the_same_name_however_many_threads_torch_may_use(tmp_path, monkeypatch, threads):
    def refuse(path):
        raise BrokenRecord(path.name)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path / "book" / "data" / f"regimes_{slug(describe(torch.device('cpu')))}.json"
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mixprec_lab.regimes.__main__.load_record", refuse)
    torch.set_num_threads(threads)
    try:
        with pytest.raises(BrokenRecord, match="^regimes_.*_1_of_.*_cores.json$"):
            main(["--device", "cpu", "--speed"])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_outside_the_project_the_command_says_where_to_go(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "the project's root, which has book/data" in capsys.readouterr().err


def test_speed_of_another_machine_is_not_written_into_a_record(record, tmp_path, monkeypatch, capsys):
    path = save_record(broken(record, lambda r: r.update(device="Another CPU")), tmp_path / "x.json")
    with pytest.raises(SystemExit):
        main(["--quick", "--speed", "--device", "cpu", "--output", str(path)])
    assert "expected a record of" in capsys.readouterr().err


def test_a_device_in_words_becomes_a_file_name():
    assert slug("NVIDIA H200") == "nvidia_h200"
    assert slug("Intel(R) Xeon(R) Processor, 1 of 2 cores") == "intel_xeon_processor_1_of_2_cores"


STORED = sorted(DATA.glob("regimes_*.json"))


@pytest.mark.parametrize("path", STORED, ids=lambda p: p.stem)
def test_a_stored_record_holds_every_regime_on_both_tasks_with_five_seeds(path):
    found = load_record(path)
    names = {r["name"] for r in found["regimes"]}
    assert names == {*regimes.REGIMES, *regimes.VARIANTS} and set(found["tasks"]) == {"text", "images"}
    assert len({r["seed"] for r in found["runs"]}) >= 5 and not found["provenance"]["quick"]
    assert path.stem == f"regimes_{slug(found['device'])}"
    assert not found["provenance"]["commit"].endswith("+changes")
