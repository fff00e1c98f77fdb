"""Everything a page loads comes from the book itself: MathJax, the widget host, our style sheet."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError

from .paths import FETCHED, ROOT, STATIC

MATHJAX = FETCHED / "mathjax"
#: source -> place under _static/vendor.  MathJax loads fonts, and its accessibility menu loads a11y and sre, on demand.
STAGED = {
    MATHJAX / "es5/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
    MATHJAX / "es5/output/chtml/fonts": "mathjax/output/chtml/fonts",
    MATHJAX / "es5/a11y": "mathjax/a11y",
    MATHJAX / "es5/sre": "mathjax/sre",
    MATHJAX / "LICENSE": "mathjax/LICENSE",
    STATIC / "gentle-math.js": "gentle-math.js",
    STATIC / "page.js": "page.js",
    STATIC / "widget-host.js": "widget-host.js",
    STATIC / "book.css": "book.css",
    ROOT / "mixprec_lab/exhibits/exhibit.css": "exhibit.css",  # for pages without scripts; others get it with the state
}


def stage(app: Sphinx, config: Config) -> None:
    """Gather the files in _build/vendor_static and have Sphinx copy them; ExtensionError names the missing ones."""
    missing = [str(source) for source in STAGED if not source.exists()]
    if missing:
        raise ExtensionError(f"browser files are missing, run 'make install': {', '.join(missing)}")
    folder = Path(app.outdir).parent / "vendor_static"
    shutil.rmtree(folder, ignore_errors=True)
    for source, place in STAGED.items():
        target = folder / "vendor" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
    config.html_static_path.append(str(folder))


def connect(app: Sphinx) -> None:
    """Stage before the build starts."""
    app.connect("config-inited", stage)
    app.add_css_file("vendor/book.css", priority=900)
    app.add_js_file("vendor/gentle-math.js", priority=900)  # after the configuration it extends
