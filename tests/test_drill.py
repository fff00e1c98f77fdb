"""The drill: JavaScript schedules, piles, draws and says what Python does; progress survives the browser."""

import datetime
import itertools
import json
import random

import pytest
import traitlets
from conftest import run_node
from widget_page import CARDS, cards, said

from mixprec_lab.exhibits import Drill
from mixprec_lab.interview import (
    NEW,
    PILES,
    answer,
    draw,
    export_progress,
    import_progress,
    load_bank,
    merge,
    queue,
    review,
)

NOW = "2026-11-26T09:30:00"
DAY = datetime.date(2026, 11, 26)
START = int(datetime.datetime(2026, 11, 26, 9, 30, tzinfo=datetime.UTC).timestamp())
STORE = "mixprec-lab:drill"


def javascript(folder, calls: list[tuple], shown: Drill | None = None) -> list:
    """What the module of the page answers to these calls: (function, arguments ...)."""
    shown = shown or Drill(cards(), now=NOW)
    traits = {key: getattr(shown, key) for key in ("bank", "themes", "choices")}
    (folder / "module.mjs").write_text(shown._esm, "utf-8")
    states = [{"call": call, "args": list(args)} for call, *args in calls]
    run_node("states.mjs", folder, {"kind": "drill", "traits": traits, "states": states})
    return json.loads((folder / "answers.json").read_text("utf-8"))


def histories(seed: int, count: int) -> list[tuple[dict, int, datetime.date]]:
    """Every step of ``count`` random histories: (state, quality, day); answers come early, in time and late."""
    rng, steps = random.Random(seed), []
    for _ in range(count):
        state, day = dict(NEW), datetime.date(2024, 2, 27)
        for _ in range(25):
            quality = rng.choice((0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5))
            steps.append((state, quality, day))
            state = answer({"a": state}, "a", quality, day)["a"]
            day += datetime.timedelta(days=rng.choice((0, 1, state["interval"], 2 * state["interval"])))
            day = min(day, datetime.date(2400, 1, 1))
    return steps


def some_progress(seed: int, ids: tuple[str, ...] = CARDS) -> dict:
    """A progress over some of the cards: seen on days around today, some weak, some never seen."""
    rng, progress = random.Random(seed), {}
    for id in ids:
        for _ in range(rng.randrange(4)):
            day = DAY - datetime.timedelta(days=rng.choice((0, 0, 1, 3, 9)))
            progress = answer(progress, id, rng.randrange(6), day)
    return progress


def test_javascript_schedules_as_python_does_on_scripted_and_random_histories(tmp_path):
    scripts = [(4, 4, 4, 4), (5, 5, 5), (3,) * 6, (4, 4, 1, 4, 4), (5, 5, 0, 4, 5), (2, 0, 5), (5,) * 30]
    steps = histories(1, 60)
    for script in scripts:
        state, day = dict(NEW), DAY
        for quality in script:
            steps.append((state, quality, day))
            state = review(state, quality, day)
            day = min(datetime.date.fromisoformat(state["due"]), datetime.date(2900, 1, 1))
    grown = [{**NEW, "repetitions": 2, "interval": 6, "ease": ease} for ease in range(130, 400)]
    steps += [(state, quality, DAY) for state in grown for quality in (3, 4, 5)]
    calls = [("review", state, quality, day.isoformat()) for state, quality, day in steps]
    calls += [("answer", {"a": state}, "a", quality, day.isoformat()) for state, quality, day in steps]
    expected = [review(*step) for step in steps] + [answer({"a": s}, "a", q, day) for s, q, day in steps]
    assert javascript(tmp_path, calls) == expected
    assert len(steps) > 2000 and any(state["again"] for state, _, _ in steps)


def test_javascript_piles_merges_and_draws_as_python_does(tmp_path):
    worlds = [some_progress(seed) for seed in range(40)]
    pairs = list(itertools.pairwise(worlds))
    piles = [(world, pile) for world in [{}, *worlds] for pile in PILES]
    drawn = [(list(CARDS), count, seed) for count in (1, 3, 6, 9) for seed in (0, 1, START, 2**32 - 1)]
    calls = [("queue", world, CARDS, pile, DAY.isoformat()) for world, pile in piles]
    calls += [("merge", *pair) for pair in pairs] + [("draw", *arguments) for arguments in drawn]
    calls += [("exportProgress", world) for world in worlds]
    expected = [queue(world, CARDS, pile, DAY) for world, pile in piles] + [merge(*pair) for pair in pairs]
    expected += [draw(*arguments) for arguments in drawn] + [export_progress(world) for world in worlds]
    assert javascript(tmp_path, calls) == expected


