"""The first cell of every notebook: it installs the package where a page is opened alone, and nowhere else.

On Colab and other services a notebook arrives without the course around it.  The cell then installs ``mixprec_lab``
from a wheel that lies beside the notebook, or from what ``MIXPREC_SOURCE`` names, and stops with one sentence where
there is neither.  The built pages do not show it.  ``strip_notebooks.py`` puts it into every notebook and refuses one
without it, so that it is the same everywhere; this file is where it is changed.
"""

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

ID = "get-mixprec-lab"
TAGS = ["setup", "remove-cell"]
SOURCE = '''\
# Opened without the course around it (Colab, Kaggle, ...)? This cell installs what is missing; else it does nothing.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("mixprec_lab") is None:
    wheels = sorted(str(path) for path in Path.cwd().glob("mixprec_lab-*.whl"))
    source = os.environ.get("MIXPREC_SOURCE") or (wheels[-1] if wheels else None)
    if source is None:
        raise ModuleNotFoundError(
            f"expected mixprec_lab to be installed, a mixprec_lab-*.whl in {Path.cwd()}, or MIXPREC_SOURCE to say what "
            "pip should install, got none of them: make the wheel with 'make wheel', upload it, and run this cell again"
        )
    missing = [] if importlib.util.find_spec("sklearn") else ["scikit-learn"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source, *missing], check=True)
    importlib.invalidate_caches()'''


def ensure(notebook: NotebookNode) -> NotebookNode:
    """``notebook`` with this cell, once and unchanged, after its opening text; an older form of it is replaced."""
    first_line = SOURCE.partition("\n")[0]
    others = [c for c in notebook.cells if c.get("id") != ID and not c.source.startswith(first_line)]
    place = int(bool(others) and others[0].cell_type == "markdown")
    cell = new_code_cell(SOURCE, id=ID, metadata={"tags": list(TAGS)})
    notebook.cells = [*others[:place], cell, *others[place:]]
    return notebook
