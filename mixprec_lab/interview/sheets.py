"""Questions as they stand on a page: HTML made from the bank, so that no text has to be written twice.

A sheet prints as one line of plain text where no HTML is shown.
"""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mixprec_lab.interview.bank import LEVELS, Question, get_question, load_bank, themes

PARTS = (
    ("short", "In short"),
    ("full", "In full"),
    ("mistake", "The usual mistake"),
    ("follow_up", "The next question"),
    ("follow_up_answer", "Its answer"),
)
_POWER = re.compile(r"\^(-?\d+(?:\.\d+)?|[a-z]\b)")


@dataclass(frozen=True)
class Sheet:
    """Questions to be shown; ``html`` is what a notebook shows."""

    title: str
    html: str

    def __repr__(self) -> str:
        return self.title

    def _repr_html_(self) -> str:
        return self.html


def as_html(text: str) -> str:
    """``text`` as paragraphs of HTML: what stands between backticks as code, powers like 2^-24 raised."""
    return "".join(f"<p>{_inline(part)}</p>" for part in text.split("\n\n"))


def _inline(text: str) -> str:
    pieces = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else _POWER.sub(r"<sup>\1</sup>", p) for i, p in enumerate(pieces))


def proof_link(q: Question) -> str:
    """The link to the place in the book that proves the answer; pages lie in one folder."""
    page, anchor = q.proof.split("#")
    return f'<a href="{page}.html#{anchor}">{page}: {anchor.replace("-", " ")}</a>'


def answer_sheet(*ids: str) -> Sheet:
    """The questions of these ids with all their answers, in this order.  KeyError for an unknown id."""
    questions = [get_question(id) for id in ids]
    return Sheet(f"{len(ids)} answered: {', '.join(ids)}", "".join(map(_in_full, questions)))


def _in_full(q: Question) -> str:
    parts = "".join(f"<dt>{title}</dt><dd>{as_html(getattr(q, key))}</dd>" for key, title in PARTS)
    proof = f"<dt>Proof</dt><dd><p>{proof_link(q)}</p></dd>"
    return f'<div class="answer-sheet"><p class="question">{_inline(q.question)}</p><dl>{parts}{proof}</dl></div>'


def listing(questions: Iterable[Question] | None = None) -> Sheet:
    """Every question with its short answer and its proof, folded by theme; the whole bank by default."""
    questions = load_bank() if questions is None else tuple(questions)
    folds = [_fold(title, [q for q in questions if q.theme == name]) for name, title in themes().items()]
    return Sheet(f"{len(questions)} questions with their short answers", "".join(folds))


def _fold(title: str, questions: list[Question]) -> str:
    if not questions:
        return ""
    rows = "".join(f'<dt id="q-{q.id}">{_inline(q.question)} <small>{q.level}</small></dt>'
                   f"<dd>{as_html(q.short)}<p>{proof_link(q)}</p></dd>" for q in questions)  # fmt: skip
    summary = f"<summary>{title}: {len(questions)} questions</summary>"
    return f'<details class="question-list">{summary}<dl>{rows}</dl></details>'


def counts() -> list[list[str]]:
    """Rows of a table: the title of a theme, its questions at each level, and all of them; a last row of sums."""
    bank = load_bank()
    rows = [
        [title, *(sum(q.theme == name and q.level == level for q in bank) for level in LEVELS)]
        for name, title in themes().items()
    ]
    sums = [sum(row[1 + n] for row in rows) for n in range(len(LEVELS))]
    return [[row[0], *map(str, row[1:]), str(sum(row[1:]))] for row in [*rows, ["all", *sums]]]
