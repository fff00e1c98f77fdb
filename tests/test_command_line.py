"""The commands: the library's answer in text and in JSON, one line and status 2 for a question that has none."""

import json
import math
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from mixprec_lab import command_line
from mixprec_lab.bf16_vs_fp16 import PrecisionSelector
from mixprec_lab.speed.quick import quick_bench


@pytest.fixture
def ask(capsys):
    """``ask("explore 0.1")`` -> the object that ``--json`` prints; the text must come out too."""

    def run(line: str) -> dict:
        assert command_line.main(shlex.split(line)) == 0
        assert capsys.readouterr().out.strip()
        assert command_line.main([*shlex.split(line), "--json"]) == 0
        return json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    return run


NUMPY = {"fp16": np.float16, "fp32": np.float32}


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize(("text", "x"), [
    ("0.1", 0.1), ("-0.1", -0.1), ("65504", 65504.0), ("-2^-24", -(2.0**-24)), ("1e-8", 1e-8), ("3", 3.0),
])  # fmt: skip
def test_explore_agrees_with_numpy(ask, name, text, x):
    kind = NUMPY[name]
    (row,) = ask(f"explore {text} --format {name}")["formats"]
    with np.errstate(over="ignore", under="ignore"):
        rounded = kind(x)
        above, below = np.nextafter(rounded, kind(math.inf)), np.nextafter(rounded, kind(-math.inf))
    assert row["value"] == float(rounded)
    assert row["bits"].replace(" ", "") == f"{rounded.view(f'u{rounded.itemsize}'):0{8 * rounded.itemsize}b}"
    assert [row["below"], row["above"]] == [float(v) if np.isfinite(v) else str(v) for v in (below, above)]
    assert row["error"] == abs(float(rounded) - x) / abs(x)


def test_explore_shows_every_format_and_what_has_no_code_for_nan(ask):
    rows = {row["format"]: row for row in ask("explore nan")["formats"]}
    assert len(rows) == 12
    assert rows["fp4_e2m1"]["code"] is None and rows["fp16"]["value"] == "nan"


@pytest.mark.parametrize(("text", "value"), [("-inf", "-inf"), ("-NaN", "nan"), ("-.5", -0.5), ("inf", "inf")])
def test_a_minus_sign_is_no_option(ask, text, value):
    assert ask(f"explore {text} --format fp32")["number"] == value


def test_negative_zero_keeps_its_sign(ask):
    assert math.copysign(1, ask("explore -0 --format fp16")["formats"][0]["value"]) == -1


@pytest.mark.parametrize(("hardware", "task"), [("h100", "gpt"), ("NVIDIA T4", "vision cnn"), ("cpu", "inference")])
def test_recommend_says_what_the_selector_says(ask, hardware, task):
    answer, selector = ask(f"recommend '{hardware}' '{task}'"), PrecisionSelector.recommend_precision(task, hardware)
    assert answer["forward"] == selector["forward"] and answer["loss_scaling"] == selector["loss_scaling"]
    reasons = {r["field"]: r["reason"] for r in answer["reasons"]}
    assert reasons["forward"] == selector["reason"]


def test_recommend_explains_with_sources(capsys):
    assert command_line.main(["recommend", "h100", "--explain"]) == 0
    assert capsys.readouterr().out.count("    [") >= 9  # one source for each decision


@pytest.mark.parametrize(("text", "count"), [
    ("7B", 7 * 10**9), ("124_439_808", 124439808), ("1.5b", 15 * 10**8), ("0.125K", 125), ("70M", 7 * 10**7),
    ("1T", 10**12), ("llama3_8b", "llama3_8b"), ("-7", "-7"), ("7 B", "7 B"),
])  # fmt: skip
def test_counts_are_read_exactly(text, count):
    assert command_line.parse_count(text) == count


