"""The museum's list of rooms: JavaScript filters as Python does; ticks are counted, kept and forgotten; links lead."""

import itertools
import json

import pytest
import traitlets
from conftest import run_node
from widget_page import said

from mixprec_lab.checks.broken_code import LEVELS, ROOMS, THEMES
from mixprec_lab.exhibits import Museum

THEME_CHOICES, LEVEL_CHOICES = ("all", *THEMES), ("all", *map(str, LEVELS))
HARD = [room.name for room in ROOMS if room.difficulty == 3]


def test_javascript_says_what_python_says_for_every_filter_and_some_ticks(tmp_path):
    shown, ticks = Museum(), ([], HARD, [room.name for room in ROOMS])
    states = [
        {"theme": theme, "level": level, "solved": solved}
        for theme, level, solved in itertools.product(THEME_CHOICES, LEVEL_CHOICES, ticks)
    ]
    traits = {key: getattr(shown, key) for key in ("rooms", "themes", "levels")}
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    run_node("states.mjs", tmp_path, {"kind": "museum", "traits": traits, "states": states})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    for state, words in zip(states, answers, strict=True):
        assert words == Museum(**state).result(), state


def test_the_filters_part_the_rooms():
    by_theme = [room for theme in THEMES for room in Museum(theme=theme).shown()]
    by_level = [room for level in LEVELS for room in Museum(level=str(level)).shown()]
    assert by_theme == list(ROOMS)
    assert sorted(by_level, key=ROOMS.index) == list(ROOMS)
    assert Museum(theme="timing", level="3").shown() == []


def test_the_verdict_by_hand():
    assert Museum(level="3", solved=[*HARD[:2], "no_floor"]).result()["verdict"] == (
        f"{len(HARD)} of {len(ROOMS)} rooms; 2 of them solved."
    )


@pytest.mark.parametrize("bad", [{"theme": "love"}, {"level": "4"}, {"level": ""}, {"solved": ["no such room"]}])
def test_unknown_themes_levels_and_rooms_are_refused_and_change_nothing(bad):
    museum = Museum(theme="repair", level="2", solved=HARD)
    for key, value in bad.items():
        with pytest.raises(traitlets.TraitError, match=f"expected {key} to"):
            setattr(museum, key, value)
    assert (museum.theme, museum.level, museum.solved) == ("repair", "2", HARD)


@pytest.fixture
def museum(pages):
    """``museum(width=...)``: a visit to the list; the browser forgets its ticks afterwards."""
    opened = []

    def open_(**how):
        opened.append(pages([Museum(name="rooms")], **how))
        return opened[-1]

    yield open_
    for visit in opened:
        visit.page.evaluate("localStorage.clear()")


def tick(visit, name: str):
    return visit.page.locator(f"[data-room={name}]")


def test_ticks_are_counted_by_mouse_and_keyboard_and_survive_filters(museum):
    visit = museum()
    tick(visit, "no_floor").click()
    tick(visit, "half_quotient").focus()
    visit.page.keyboard.press("Space")
    assert said(visit) == Museum(solved=["no_floor", "half_quotient"]).result()
    visit.page.get_by_label("Theme", exact=True).select_option("scaling")
    assert said(visit) == Museum(theme="scaling", solved=["no_floor", "half_quotient"]).result()
    assert tick(visit, "no_floor").is_checked() and not tick(visit, "no_ceiling").is_checked()
    tick(visit, "no_floor").click()
    assert said(visit) == Museum(theme="scaling", solved=["half_quotient"]).result()
    assert visit.problems == {}


def test_the_browser_keeps_the_ticks_and_ignores_what_it_does_not_know(museum):
    visit = museum()
    tick(visit, "no_floor").click()
    visit.page.reload()
    visit.page.wait_for_selector("[data-room]")
    assert said(visit) == Museum(solved=["no_floor"]).result()
    for stored, solved in (('["no_floor", "gone", 7]', ["no_floor"]), ("{", []), ('"no_floor"', []), ("null", [])):
        visit.page.evaluate("text => localStorage.setItem('mixprec-lab:museum', text)", stored)
        visit.page.reload()
        visit.page.wait_for_selector("[data-room]")
        assert said(visit) == Museum(solved=solved).result(), stored
    assert visit.problems == {}


def test_without_storage_ticks_work_and_the_page_says_that_they_will_be_lost(museum):
    visit = museum()
    visit.page.evaluate("""() => { Storage.prototype.setItem = () => { throw new DOMException("full"); }; }""")
    tick(visit, "no_floor").click()
    assert said(visit) == Museum(solved=["no_floor"]).result()
    assert "keeps no ticks" in visit.page.locator(".mpl-exhibit").inner_text()
    assert visit.problems == {}


def test_titles_lead_to_the_rooms(museum):
    visit = museum()
    told = "all => all.map(a => [a.textContent, a.getAttribute('href')])"
    assert visit.page.locator(".mpl-rooms a").evaluate_all(told) == [[room.title, f"#{room.anchor}"] for room in ROOMS]


@pytest.mark.parametrize("width", [1280, 390])
def test_filters_and_ticks_do_not_move_the_page(museum, width):
    visit = museum(width=width)
    height = "document.querySelector('.mpl-exhibit').offsetHeight"
    before = visit.page.evaluate(height)
    for theme, level in (("all", "3"), ("timing", "3"), ("weights", "all"), ("all", "all")):
        visit.page.get_by_label("Theme", exact=True).select_option(theme)
        visit.page.get_by_label("Difficulty", exact=True).select_option(level)
        assert visit.page.evaluate(height) == before
    tick(visit, "no_floor").click()
    assert visit.page.evaluate(height) == before
