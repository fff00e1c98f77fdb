"""Which card comes next, and an exam against the clock: pure functions on the progress of ``schedule``.

The exhibit ``drill`` does the same in the page.  Times are whole seconds of one clock, which one does not matter.
"""

import datetime
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mixprec_lab.interview.schedule import NEW, PASSED, due, repeat_today, review, to_repeat

Date = datetime.date
PILES: Mapping[str, str] = MappingProxyType({
    "plan": "today's plan",
    "weak": "weak ones",
    "all": "all cards",
})  # fmt: skip


def queue(progress: Mapping[str, Mapping], ids: Iterable[str], pile: str, today: Date) -> list[str]:
    """Those of ``ids`` that are in a pile, in the order in which they come.

    The plan is what is due, oldest first, then what was never seen, and last what scored below 4 and waits for its
    repetition.  Raises KeyError, with the names, for another pile.
    """
    ids = list(ids)
    if pile not in PILES:
        raise KeyError(f"expected a pile, got {pile!r}; the names are {', '.join(PILES)}")
    if pile == "all":
        return ids
    again = set(to_repeat(progress))
    weak = [id for id in ids if id in again]
    if pile == "weak":
        return weak
    first = due(progress, ids, today)
    return first + [id for id in weak if id not in first]


def repeats(state: Mapping, today: Date) -> bool:
    """Whether an answer today is a repetition: the card scored below 4, and its review is not due yet."""
    return state["again"] and state["due"] is not None and state["due"] > today.isoformat()


def answer(progress: Mapping[str, Mapping], id: str, quality: int, today: Date) -> dict[str, dict]:
    """The progress after an answer: a repetition where ``repeats`` says so, else a review.

    ``progress`` itself is not changed; ValueError as ``review``.
    """
    state = progress.get(id, NEW)
    after = repeat_today(state, quality) if repeats(state, today) else review(state, quality, today)
    return {**progress, id: after}


def reviewed(state: Mapping) -> str:
    """The date of the last review as text that sorts; "" for a card that was never seen."""
    if state["due"] is None:
        return ""
    return (Date.fromisoformat(state["due"]) - datetime.timedelta(days=state["interval"])).isoformat()


def merge(kept: Mapping[str, Mapping], read: Mapping[str, Mapping]) -> dict[str, dict]:
    """Both progresses in one: of a card that is in both, the state reviewed last, and ``read``'s of the same day."""
    newer = {id: state for id, state in read.items() if id not in kept or reviewed(state) >= reviewed(kept[id])}
    return {**kept, **newer}


def mixed(ids: Iterable[str], theme_of: Mapping[str, str]) -> list[str]:
    """``ids`` dealt in rounds: the first of each theme, then the second of each, and so on."""
    piles: dict[str, list[str]] = {}
    for id in ids:
        piles.setdefault(theme_of[id], []).append(id)
    longest = max(map(len, piles.values()), default=0)
    return [pile[n] for n in range(longest) for pile in piles.values() if n < len(pile)]


def draw(ids: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` of ``ids`` without repetition, all of them if there are fewer; the same ones for the same seed.

    Fisher and Yates's shuffle, drawn from the 32-bit linear congruential generator of *Numerical Recipes* (1664525,
    1013904223), whose upper bits choose: a browser computes the same.
    """
    drawn, state = list(ids), seed % 2**32
    for last in range(len(drawn) - 1, 0, -1):
        state = (1664525 * state + 1013904223) % 2**32
        other = state * (last + 1) >> 32
        drawn[last], drawn[other] = drawn[other], drawn[last]
    return drawn[:count]


def workload(cards: int, new_a_day: int, days: int, known: float, rng: random.Random) -> list[int]:
    """Answers given on each of ``days`` days by a learner who meets ``new_a_day`` new cards a day until none is left.

    An answer is a 4 with probability ``known`` and a 2 otherwise; a card comes again on the same day until it gets a 4.
    """
    progress: dict[str, dict] = {}
    unseen, answers, start = [str(n) for n in range(cards)], [], Date(2026, 1, 1)
    for day in (start + datetime.timedelta(days=n) for n in range(days)):
        plan = due(progress, progress, day) + unseen[:new_a_day]
        del unseen[:new_a_day]
        answers.append(0)
        while plan:
            for id in plan:
                progress = answer(progress, id, 4 if rng.random() < known else 2, day)
            answers[-1] += len(plan)
            plan = [id for id in plan if progress[id]["again"]]
    return answers


@dataclass(frozen=True)
class Exam:
    """An exam that runs or is over: the questions, the grades so far, its start, its length and its end if ended."""

    ids: tuple[str, ...]
    minutes: int
    start: int
    grades: tuple[int, ...] = ()
    ended: int | None = None  #: when it was finished or stopped

    def left(self, now: int) -> int:
        """Seconds left at ``now``, 0 when time is up; what was left at its end, if it has ended."""
        spent = (now if self.ended is None else self.ended) - self.start
        return min(max(60 * self.minutes - spent, 0), 60 * self.minutes)

    def over(self, now: int) -> bool:
        """Whether it has ended, or its time is up."""
        return self.ended is not None or self.left(now) == 0

    def grade(self, quality: int, now: int) -> "Exam":
        """The exam with one more grade, from 0 to 5; it ends with the last question.  ValueError once it is over."""
        if self.over(now):
            raise ValueError("expected an exam that runs, got one that is over; begin another")
        if not isinstance(quality, int) or isinstance(quality, bool) or not 0 <= quality <= 5:
            raise ValueError(f"expected quality to be a whole number from 0 (blackout) to 5 (perfect), got {quality!r}")
        grades = (*self.grades, quality)
        return Exam(self.ids, self.minutes, self.start, grades, now if len(grades) == len(self.ids) else None)

    def stop(self, now: int) -> "Exam":
        """The exam, ended at ``now``; itself if it is over."""
        return self if self.over(now) else Exam(self.ids, self.minutes, self.start, self.grades, now)

    def score(self, theme_of: Mapping[str, str]) -> dict[str, tuple[int, int, int]]:
        """By theme, in the order of the questions: how many were asked, how many passed (3 or more), and the points."""
        grades = (*self.grades, *(0 for _ in self.ids[len(self.grades) :]))
        found: dict[str, tuple[int, int, int]] = {}
        for id, quality in zip(self.ids, grades, strict=True):
            asked, passed, points = found.get(theme_of[id], (0, 0, 0))
            found[theme_of[id]] = asked + 1, passed + (quality >= PASSED), points + quality
        return found


def begin(ids: Sequence[str], count: int, minutes: int, seed: int, now: int) -> Exam:
    """An exam of ``count`` of ``ids``, drawn by ``seed``, that starts at ``now``.  ValueError without questions."""
    if not ids or not all(isinstance(n, int) and n >= 1 for n in (count, minutes)):
        raise ValueError(f"expected questions, a count and minutes, got {len(ids)}, {count} and {minutes}")
    return Exam(tuple(draw(ids, count, seed)), minutes, now)
