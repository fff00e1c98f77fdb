"""What the theme gets wrong: idle scripts, one that breaks every page, and parts a screen reader cannot name."""

import re

from docutils.nodes import document
from sphinx.application import Sphinx
from sphinx.config import Config

from .paths import TEMPLATES, pages_of


def is_thebe(script: object) -> bool:
    """Whether a script tag belongs to sphinx-thebe, which declares one constant twice: an error on every page."""
    body = str(getattr(script, "attributes", {}).get("body", ""))
    return "THEBE_JS_URL" in body or "sphinx-thebe" in str(getattr(script, "filename", script))


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: document | None) -> None:
    """Leave sphinx-thebe's scripts and style out: the book runs no code in a remote kernel."""
    context["script_files"] = [script for script in context["script_files"] if not is_thebe(script)]
    context["css_files"] = [sheet for sheet in context["css_files"] if "thebe" not in str(sheet.filename)]


#: What MathJax would look at: its classes as Sphinx and MyST-NB write them.
MATH = re.compile(r'class="[^"]*\b(math|tex2jax_process|mathjax_process|output_area)\b')
#: Markup of Sphinx and its extensions that a screen reader stumbles over, and what it should have been: a label that
#: hides the visible words of a fold, and a list whose entries are not list items.
REPAIRS = (
    (' aria-label="Toggle hidden content"', ""),
    ('role="doc-biblioentry"', 'role="listitem"'),
)


def repair_markup(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: document | None) -> None:
    """Apply ``REPAIRS`` to the body of a page."""
    for wrong, right in REPAIRS:
        context["body"] = context.get("body", "").replace(wrong, right)


def drop_idle_mathjax(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: document | None) -> None:
    """Load MathJax, half of a page's weight and most of its start-up time, only where there is something to set."""
    if not MATH.search(context.get("body", "")):
        idle = ("mathjax", "gentle-math")
        context["script_files"] = [s for s in context["script_files"] if not any(n in str(s.filename) for n in idle)]


def light_without_scripts(app: Sphinx, exception: Exception | None) -> None:
    """Start every page in the light theme: "auto" is a word only the theme's script knows, and has no colours."""
    if exception or app.builder.format != "html":
        return
    for path in pages_of(app):
        page = path.read_text(encoding="utf-8")
        path.write_text(page.replace(' data-theme="auto">', ' data-theme="light">', 1), encoding="utf-8")


def use_templates(app: Sphinx, config: Config) -> None:
    """Our corrected templates come before the theme's."""
    config.templates_path.insert(0, str(TEMPLATES))


def connect(app: Sphinx) -> None:
    """Late for the page context, so that everyone else has added their scripts."""
    app.connect("config-inited", use_templates)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", repair_markup, priority=900)
    app.connect("html-page-context", drop_idle_mathjax, priority=900)
    app.connect("build-finished", light_without_scripts)
