"""Replace the theme's icon script, 1.5 MB on every page, by a few kilobytes of CSS.

The theme ships all of FontAwesome as JavaScript.  After the pages are written, the icons they name are looked up in
that script and written as CSS masks filled with the text colour.  The build fails if a page names an unknown icon.
"""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pydata_sphinx_theme
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

SCRIPT = (
    Path(pydata_sphinx_theme.__file__).parent
    / "theme/pydata_sphinx_theme/static/scripts/fontawesome.js"
)
STYLES = {
    "fas": "solid", "fa-solid": "solid", "fa": "solid", "far": "regular", "fa-regular": "regular",
    "fab": "brands", "fa-brands": "brands",
}  # fmt: skip
NOT_ICONS = {*STYLES, "fa-lg", "fa-sm", "fa-xs", "fa-fw", "fa-2x", "fa-spin"}
CLASS_LIST = re.compile(r'class=\\?"([^"\\]*\bfa[srb]?\b[^"\\]*)')
ENTRY = re.compile(r'[{,]"?([a-z0-9-]+)"?:\[(\d+),(\d+),(\[[^\]]*\]),"[0-9a-f]*",("[^"]*"|\[[^\]]*\])\]')
PREAMBLE = """\
.fa-solid, .fa-regular, .fa-brands, .fas, .far, .fab, .fa {
  display: inline-block; width: 1.25em; height: 1em; vertical-align: -0.125em; background: currentColor;
  -webkit-mask: var(--icon) center / contain no-repeat; mask: var(--icon) center / contain no-repeat;
}
.fa-solid::before, .fa-regular::before, .fa-brands::before, .fas::before, .far::before, .fab::before, .fa::before {
  content: none !important;
}
@media (forced-colors: active) {
  .fa-solid, .fa-regular, .fa-brands, .fas, .far, .fab, .fa { forced-color-adjust: none; background: ButtonText; }
}
"""


class Icon(NamedTuple):
    """One glyph: the size of its box and its SVG path."""

    width: int
    height: int
    path: str

    def rule(self, name: str) -> str:
        """The CSS rule that gives elements of class ``name`` this glyph as their mask."""
        svg = (
            f"%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}'%3E"
            f"%3Cpath d='{self.path}'/%3E%3C/svg%3E"
        )
        return f'.{name} {{ --icon: url("data:image/svg+xml,{svg}"); }}\n'


class IconSet:
    """The glyphs inside the theme's script, by style and name; old names work too."""

    def __init__(self, script: str) -> None:
        self.script = script

    @cached_property
    def styles(self) -> dict[str, dict[str, Icon]]:
        """``{"solid": {"bars": Icon(...)}}``; each style's block of the script ends with its registration."""
        found, start = {}, 0
        for marker in re.finditer(r'\("fa-(solid|regular|brands)",\w+\)\}\)', self.script):
            found[marker[1]] = self.read(self.script[start : marker.start()])
            start = marker.end()
        return found

    def read(self, block: str) -> dict[str, Icon]:
        """All glyphs of one block of the script."""
        icons = {}
        for name, width, height, aliases, shape in ENTRY.findall(block):
            path = json.loads(shape)
            icon = Icon(int(width), int(height), path if isinstance(path, str) else "".join(path))
            for other in (name, *re.findall(r'"([^"]+)"', aliases)):
                icons.setdefault(other, icon)
        return icons

    def get(self, style: str, name: str) -> Icon:
        """The glyph; ExtensionError if there is none of that name."""
        if name not in self.styles.get(style, {}):
            raise ExtensionError(f"a page uses the icon '{name}' ({style}), which the theme's icon set does not have")
        return self.styles[style][name]


def used_icons(texts: list[str]) -> set[tuple[str, str]]:
    """``(style, class name)`` of every icon named in a class attribute of the given pages and scripts."""
    used = set()
    for text in texts:
        for classes in map(str.split, CLASS_LIST.findall(text)):
            styles = [STYLES[name] for name in classes if name in STYLES]
            icons = [name for name in classes if name.startswith("fa-") and name not in NOT_ICONS]
            used.update((styles[0] if styles else "solid", name) for name in icons)
    return used


def write_css(app: Sphinx, exception: Exception | None) -> None:
    """Write the style sheet for the icons in use and drop the script."""
    if exception or app.builder.format != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    scripts = [static / "scripts/sphinx-book-theme.js", static / "scripts/pydata-sphinx-theme.js"]
    pages = [p for p in out.rglob("*.html") if static not in p.parents]
    texts = [p.read_text(encoding="utf-8") for p in [*pages, *scripts]]
    glyphs = IconSet(SCRIPT.read_text(encoding="utf-8"))
    rules = [glyphs.get(style, name.removeprefix("fa-")).rule(name) for style, name in sorted(used_icons(texts))]
    (static / "icons.css").write_text(PREAMBLE + "".join(rules), encoding="utf-8")
    # The script, the theme's source maps and its raw templates are of no use to a reader.
    patterns = ("scripts/fontawesome.js*", "**/*.map", "*webpack-macros.html")
    for unused in {path for pattern in patterns for path in static.glob(pattern)}:
        unused.unlink()


def connect(app: Sphinx) -> None:
    """The pages link the style sheet; it is written when they are."""
    app.add_css_file("icons.css", priority=901)
    app.connect("build-finished", write_css)
