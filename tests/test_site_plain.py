"""The built book where scripts are off, and for readers who asked that nothing moves."""

import json

import pytest
from bs4 import BeautifulSoup
from conftest import HTML, OVERLAPS, served
from house.policy import secured
from house.still import CAPTION, stills, with_stills
from ipywidgets.embed import dependency_state
from sphinx.errors import ExtensionError
from widget_page import MAKERS

PAGES = sorted(str(p.relative_to(HTML)) for p in HTML.rglob("*.html") if p != HTML / "index.html")
CHAPTERS = [path for path in PAGES if path.startswith("book/")]
VIEW = "application/vnd.jupyter.widget-view+json"
TEXTS = """(root) => Object.fromEntries([...root.querySelectorAll("[data-field]")]
  .filter((e) => e.dataset.field !== "link-status" && !e.closest("[hidden], .mpl-button"))
  .map((e) => [e.dataset.field, e.textContent]))"""
DRAWINGS = """(root) => [...root.querySelectorAll("svg[role=img]")].filter((e) => !e.closest("[hidden]"))
  .map((e) => e.ariaLabel)"""


def entry(widget) -> dict:
    """The state of a widget as a page carries it."""
    return dependency_state([widget], drop_defaults=False)[widget.model_id]


@pytest.fixture(scope="module")
def drawn() -> dict[str, BeautifulSoup]:
    """The still picture of a sample of every exhibit, by kind."""
    pictures = stills(entry(make()) for make in MAKERS.values())
    return {kind: BeautifulSoup(picture, "html.parser") for kind, picture in zip(MAKERS, pictures, strict=True)}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_still_picture_says_what_python_computes(drawn, kind):
    told = {node["data-field"]: node.get_text() for node in drawn[kind].select("[data-field]")}
    expected = MAKERS[kind]().result()
    assert told == {field: expected[field] for field in told}
    assert told and all(svg["aria-label"] and list(svg.children) for svg in drawn[kind].select("svg[role=img]"))


def test_still_pictures_hold_every_text_and_drawing_of_the_first_views(drawn, pages):
    visit = pages([make() for make in MAKERS.values()])
    for at, kind in enumerate(MAKERS):
        root = visit.page.locator(".mpl-exhibit").nth(at)
        assert {n["data-field"]: n.get_text() for n in drawn[kind].select("[data-field]")} == root.evaluate(TEXTS)
        assert [svg["aria-label"] for svg in drawn[kind].select("svg[role=img]")] == root.evaluate(DRAWINGS)


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_in_a_still_picture_waits_for_an_answer(drawn, kind):
    assert not drawn[kind].select("button, select, textarea, script, [tabindex], [aria-live], [hidden]")
    assert all(field.has_attr("disabled") for field in drawn[kind].select("input"))
    ids = [node["id"] for node in drawn[kind].select("[id]")]
    assert len(ids) == len(set(ids))


def test_still_pictures_are_the_same_in_every_build():
    entries = [entry(MAKERS[kind]()) for kind in ("loss-scale-lab", "lost-update-map")]  # they paint by ids
    assert stills(entries) == stills(entries)


def test_what_a_reader_could_write_into_a_state_stays_text():
    hostile = entry(MAKERS["bit-explorer"]())
    hostile["state"]["text"] = "<img src=x onerror=alert(1)>"
    assert "<img" not in stills([hostile])[0] and "&lt;img" in stills([hostile])[0]


def test_an_exhibit_that_cannot_be_drawn_stops_the_build_and_says_why():
    broken = {"state": {"name": "one", "_esm": "export default { render({ el }) { el.append(document.body.x); } };"}}
    with pytest.raises(ExtensionError, match=r"one: TypeError: Cannot read .*'x'"):
        stills([broken])
    silent = {"state": {"name": "two", "_esm": "export default { render() {} };"}}
    with pytest.raises(ExtensionError, match="two: Error: expected one element of two, got 0"):
        stills([silent])
    unknown = {"state": {"name": "three", "_esm": "export default { render({ el }) { el.innerHTML = 'x'; } };"}}
    with pytest.raises(ExtensionError, match="three: TypeError: Cannot add property innerHTML"):
        stills([unknown])


