"""The notebooks as committed: stripped, exercised, readable.

``make test`` runs every cell again with nbval and compares it with the committed output.  What is checked here of the
committed outputs therefore holds for a fresh run too.
"""

import json

import nbformat
import pytest
import yaml
from conftest import HTML, ROOT

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
TEXT_OUTPUTS = {"text/plain", "text/markdown", "text/latex", "text/html"}
UNCOMPARED = {"nbval-skip", "nbval-ignore-output", "nbval-check-output"}


def code_cells(path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def printed(cell) -> str:
    """What a cell wrote to standard output; it must have no other output."""
    assert {output.output_type for output in cell.outputs} == {"stream"}, cell.source
    return "".join(output.text for output in cell.outputs)


def pairs() -> list:
    """``(stub, solution)``: each exercise with the code cell after it that shows no symptom."""
    found = []
    for path in NOTEBOOKS:
        cells = [cell for cell in code_cells(path) if "symptom" not in tags(cell)]
        for cell, after in zip(cells, [*cells[1:], None], strict=True):
            if "exercise" in tags(cell):
                found.append(pytest.param(cell, after, id=f"{path.stem}-{cell.id}"))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_in_the_table_of_contents(path):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = {chapter["file"] for part in toc["parts"] for chapter in part["chapters"]}
    assert f"book/{path.stem}" in listed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_text_outputs_only(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    for cell in code_cells(path):
        for output in cell.outputs:
            assert set(output.get("data", {})) <= TEXT_OUTPUTS, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_output_is_compared(path):
    for cell in code_cells(path):
        assert not tags(cell) & UNCOMPARED, f"{cell.id}: make the output stable instead of hiding it from nbval"


@pytest.mark.parametrize(("stub", "solution"), pairs())
def test_stub_is_not_done_and_solution_is_correct(stub, solution):
    first = printed(stub)
    assert first.count("\n") == 1
    assert first == "Not done yet.\n" or first.startswith("Not yet: expected ")
    assert solution is not None and "solution" in tags(solution), "the next code cell must be the solution"
    assert printed(solution) == "Correct.\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_solutions_follow_exercises(path):
    kinds = [tags(cell) & {"exercise", "solution"} for cell in code_cells(path)]
    assert sum("exercise" in kind for kind in kinds) == sum("solution" in kind for kind in kinds)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_has_a_description(open_page, path):
    page = open_page(f"book/{path.stem}.html", scheme="file").page
    images = page.eval_on_selector_all(".bd-article img", "els => els.map(e => [e.src, e.alt.trim()])")
    short = [source for source, alt in images if len(alt) < 15 or alt.startswith("../_images")]
    assert not short, f"give alt text in the cell's metadata (mystnb: image: alt): {short}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_page_holds_only_widgets_that_need_no_kernel(path):
    page = (HTML / "book" / f"{path.stem}.html").read_text(encoding="utf-8")
    marker = '<script type="application/vnd.jupyter.widget-state+json">'
    if marker not in page:
        return
    states = json.loads(page.split(marker)[1].split("</script>")[0])["state"]
    assert {state["model_module"] for state in states.values()} <= {"anywidget", "@jupyter-widgets/base"}