EXAMS = [
    {},
    {"ids": list(CARDS), "minutes": 5, "start": START, "grades": [], "ended": None},
    {"ids": list(CARDS[:3]), "minutes": 5, "start": START - 299, "grades": [5, 2], "ended": None},
    {"ids": list(CARDS[:3]), "minutes": 5, "start": START - 300, "grades": [5, 2], "ended": None},
    {"ids": list(CARDS[:3]), "minutes": 5, "start": START - 90, "grades": [5, 2, 3], "ended": START - 5},
    {"ids": list(CARDS), "minutes": 10, "start": START - 200, "grades": [4], "ended": START - 60},
]


def states() -> list[dict]:
    """Every choice of the lists on one progress, then random progresses with every card and side, then exams."""
    base = {"mode": "cards", "theme": "all", "level": "all", "order": "mixed", "pile": "plan", "card": ""}
    base |= {"side": "front", "count": 10, "minutes": 20, "progress": some_progress(3), "exam": {}, "now": NOW}
    filters = itertools.product(
        ("all", "amp", "coding", "speed"), ("all", "screen", "onsite", "specialist"), ("mixed", "themes"), PILES
    )
    found = [base | dict(zip(("theme", "level", "order", "pile"), f, strict=True)) for f in filters]
    for seed, card, side in itertools.product(range(8), ("", *CARDS), ("front", "back")):
        found.append(base | {"progress": some_progress(seed), "card": card, "side": side})
    everything_known = {id: review(NEW, 4, DAY) for id in CARDS}
    found += [base | {"progress": everything_known, "pile": pile} for pile in PILES]
    for exam, side, count in itertools.product(EXAMS, ("front", "back"), (5, 10)):
        found.append(base | {"mode": "exam", "exam": exam, "side": side, "count": count})
    return found


def test_javascript_says_what_python_says_for_every_state(tmp_path):
    asked, twin = states(), Drill(cards(), now=NOW)
    answers = javascript(tmp_path, [("texts", state) for state in asked])
    for state, words in zip(asked, answers, strict=True):
        twin.set_state(state)
        assert words == twin.result(), state
    verdicts = " ".join(words["verdict"] for words in answers)
    parts = ("Nothing is due among these 6", "No card scored below 4", "No question passes", "time was up", "elsewhere")
    assert [part for part in parts if part not in verdicts] == []


BAD_TEXTS = ["", "{", "[]", "null", '{"algorithm": "SM-2", "version": 2, "cards": {}}',
             '{"algorithm": "SM-2", "version": 1, "cards": []}', '{"algorithm": "SM-2", "version": 1}']  # fmt: skip
BAD_STATES = [{"repetitions": -1}, {"interval": 1.5}, {"interval": 36501}, {"ease": 129}, {"again": 1}, {"other": 1},
              {"due": "2026-02-30"}, {"due": "26.11.2026"}, {"due": 5}, {"due": "1899-12-31"},
              {"repetitions": None}]  # fmt: skip


def bad_texts() -> list[str]:
    head = {"algorithm": "SM-2", "version": 1}
    return BAD_TEXTS + [json.dumps({**head, "cards": {"a": {**NEW, **bad}}}) for bad in BAD_STATES]


@pytest.fixture
def drill(pages):
    """``drill(now=..., width=...)``: a visit to six cards; the browser forgets its progress afterwards."""
    opened = []

    def open_(now=NOW, **how):
        opened.append(pages([Drill(cards(), now=now, name="drill")], **how))
        return opened[-1]

    yield open_
    for visit in opened:
        visit.page.evaluate("localStorage.clear()")


def kept(visit) -> dict:
    """The progress that the browser keeps; it must be one that Python reads."""
    text = visit.page.evaluate("key => localStorage.getItem(key)", STORE)
    return {} if text is None else import_progress(text)


def test_a_session_by_keyboard_goes_as_the_twin_in_python(drill):
    visit, twin = drill(), Drill(cards(), now=NOW)
    visit.page.get_by_label("The card", exact=True).focus()
    for key in (*" 4 2", "ArrowRight", *" 5", "ArrowLeft", *" 0 3 4 4 1"):
        if key == " ":
            twin.side = "back"
        elif key.startswith("Arrow"):
            twin.skip(1 if key == "ArrowRight" else -1)
        else:
            twin.grade(int(key))
        visit.page.keyboard.press("Space" if key == " " else key)
        assert said(visit) == twin.result(), key
    assert kept(visit) == twin.progress and len(twin.progress) > 3
    assert visit.problems == {}


