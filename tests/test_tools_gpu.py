"""``make gpu``: what it runs, how stages end, and that nothing passes which did not; its stages here are stubs."""

import copy
import json
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_speed_records import record

sys.path.insert(0, str(ROOT / "tools"))
import gpu

sys.path.remove(str(ROOT / "tools"))


def stage(name, code):
    return gpu.Stage(name, (sys.executable, "-S", "-c", code))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_without_a_gpu_it_is_one_sentence_and_exit_status_1(capfd):
    assert gpu.main([]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("make gpu expected a CUDA device") and "make test" in err


def test_every_notebook_every_gpu_test_and_the_measurement_are_in_it():
    tests, measure, notebooks = gpu.stages()
    assert tests.command[-4:] == ("-m", "gpu", "-rs", "tests")
    assert measure.command[1:] == ("tools/measure.py", "--device", "cuda")
    named = {part for part in notebooks.command if part.endswith(".ipynb")}
    assert named == {f"book/{path.name}" for path in (ROOT / "book").glob("*.ipynb")} and len(named) >= 13
    assert "--nbval-lax" in notebooks.command and "--nbval" not in notebooks.command


def test_a_stage_that_fails_does_not_stop_the_next_one(tmp_path):
    ran = tmp_path / "ran"
    todo = [stage("a", "raise SystemExit(3)"), stage("b", f"open({str(ran)!r}, 'w')")]
    results = gpu.run_all(todo)
    assert [r.status for r in results] == ["failed with exit status 3", "passed"] and ran.exists()


def test_stages_compute_on_the_gpu(tmp_path):
    seen = tmp_path / "seen"
    code = f"import os; open({str(seen)!r}, 'w').write(os.environ['MIXPREC_DEVICE'])"
    assert gpu.run(stage("a", code), 60).status == "passed"
    assert seen.read_text() == "cuda"


def test_a_stage_past_the_limit_is_stopped_with_all_it_started_and_the_next_is_not_begun(tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True:\n    open({str(beat)!r}, 'a').write('x'); time.sleep(0.02)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    results = gpu.run_all([stage("slow", code), stage("late", "pass")], limit=2)
    assert [r.status for r in results] == ["stopped after its 2 s", "not started, the time was used up"]
    assert time.monotonic() - start < 30
    before = beat.stat().st_size
    assert before > 0
    time.sleep(0.3)
    assert beat.stat().st_size == before


def test_only_a_valid_record_of_a_gpu_that_is_new_counts(tmp_path):
    for name, kind in (("h200", "cuda"), ("xeon", "cpu")):
        found = copy.deepcopy(record()) | {"device_type": kind}
        (tmp_path / f"{name}.json").write_text(json.dumps(found), "utf-8")
    (tmp_path / "h200.partial.json").write_text("{", "utf-8")
    assert gpu.written(0, tmp_path) == [tmp_path / "h200.json"]
    assert gpu.written(time.time() + 60, tmp_path) == []


def test_the_summary_is_good_only_if_all_passed_and_a_record_is_there(tmp_path):
    good = [gpu.Result("tests", "passed", 61.2), gpu.Result("measure", "passed", 100)]
    text, status = gpu.summary(good, [tmp_path / "h200.json"])
    assert status == 0 and f"tests: passed, 61 s\nmeasure: passed, 100 s\nrecord: {tmp_path / 'h200.json'}\n" in text
    assert gpu.summary(good, [])[1] == 1 and "none was written" in gpu.summary(good, [])[0]
    assert gpu.summary([*good, gpu.Result("notebooks", "failed with exit status 1", 9)], [tmp_path])[1] == 1
