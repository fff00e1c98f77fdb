"""The interview under bad input: files of progress, days and exams that are none, and answers that are no program."""

import datetime
import json
import math

import pytest

from mixprec_lab.interview import coding, schedule, session
from mixprec_lab.interview.bank import Code

TODAY = datetime.date(2026, 11, 26)


def progress(**changed) -> str:
    return json.dumps({"algorithm": "SM-2", "version": 1, "cards": {"a": {**schedule.NEW, **changed}}})


@pytest.mark.parametrize("due", ["2026-W01-1", "20260101  ", "2026-1-001", "+026-01-01", "2026-01-01T00"])
def test_a_day_is_written_in_one_way_only(due):
    with pytest.raises(ValueError, match="expected due to be a date like '2026-11-26' or None"):
        schedule.import_progress(progress(due=due))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, progress().replace('"interval": 0', f'"interval": {"9" * 5000}'), "\x00", '{"algorithm": '],
    ids=["nested", "digits", "null byte", "half"],
)
def test_a_file_that_json_cannot_hold_is_no_progress(text):
    with pytest.raises(ValueError, match="expected progress as JSON, got .*; choose a file that this page exported"):
        schedule.import_progress(text)


def test_true_is_no_version():
    with pytest.raises(ValueError, match="expected progress of SM-2, version 1"):
        schedule.import_progress('{"algorithm": "SM-2", "version": true, "cards": {}}')


@pytest.mark.parametrize("today", [datetime.datetime(2026, 11, 26, 12), "2026-11-26", None], ids=str)
def test_today_is_a_day_and_what_is_kept_can_be_read_again(today):
    with pytest.raises(TypeError, match="expected today to be a datetime.date without a time"):
        session.answer({}, "a", 4, today)
    kept = session.answer({}, "a", 4, TODAY)
    assert schedule.import_progress(schedule.export_progress(kept)) == kept


@pytest.mark.parametrize(("count", "minutes"), [(1.5, 10), (1, math.nan), (1, 1.5), ("2", 10), (0, 10), (1, -1)])
def test_an_exam_has_whole_numbers_of_questions_and_minutes(count, minutes):
    with pytest.raises(ValueError, match="expected questions, a count and minutes"):
        session.begin(["a", "b"], count, minutes, 1, 0)


@pytest.mark.parametrize("source", ["f = 3", "f = None", "f = 'def f(): pass'"])
def test_an_answer_that_is_no_function_is_said_to_be_none(source):
    with pytest.raises(TypeError, match="expected f to be a function or a class, got"):
        coding.run_check(Code("f", "losing_ratio", "", ""), source)
