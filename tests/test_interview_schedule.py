"""SM-2 against values worked by hand from the published rules, and progress that survives export and import."""

import datetime
import json
from fractions import Fraction

import pytest

from mixprec_lab.interview import NEW, due, export_progress, import_progress, repeat_today, review, to_repeat
from mixprec_lab.interview.schedule import next_ease, next_interval

DAY = datetime.date(2026, 11, 26)


def history(*qualities: int) -> list[dict]:
    """The states after answers of these qualities, each on the day it is due."""
    states, state, today = [], NEW, DAY
    for quality in qualities:
        state = review(state, quality, today)
        states.append(state)
        today = datetime.date.fromisoformat(state["due"])
    return states


@pytest.mark.parametrize(
    ("qualities", "intervals", "eases"),
    [
        # 4 leaves EF at 2.5: 6 * 2.5 = 15, 15 * 2.5 = 37.5 -> 38, 38 * 2.5 = 95
        ((4, 4, 4, 4, 4), (1, 6, 15, 38, 95), (250, 250, 250, 250, 250)),
        # 5 adds 0.1: 6 * 2.8 = 16.8 -> 17, 17 * 2.9 = 49.3 -> 50
        ((5, 5, 5, 5), (1, 6, 17, 50), (260, 270, 280, 290)),
        # 3 takes 0.14: 6 * 2.08 = 12.48 -> 13, 13 * 1.94 = 25.22 -> 26, 26 * 1.8 = 46.8 -> 47
        ((3, 3, 3, 3, 3), (1, 6, 13, 26, 47), (236, 222, 208, 194, 180)),
        # below 3 the item starts anew and EF stays: after 4 4 4 at 2.5, a 1, then 1, 6, 15 again
        ((4, 4, 4, 1, 4, 4, 4), (1, 6, 15, 1, 1, 6, 15), (250,) * 7),
        # EF gained before a failure is kept: 2.6, 2.7, fail, 2.7 + 0 twice, then 6 * 2.8 = 16.8 -> 17
        ((5, 5, 0, 4, 4, 5), (1, 6, 1, 1, 6, 17), (260, 270, 270, 270, 270, 280)),
        # failing a card that was never known
        ((2, 0, 5), (1, 1, 1), (250, 250, 260)),
        # exactly whole products are not rounded up: 6 * 2.5 = 15, 15 * 2.6 = 39, 39 * 2.7 = 105.3 -> 106
        ((4, 4, 4, 5, 5), (1, 6, 15, 39, 106), (250, 250, 250, 260, 270)),
    ],
)
def test_scripted_histories_give_the_published_intervals(qualities, intervals, eases):
    states = history(*qualities)
    assert tuple(s["interval"] for s in states) == intervals
    assert tuple(s["ease"] for s in states) == eases


@pytest.mark.parametrize("quality", range(6))
@pytest.mark.parametrize("ease", [130, 131, 143, 144, 250, 317])
def test_the_ease_follows_the_published_formula_exactly(ease, quality):
    q = Fraction(quality)
    exact = Fraction(ease, 100) + (Fraction("0.1") - (5 - q) * (Fraction("0.08") + (5 - q) * Fraction("0.02")))
    assert Fraction(next_ease(ease, quality), 100) == max(exact, Fraction("1.3"))


def test_the_ease_never_falls_below_its_floor():
    assert [s["ease"] for s in history(*[3] * 12)][-6:] == [152, 138, 130, 130, 130, 130]


@pytest.mark.parametrize("ease", [130, 194, 236, 250, 290])
@pytest.mark.parametrize("interval", [6, 13, 15, 100, 37])
def test_a_fraction_of_a_day_is_rounded_up(interval, ease):
    days = next_interval(3, interval, ease)
    assert days - 1 < Fraction(interval * ease, 100) <= days


def test_the_due_date_is_the_interval_after_the_answer_also_when_it_comes_late():
    late = review(history(4, 4)[-1], 4, DAY + datetime.timedelta(days=400))
    assert (late["interval"], late["due"]) == (15, (DAY + datetime.timedelta(days=415)).isoformat())
    assert review(NEW, 4, datetime.date(2028, 2, 28))["due"] == "2028-02-29"


