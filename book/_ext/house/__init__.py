"""The book's own Sphinx extension: offline assets, an execution cache that cannot go stale, a strict policy,
a line that says what the book was built with, pictures where scripts are off, and the theme put right.
"""

from sphinx.application import Sphinx

from . import assets, colophon, execution, icons, policy, repository, still, theme


def setup(app: Sphinx) -> dict[str, object]:
    """Connect the eight parts; each module says what its part is for."""
    for part in (assets, colophon, execution, icons, repository, theme, still, policy):
        part.connect(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
