"""Print requirements.txt with the newest releases let in of what the book depends on most; CI tries them weekly.

The packages of ``NEWEST`` get the range of pyproject.toml instead of a pin, and what jupyter-book pins itself is left
to it.  Everything else stays, so that a failure names its cause.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWEST = ("torch", "ipywidgets", "anywidget", "nbval", "jupyter-book")
LEFT_TO_JUPYTER_BOOK = ("sphinx", "myst-nb", "sphinx-book-theme", "pydata-sphinx-theme")


def ranges(pyproject: str) -> dict[str, str]:
    """By package: the requirement that pyproject.toml states."""
    project = tomllib.loads(pyproject)["project"]
    stated = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    return {re.match(r"[A-Za-z0-9_.-]+", requirement)[0]: requirement for requirement in stated}


def newest(requirements: str, pyproject: str) -> str:
    """``requirements`` with those pins opened; ValueError if one of them is not there to be opened."""
    lines, opened, known = [], set(), ranges(pyproject)
    for line in requirements.splitlines():
        name, pin, _ = line.partition("==")
        if pin and name in NEWEST:
            opened.add(name)
            line = known[name]
        if not (pin and name in LEFT_TO_JUPYTER_BOOK):
            lines.append(line)
    if missing := set(NEWEST) - opened:
        raise ValueError(f"expected pins of {', '.join(NEWEST)}, got none of {', '.join(sorted(missing))}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(newest(*((ROOT / name).read_text("utf-8") for name in ("requirements.txt", "pyproject.toml"))))
