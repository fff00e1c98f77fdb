"""A Content-Security-Policy in every page: it loads the book's own files and runs the scripts it was built with.

Each page names the hashes of its own inline scripts, so a script that gets into it by another way does not run.
Three sources are wider than the page's own files, each for one reason:

- ``script-src blob:``, on pages with exhibits: a widget's ES module travels as text inside the page, and a module from
  ``file://`` can only be imported through a blob, which none but a script that already runs can make;
- ``style-src 'unsafe-inline'``: MathJax and the figures set styles in attributes;
- ``img-src data:``: the icons are masks inside the style sheets.

``connect-src 'self'`` is the search page, which fetches the pages it quotes; ``default-src 'self'`` lets Firefox fetch
the next page ahead.
"""

import base64
import hashlib
import re
from html.parser import HTMLParser

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from .paths import pages_of

DIRECTIVES = {
    "default-src": "'self'",
    "script-src": "'self'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data:",
    "font-src": "'self'",
    "connect-src": "'self'",
    "form-action": "'self'",
    "frame-src": "'none'",
    "media-src": "'none'",
    "object-src": "'none'",
    "worker-src": "'none'",
    "base-uri": "'none'",
}
#: The theme's inline handlers and what page.js listens to instead.
HANDLERS = {
    'onclick="toggleFullScreen()"': 'data-page-action="full-screen"',
    'onclick="window.print()"': 'data-page-action="print"',
}
SCRIPT_TYPES = {"", "text/javascript", "application/javascript", "module"}
WIDGET = "application/vnd.jupyter.widget-view+json"
CHARSET = re.compile(r"<meta charset=[^>]*>")
TAG = '<meta http-equiv="Content-Security-Policy" content="{}">'
OLD_TAG = re.compile(TAG.format('[^"]*'))


class Scripts(HTMLParser):
    """The inline scripts of a page, whether it holds widgets, and what no policy of ours lets run."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.inline: list[str] = []
        self.widgets = False
        self.refused: list[str] = []
        self._open = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        if tag == "script":
            kind = known.get("type", "").strip().lower()
            self.widgets |= kind == WIDGET
            self._open = "src" not in known and kind in SCRIPT_TYPES
            self.inline += [""] * self._open
        inline = [name for name, value in known.items() if name.startswith("on")]
        links = [name for name, value in known.items() if value.strip().lower().startswith("javascript:")]
        self.refused += [f'<{tag} {name}="{known[name]}">' for name in inline + links]

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inline[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = False


def source_of(script: str) -> str:
    """The hash that lets an inline script run, as ``script-src`` writes it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def policy_of(page: str) -> str:
    """The policy of a page; ExtensionError if it holds an inline handler, which no hash of ours covers."""
    found = Scripts(page)
    if found.refused:
        raise ExtensionError(
            f"expected no inline handler, got {found.refused[0]}: listen to it in page.js, see policy.HANDLERS"
        )
    hashes = sorted({source_of(script) for script in found.inline})
    script_src = [DIRECTIVES["script-src"], *["blob:"] * found.widgets, *hashes]
    return "; ".join(f"{name} {value}" for name, value in (DIRECTIVES | {"script-src": " ".join(script_src)}).items())


def secured(page: str) -> str:
    """The page with its policy, ahead of everything that could load, in place of the one it may have had.

    Raises ExtensionError if it does not name a charset.
    """
    page = OLD_TAG.sub("", page)
    for wrong, right in HANDLERS.items():
        page = page.replace(wrong, right)
    if not CHARSET.search(page):
        raise ExtensionError("expected a <meta charset> in every page, got a page without: its policy goes after it")
    tag = TAG.format(policy_of(page))
    return CHARSET.sub(lambda charset: f"{charset[0]}{tag}", page, count=1)


def secure_pages(app: Sphinx, exception: Exception | None) -> None:
    """Write the policy into every page of the build but the top one, which tools/build_book.py writes with its own."""
    if exception or app.builder.format != "html":
        return
    for path in pages_of(app):
        path.write_text(secured(path.read_text(encoding="utf-8")), encoding="utf-8")


def connect(app: Sphinx) -> None:
    """After everyone else has written; page.js takes the place of the inline handlers."""
    app.add_js_file("vendor/page.js", priority=900)
    app.connect("build-finished", secure_pages, priority=950)
