"""The built book in a real browser: self-contained, silent, accessible, good on a phone and as plain files."""

import gzip
import json

import pytest
from conftest import HTML, ROOT

PAGES = sorted(str(p.relative_to(HTML)) for p in HTML.rglob("*.html") if p != HTML / "index.html")
HEAVIEST_PAGE = 1.2e6  # bytes on first load, gzip
AXE = ROOT / ".assets" / "axe-core" / "axe.min.js"
# The theme lets the keyboard reach what scrolls, a third of a second after the width has changed.
REACHABLE = """() => [...document.querySelectorAll("pre")]
  .every((e) => e.scrollWidth <= e.clientWidth || e.tabIndex === 0)"""
RUN_AXE = """async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  return found.violations.filter((v) => ["serious", "critical"].includes(v.impact))
    .map((v) => ({ rule: v.id, impact: v.impact, nodes: v.nodes.slice(0, 5).map((n) => n.html.slice(0, 200)) }));
}"""


def widget_states(visit) -> list[str]:
    return visit.page.eval_on_selector_all("[data-widget]", "els => els.map(e => e.dataset.widget)")


def sizes(visit, site: str) -> dict[str, int]:
    """Bytes after gzip of every file the page asked for."""
    names = {url.split("?")[0].removeprefix(site + "/") for url in visit.requests if url.startswith(site)}
    return {name: len(gzip.compress((HTML / name).read_bytes(), 6)) for name in sorted(names)}


def test_book_has_pages():
    assert "book/index.html" in PAGES, "there is no built book: run 'make test', which builds it first"


def test_top_of_site_leads_to_the_first_page(open_page):
    visit = open_page("index.html")
    visit.page.wait_for_url("**/book/index.html")
    assert not visit.external and not visit.console_errors and not visit.page_errors


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_page_is_self_contained_accessible_and_fits(open_page, path, theme):
    visit = open_page(path, theme=theme)
    page = visit.page
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert set(widget_states(visit)) <= {"ready"}
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for width in (1280, 390):
        if width != 1280:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(REACHABLE, timeout=20_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        violations = page.evaluate(RUN_AXE)
        assert not violations, f"{width} px: {json.dumps(violations, indent=1)}"
    assert not visit.problems


@pytest.mark.parametrize("path", PAGES)
def test_page_fits_and_is_light_on_a_phone(open_page, path, site):
    visit = open_page(path, width=390)
    distorted = "els => els.map(e => e.clientWidth / e.clientHeight / e.naturalWidth * e.naturalHeight)"
    ratios = visit.page.eval_on_selector_all("div.cell_output img", distorted)
    assert all(abs(ratio - 1) < 0.03 for ratio in ratios), ratios
    assert sum(sizes(visit, site).values()) <= HEAVIEST_PAGE, sizes(visit, site)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert set(widget_states(visit)) <= {"ready"}
    assert not visit.problems


@pytest.mark.parametrize("path", PAGES)
def test_page_works_from_a_file(open_page, path):
    visit = open_page(path, scheme="file")
    assert set(widget_states(visit)) <= {"ready"}
    assert not visit.problems


@pytest.mark.parametrize("path", [p for p in PAGES if p.startswith("book/")])
def test_no_part_of_the_theme_shows_an_empty_icon(open_page, path):
    icons = ".fa-solid, .fas, .fa-regular, .far, .fa-brands, .fab"
    unset = "els => els.filter(e => !getComputedStyle(e).getPropertyValue('--icon')).map(e => e.className)"
    assert open_page(path, scheme="file").page.eval_on_selector_all(icons, unset) == []
