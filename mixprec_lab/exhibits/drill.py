"""Flash cards with spaced repetition, and an exam against the clock."""

import datetime
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.interview import (
    LEVELS,
    NEW,
    PILES,
    Exam,
    Question,
    answer,
    begin,
    export_progress,
    import_progress,
    load_bank,
    merge,
    mixed,
    queue,
    repeats,
    themes,
    to_repeat,
)

ALL = "all"
MODES = {"cards": "flash cards", "exam": "exam"}
ORDERS = {"mixed": "mixed", "themes": "theme by theme"}
COUNTS, MINUTES = (5, 10, 20, 40), (5, 10, 20, 30, 60)
SIDES = ("front", "back")
BACK = ("short", "full", "mistake", "follow_up", "follow_up_answer")
EXAM_IDLE = (
    "Choose theme, level, number of questions and time, and begin. An exam leaves the schedule of your cards as it is."
)
CARDS_IDLE = "Come back then, choose another pile, theme or level, or take an exam."
GRADES = ("blackout", "wrong", "almost", "hard", "good", "perfect")


class Drill(Exhibit):
    """Cards of a question bank (this package's own by default) for the theme and level that the filters name.

    ``progress`` is the state of each card by ``mixprec_lab.interview.schedule``; the page adds what this browser
    remembers, and keeps every answer there.  ``card`` is the id of a card to show, "" for the next one of the pile.
    ``exam`` is the exam that runs, {} before the first.  ``now``, as "2026-11-26T09:30:00", stops the clock for tests.
    Raises TraitError for what is no filter, card, progress, exam or time.
    """

    _esm = es_module("drill", "drill_rules.js")
    _kind = "drill"

    bank = t.List(help="every card").tag(sync=True)
    themes = t.List(help="theme and title, in order").tag(sync=True)
    choices = t.Dict(help="the options of the lists and the words for the grades").tag(sync=True)
    mode = t.Unicode("cards").tag(sync=True)
    theme = t.Unicode(ALL).tag(sync=True)
    level = t.Unicode(ALL).tag(sync=True)
    order = t.Unicode("mixed").tag(sync=True)
    pile = t.Unicode("plan").tag(sync=True)
    card = t.Unicode("").tag(sync=True)
    side = t.Unicode("front").tag(sync=True)
    count = t.Int(10).tag(sync=True)
    minutes = t.Int(20).tag(sync=True)
    progress = t.Dict(help="id -> state").tag(sync=True)
    exam = t.Dict(help="the fields of Exam, or nothing").tag(sync=True)
    now = t.Unicode("").tag(sync=True)

    def __init__(self, questions: Iterable[Question] | None = None, *, name: str | None = None, **state: Any) -> None:
        self._questions = {q.id: q for q in (load_bank() if questions is None else questions)}
        if not self._questions:
            raise ValueError("expected at least one question, got none")
        self._theme_of = {id: q.theme for id, q in self._questions.items()}
        self._titles = {key: title for key, title in themes().items() if key in self._theme_of.values()}
        super().__init__(table_of(["fp16"]), name, **state)
        self.bank = [_for_the_page(q) for q in self._questions.values()]
        self.themes = [list(pair) for pair in self._titles.items()]
        self.choices = {
            "levels": [[key, key] for key in LEVELS],
            "modes": [list(pair) for pair in MODES.items()],
            "orders": [list(pair) for pair in ORDERS.items()],
            "piles": [list(pair) for pair in PILES.items()],
            "counts": list(COUNTS),
            "minutes": list(MINUTES),
            "grades": list(GRADES),
            "idle": {"cards": CARDS_IDLE, "exam": EXAM_IDLE},
        }

    _check_mode = t.validate("mode")(choice("mode", lambda self: MODES))
    _check_theme = t.validate("theme")(choice("theme", lambda self: (ALL, *self._titles)))
    _check_level = t.validate("level")(choice("level", lambda self: (ALL, *LEVELS)))
    _check_order = t.validate("order")(choice("order", lambda self: ORDERS))
    _check_pile = t.validate("pile")(choice("pile", lambda self: PILES))
    _check_side = t.validate("side")(choice("side", lambda self: SIDES))
    _check_count = t.validate("count")(choice("count", lambda self: COUNTS))
    _check_minutes = t.validate("minutes")(choice("minutes", lambda self: MINUTES))

    @t.validate("card")
    def _check_card(self, proposal: Any) -> str:
        if proposal.value and proposal.value not in self._questions:
            raise t.TraitError(f"expected card to be the id of a question or '', got {proposal.value!r}")
        return proposal.value

    @t.validate("progress")
    def _check_progress(self, proposal: Any) -> dict:
        try:
            export_progress(proposal.value)
        except (ValueError, TypeError, AttributeError) as error:
            raise t.TraitError(f"expected progress by id; {error}") from error
        return proposal.value

    @t.validate("exam")
    def _check_exam(self, proposal: Any) -> dict:
        x = proposal.value
        whole = x and all(isinstance(x.get(key), int) for key in ("minutes", "start"))
        lists = x and all(isinstance(x.get(key), list | tuple) for key in ("ids", "grades"))
        if x and not (whole and lists and set(x["ids"]) <= set(self._questions) and len(x["grades"]) <= len(x["ids"])):
            raise t.TraitError(f"expected exam to be the fields of an Exam of this bank, or {{}}, got {x!r:.80}")
        return x

    @t.validate("now")
    def _check_now(self, proposal: Any) -> str:
        try:
            if proposal.value and len(proposal.value) == 19:
                datetime.datetime.fromisoformat(proposal.value)
                return proposal.value
        except ValueError:
            pass
        if proposal.value:
            raise t.TraitError(f"expected now to be like '2026-11-26T09:30:00', or '', got {proposal.value!r}")
        return ""

    def today(self) -> datetime.date:
        """The day of ``now``, or of the clock."""
        return datetime.date.fromisoformat(self.now[:10]) if self.now else datetime.date.today()

    def second(self) -> int:
        """``now`` in seconds, or those of the clock."""
        if not self.now:
            return int(time.time())
        return int(datetime.datetime.fromisoformat(self.now).replace(tzinfo=datetime.UTC).timestamp())

    def passing(self) -> list[str]:
        """The ids of the questions that pass the filters, in their order."""
        ids = [q.id for q in self._questions.values() if self.theme in (ALL, q.theme) and self.level in (ALL, q.level)]
        return mixed(ids, self._theme_of) if self.order == "mixed" else ids

    def queue(self) -> list[str]:
        """The ids of the cards to come."""
        return queue(self.progress, self.passing(), self.pile, self.today())

    def running(self) -> Exam | None:
        """The exam, running or over; None before the first."""
        if not self.exam:
            return None
        return Exam(**{**self.exam, "ids": tuple(self.exam["ids"]), "grades": tuple(self.exam["grades"])})

    def current(self) -> Question | None:
        """The question on the table; None if there is none."""
        if self.mode == "exam":
            exam = self.running()
            return None if exam is None or exam.over(self.second()) else self._questions[exam.ids[len(exam.grades)]]
        id = self.card or next(iter(self.queue()), None)
        return None if id is None else self._questions[id]

    def grade(self, quality: int) -> None:
        """Record a grade for the question on the table and lay down the next one; ValueError if there is none."""
        asked = self.current()
        if asked is None:
            raise ValueError("expected a question on the table, got none; change the filters, or begin an exam")
        if self.mode == "exam":
            self.exam = asdict(self.running().grade(quality, self.second()))
        else:
            order = self.queue()
            at = order.index(asked.id) + 1 if asked.id in order else len(order)
            self.progress = answer(self.progress, asked.id, quality, self.today())
            self.card = order[at] if at < len(order) else ""
        self.side = "front"

    def skip(self, by: int = 1) -> None:
        """Lay down the next card of the pile, or the one before (-1), round and round; nothing in an exam."""
        order, shown = self.queue(), self.current()
        if self.mode == "exam" or shown is None or not order:
            return
        at = order.index(shown.id) if shown.id in order else (-1 if by > 0 else 0)
        self.card, self.side = order[(at + by) % len(order)], "front"

    def begin_exam(self, seed: int) -> None:
        """Draw an exam from the questions that pass the filters, and start its clock."""
        self.exam = asdict(begin(self.passing(), self.count, self.minutes, seed, self.second()))
        self.side = "front"

    def export(self) -> str:
        """The progress as text, which ``load`` and the page read."""
        return export_progress(self.progress)

    def load(self, text: str) -> None:
        """Add an exported progress: of a card in both, the state reviewed last stays.  ValueError for other text."""
        self.progress = merge(self.progress, import_progress(text))

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        shown = self.current()
        texts = {"verdict": self._exam_verdict() if self.mode == "exam" else self._card_verdict(shown)}
        texts |= {"left": self._left(), "meta": "" if shown is None else self._meta(shown)}
        idle = shown is None and not (self.mode == "exam" and self.exam)
        texts["idle"] = "" if not idle else EXAM_IDLE if self.mode == "exam" else CARDS_IDLE
        back = shown is not None and self.side == "back"
        texts |= {"question": _plain(shown.question) if shown else "", "stub": _code(shown, "stub")}
        texts |= {key: _plain(getattr(shown, key)) if back else "" for key in BACK}
        texts |= {"solution": _code(shown, "solution") if back else "", "proof": _place(shown.proof) if back else ""}
        texts |= {f"next-{q}": self._next(shown, q) for q in range(6)}
        exam = self.running()
        if self.mode == "exam" and exam is not None and exam.over(self.second()):
            for theme, (asked, passed, points) in exam.score(self._theme_of).items():
                texts[f"score-{theme}"] = f"{passed} of {asked} passed, {points} of {5 * asked} points"
        return texts

    def _card_verdict(self, shown: Question | None) -> str:
        ids, order, today = self.passing(), self.queue(), self.today().isoformat()
        if shown is None:
            if not ids:
                return "No question passes the filters."
            if self.pile == "weak":
                return "No card scored below 4 at its last answer."
            following = min(self.progress[id]["due"] for id in ids)
            return f"Nothing is due among {_cards(len(ids))}; the next one is on {following}."
        dates = [self.progress.get(id, NEW)["due"] for id in ids]
        counts = sum(d is not None and d <= today for d in dates), dates.count(None)
        weak = len(set(to_repeat(self.progress)) & set(ids))
        place = f"Card {order.index(shown.id) + 1} of {len(order)}" if shown.id in order else "A card from elsewhere"
        what = "Answer aloud, then look." if self.side == "front" else "Grade yourself."
        return f"{place}: {counts[0]} due, {counts[1]} new, {weak} to repeat. {what}"

    def _exam_verdict(self) -> str:
        exam, ids = self.running(), self.passing()
        if exam is None:
            asked = f"{min(self.count, len(ids))} of {len(ids)} questions in {self.minutes} minutes"
            return f"An exam of {asked}." if ids else "No question passes the filters."
        if not exam.over(self.second()):
            what = "Answer aloud, then look." if self.side == "front" else "Grade yourself: 3 and more passes."
            return f"Question {len(exam.grades) + 1} of {len(exam.ids)}. {what}"
        passed, n = sum(row[1] for row in exam.score(self._theme_of).values()), len(exam.ids)
        said = f"{passed} of {n} passed with 3 or more, {sum(exam.grades)} of {5 * n} points."
        if missing := n - len(exam.grades):
            said += f" {missing} not answered{': time was up' if exam.ended is None else ''}."
        return said

    def _left(self) -> str:
        if self.mode != "exam":
            return ""
        exam = self.running()
        seconds = 60 * self.minutes if exam is None else exam.left(self.second())
        return f"{seconds // 60}:{seconds % 60:02}"

    def _meta(self, q: Question) -> str:
        said = f"{self._titles[q.theme]}, {q.level}"
        if self.mode == "exam":
            return said
        state = self.progress.get(q.id, NEW)
        if state["due"] is None:
            return f"{said}; never seen"
        ease = f"{state['ease'] // 100}.{state['ease'] % 100:02}"
        return f"{said}; due {state['due']}, interval {state['interval']} d, ease {ease}"

    def _next(self, q: Question | None, quality: int) -> str:
        if q is None or self.mode == "exam":
            return ""
        after = answer(self.progress, q.id, quality, self.today())[q.id]
        if repeats(self.progress.get(q.id, NEW), self.today()):
            return "today" if after["again"] else "done"
        return f"today, {after['interval']} d" if after["again"] else f"{after['interval']} d"


def _cards(count: int) -> str:
    return "this one card" if count == 1 else f"these {count} cards"


def _plain(text: str) -> str:
    return text.replace("`", "")


def _code(q: Question | None, part: str) -> str:
    return getattr(q.code, part) if q is not None and q.code else ""


def _place(proof: str) -> str:
    page, anchor = proof.split("#")
    return f"{page}: {anchor.replace('-', ' ')}"


def _for_the_page(q: Question) -> dict[str, Any]:
    card = {key: getattr(q, key) for key in ("id", "theme", "level", "question", *BACK, "proof")}
    return card | ({"stub": q.code.stub, "solution": q.code.solution} if q.code else {})
