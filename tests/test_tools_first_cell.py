"""The first cell of every notebook: nothing where the package is, an install where it is not, one sentence else."""

import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import first_cell
import strip_notebooks

sys.path.remove(str(ROOT / "tools"))

#: A pip that only writes down what it was asked for.
PIP = """import sys, pathlib
pathlib.Path({log!r}).write_text(" ".join(sys.argv[1:]))
sys.exit({status})
"""


@pytest.fixture
def alone(tmp_path):
    """``alone(wheel, source, status, here)`` -> the cell run where no mixprec_lab is, and what pip was asked for."""

    def run(wheel: str = "", source: str = "", status: int = 0, here: tuple[str, ...] = ("sklearn",)):
        (tmp_path / "pip").mkdir()
        (tmp_path / "pip" / "__init__.py").touch()  # a package proper, or the real pip would go before it
        (tmp_path / "pip" / "__main__.py").write_text(PIP.format(log=str(tmp_path / "asked"), status=status))
        for name in here:
            (tmp_path / f"{name}.py").touch()
        if wheel:
            (tmp_path / wheel).touch()
        environment = {k: v for k, v in os.environ.items() if k != "MIXPREC_SOURCE"} | {"PYTHONPATH": str(tmp_path)}
        environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}  # should it be real
        if source:
            environment["MIXPREC_SOURCE"] = source
        # -S leaves site-packages out, and so the editable install of this checkout
        done = subprocess.run([sys.executable, "-S", "-c", first_cell.SOURCE], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        asked = tmp_path / "asked"
        return done, asked.read_text() if asked.is_file() else None

    return run


def test_where_the_package_is_the_cell_does_and_prints_nothing(alone):
    done, asked = alone(wheel="mixprec_lab-0.1.0-py3-none-any.whl", here=("mixprec_lab", "sklearn"))
    assert (done.returncode, done.stdout, done.stderr, asked) == (0, "", "", None)


def test_a_wheel_beside_the_notebook_is_installed(alone, tmp_path):
    done, asked = alone(wheel="mixprec_lab-0.1.0-py3-none-any.whl")
    assert done.returncode == 0, done.stderr
    assert asked == f"install --quiet {tmp_path / 'mixprec_lab-0.1.0-py3-none-any.whl'}"


def test_mixprec_source_goes_before_a_wheel_and_scikit_learn_only_where_it_is_missing(alone):
    done, asked = alone(wheel="mixprec_lab-0.1.0-py3-none-any.whl", source="mixprec_lab==0.1.0", here=())
    assert done.returncode == 0, done.stderr
    assert asked == "install --quiet mixprec_lab==0.1.0 scikit-learn"


def test_without_either_the_cell_says_what_to_do(alone, tmp_path):
    done, asked = alone()
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and asked is None
    assert last.startswith("ModuleNotFoundError: expected mixprec_lab to be installed") and "make wheel" in last


def test_a_pip_that_fails_stops_the_notebook(alone):
    done, _ = alone(source="nowhere", status=1)
    assert done.returncode == 1 and "CalledProcessError" in done.stderr


def make(*cells):
    return nbformat.v4.new_notebook(cells=list(cells), metadata={"kernelspec": dict(strip_notebooks.KERNEL)})


def test_the_cell_stands_after_the_opening_text_once_and_unchanged():
    v4 = nbformat.v4
    old = v4.new_code_cell(first_cell.SOURCE + "\n# edited", id="other", outputs=[v4.new_output("stream", text="x")])
    notebook = first_cell.ensure(make(v4.new_markdown_cell("# T"), v4.new_code_cell("1"), old))
    assert [cell.source for cell in notebook.cells] == ["# T", first_cell.SOURCE, "1"]
    cell = notebook.cells[1]
    assert (cell.id, cell.metadata.tags, cell.outputs) == (first_cell.ID, ["setup", "remove-cell"], [])
    assert first_cell.ensure(notebook).cells == notebook.cells
    nbformat.validate(first_cell.ensure(make(v4.new_code_cell("1"))))
    assert first_cell.ensure(make()).cells[0].id == first_cell.ID


def test_a_notebook_without_it_is_refused_and_then_given_it(tmp_path, capsys):
    path = tmp_path / "n.ipynb"
    nbformat.write(make(nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell("1 + 1")), path)
    assert strip_notebooks.main(["--check", str(path)]) == 1
    assert "run make notebooks" in capsys.readouterr().out
    assert strip_notebooks.main([str(path)]) == 0
    assert strip_notebooks.main(["--check", str(path)]) == 0
    edited = nbformat.read(path, as_version=4)
    edited.cells[1].source += "\n"
    nbformat.write(edited, path)
    assert strip_notebooks.main(["--check", str(path)]) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "book").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_has_it(path):
    cells = nbformat.read(path, as_version=4).cells
    assert [i for i, cell in enumerate(cells) if cell.id == first_cell.ID] == [1], "run tools/strip_notebooks.py on it"
    assert cells[1].source == first_cell.SOURCE and cells[1].metadata.tags == first_cell.TAGS