def test_the_same_session_by_mouse(drill):
    visit, twin = drill(), Drill(cards(), now=NOW)
    for quality in (4, 0, 5, 3):
        visit.page.locator("[data-action=show]").click()
        visit.page.locator(f"[data-grade='{quality}']").click()
        twin.side = "back"
        twin.grade(quality)
        assert said(visit) == twin.result()
    visit.page.locator("[data-action=skip]").click()
    visit.page.locator("[data-action=back]").click()
    twin.skip(1)
    twin.skip(-1)
    assert said(visit) == twin.result() and kept(visit) == twin.progress


def test_keys_do_nothing_before_the_answer_shows_or_while_one_types_or_elsewhere(drill):
    visit = drill()
    before = said(visit)
    for key in ("Space", "4", "ArrowRight"):
        visit.page.locator("body").press(key)
    visit.page.get_by_label("The card", exact=True).press("4")
    visit.page.get_by_label("The card", exact=True).press("Control+ArrowRight")
    visit.page.locator("summary").click()
    visit.page.get_by_label("Progress as text").press_sequentially(" 4")
    visit.page.get_by_label("Theme", exact=True).press("5")
    assert said(visit) == before and visit.page.get_by_label("Progress as text").input_value() == " 4"
    visit.page.locator("[data-action=skip]").press("Space")  # a focused button is pressed, the answer stays hidden
    assert said(visit)["short"] == "" and said(visit)["question"] != before["question"]


def test_progress_survives_a_reload_and_the_next_day(drill):
    visit, twin = drill(), Drill(cards(), now=NOW)
    for quality in (5, 1):
        visit.page.keyboard.press("Tab")
        visit.page.locator("[data-action=show]").click()
        visit.page.locator(f"[data-grade='{quality}']").click()
        twin.side = "back"
        twin.grade(quality)
    visit.page.reload()
    visit.page.wait_for_selector("[data-grade]")
    again = Drill(cards(), progress=twin.progress, now=NOW)
    assert said(visit) == again.result()
    tomorrow = drill(now="2026-11-27T09:30:00")
    assert said(tomorrow) == Drill(cards(), progress=twin.progress, now="2026-11-27T09:30:00").result()
    assert said(tomorrow)["verdict"].startswith("Card 1 of 6: 2 due, 4 new")


def test_two_open_pages_do_not_forget_each_others_answers(drill):
    first, second = drill(), drill()
    for visit, quality in ((first, 5), (second, 5)):
        if visit is second:
            visit.page.locator("[data-action=skip]").click()
        visit.page.locator("[data-action=show]").click()
        visit.page.locator(f"[data-grade='{quality}']").click()
    assert len(kept(first)) == 2


def test_storage_that_is_full_or_denied_breaks_nothing_and_is_told(drill):
    visit, twin = drill(), Drill(cards(), now=NOW)
    visit.page.evaluate("""() => { Storage.prototype.setItem = () => { throw new DOMException("full"); };
      Storage.prototype.getItem = () => { throw new DOMException("denied", "SecurityError"); }; }""")
    visit.page.locator("[data-action=show]").click()
    visit.page.locator("[data-grade='4']").click()
    twin.side = "back"
    twin.grade(4)
    assert said(visit) == twin.result()
    assert "This browser keeps no progress" in visit.page.locator(".mpl-body > [role=status]").inner_text()
    assert visit.problems == {}


def test_unreadable_storage_is_put_aside_and_told(drill):
    visit = drill()
    visit.page.evaluate("key => localStorage.setItem(key, '{broken')", STORE)
    visit.page.reload()
    visit.page.wait_for_selector("[data-grade]")
    assert said(visit) == Drill(cards(), now=NOW).result()
    assert "cannot be read" in visit.page.locator(".mpl-body > [role=status]").inner_text()
    assert visit.page.evaluate("key => localStorage.getItem(key)", STORE + ":unreadable") == "{broken"
    visit.page.locator("[data-action=show]").click()
    visit.page.locator("[data-grade='4']").click()
    assert len(kept(visit)) == 1 and visit.problems == {}