def test_below_four_a_card_comes_again_the_same_day_and_only_that_changes():
    weak = review(NEW, 3, DAY)
    assert weak["again"] and not review(NEW, 4, DAY)["again"]
    assert repeat_today(weak, 3) == weak
    assert repeat_today(weak, 4) == {**weak, "again": False}
    assert to_repeat({"a": weak, "b": repeat_today(weak, 5), "c": dict(NEW)}) == ["a"]


def test_a_review_changes_neither_its_argument_nor_the_new_card():
    first = review(NEW, 5, DAY)
    kept = dict(first)
    review(first, 0, DAY)
    repeat_today(first, 0)
    assert first == kept
    assert dict(NEW) == {"repetitions": 0, "interval": 0, "ease": 250, "due": None, "again": False}
    with pytest.raises(TypeError):
        NEW["ease"] = 130


def test_due_cards_come_oldest_first_and_new_ones_last():
    progress = {
        "late": review(NEW, 4, DAY - datetime.timedelta(days=9)),
        "later": review(NEW, 4, DAY - datetime.timedelta(days=3)),
        "today": review(NEW, 4, DAY - datetime.timedelta(days=1)),
        "tomorrow": review(NEW, 4, DAY),
        "untouched": dict(NEW),
    }
    ids = ["new", "today", "tomorrow", "untouched", "later", "late"]
    assert due(progress, ids, DAY) == ["late", "later", "today", "new", "untouched"]
    assert due(progress, iter(ids), DAY) == ["late", "later", "today", "new", "untouched"]
    assert due(progress, ["tomorrow"], DAY) == []
    assert due({}, ["b", "a"], DAY) == ["b", "a"]


def test_progress_survives_export_and_import_to_the_last_answer():
    progress = {"a": history(5, 4, 3, 0)[-1], "b": history(4, 4, 4)[-1], "c": dict(NEW)}
    text = export_progress(progress)
    assert import_progress(text) == progress and export_progress(import_progress(text)) == text
    for id, state in import_progress(text).items():
        assert review(state, 4, DAY) == review(progress[id], 4, DAY)
    assert import_progress(export_progress({})) == {}
    assert export_progress(dict(reversed(progress.items()))) == text


@pytest.mark.parametrize("quality", [-1, 6, 2.5, "5", None, True])
def test_a_quality_outside_of_the_scale_is_refused(quality):
    for call, arguments in ((review, (NEW, quality, DAY)), (repeat_today, (NEW, quality)), (next_ease, (250, quality))):
        with pytest.raises(ValueError, match="expected quality to be a whole number from 0"):
            call(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repetitions": -1}, "expected repetitions to be a whole number of at least 0, got -1"),
        ({"interval": 1.5}, "expected interval to be a whole number of at least 0, got 1.5"),
        ({"ease": 129}, "expected ease to be a whole number of at least 130, got 129"),
        ({"ease": True}, "expected ease to be a whole number"),
        ({"again": 1}, "expected again to be true or false, got 1"),
        ({"due": "26.11.2026"}, "expected due to be a date like '2026-11-26' or None, got '26.11.2026'"),
        ({"due": "2026-02-30"}, "expected due to be a date"),
        ({"due": "20261126"}, "expected due to be a date"),
        ({"due": 5}, "expected due to be a date"),
        ({"other": 1}, "expected a state with the keys repetitions, interval, ease, due, again"),
    ],
)
def test_a_broken_state_is_refused_everywhere(change, message):
    state = {**NEW, **change}
    text = json.dumps({"algorithm": "SM-2", "version": 1, "cards": {"a": state}})
    for call in (
        lambda: review(state, 4, DAY),
        lambda: repeat_today(state, 4),
        lambda: export_progress({"a": state}),
        lambda: import_progress(text),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected progress as JSON"),
        ("[]", "expected progress of SM-2, version 1"),
        ('{"algorithm": "SM-2", "version": 2, "cards": {}}', "expected progress of SM-2, version 1"),
        ('{"algorithm": "FSRS", "version": 1, "cards": {}}', "expected progress of SM-2, version 1"),
        ('{"algorithm": "SM-2", "version": 1}', "expected progress of SM-2, version 1"),
        ('{"algorithm": "SM-2", "version": 1, "cards": {}, "x": 1}', "expected progress of SM-2, version 1"),
        ('{"algorithm": "SM-2", "version": 1, "cards": []}', "expected cards to be a mapping"),
        ('{"algorithm": "SM-2", "version": 1, "cards": {"a": 3}}', "expected a state with the keys"),
    ],
)
def test_text_that_is_no_progress_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        import_progress(text)
