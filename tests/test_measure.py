"""``make measure``: a quick run end to end, sections that fail alone, and provenance that is complete."""

import datetime
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_tools import load

from mixprec_lab.speed import validate
from mixprec_lab.speed.records import failures

measure = load(ROOT / "tools/measure.py")
sections = sys.modules["measure_sections"]
PLAN = sections.Plan(torch.device("cpu"), quick=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The record of one quick run by its command line, and what it printed."""
    path = tmp_path_factory.mktemp("measure") / "here.json"
    command = [sys.executable, "tools/measure.py", "--quick", "--device", "cpu", "--output", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text("utf-8")), done.stdout


def test_a_quick_run_measures_every_section(quick):
    record, printed = quick
    validate(record)
    assert list(record["sections"]) == list(sections.SECTIONS)
    statuses = dict.fromkeys(sections.SECTIONS, "ok") | {"transformer_engine": "skipped"}
    assert {name: s["status"] for name, s in record["sections"].items()} == statuses
    assert all(f"{name}: {status}, " in printed for name, status in statuses.items()) and "wrote " in printed


def test_provenance_says_where_when_and_with_what(quick):
    told = quick[0]["provenance"]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(told["date"])
    assert 0 <= age.total_seconds() < 600 and told["quick"] is True
    assert told["command"].startswith("python tools/measure.py --quick") and told["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", told["commit"])
    assert told["driver"] is None and told["transformer_engine"] is None and len(told["load"]) == 3


def test_rows_hold_what_the_pages_need(quick):
    rows = {name: section["rows"] for name, section in quick[0]["sections"].items() if section["status"] == "ok"}
    assert {row["dtype"] for row in rows["matmul"]} == {"fp32", "bf16", "fp16"}
    assert all(row["teraflops"] > 0 for row in rows["matmul"] + rows["linear"])
    assert {row["emulated"] for row in rows["linear"] if row["dtype"] == "fp8"} == {True}
    assert [row["name"] for row in rows["gpt"]] == ["fp32", "bf16 autocast", "bf16 weights", "fp8, emulated"]
    assert all(isinstance(row["peak_bytes"], int) for row in rows["gpt"])
    assert rows["copy"][0]["gigabytes_per_second"] > 0 and "ratio" in rows["noise"][0]


def test_pure_bf16_states_need_less_memory_than_fp32(quick):
    peak = {row["name"]: row["peak_bytes"] for row in quick[0]["sections"]["gpt"]["rows"]}
    assert peak["bf16 weights"] < 0.75 * peak["fp32"]


def broken(plan):
    raise RuntimeError("out of memory, 2 GiB wanted")


def absent(plan):
    raise sections.Skipped("no such unit")


def test_a_section_that_fails_is_recorded_and_the_others_run(capsys):
    chosen = {"broken": broken, "absent": absent, "copy": sections.SECTIONS["copy"]}
    record = measure.measure(PLAN, chosen, "python tools/measure.py")
    validate(record)
    assert [s["status"] for s in record["sections"].values()] == ["failed", "skipped", "ok"]
    reason = failures(record)["broken"]
    assert reason.startswith("RuntimeError: out of memory, 2 GiB wanted (broken, line ")
    assert "broken: failed, RuntimeError" in capsys.readouterr().out


def test_a_failed_section_sets_the_exit_status_and_keeps_the_whole_record(tmp_path, monkeypatch, capsys):
    path = tmp_path / "here.json"
    assert measure.main(["--quick", "--only", "copy", "--output", str(path)]) == 0
    whole = path.read_bytes()
    monkeypatch.setitem(sections.SECTIONS, "copy", broken)
    assert measure.main(["--quick", "--only", "copy,noise", "--output", str(path)]) == 1
    assert path.read_bytes() == whole and (tmp_path / "here.partial.json").is_file()
    assert "failed: copy: RuntimeError: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "sleep", "--output", "x"], "expected sections among noise, copy"), (["--quick"], "expected --output"),
     (["--only", "copy"], "expected --output")],
)  # fmt: skip
def test_wrong_arguments_end_with_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        measure.main(arguments)
    assert message in capsys.readouterr().err


def test_the_gpt_is_causal():
    torch.manual_seed(0)
    model = sections.GPT(32, 16, 2, 8)
    tokens = torch.randint(32, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 32
    first, second = model(tokens), model(changed)
    assert torch.equal(first[:5], second[:5]) and not torch.equal(first[5:], second[5:])


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    record = measure.measure(sections.Plan(torch.device("cuda"), quick=True), sections.SECTIONS, "test")
    validate(record)
    assert failures(record) == {} and record["provenance"]["driver"]
