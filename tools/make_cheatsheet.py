"""Set book/cheatsheet.md as a PDF of one page of A4, in two columns.  It needs no browser.

The page and the PDF are one text: headings, paragraphs, tables and code of the Markdown file.  What stands under
``{.screen-only}`` is for the web page alone.  What the setter does not know, or what does not fit, is an error.
"""

import html
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import matplotlib
from markdown_it import MarkdownIt
from markdown_it.token import Token
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import (
    BaseDocTemplate,
    Flowable,
    Frame,
    KeepTogether,
    PageTemplate,
    Paragraph,
    Preformatted,
    Table,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "book" / "cheatsheet.md"
PDF = ROOT / "_build" / "cheatsheet.pdf"
SCREEN_ONLY = "{.screen-only}"
FONTS = {"Sans": "DejaVuSans", "Sans-Bold": "DejaVuSans-Bold", "Sans-Oblique": "DejaVuSans-Oblique",
         "Mono": "DejaVuSansMono"}  # fmt: skip
SIZE, MARGIN, GUTTER, GAP = 7.2, 9 * mm, 5 * mm, 3.5
COLUMN = (A4[0] - 2 * MARGIN - GUTTER) / 2
TEXT = ParagraphStyle("text", fontName="Sans", fontSize=SIZE, leading=1.33 * SIZE, spaceAfter=1.5)
HEAD = ParagraphStyle("head", parent=TEXT, fontName="Sans-Bold")
HEADING = ParagraphStyle("heading", parent=HEAD, fontSize=9.5, leading=12, spaceBefore=7, spaceAfter=2,
                         textColor=colors.HexColor("#0063b2"))  # fmt: skip
TITLE = ParagraphStyle("title", parent=HEAD, fontSize=13, leading=16)
CODE = ParagraphStyle("code", parent=TEXT, fontName="Mono", fontSize=6.5, leading=8.4, spaceAfter=2)
LINES = [
    ("LINEBELOW", (0, 0), (-1, 0), 0.6, colors.black),
    ("LINEBELOW", (0, 1), (-1, -1), 0.2, colors.grey),
    ("VALIGN", (0, 0), (-1, -1), "TOP"),
    ("LEFTPADDING", (0, 0), (-1, -1), 0),
    ("RIGHTPADDING", (0, 0), (-1, -1), GAP - 0.5),
    ("TOPPADDING", (0, 0), (-1, -1), 1),
    ("BOTTOMPADDING", (0, 0), (-1, -1), 1.8),
]


def register_fonts() -> None:
    """Make the fonts known that matplotlib brings: they have every sign of the sheet and are always there."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name, file in FONTS.items():
        pdfmetrics.registerFont(TTFont(name, folder / f"{file}.ttf"))
    pdfmetrics.registerFontFamily("Sans", "Sans", "Sans-Bold", "Sans-Oblique", "Sans-Bold")


def inline(tokens: list[Token]) -> str:
    """A line of text in ReportLab's markup."""
    known = {"em_open": "<i>", "em_close": "</i>", "strong_open": "<b>", "strong_close": "</b>", "softbreak": " "}
    parts = []
    for token in tokens:
        if token.type == "text":
            parts.append(html.escape(token.content, quote=False))
        elif token.type == "code_inline":
            parts.append(f'<font name="Mono">{html.escape(token.content, quote=False)}</font>')
        elif token.type == "html_inline" and token.content.strip("</>") in ("sub", "sup"):
            parts.append(token.content.replace("sup", "super"))
        elif token.type in known:
            parts.append(known[token.type])
        else:
            raise ValueError(f"expected text, code, sub or sup in {SOURCE.name}, got {token.type} {token.content!r}")
    return "".join(parts)


def rows(tokens: Iterator[Token]) -> list[list[str]]:
    """The cells of a table, up to its end."""
    found: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline":
            found[-1].append(inline(token.children))
        elif token.type == "table_close":
            return found
    raise ValueError("expected the end of a table, got the end of the file")


def widths(cells: list[list[Paragraph]]) -> list[float]:
    """Widths that sum to the column: each what its longest line takes, the longest cut down where that is too much.

    A head may take two lines.
    """
    columns = list(zip(*cells, strict=True))
    least = [max(p.minWidth() for p in column) + GAP for column in columns]
    needed = [max(m, *(_line(p) + GAP for p in column[1:])) for m, column in zip(least, columns, strict=True)]
    spare = COLUMN - sum(needed)
    if spare >= 0:
        return [width + spare / len(needed) for width in needed]
    room = COLUMN - sum(least)
    if room < 0:
        raise ValueError(f"expected a table of at most {COLUMN:.0f} points, got {sum(least):.0f}; shorten its words")
    wanted = sum(needed) - sum(least)
    return [m + room * (n - m) / wanted for m, n in zip(least, needed, strict=True)]


def _line(paragraph: Paragraph) -> float:
    paragraph.wrap(10_000, 10_000)
    return max(paragraph.getActualLineWidths0())


def table(cells: list[list[str]]) -> Table:
    """A table as wide as the column, its first row as head."""
    set_ = [[Paragraph(text, TEXT if n else HEAD) for text in row] for n, row in enumerate(cells)]
    return Table(set_, colWidths=widths(set_), style=LINES, spaceAfter=2)


def program(text: str) -> Preformatted:
    """Code, line by line."""
    longest = max(pdfmetrics.stringWidth(line, CODE.fontName, CODE.fontSize) for line in text.splitlines())
    if longest > COLUMN:
        raise ValueError(f"expected lines of code of at most {COLUMN:.0f} points, got {longest:.0f}; shorten them")
    return Preformatted(text, CODE)


def flowables(text: str) -> list[Flowable]:
    """The sheet, section by section, none of them torn.  Raises ValueError for Markdown that it does not use."""
    tokens, sections, style = iter(MarkdownIt("commonmark").enable("table").parse(text)), [[]], TEXT
    for token in tokens:
        if token.type == "heading_open":
            style = TITLE if token.tag == "h1" else HEADING
            sections.append([])
        elif token.type == "inline" and not token.content.startswith(SCREEN_ONLY):
            sections[-1].append(Paragraph(inline(token.children), style))
        elif token.type == "fence":
            sections[-1].append(program(token.content.rstrip()))
        elif token.type == "table_open":
            sections[-1].append(table(rows(tokens)))
        elif token.type in ("heading_close", "paragraph_close"):
            style = TEXT
        elif token.type not in ("inline", "paragraph_open"):
            raise ValueError(f"expected headings, paragraphs, tables and code in {SOURCE.name}, got {token.type}")
    return [KeepTogether(section) for section in sections if section]


def write(path: Path, source: Path = SOURCE) -> None:
    """Write the PDF, the same bytes for the same text.  ValueError if it takes more than one page."""
    register_fonts()
    height = A4[1] - 2 * MARGIN
    frames = [Frame(MARGIN + n * (COLUMN + GUTTER), MARGIN, COLUMN, height, 0, 0, 0, 0) for n in (0, 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = BaseDocTemplate(str(path), pagesize=A4, invariant=1, lang="en", title="Mixed precision: cheat sheet",
                            author=f"Mixed-Precision Training Lab {version('mixprec_lab')}")  # fmt: skip
    sheet.addPageTemplates(PageTemplate("two", frames))
    sheet.build(flowables(source.read_text(encoding="utf-8")))
    if sheet.page != 1:
        path.unlink()
        raise ValueError(f"expected {source.name} to fit on one page of A4, got {sheet.page} pages; shorten it")


def main() -> int:
    """Write ``_build/cheatsheet.pdf`` and say so."""
    write(PDF)
    print(f"One page of A4 in {PDF.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
