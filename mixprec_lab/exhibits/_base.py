"""The common part of every exhibit: one ES module without imports, the formats it needs, checked traits."""

import re
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import traitlets as t

from mixprec_lab.exhibits._text import parse_number
from mixprec_lab.formats import FORMATS, FloatFormat, FormatLike, get_format
from mixprec_lab.plots.style import FORMAT_COLOURS

_HERE = Path(__file__).parent
_SHARED = ("float.js", "text.js", "ui.js")
_DROPPED = ("has_zero", "binades")  # not read by the page
_OWN_COLOURS = ("#4d4d4d", "#c9c9c9")  # for formats that are not in FORMATS


@cache
def es_module(name: str, *own: str) -> str:
    """The source of exhibit ``name`` as one module: the shared files and its own parts, without ``export``, then it.

    Every file is a module of its own, for node and for editors; the page and JupyterLab get them joined because a
    widget travels as one string.  Comment lines stay behind.
    """
    parts = []
    joined = (*_SHARED, *own)
    for file in (*joined, f"{name}.js"):
        source = re.sub(r"^(import [^;]*;| *//.*)\n", "", (_HERE / file).read_text("utf-8"), flags=re.MULTILINE)
        parts.append(re.sub(r"^export ", "", source, flags=re.MULTILINE) if file in joined else source)
    return "".join(parts)


@cache
def style_sheet() -> str:
    """The style sheet that all exhibits share."""
    return (_HERE / "exhibit.css").read_text(encoding="utf-8")


def describe(fmt: FloatFormat) -> dict[str, Any]:
    """What the page needs to know of a format: its descriptor and its two colours (light theme, dark theme)."""
    known = {key: value for key, value in fmt.as_dict().items() if key not in _DROPPED}
    return known | {"colours": list(FORMAT_COLOURS.get(fmt.name, _OWN_COLOURS))}


def table_of(formats: Iterable[FormatLike] | None, default: Iterable[str] = tuple(FORMATS)) -> dict[str, FloatFormat]:
    """The formats asked for, by name and in their order; the default ones for None.  ValueError for none at all."""
    chosen = [get_format(f) for f in (default if formats is None else formats)]
    if not chosen:
        raise ValueError("expected at least one format, got none")
    return {f.name: f for f in chosen}


def _ranked(offered: dict[str, FloatFormat]) -> dict[str, dict[str, Any]]:
    """The descriptions with their places: the built page sorts the keys of a widget's state, the drawing must not."""
    return {key: describe(fmt) | {"rank": rank} for rank, (key, fmt) in enumerate(offered.items())}


class Exhibit(anywidget.AnyWidget):
    """A drawing that answers in the page, with a kernel or without; its traits are its state.

    ``formats`` are the formats it offers; ``name`` is what a link to its state starts with: give one if a page shows
    the same exhibit twice from the same start.
    """

    _css = style_sheet()
    _kind = "exhibit"

    name = t.Unicode(help="the stem of links to this exhibit").tag(sync=True)
    formats = t.Dict(help="name -> descriptor and colours, for the page").tag(sync=True)

    def __init__(self, offered: dict[str, FloatFormat], name: str | None, **state: Any) -> None:
        self._offered = offered
        self._shown = {key: value for key, value in state.items() if value != self.trait_defaults().get(key)}
        stem = name or f"{self._kind}-{zlib.crc32(repr((sorted(offered), state)).encode()) & 0xFFFF:04x}"
        super().__init__(name=stem, formats=_ranked(offered), **state)

    def __repr__(self) -> str:
        """Class and arguments: the same in every run, so that a notebook's output can be compared."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._shown.items())})"

    @t.validate("name")
    def _check_name(self, proposal: Any) -> str:
        if not proposal.value or not all(c.isalnum() or c in "-_" for c in proposal.value):
            raise t.TraitError(f"expected a name of letters, digits, '-' and '_', got {proposal.value!r}")
        return proposal.value

    def _format(self, key: str) -> FloatFormat:
        return self._offered[key]

    def result(self) -> dict[str, str]:
        """Every text that the page shows for the present state, by its ``data-field``, computed in Python."""
        raise NotImplementedError


def read_number(text: str) -> float:
    """The number that ``text`` names (see ``parse_number``); TraitError, saying what may be written, if none."""
    try:
        return parse_number(text)
    except ValueError as error:
        raise t.TraitError(f"expected a number as text, got {text!r}. {error}") from None


def choice(what: str, options: Callable[[Any], Iterable[str]]) -> Any:
    """A validator: the value must be one of ``options(exhibit)``; TraitError names them."""

    def check(self: Exhibit, proposal: Any) -> str:
        allowed = list(options(self))
        if proposal.value not in allowed:
            raise t.TraitError(f"expected {what} to be one of {', '.join(map(str, allowed))}, got {proposal.value!r}")
        return proposal.value

    return check
