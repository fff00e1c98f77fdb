"""Write the question bank as a deck for Anki: make anki, or make anki SITE=https://... for links into the book.

Models, decks and notes keep their ids from build to build, so that importing a newer deck updates the cards that are
there, and their schedule stays.  A deck is never merged by its texts: the id of a question is what counts.
"""

import argparse
import hashlib
import html
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import genanki
from pybtex.database import BibliographyData, parse_file
from pybtex.richtext import Text

from mixprec_lab.interview import Question, load_bank, themes

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = ROOT / "book" / "references.bib"
APKG = ROOT / "_build" / "mixprec.apkg"
NAME = "Mixed-precision training"
FIELDS = ("Question", "Stub", "Short", "Solution", "Full", "Mistake", "FollowUp", "FollowUpAnswer", "Proof", "Sources")
PARTS = (
    ("Short", "In short"),
    ("Solution", "A solution"),
    ("Full", "In full"),
    ("Mistake", "The usual mistake"),
    ("FollowUp", "The next question"),
    ("FollowUpAnswer", "Its answer"),
    ("Proof", "Proof"),
    ("Sources", "Sources"),
)
CSS = """\
.card { font-family: system-ui, sans-serif; font-size: 18px; line-height: 1.5; text-align: left;
  max-width: 42em; margin: 0 auto; padding: 12px; }
.question { font-weight: 600; }
h4 { margin: 1em 0 0.2em; font-size: 15px; }
p { margin: 0 0 0.5em; }
pre { overflow-x: auto; font-size: 14px; padding: 8px; border: 1px solid #888; }
"""
_POWER = re.compile(r"(?P<base>\d+(?:\.\d+)?|\b[a-z]|\))\^(?P<power>-?\d+(?:\.\d+)?|[a-z]\b|\([^()]+\))")


def stable_id(name: str) -> int:
    """A number that belongs to ``name`` for ever, in the range that Anki gives its ids: 2^30 to 2^31."""
    return (1 << 30) + int.from_bytes(hashlib.sha256(f"mixprec-lab:{name}".encode()).digest()[:8]) % (1 << 30)


def _mathematics(found: re.Match) -> str:
    base, power = found["base"], found["power"].removeprefix("(").removesuffix(")")
    return rf")\({{}}^{{{power}}}\)" if base == ")" else rf"\({base}^{{{power}}}\)"


def field(text: str) -> str:
    r"""``text`` as a field of Anki: escaped, paragraphs, code between backticks, and powers as \( \)."""
    pieces = html.escape(text, quote=False).split("`")
    whole = "".join(f"<code>{p}</code>" if i % 2 else _POWER.sub(_mathematics, p) for i, p in enumerate(pieces))
    return "".join(f"<p>{part}</p>" for part in whole.split("\n\n"))


def code(text: str) -> str:
    """A program as a field of Anki."""
    return f"<pre><code>{html.escape(text, quote=False)}</code></pre>"


def proof(q: Question, site: str) -> str:
    """Where the book proves the answer: a link if the address of the book is known, else the page and the heading."""
    page, anchor = q.proof.split("#")
    words = f"{page}: {anchor.replace('-', ' ')}"
    if not site:
        return words
    return f'<a href="{html.escape(site.rstrip("/"))}/book/{page}.html#{anchor}">{words}</a>'


def source(library: BibliographyData, key: str) -> str:
    """The title and the year of a source, as far as they are known, with its address if it has one."""
    entry = library.entries[key]
    title = str(Text.from_latex(entry.fields["title"]))
    year = f" ({entry.fields['year']})" if "year" in entry.fields else ""
    words = html.escape(title + year, quote=False)
    doi = entry.fields.get("doi")
    address = entry.fields.get("url") or (doi and f"https://doi.org/{doi}")
    return f'<a href="{html.escape(address)}">{words}</a>' if address else words


def model() -> genanki.Model:
    """The kind of note: question and stub in front, every answer behind.  A part without a text does not show."""
    parts = "".join(f"{{{{#{key}}}}}<h4>{title}</h4>{{{{{key}}}}}{{{{/{key}}}}}" for key, title in PARTS)
    front = '<div class="question">{{Question}}</div>{{Stub}}'
    template = {"name": "Card", "qfmt": front, "afmt": f'{{{{FrontSide}}}}<hr id="answer">{parts}'}
    fields = [{"name": name} for name in FIELDS]
    return genanki.Model(stable_id("model"), "Mixed-precision question", fields=fields, templates=[template], css=CSS)


def note(q: Question, kind: genanki.Model, library: BibliographyData, site: str) -> genanki.Note:
    """The note of a question."""
    values = [
        field(q.question),
        code(q.code.stub) if q.code else "",
        field(q.short),
        code(q.code.solution) if q.code else "",
        *(field(text) for text in (q.full, q.mistake, q.follow_up, q.follow_up_answer)),
        proof(q, site),
        "<br>".join(source(library, key) for key in q.sources),
    ]
    tags = ["mixprec", f"theme::{q.theme}", f"level::{q.level}", *(["coding"] if q.code else [])]
    return genanki.Note(model=kind, fields=values, tags=tags, guid=genanki.guid_for("mixprec-lab", q.id))


def decks(questions: Sequence[Question], site: str = "") -> list[genanki.Deck]:
    """One deck a theme, all under one."""
    kind, library, made = model(), parse_file(REFERENCES), []
    for theme, title in themes().items():
        deck = genanki.Deck(stable_id(f"deck:{theme}"), f"{NAME}::{title}")
        for q in questions:
            if q.theme == theme:
                deck.add_note(note(q, kind, library, site))
        made.append(deck)
    return made


def write(path: Path, site: str = "", now: float | None = None) -> int:
    """Write the deck; the number of notes.  ``now`` (default: the clock) tells Anki which of two decks is newer."""
    questions = load_bank()
    path.parent.mkdir(parents=True, exist_ok=True)
    genanki.Package(decks(questions, site)).write_to_file(path, timestamp=time.time() if now is None else now)
    return len(questions)


def main(arguments: list[str]) -> int:
    """Write ``_build/mixprec.apkg`` and say so."""
    parser = argparse.ArgumentParser(description="Write the question bank as a deck for Anki.")
    parser.add_argument("--site", default="", help="address of the built book, for links from the cards")
    site = parser.parse_args(arguments).site
    if site and not re.match(r"(https?|file)://", site):
        parser.error(f"expected --site to be an address like https://example.org/book, got {site!r}")
    print(f"{write(APKG, site)} cards in {APKG.relative_to(ROOT)}; import it in Anki with File, Import.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