def test_without_node_the_build_says_what_to_do(monkeypatch):
    monkeypatch.setattr("house.still.NODE", None)
    with pytest.raises(ExtensionError, match="expected node .* run 'make install'"):
        stills([])


def test_a_page_with_scripts_does_not_see_the_picture(browser, tmp_path):
    widget = MAKERS["stalling-sum"]()
    view = f'<script type="{VIEW}">{json.dumps({"model_id": widget.model_id})}</script>'
    body = with_stills(f"<main>{view}</main>", {widget.model_id: entry(widget)})
    tmp_path.joinpath("a.html").write_text(secured(f'<meta charset="utf-8">{body}'), "utf-8")
    with served(tmp_path) as address:
        for scripts, count in ((True, 0), (False, 1)):
            context = browser.new_context(java_script_enabled=scripts)
            page = context.new_page()
            page.goto(f"{address}/a.html")
            assert page.locator("[data-exhibit]").count() == page.locator(".mpl-still-caption").count() == count
            context.close()


DRAWN = (".mpl-still-drawing", ":not(.mpl-still-drawing)")


@pytest.fixture(scope="module")
def plain(browser, site):
    """A page without scripts."""
    context = browser.new_context(java_script_enabled=False, color_scheme="dark")
    yield context.new_page()
    context.close()


@pytest.mark.parametrize("path", PAGES)
def test_without_scripts_a_page_is_whole_fits_and_shows_every_exhibit(plain, site, path):
    plain.goto(f"{site}/{path}")
    views = plain.locator(f'script[type="{VIEW}"]').count()
    stills, captions = plain.locator("noscript .mpl-exhibit"), plain.locator("noscript .mpl-still-caption")
    assert (stills.count(), captions.count()) == (views, views)
    for width in (1280, 390):
        plain.set_viewport_size({"width": width, "height": 900})
        assert plain.evaluate("document.documentElement.scrollWidth") <= width
        assert all(e.is_visible() for e in [*stills.all(), *captions.all()])
        assert set(captions.all_inner_texts()) <= {CAPTION}
        assert plain.evaluate(OVERLAPS) == []
        sizes = "all => all.filter((e) => e.clientWidth).map((e) => e.clientWidth)"
        drawings, marks = (plain.locator(f"noscript svg{which}").evaluate_all(sizes) for which in DRAWN)
        assert all(size >= 600 for size in drawings) and all(size <= 60 for size in marks), (drawings, marks)
    paper, ink = plain.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert paper == "rgb(255, 255, 255)" and max(map(int, ink[4:-1].split(","))) < 100
    assert plain.locator("button:visible").evaluate_all("all => all.filter((b) => !b.ariaLabel)") == []


def test_without_scripts_every_page_is_two_links_away_on_a_phone(plain, site):
    plain.set_viewport_size({"width": 390, "height": 900})
    plain.goto(f"{site}/index.html")
    plain.wait_for_url("**/book/index.html")
    links = plain.locator(".bd-sidebar-primary nav a:visible").evaluate_all("all => all.map((a) => a.href)")
    there = {link.removeprefix(f"{site}/").split("#")[0] for link in links}
    assert set(CHAPTERS) <= there | {"book/index.html"}


MOVING = """() => {
  const long = (text) => text.split(",").some((t) => parseFloat(t) * (t.trim().endsWith("ms") ? 1 : 1000) > 1);
  return [...document.querySelectorAll("*")].flatMap((e) => [null, "::before", "::after"].map((part) => [e, part]))
    .filter(([e, part]) => { const s = getComputedStyle(e, part);
      return long(s.transitionDuration) || (long(s.animationDuration) && s.animationName !== "none")
        || s.scrollBehavior === "smooth"; })
    .map(([e]) => e.outerHTML.slice(0, 90));
}"""


def test_nothing_moves_for_a_reader_who_asked_for_that(open_page, pages):
    assert open_page("book/loss_scaling.html").page.evaluate(MOVING) == []  # contexts of open_page ask for it
    page = pages([make() for make in MAKERS.values()]).page
    assert page.evaluate(MOVING) != []  # and this one does not
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(MOVING) == []
