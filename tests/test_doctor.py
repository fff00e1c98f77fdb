"""The doctor: what is missing is named with its cure, what is there is named as torch itself names it."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from mixprec_lab import bf16_vs_fp16, command_line, doctor
from mixprec_lab.bf16_vs_fp16 import HARDWARE


@pytest.fixture
def versions(monkeypatch):
    """``versions(torch="2.6")`` -> what importlib.metadata reports from then on; None means not installed."""

    def pretend(**changed: str | None) -> None:
        real = importlib.metadata.version

        def version(name: str) -> str:
            found = changed.get(name.replace("-", "_"), real)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found is real else found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_where_the_tests_run_the_book_runs(capsys):
    assert command_line.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("The book runs here.\n") and "problems" not in text
    assert command_line.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] and report["devices"][-1]["name"] == "cpu"
    found = {p["name"]: p["found"] for p in report["packages"]}
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # +cu130 is in one of them only
    assert {"anywidget", "ipykernel", "scikit-learn", "jupyter-book", "pytest"} <= set(found)


def test_a_missing_package_is_a_problem_with_a_cure(versions, capsys):
    versions(anywidget=None)
    assert command_line.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "anywidget is not installed: pip install 'anywidget>=0.9.13'" in text
    assert text.endswith("The book does not run here yet.\n")


@pytest.fixture
def pins(monkeypatch):
    """What the book was tested with, whatever requirements.txt holds: the weekly run opens its pins."""
    monkeypatch.setattr(doctor, "tested_pins", lambda: {"torch": "2.13.0", "jupyter-book": "1.0.4.post1"})


def test_a_package_that_is_too_old_is_a_problem_and_a_newer_one_is_not(versions, pins):
    versions(torch="2.6.0")
    assert [p.what for p in doctor.examine().problems] == ["torch is 2.6.0, and >=2.7 is needed"]
    versions(torch="2.99.0+cu140")
    assert doctor.examine().runs and "torch 2.99.0+cu140, tested with 2.13.0" in str(doctor.examine())


def test_what_only_the_build_or_the_tests_need_keeps_no_page_from_running(versions, pins):
    versions(jupyter_book="2.0", pytest=None)
    report = doctor.examine()
    assert report.runs
    assert "jupyter-book 2.0, needs <2,>=1.0.4, tested with 1.0.4.post1 (only for the build)" in str(report)
    assert "pytest is not installed" in str(report)


def test_an_uninstalled_package_is_said(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    (problem,) = doctor.examine().problems
    assert "mixprec_lab is not installed" in problem.what and "pip install -e ." in problem.cure


def test_a_device_that_is_not_here_is_a_problem(monkeypatch):
    monkeypatch.setenv("MIXPREC_DEVICE", "cuda:99")
    (problem,) = doctor.examine().problems
    assert "got 'cuda:99'" in str(problem) and "unset it" in problem.cure


@pytest.mark.parametrize(("statement", "said"), [
    ("sys.modules['torch'] = None", "pip install 'torch>=2.7'"),  # what a missing module looks like to an import
    ("sys.path.insert(0, folder)", "torch is installed and does not load (undefined symbol: cublas)"),
])  # fmt: skip
def test_torch_that_does_not_load_is_a_problem_and_no_traceback(tmp_path, statement, said):
    (tmp_path / "torch.py").write_text("raise OSError('undefined symbol: cublas')")
    code = (
        f"import importlib.metadata as m, sys; folder = {str(tmp_path)!r}; real = m.version\n"
        "def version(name):\n    if name == 'torch' and folder not in sys.path:\n        raise m.PackageNotFoundError\n"
        "    return real(name)\n"
        f"m.version = version; {statement}\n"
        "from mixprec_lab.command_line import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert said in done.stdout


FORMATS_BY_GENERATION = [
    ("v100", "FP32 FP16"), ("a100", "FP32 TF32 FP16 BF16"), ("h200", "FP32 TF32 FP16 BF16 FP8"),
    ("b200", "FP32 TF32 FP16 BF16 FP8 MXFP8 NVFP4"), ("mi300x", "FP32 TF32 FP16 BF16 FP8"), ("cpu", "FP32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "native"), FORMATS_BY_GENERATION)
def test_native_formats_follow_the_generation(monkeypatch, name, native):
    found = bf16_vs_fp16.hardware.Detected(HARDWARE[name], "in this test")
    monkeypatch.setattr(bf16_vs_fp16, "detect_hardware", lambda: found)
    monkeypatch.setattr(bf16_vs_fp16.hardware, "cpu_flags", frozenset)
    kinds = {fmt: ability.how for fmt, ability in doctor.abilities().items()}
    assert [fmt for fmt, how in kinds.items() if how == "native"] == native.split()
    assert set(kinds.values()) <= {"native", "emulated"}


def test_an_apple_gpu_does_not_say(monkeypatch):
    found = bf16_vs_fp16.hardware.Detected(HARDWARE["apple"], "in this test")
    monkeypatch.setattr(bf16_vs_fp16, "detect_hardware", lambda: found)
    assert doctor.abilities()["BF16"].how == "unknown"


def test_a_gpu_that_is_in_no_table_is_a_note(monkeypatch):
    def unknown():
        raise KeyError("unknown hardware 'NVIDIA Abacus'")

    monkeypatch.setattr(bf16_vs_fp16, "detect_hardware", unknown)
    report = doctor.examine()
    assert report.runs and report.formats == {} and "Abacus" in report.notes[-1]


def test_a_driver_beside_a_torch_without_cuda_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (note,) = doctor.examine().notes
    assert "built without CUDA" in note
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (note,) = doctor.examine().notes
    assert "sees no GPU" in note


@pytest.mark.parametrize("count", [1, 2, 8])
def test_scaling_out_gains_from_a_second_gpu(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    found = doctor.page_gains(torch.device("cuda"), {"transformer_engine": "no", "scaled_mm": "no"})
    assert found.get("scaling_out") == (f"its jobs run on {count} GPUs and talk through NCCL" if count > 1 else None)


def test_pages_gain_from_a_gpu_and_from_fp8_only_where_it_runs():
    gpu, missing = torch.device("cuda"), {"transformer_engine": "not installed", "scaled_mm": "too old"}
    assert doctor.page_gains(torch.device("cpu"), missing) == {}
    assert "fp8" not in doctor.page_gains(gpu, missing)
    assert doctor.page_gains(gpu, missing | {"scaled_mm": "runs"})["fp8"].endswith("through scaled_mm")


def test_pins_are_read_from_the_checkout_and_missing_outside(tmp_path):
    assert doctor.tested_pins(tmp_path / "requirements.txt") == {}
    (tmp_path / "requirements.txt").write_text("# pins\nTorch==2.13.0\nml_dtypes==0.6.0\nclick<9\n-e .\n")
    assert doctor.tested_pins(tmp_path / "requirements.txt") == {"torch": "2.13.0", "ml-dtypes": "0.6.0"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_listed_as_cuda_names_it():
    report = doctor.examine()
    assert report.devices[0]["title"] == torch.cuda.get_device_name(0)
    assert report.formats["BF16"].how == bf16_vs_fp16.bf16_support()
    assert "speed" in report.pages