def test_memory_is_sixteen_bytes_a_parameter_whatever_the_count(ask):
    answer = ask("memory 7B bf16_master")
    assert answer["total"] == sum(term["bytes"] for term in answer["terms"].values()) == 16 * 7 * 10**9
    assert answer["fits"]["b200"] and not answer["fits"]["h100"]


def test_memory_hands_every_flag_to_the_library(ask):
    words = "memory llama3_8b te_fp8_bf16 --zero-stage 3 --world-size 8 --sequence 512 --batch 2"
    plain = ask(words)
    more = ask(f"{words} --attention full --dropout")
    less = ask(f"{words} --activation-checkpointing")
    small = ask("memory 1000 --layers 2 --hidden 8 --heads 2 --sequence 4 --batch 1 --vocabulary 16")
    lora = ask("memory 7B --adapters 1000 --base nf4")
    activations = [answer["terms"]["activations"]["bytes"] for answer in (less, plain, more)]
    assert activations == sorted(set(activations)) and activations[0] > 0
    assert small["terms"]["logits"]["bytes"] == 14 * 4 * 16
    assert lora["terms"]["gradients"]["bytes"] == 4 * 1000


def test_memory_lists_what_it_knows(ask):
    listed = ask("memory --list")
    assert listed["regimes"]["bf16_pure"] == 8 and "llama3_8b" in listed["models"]


def test_bench_reports_machine_date_and_what_it_timed(ask):
    answer = ask("bench --size 32 --rounds 3 --device cpu")
    assert set(answer["arms"]) == {"fp32", "bf16", "fp16"} and answer["torch"] == torch.__version__
    arm = answer["arms"]["bf16"]
    assert arm["teraflops"] == pytest.approx(2 * 32**3 / arm["seconds"]["median"] / 1e12, rel=1e-12)
    assert 0 < arm["difference"] < 0.02 and answer["arms"]["fp32"]["ratio"]["median"] == 1
    assert answer["date"].endswith("+00:00") and answer["device"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bench_on_a_gpu_times_what_the_gpu_multiplies():
    arms = {arm.name for arm in quick_bench("cuda", 256, 3).result.arms}
    major, minor = torch.cuda.get_device_capability()
    assert ("tf32" in arms) == (major >= 8) and ("fp8" in arms) == ((major, minor) >= (8, 9))


@pytest.mark.parametrize(("words", "message"), [
    ("explore abc", "is not a number"), ("explore 1e999", "beyond double"), ("explore 1 --format fp7", "fp7"),
    ("recommend warp_drive", "Known: "), ("recommend h100 poetry", "Known: "),
    ("recommend h100 lora --priority both", "'stability' or 'speed'"),
    ("memory", "a number of parameters or a model's name"), ("memory gpt9", "the names are"),
    ("memory 7B fp64", "the names are"), ("memory 1.0005K", "whole number"), ("memory 0", "1"),
    ("memory 7B --zero-stage 3", "world_size"), ("memory 7B --sequence 8", "together"),
    ("memory 7B --base fp99", "fp99"), ("bench --size 17", "multiple of 16"), ("bench --size -16", "multiple of 16"),
    ("bench --rounds 1 --size 16", "rounds"), ("bench --device warp", "a device of this machine"),
    ("bench --size many", "many"), ("fly", "fly"), ("", "COMMAND"), ("explore", "number"),
])  # fmt: skip
def test_a_question_without_an_answer_is_one_line_and_status_2(capsys, words, message):
    try:
        status = command_line.main(words.split())
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and said.out == ""
    assert said.err.count("\n") == 1 and message in said.err


def test_help_costs_no_torch_and_the_module_runs():
    code = "import sys; from mixprec_lab.command_line import make_parser; make_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    done = subprocess.run([sys.executable, "-m", "mixprec_lab", "--help"], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("doctor", "recommend", "memory", "bench", "explore"))


def test_a_reader_that_closes_early_is_no_error():
    """As with ``| head``: the pipe is closed before anything is written."""
    command = [sys.executable, "-m", "mixprec_lab", "explore", "0.1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()
