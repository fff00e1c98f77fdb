"""The built book in a real browser: self-contained, silent, accessible, good on a phone and as plain files."""

import gzip
import json

import pytest
from conftest import HTML, OVERLAPS, READY, ROOT, wait_until

PAGES = sorted(str(p.relative_to(HTML)) for p in HTML.rglob("*.html") if p != HTML / "index.html")
HEAVIEST_PAGE = 1.2e6  # bytes on first load, gzip
AXE = ROOT / ".assets" / "axe-core" / "axe.min.js"
# The theme lets the keyboard reach what scrolls, a third of a second after the width has changed.
REACHABLE = """() => [...document.querySelectorAll("pre")]
  .every((e) => e.scrollWidth <= e.clientWidth || e.tabIndex === 0)"""
DISTORTED = "els => els.map(e => e.clientWidth / e.clientHeight / e.naturalWidth * e.naturalHeight)"
ICONS = ".fa-solid, .fas, .fa-regular, .far, .fa-brands, .fab"
UNSET = "els => els.filter(e => !getComputedStyle(e).getPropertyValue('--icon')).map(e => e.className)"
PHONE = {"width": 390, "height": 900}
PAPER = {"width": 718, "height": 1000}  # A4 with margins of 1 cm, in pixels
SHOWN = """(selector) => [...document.querySelectorAll(selector)].filter((e) => e.getClientRects().length)
  .map((e) => e.outerHTML.slice(0, 90))"""
MACHINERY = (
    "button:not(.mpl-bit), .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .prev-next-area, "
    ".headerlink, input[type=range], dialog, details:not([open])"
)
GROUNDS = "all => all.map((e) => [getComputedStyle(e).backgroundColor, getComputedStyle(e).filter])"
RUN_AXE = """async (options) => {
  const found = await axe.run(document, { resultTypes: ["violations"], ...options });
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


def violations(page, contrast: bool, rest: bool) -> str:
    """What axe finds serious in the page, as text: of the contrast of its colours, of all the rest, or of both."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    options = {"rules": {"color-contrast": {"enabled": contrast}}} if rest else {"runOnly": ["color-contrast"]}
    found = page.evaluate(RUN_AXE, options)
    return json.dumps(found, indent=1) if found else ""


@pytest.mark.parametrize("path", PAGES)
def test_page_is_self_contained_light_accessible_and_fits(open_page, site, path):
    visit = open_page(path)
    page = visit.page
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert set(widget_states(visit)) <= {"ready"}
    assert sum(sizes(visit, site).values()) <= HEAVIEST_PAGE, sizes(visit, site)
    assert violations(page, contrast=True, rest=True) == ""
    page.set_viewport_size(PHONE)
    wait_until(page, REACHABLE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert violations(page, contrast=False, rest=True) == ""
    assert not visit.problems


@pytest.mark.parametrize("path", PAGES)
def test_page_works_from_a_file_on_a_dark_phone_and_on_paper(open_page, path):
    """On paper it is light, unfolded and without machinery; afterwards it is as it was."""
    visit = open_page(path, theme="dark", scheme="file", width=PHONE["width"])
    page = visit.page
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert set(widget_states(visit)) <= {"ready"}
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert all(abs(ratio - 1) < 0.03 for ratio in page.eval_on_selector_all("div.cell_output img", DISTORTED))
    assert page.eval_on_selector_all(ICONS, UNSET) == []
    assert violations(page, contrast=True, rest=False) == ""
    folded = page.locator("details:not([open])").count()
    page.set_viewport_size(PAPER)
    page.emulate_media(media="print")
    wait_until(page, "() => document.documentElement.dataset.theme === 'light'")
    assert page.evaluate(SHOWN, MACHINERY) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER["width"]
    assert page.evaluate(OVERLAPS) == []
    for ground, filtered in page.locator("body, .mpl-exhibit, div.cell_output img").evaluate_all(GROUNDS):
        assert ground in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)") and filtered == "none"
    page.emulate_media(media="screen")
    wait_until(page, "() => document.documentElement.dataset.theme === 'dark'")
    assert page.locator("details:not([open])").count() == folded
    assert not visit.problems


def test_a_chapter_prints(open_page):
    printed = open_page("book/loss_scaling.html", theme="dark", scheme="file").page.pdf(format="A4")
    assert printed.startswith(b"%PDF-") and 5 <= printed.count(b"/Type /Page\n") <= 60


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search_finds_and_quotes_and_nothing_is_refused(open_page, scheme):
    visit = open_page("search.html", scheme=scheme, query="?q=underflow")
    wait_until(visit.page, "() => /found/.test(document.querySelector('.search-summary')?.textContent)")
    results = visit.page.locator("ul.search li a")
    assert results.count() >= 5
    if scheme == "http":
        visit.page.locator("ul.search li p.context").first.wait_for()
    assert not visit.problems
    results.first.click()
    wait_until(visit.page, READY)
    assert "/book/" in visit.page.url and not visit.problems
