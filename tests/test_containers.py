"""The files for containers agree with the rest: the CUDA of the pins, files that exist, an install with what is copied.

No image is built here.  What is checked is what changes elsewhere and would be forgotten there.
"""

import re
import shlex
import tomllib

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as ``(instruction, arguments)``, continued lines joined and comments left out."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in lines.splitlines() if line.strip()]


def copied(instructions) -> list[list[str]]:
    """By COPY: its sources."""
    found = [shlex.split(arguments) for name, arguments in instructions if name == "COPY"]
    return [[word for word in words[:-1] if not word.startswith("--")] for words in found]


def test_every_image_has_the_cuda_of_the_locked_torch():
    locked = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)\.", (ROOT / "requirements.lock").read_text("utf-8"), re.M)[1]
    images = re.findall(r"nvidia/cuda:(\d+\.\d+)\.\d+-(\S+)", (ROOT / "Dockerfile").read_text("utf-8"))
    assert {version for version, _ in images} == {locked}
    assert {kind for _, kind in images} == {"base-ubuntu24.04", "cudnn-devel-ubuntu24.04"}


def test_what_is_copied_exists_and_is_enough_for_an_install(instructions):
    early, *_, late = copied(instructions)
    assert late == ["."]
    sources = {source for sources in copied(instructions)[:-1] for source in sources}
    assert [s for s in sources if not (ROOT / s).exists()] == []
    needed = {"Makefile", "requirements.txt", "requirements-gpu.txt", "pyproject.toml", "tools", PROJECT["readme"],
              *PROJECT["license-files"]}  # fmt: skip
    assert needed <= sources and "Makefile" in early


def test_the_install_comes_before_the_pages_and_nothing_runs_as_root_after_it(instructions):
    order = [arguments if name == "RUN" else name for name, arguments in instructions]
    assert order.index("USER") < order.index("make install") < len(order) - order[::-1].index("COPY") - 1
    assert [name for name, _ in instructions].count("USER") == 1


def test_what_git_ignores_stays_out_of_the_image():
    def names(path):
        lines = (ROOT / path).read_text("utf-8").splitlines()
        return {line.removeprefix("**/").strip("/") for line in lines if line and not line.startswith("#")}

    assert names(".dockerignore") == names(".gitignore")


def test_binder_installs_the_pins_on_a_python_that_the_project_allows():
    lines = (ROOT / "binder" / "requirements.txt").read_text("utf-8").splitlines()
    (included,) = (line.removeprefix("-r ") for line in lines if line.startswith("-r "))
    assert (ROOT / "binder" / included).resolve() == ROOT / "requirements.txt"
    version = re.fullmatch(r"python-(\d+)\.(\d+)\n", (ROOT / "binder" / "runtime.txt").read_text("utf-8"))
    lowest = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert tuple(map(int, version.groups())) >= tuple(map(int, lowest.groups()))
