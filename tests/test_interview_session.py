"""The pile of cards and the exam, by hand-worked stories and by properties."""

import datetime
from collections import Counter

import pytest

from mixprec_lab.interview import (
    NEW,
    PILES,
    Exam,
    answer,
    begin,
    draw,
    import_progress,
    load_bank,
    merge,
    mixed,
    queue,
    repeats,
    review,
)
from mixprec_lab.interview.schedule import LONGEST

DAY = datetime.date(2026, 11, 26)
IDS = ["a", "b", "c", "d", "e"]
THEMES = {"a": "x", "b": "x", "c": "y", "d": "x", "e": "z"}


def ago(days: int) -> datetime.date:
    return DAY - datetime.timedelta(days=days)


def test_the_plan_is_due_then_new_then_weak_and_no_card_stands_twice():
    progress = {
        "a": review(NEW, 5, DAY),  # due tomorrow
        "b": review(NEW, 2, DAY),  # due tomorrow, to be repeated today
        "c": review(NEW, 3, ago(1)),  # due today, and below 4: once, as due
        "d": review(NEW, 5, ago(9)),
    }
    assert queue(progress, IDS, "plan", DAY) == ["d", "c", "e", "b"]
    assert queue(progress, IDS, "weak", DAY) == ["b", "c"]
    assert queue(progress, IDS, "all", DAY) == IDS
    assert queue(progress, ["a"], "plan", DAY) == queue({}, [], "plan", DAY) == queue({}, IDS, "weak", DAY) == []


def test_an_unknown_pile_is_refused_by_name():
    with pytest.raises(KeyError, match="expected a pile, got 'new'; the names are plan, weak, all"):
        queue({}, IDS, "new", DAY)


def test_a_day_with_a_weak_card_goes_as_the_published_rules_say():
    progress = answer({}, "a", 2, DAY)
    assert repeats(progress["a"], DAY) and (progress["a"]["interval"], progress["a"]["ease"]) == (1, 250)
    again = answer(progress, "a", 3, DAY)  # 3 is a pass, but a repetition moves nothing and goes on below 4
    assert again == progress
    done = answer(again, "a", 4, DAY)
    assert done["a"] == {**progress["a"], "again": False} and not repeats(done["a"], DAY)
    tomorrow = answer(done, "a", 4, DAY + datetime.timedelta(days=1))
    assert (tomorrow["a"]["repetitions"], tomorrow["a"]["due"]) == (1, "2026-11-28")
    assert progress == {"a": review(NEW, 2, DAY)}


def test_a_weak_card_that_was_never_repeated_is_reviewed_when_it_is_due():
    weak = {"a": review(NEW, 2, ago(1))}
    assert not repeats(weak["a"], DAY)
    assert answer(weak, "a", 5, DAY)["a"] == review(weak["a"], 5, DAY)


def test_a_merge_loses_no_card_and_keeps_what_was_reviewed_last():
    old, new = review(NEW, 5, ago(9)), review(review(NEW, 5, ago(9)), 5, ago(2))
    assert merge({"a": old, "b": new}, {"a": new, "b": old, "c": old}) == {"a": new, "b": new, "c": old}
    assert merge({"a": dict(NEW)}, {"a": old}) == merge({"a": old}, {"a": dict(NEW)}) == {"a": old}
    same_day = review(NEW, 0, ago(9))
    assert merge({"a": old}, {"a": same_day}) == {"a": same_day}
    assert merge({}, {}) == {}


def test_dealing_in_rounds_keeps_every_card_and_the_order_within_a_theme():
    assert mixed(IDS, THEMES) == ["a", "c", "e", "b", "d"]
    bank = {q.id: q.theme for q in load_bank()}
    dealt = mixed(bank, bank)
    assert sorted(dealt) == sorted(bank)
    for theme in set(bank.values()):
        assert [id for id in dealt if bank[id] == theme] == [id for id in bank if bank[id] == theme]
    assert len({bank[id] for id in dealt[:14]}) == 14
    assert mixed([], {}) == []


