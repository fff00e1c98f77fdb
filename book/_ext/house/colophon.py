"""A line at the foot of every page: with which versions, and from which commit, the book was built."""

import html
import importlib.metadata
import subprocess
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

from .paths import ROOT

#: What decides the numbers on the pages, besides the checkout itself.
NAMED = ("torch", "mixprec_lab")


def commit(root: Path = ROOT) -> str | None:
    """The commit of the checkout, in twelve digits, with "+changes" if tracked files differ; None if it is not one."""
    try:
        told = [
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        ]
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or an unpacked archive
        return None
    top, found, changes = told
    if Path(top) != root:  # an archive unpacked inside somebody else's repository
        return None
    return found + ("+changes" if changes else "")


def line(root: Path = ROOT) -> str:
    """The line, as text."""
    parts = [f"{name} {importlib.metadata.version(name)}" for name in NAMED]
    found = commit(root)
    return f"Built with {', '.join(parts)}" + (f", from commit {found}." if found else ".")


def add_line(app: Sphinx, config: Config) -> None:
    """Hand the line to the theme's footer."""
    config.html_theme_options["extra_footer"] = html.escape(line())


def connect(app: Sphinx) -> None:
    """Before the theme reads its options."""
    app.connect("config-inited", add_line, priority=400)
