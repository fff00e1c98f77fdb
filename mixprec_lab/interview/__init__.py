"""A question bank on mixed-precision training, and the schedule by which to learn it.

A question is data: one YAML file a theme, read and checked by ``load_bank``.  Each has a short and a full answer, the
mistake most people make, the question that comes next, a place in the book that proves it, and sources.  Coding
questions carry a stub, a check and a solution (``run_check``).  ``schedule`` is SM-2, the published algorithm for when
to see a card again.  Importing this package does not import torch.
"""

from mixprec_lab.interview.bank import LEVELS, BankError, Code, Question, get_question, load_bank, select, themes
from mixprec_lab.interview.schedule import (
    NEW,
    due,
    export_progress,
    import_progress,
    repeat_today,
    review,
    to_repeat,
)
from mixprec_lab.interview.session import PILES, Exam, answer, begin, draw, merge, mixed, queue, repeats, workload
from mixprec_lab.interview.sheets import Sheet, answer_sheet, counts, listing

__all__ = [
    "LEVELS",
    "NEW",
    "PILES",
    "BankError",
    "Code",
    "Exam",
    "Question",
    "Sheet",
    "answer",
    "answer_sheet",
    "begin",
    "counts",
    "draw",
    "due",
    "export_progress",
    "get_question",
    "import_progress",
    "listing",
    "load_bank",
    "merge",
    "mixed",
    "queue",
    "repeat_today",
    "repeats",
    "review",
    "select",
    "themes",
    "to_repeat",
    "workload",
]