def status(visit) -> str:
    return visit.page.locator(".mpl-body > [role=status]").inner_text()


def test_progress_goes_out_as_text_and_as_a_file_and_comes_back_to_the_last_answer(drill, tmp_path):
    visit, progress = drill(), some_progress(5)
    visit.page.locator("summary").click()
    text = visit.page.get_by_label("Progress as text")
    text.fill(export_progress(progress))
    visit.page.locator("[data-action=read-text]").click()
    assert kept(visit) == progress and f"{len(progress)} cards read from the text" in status(visit)
    assert said(visit) == Drill(cards(), progress=progress, now=NOW).result()
    visit.page.locator("[data-action=show-text]").click()
    assert text.input_value() == export_progress(progress)
    with visit.page.expect_download() as download:
        visit.page.locator("[data-action=save-file]").click()
    download.value.save_as(tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text("utf-8") == export_progress(progress)
    visit.page.locator("[data-action=forget]").click()
    assert kept(visit) == progress
    visit.page.locator("[data-action=forget]").click()
    assert kept(visit) == {} and said(visit) == Drill(cards(), now=NOW).result()
    visit.page.get_by_label("Read a file").set_input_files(tmp_path / "mine.json")
    visit.page.locator(".mpl-body > [role=status]", has_text="mine.json").wait_for()
    assert kept(visit) == progress and said(visit) == Drill(cards(), progress=progress, now=NOW).result()
    assert visit.problems == {}


def test_bad_progress_is_refused_by_name_and_nothing_is_lost(drill):
    visit, progress = drill(), some_progress(5)
    visit.page.locator("summary").click()
    text = visit.page.get_by_label("Progress as text")
    text.fill(export_progress(progress))
    visit.page.locator("[data-action=read-text]").click()
    before = said(visit)
    for bad in bad_texts():
        with pytest.raises(ValueError, match="expected"):
            import_progress(bad)
        text.fill(bad)
        visit.page.locator("[data-action=read-text]").click()
        assert "nothing is lost" in status(visit) and "expected" in status(visit), bad
        assert kept(visit) == progress and said(visit) == before and text.input_value() == bad
    assert visit.problems == {}


def test_an_exam_ends_when_its_time_is_up(drill):
    visit = drill(now="")
    page = visit.page
    page.clock.install(time=datetime.datetime(2026, 11, 26, 12, 0, tzinfo=datetime.UTC))
    page.reload()
    page.wait_for_selector("[data-grade]")
    page.get_by_label("What", exact=True).select_option("exam")
    page.get_by_label("Time", exact=True).select_option("5")
    page.locator("[data-action=exam]").click()
    page.locator("[data-action=show]").click()
    page.keyboard.press("5")
    assert said(visit)["left"] == "5:00" and said(visit)["verdict"].startswith("Question 2 of 6")
    page.clock.run_for(299_000)
    assert said(visit)["left"] == "0:01" and said(visit)["verdict"].startswith("Question 2 of 6")
    page.clock.run_for(1_000)
    assert said(visit)["left"] == "0:00"
    assert said(visit)["verdict"] == "1 of 6 passed with 3 or more, 5 of 30 points. 5 not answered: time was up."
    page.keyboard.press("5")
    assert said(visit)["verdict"].startswith("1 of 6 passed") and kept(visit) == {}
    assert visit.problems == {}


def test_a_whole_exam_is_scored_by_theme_as_in_python(drill):
    visit, twin = drill(), Drill(cards(), now=NOW, mode="exam", count=5, minutes=10)
    page = visit.page
    for label, value in (("What", "exam"), ("Questions", "5"), ("Time", "10")):
        page.get_by_label(label, exact=True).select_option(value)
    assert said(visit) == twin.result()
    page.locator("[data-action=exam]").click()
    twin.begin_exam(START)
    assert page.get_by_label("Theme", exact=True).is_disabled()
    for quality in (5, 2, 3, 0, 4):
        assert said(visit) == twin.result()
        page.keyboard.press("Space")
        twin.side = "back"
        assert said(visit) == twin.result()
        page.keyboard.press(str(quality))
        twin.grade(quality)
    assert said(visit) == twin.result() and said(visit)["verdict"] == "3 of 5 passed with 3 or more, 14 of 25 points."
    assert {key for key in said(visit) if key.startswith("score-")} <= {"score-amp", "score-speed", "score-coding"}
    assert page.get_by_label("Theme", exact=True).is_enabled() and kept(visit) == {}


def test_an_exam_can_be_stopped_and_begun_again(drill):
    visit, twin = drill(), Drill(cards(), now=NOW, mode="exam")
    visit.page.get_by_label("What", exact=True).select_option("exam")
    act = visit.page.locator("[data-action=exam]")
    assert act.inner_text() == "Begin an exam"
    act.click()
    assert act.inner_text() == "Stop the exam"
    act.click()
    assert said(visit)["verdict"] == "0 of 6 passed with 3 or more, 0 of 30 points. 6 not answered."
    act.click()
    twin.begin_exam(START)
    assert said(visit) == twin.result()


def test_the_proof_is_a_link_in_the_book(drill):
    visit = drill()
    for card in cards():
        visit.page.goto(f"{visit.page.url.split('#')[0]}#drill:card={card.id}&side=back")
        link = visit.page.locator("[data-field=proof] a")
        page, anchor = card.proof.split("#")
        assert link.get_attribute("href") == f"{page}.html#{anchor}"
        assert said(visit)["question"] == card.question.replace("`", "")


@pytest.mark.parametrize("width", [1280, 390])
def test_neither_answers_nor_exams_move_the_page(drill, width):
    visit, height = drill(width=width), "document.querySelector('.mpl-exhibit').offsetHeight"
    before = visit.page.evaluate(height)
    for card, side in itertools.product(CARDS, ("front", "back")):
        visit.page.goto(f"{visit.page.url.split('#')[0]}#drill:card={card}&side={side}")
        assert visit.page.evaluate(height) == before
    visit.page.get_by_label("What", exact=True).select_option("exam")
    exam = visit.page.evaluate(height)
    for _ in range(2):
        visit.page.locator("[data-action=exam]").click()
        assert visit.page.evaluate(height) == exam
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mode": "quiz"}, "expected mode to be one of cards, exam"),
        ({"theme": "formats"}, "expected theme to be one of all, amp, coding, speed"),
        ({"level": "junior"}, "expected level to be one of all, screen"),
        ({"pile": "due"}, "expected pile to be one of plan, weak, all"),
        ({"side": "edge"}, "expected side to be one of"),
        ({"card": "nothing"}, "expected card to be the id of a question"),
        ({"count": 7}, "expected count to be one of 5, 10, 20, 40"),
        ({"minutes": 0}, "expected minutes to be one of 5"),
        ({"now": "tomorrow"}, "expected now to be like"),
        ({"now": "2026-11-26 25:00:00"}, "expected now to be like"),
        ({"progress": {"a": {"due": 3}}}, "expected progress by id; expected a state with the keys"),
        ({"progress": {"a": 3}}, "expected progress by id; expected a state"),
        ({"exam": {"ids": ["x"]}}, "expected exam to be the fields of an Exam"),
        ({"exam": EXAMS[1] | {"ids": ["nothing"]}}, "expected exam to be the fields of an Exam of this bank"),
    ],
)
def test_wrong_state_is_refused_and_changes_nothing(bad, message):
    drill = Drill(cards(), now=NOW)
    ((key, value),) = bad.items()
    before = getattr(drill, key)
    with pytest.raises(traitlets.TraitError, match=message):
        setattr(drill, key, value)
    assert getattr(drill, key) == before


def test_python_can_be_driven_without_a_page():
    drill = Drill(now=NOW, theme="formats", order="themes")
    first = drill.current()
    assert first.theme == "formats" and len(drill.passing()) == len(drill.queue())
    drill.grade(5)
    text = drill.export()
    other = Drill(now=NOW)
    other.load(text)
    assert list(other.progress) == [first.id] and other.export() == text
    with pytest.raises(ValueError, match="expected progress as JSON"):
        other.load("no")
    assert other.export() == text
    empty = Drill(cards(), now=NOW, pile="weak")
    with pytest.raises(ValueError, match="expected a question on the table, got none"):
        empty.grade(3)
    with pytest.raises(ValueError, match="expected at least one question"):
        Drill([])


def test_without_a_given_time_the_clock_counts():
    today = datetime.date.today()
    assert Drill(cards()).today() in (today, today + datetime.timedelta(days=1))


def test_the_whole_bank_travels_in_less_than_300_kilobytes():
    drill = Drill()
    state = {key: getattr(drill, key) for key in drill.keys if not key.startswith("_") and key != "layout"}
    assert len(drill.bank) == len(load_bank()) and len(json.dumps(state)) < 300_000
