"""Keep a notebook's text outputs; drop images, widget state and volatile metadata, and number the cells 1, 2, 3, ...

The committed notebooks are the source of the book: text outputs are what the tests compare, everything else is made
by the build.  Every notebook also gets the cell of first_cell.py.  ``--check`` changes nothing and fails if a file
would change; ``--execute`` runs the notebook first.
"""

import argparse
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parent))

from first_cell import ensure as ensure_first_cell

TEXT = ("text/plain", "text/markdown", "text/latex", "text/html")
VOLATILE = ("execution", "ExecuteTime", "collapsed", "scrolled")
NOTEBOOK_METADATA = ("kernelspec", "mystnb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def strip_output(output: NotebookNode, number: int) -> None:
    """Leave the text forms of one output; an image keeps its ``text/plain`` line, which the tests compare."""
    if "execution_count" in output:
        output.execution_count = number
    if "data" in output:
        output.data = NotebookNode({kind: body for kind, body in output.data.items() if kind in TEXT})
        output.metadata = NotebookNode()


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs with neighbours of one stream joined: where the kernel cut the text depends on its timing."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == "stream" == kept[-1].output_type and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def strip_cell(cell: NotebookNode, number: int) -> None:
    """Number one code cell and strip its outputs; tags and other metadata stay."""
    cell.execution_count = number if cell.source.strip() else None
    cell.outputs = merged(cell.outputs)
    for output in cell.outputs:
        strip_output(output, number)


def strip(notebook: NotebookNode) -> NotebookNode:
    """The same notebook with nothing in it that changes from run to run."""
    kept = {key: notebook.metadata[key] for key in NOTEBOOK_METADATA if key in notebook.metadata}
    notebook.metadata = NotebookNode({**kept, "kernelspec": KERNEL, "language_info": {"name": "python"}})
    number = 0
    for cell in notebook.cells:
        for key in VOLATILE:
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            number += 1
            strip_cell(cell, number)
    return notebook


def execute(path: Path) -> NotebookNode:
    """Run a notebook from top to bottom in its own folder and return it with fresh outputs."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    return client.execute()


def stripped_text(notebook: NotebookNode) -> str:
    """The file contents of the stripped notebook with its first cell; ``ValidationError`` if it is not a valid one."""
    notebook = strip(ensure_first_cell(notebook))
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


def main(argv: list[str] | None = None) -> int:
    """Strip the notebooks named on the command line; 1 if ``--check`` found one that is not stripped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a notebook is not stripped")
    parser.add_argument("--execute", action="store_true", help="run each notebook before stripping it")
    parser.add_argument("notebooks", nargs="*", type=Path)
    options = parser.parse_args(argv)
    unstripped = []
    for path in options.notebooks:
        before = path.read_text(encoding="utf-8")
        after = stripped_text(execute(path) if options.execute else nbformat.reads(before, as_version=4))
        if after != before:
            unstripped.append(path)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    for path in unstripped:
        print(f"{path}: {'not stripped; run make notebooks' if options.check else 'rewritten'}")
    return int(options.check and bool(unstripped))


if __name__ == "__main__":
    sys.exit(main())
