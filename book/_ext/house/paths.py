"""Where things are."""

from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

EXTENSION = Path(__file__).resolve().parents[1]
ROOT = EXTENSION.parents[1]
STATIC = EXTENSION / "static"
TEMPLATES = EXTENSION / "templates"
FETCHED = ROOT / ".assets"


def pages_of(app: Sphinx) -> Iterator[Path]:
    """The pages of the build but the top one, which tools/build_book.py writes."""
    out = Path(app.outdir)
    return (p for p in out.rglob("*.html") if p != out / "index.html" and out / "_static" not in p.parents)