def test_a_draw_is_a_part_of_the_questions_without_repetition_and_fair():
    drawn = draw(IDS, 3, 7)
    assert drawn == draw(IDS, 3, 7) and len(set(drawn)) == 3 and set(drawn) <= set(IDS)
    assert sorted(draw(IDS, 99, 1)) == IDS and IDS == ["a", "b", "c", "d", "e"]
    assert draw(IDS, 3, 5) == draw(IDS, 3, 5 + 2**32)
    firsts = Counter(draw(IDS, 1, seed)[0] for seed in range(5000))
    assert all(abs(firsts[id] - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5 for id in IDS)  # five standard deviations


def test_an_exam_ends_with_its_last_question_or_with_its_time():
    exam = begin(IDS, 3, 10, seed=1, now=1000)
    assert len(exam.ids) == 3 and exam.left(1000) == 600 and not exam.over(1599) and exam.over(1600)
    exam = exam.grade(5, 1100).grade(2, 1599)
    assert not exam.over(1599) and exam.left(1599) == 1 and exam.left(1600) == exam.left(9999) == 0
    done = exam.grade(3, 1599)
    assert done.over(1599) and done.left(9999) == 1
    for finished in (done, exam.stop(1200)):
        with pytest.raises(ValueError, match="expected an exam that runs, got one that is over"):
            finished.grade(4, 1300)
    with pytest.raises(ValueError, match="one that is over"):
        exam.grade(4, 1600)


def test_the_score_counts_what_was_not_answered_as_nothing():
    exam = Exam(("a", "b", "c", "e"), 10, 0, (5, 2, 3))
    assert exam.score(THEMES) == {"x": (2, 1, 7), "y": (1, 1, 3), "z": (1, 0, 0)}
    assert sum(asked for asked, _, _ in exam.score(THEMES).values()) == len(exam.ids)


def test_stopping_keeps_the_clock_where_it_was():
    exam = Exam(("a", "b"), 10, 0, (5,))
    stopped = exam.stop(60)
    assert stopped.ended == 60 and stopped.left(500) == 540 and stopped.stop(70) is stopped
    assert exam.stop(600) is exam


def test_a_clock_that_is_set_back_gives_no_more_time_than_there_was():
    assert Exam(("a",), 10, 1000).left(400) == 600


@pytest.mark.parametrize("quality", [-1, 6, 2.0, True, "3"])
def test_a_grade_outside_of_the_scale_is_refused(quality):
    with pytest.raises(ValueError, match="expected quality to be a whole number from 0"):
        Exam(("a",), 10, 0).grade(quality, 1)


@pytest.mark.parametrize(("ids", "count", "minutes"), [([], 5, 10), (IDS, 0, 10), (IDS, 5, 0)])
def test_an_exam_needs_questions_and_time(ids, count, minutes):
    with pytest.raises(ValueError, match="expected questions, a count and minutes"):
        begin(ids, count, minutes, seed=1, now=0)


def test_intervals_end_at_a_century_and_dates_before_1900_are_refused():
    state = dict(NEW)
    for _ in range(40):
        state = review(state, 5, DAY)
    assert state["interval"] == LONGEST and datetime.date.fromisoformat(state["due"]).year == 2126
    text = '{"algorithm": "SM-2", "version": 1, "cards": {"a": %s}}'
    far = '{"repetitions": 1, "interval": 36501, "ease": 250, "due": null, "again": false}'
    old = '{"repetitions": 1, "interval": 1, "ease": 250, "due": "1899-12-31", "again": false}'
    for state, message in ((far, "expected interval to be at most 36500 days"), (old, "expected due to be a date")):
        with pytest.raises(ValueError, match=message):
            import_progress(text % state)


def test_every_pile_has_words():
    assert list(PILES) == ["plan", "weak", "all"] and all(PILES.values())
