"""The built book in another browser: every page opens without a complaint, and its exhibits answer with our numbers."""

import json

import pytest
from conftest import HTML, READY, WATCH_POLICY, served
from firefox import find_firefox, running
from house.policy import secured
from widget_page import MAKERS, SAID, page_of

PAGES = sorted(str(p.relative_to(HTML)) for p in HTML.rglob("*.html") if p != HTML / "index.html")
RIGHT, LEFT, DOWN, UP, END = "\ue014", "\ue012", "\ue015", "\ue013", "\ue010"
EXHIBITS = f"() => [...document.querySelectorAll('.mpl-exhibit')].map({SAID})"
FOCUS = """() => {
  const all = [...document.querySelectorAll(".mpl-exhibit input[type=range]:enabled, .mpl-exhibit select:enabled")];
  const field = all.find((e) => e.getClientRects().length);
  field?.focus();
  return field ? [field.type, document.activeElement === field] : null;
}"""
UNWELL = "() => [...document.querySelectorAll('[data-widget]')].filter((e) => e.dataset.widget !== 'ready').length"


@pytest.fixture(scope="module")
def firefox(tmp_path_factory):
    """One headless Firefox for this file; without one, skip."""
    executable = find_firefox()
    if executable is None:
        pytest.skip("no Firefox found: install firefox-esr, or name one with FIREFOX=/path/to/firefox")
    with running(executable, tmp_path_factory.mktemp("firefox")) as browser:
        browser.watch(f"() => {{ {WATCH_POLICY} }}")
        yield browser


def test_first_views_say_what_python_computes(firefox, tmp_path):
    exhibits = [make() for make in MAKERS.values()]
    tmp_path.joinpath("all.html").write_text(page_of(exhibits), "utf-8")
    with served(tmp_path) as address:
        firefox.go(f"{address}/all.html")
        firefox.until(f"() => document.querySelectorAll('[data-widget=ready]').length === {len(exhibits)}")
        told = dict(zip(MAKERS, firefox.evaluate(EXHIBITS), strict=True))
    assert told == {kind: make().result() for kind, make in MAKERS.items()}
    assert firefox.errors == [] == firefox.evaluate("() => refusedByPolicy")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_opens_fits_and_its_exhibit_answers_a_key(firefox, site, path):
    firefox.resize(390)
    firefox.go(f"{site}/{path}")
    firefox.until(READY)
    assert firefox.evaluate(UNWELL) == 0
    assert firefox.evaluate("() => document.documentElement.scrollWidth") <= 390
    focused = firefox.evaluate(FOCUS)
    if focused:
        kind, in_focus = focused
        assert in_focus
        texts = f"JSON.stringify(({EXHIBITS})())"
        before = firefox.evaluate(f"() => {texts}")
        for key in (RIGHT, LEFT, END) if kind == "range" else (DOWN, UP, END):
            firefox.press(key)
        firefox.until(f"() => {texts} !== {json.dumps(before)}", seconds=10)
    assert firefox.errors == [] == firefox.evaluate("() => refusedByPolicy")


def test_pages_open_from_disk(firefox):
    for path in ("index.html", "book/loss_scaling.html"):
        firefox.go((HTML / path).as_uri())
        firefox.until("() => location.pathname.includes('/book/')")
        firefox.until(READY)
        assert firefox.evaluate(UNWELL) == 0
        assert firefox.errors == [] == firefox.evaluate("() => refusedByPolicy")


def test_what_goes_wrong_is_noticed(firefox, tmp_path):
    page = '<meta charset="utf-8"><img src=nothing.png><script>throw new Error("thrown")</script>'
    tmp_path.joinpath("bad.html").write_text(secured(page), "utf-8")
    with served(tmp_path) as address:
        firefox.go(f"{address}/bad.html")
        firefox.evaluate("() => document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=a()>')")
        firefox.until("() => refusedByPolicy.length")
    assert any("nothing.png: 404" in error for error in firefox.errors)
    assert any("thrown" in error for error in firefox.errors)
    assert "script-src-attr" in firefox.evaluate("() => refusedByPolicy")[0]
