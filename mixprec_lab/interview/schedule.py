"""When to see a card again: SM-2 as P. A. Wozniak published it, as pure functions on plain data.

The state of a card is a dict, ``NEW`` before it was ever seen; progress is a dict from a question's id to its state.
Both hold nothing but numbers, texts and truth values, so that a browser can keep them as JSON.  The easiness factor is
kept in hundredths: every change that the algorithm makes to it is a whole number of them, and so no rounding creeps in.

Where the published text leaves a choice: the ease moves first and the new ease gives the interval; a failed answer
counts as no repetition, so that 1 day follows it, and the next passed answer is the first again.  Early and late
reviews are treated alike, since the algorithm knows no date.

Source: P. A. Wozniak, Optimization of Learning, master's thesis, Poznan University of Technology, 1990, section 3.2.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

Date = datetime.date
FIRST_INTERVAL, SECOND_INTERVAL = 1, 6  #: days
LONGEST = 36_500  #: days: a century; the published rule has no end, dates have
EASE_FLOOR = 130
PASSED, WELL_KNOWN = 3, 4  #: a quality below the first starts the card anew, one below the second repeats it today
VERSION = 1
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
#: repetitions in a row that were passed; days from the last review to the next; easiness in hundredths; the date of
#: the next review (None: never seen); whether the card comes again today.
NEW: Mapping[str, int | str | bool | None] = MappingProxyType(
    {"repetitions": 0, "interval": 0, "ease": 250, "due": None, "again": False}
)


def _quality(quality: int) -> int:
    if not isinstance(quality, int) or isinstance(quality, bool) or not 0 <= quality <= 5:
        raise ValueError(f"expected quality to be a whole number from 0 (blackout) to 5 (perfect), got {quality!r}")
    return quality


def next_ease(ease: int, quality: int) -> int:
    """The easiness factor after an answer, in hundredths: EF + (0.1 - (5 - q) (0.08 + (5 - q) 0.02)), at least 1.3."""
    missing = 5 - _quality(quality)
    return max(ease + 10 - missing * (8 + 2 * missing), EASE_FLOOR)


def next_interval(repetitions: int, interval: int, ease: int) -> int:
    """Days to the next review after the ``repetitions``-th passed one: 1, 6, then ``interval`` * ease, rounded up.

    At most ``LONGEST``.
    """
    if repetitions <= 2:
        return SECOND_INTERVAL if repetitions == 2 else FIRST_INTERVAL
    return min(-(-interval * ease // 100), LONGEST)


def review(state: Mapping, quality: int, today: Date) -> dict:
    """The state after an answer of ``quality`` 0 to 5 given on ``today``; ``state`` itself is not changed.

    From 3 on the answer counts as known: the ease moves, and the new ease gives the interval.  Below 3 the card starts
    anew, and its ease stays.  Below 4 it also comes again on the same day (``repeat_today``).  Raises ValueError for
    another quality and for a state that is none, TypeError for a ``today`` with a time.
    """
    _checked(state)
    if not isinstance(today, Date) or isinstance(today, datetime.datetime):
        raise TypeError(f"expected today to be a datetime.date without a time, got {today!r}")
    known = _quality(quality) >= PASSED
    repetitions = state["repetitions"] + 1 if known else 0
    ease = next_ease(state["ease"], quality) if known else state["ease"]
    interval = next_interval(repetitions, state["interval"], ease)
    return {
        "repetitions": repetitions,
        "interval": interval,
        "ease": ease,
        "due": (today + datetime.timedelta(days=interval)).isoformat(),
        "again": quality < WELL_KNOWN,
    }


def repeat_today(state: Mapping, quality: int) -> dict:
    """The state after a repetition on the same day: the card is done for today once ``quality`` is 4 or more.

    Only that changes: ease, interval and date come from the first answer of the day.
    """
    return {**_checked(state), "again": _quality(quality) < WELL_KNOWN}


def due(progress: Mapping[str, Mapping], ids: Iterable[str], today: Date) -> list[str]:
    """Those of ``ids`` whose review is due: the longest overdue first, then the ones never seen, in the order given."""
    ids = list(ids)
    dates = {id: progress[id]["due"] for id in ids if id in progress and progress[id]["due"] is not None}
    seen = [id for id in dates if dates[id] <= today.isoformat()]
    return sorted(seen, key=lambda id: dates[id]) + [id for id in ids if id not in dates]


def to_repeat(progress: Mapping[str, Mapping]) -> list[str]:
    """The cards that scored below 4 today and come again until they do not."""
    return [id for id, state in progress.items() if state["again"]]


def export_progress(progress: Mapping[str, Mapping]) -> str:
    """The progress as JSON text, the same for equal progress; ``import_progress`` reads it back."""
    cards = {id: dict(_checked(state)) for id, state in progress.items()}
    return json.dumps({"algorithm": "SM-2", "version": VERSION, "cards": cards}, indent=1, sort_keys=True)


def import_progress(text: str) -> dict[str, dict]:
    """The progress that ``export_progress`` wrote.  Raises ValueError, saying what is wrong, for any other text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON; or numbers and nestings that no page wrote
        raise ValueError(f"expected progress as JSON, got {error}; choose a file that this page exported") from error
    head = {"algorithm": "SM-2", "version": VERSION}
    found = {k: content.get(k) for k in head} if isinstance(content, dict) else {}
    if found != head or found["version"] is True or set(content) != {*head, "cards"}:
        raise ValueError(f"expected progress of SM-2, version {VERSION}, with cards, got {text[:60]!r}")
    if not isinstance(content["cards"], dict):
        raise ValueError(f"expected cards to be a mapping from ids to states, got {content['cards']!r:.60}")
    return {id: dict(_checked(state)) for id, state in content["cards"].items()}


def _checked(state: Mapping) -> Mapping:
    if not isinstance(state, Mapping) or set(state) != set(NEW):
        raise ValueError(f"expected a state with the keys {', '.join(NEW)}, got {state!r:.80}")
    for key, least in (("repetitions", 0), ("interval", 0), ("ease", EASE_FLOOR)):
        if not isinstance(state[key], int) or isinstance(state[key], bool) or state[key] < least:
            raise ValueError(f"expected {key} to be a whole number of at least {least}, got {state[key]!r}")
    if state["interval"] > LONGEST:
        raise ValueError(f"expected interval to be at most {LONGEST} days, got {state['interval']}")
    if not isinstance(state["again"], bool):
        raise ValueError(f"expected again to be true or false, got {state['again']!r}")
    if state["due"] is not None:
        _date(state["due"])
    return state


def _date(text: object) -> Date:
    try:
        if isinstance(text, str) and _DAY.fullmatch(text) and text >= "1900":  # room for the longest interval before it
            return Date.fromisoformat(text)
    except ValueError:
        pass
    raise ValueError(f"expected due to be a date like '2026-11-26' or None, got {text!r}")
