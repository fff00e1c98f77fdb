"""The exhibits by keyboard and by ear, and what they make of text that means harm: one page with a sample of each."""

import pytest
import torch
from conftest import Visit
from widget_page import MAKERS, SAMPLES, said

from mixprec_lab.exhibits import LossScaleLab, SameTensorTwoFormats, Windows

HARM = "<img src=x onerror=\"window.harmed='attribute'\"><script>window.harmed='script'</script>{{7*7}}${7*7}"
# What the keyboard can reach, in reading order; of a group of radio buttons or of roving bits, one.
REACHED = """() => {
  const radios = new Set(), all = "button, input, select, textarea, summary, a[href], [tabindex]";
  return [...document.querySelectorAll(`main :is(${all})`)].filter((e) => {
    if (e.disabled || e.tabIndex < 0 || !e.checkVisibility()) return false;
    if (e.type !== "radio") return true;
    const group = [...e.closest(".mpl-exhibit").querySelectorAll(`[name="${e.name}"]`)];
    const first = group.find((r) => r.checked) ?? group[0];
    return e === first && !radios.has(e.name) && radios.add(e.name);
  });
}"""
STOP = f"""() => {{
  const stops = window.stops ??= ({REACHED})(), e = document.activeElement, style = getComputedStyle(e);
  const exhibit = e.closest(".mpl-exhibit"), rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) =>
    sum + weight * (c[i] / 255 <= 0.04045 ? c[i] / 3294.6 : ((c[i] / 255 + 0.055) / 1.055) ** 2.4), 0);
  const ground = exhibit && getComputedStyle(exhibit).backgroundColor;
  const [a, b] = exhibit ? [style.outlineColor, ground].map((text) => light(rgb(text))) : [1, 0];
  return {{ place: stops.indexOf(e), html: e.outerHTML.slice(0, 100), end: e.id === "end",
    ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) }};
}}"""
NAMELESS = f"""() => ({REACHED})().filter((e) => {{
  const by = (name) => (e.getAttribute(name) ?? "").split(" ").map((id) => document.getElementById(id)?.textContent);
  const labels = [...(e.labels ?? [])].map((label) => label.textContent);
  const own = ["BUTTON", "SUMMARY", "A"].includes(e.tagName) ? e.textContent : "";
  return ![e.ariaLabel ?? "", ...by("aria-labelledby"), ...labels, own].some((text) => text?.trim());
}}).map((e) => e.outerHTML.slice(0, 120))"""
REORDERED = """() => [...document.querySelectorAll(".mpl-exhibit *")].filter((e) => {
  const style = getComputedStyle(e);
  return style.order !== "0" || style.flexDirection.endsWith("reverse") || e.tabIndex > 0;
}).map((e) => e.outerHTML.slice(0, 120))"""
# Move one control after the other until the words of the live region change.
HEARD = """(root) => {
  const regions = [...root.querySelectorAll("[aria-live=polite], output, [role=status]")]
    .filter((e) => e.dataset.field !== "link-status");
  const words = () => regions.map((e) => e.textContent).join("|"), first = words();
  const controls = "input[type=range]:enabled, select:enabled, input[type=checkbox]:enabled";
  for (const field of root.querySelectorAll(controls)) {
    if (field.type === "range") field.value = Number(field.value) === Number(field.max) ? field.min : field.max;
    else if (field.type === "checkbox") field.click();
    else field.selectedIndex = field.selectedIndex ? 0 : field.options.length - 1;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.dispatchEvent(new Event("change", { bubbles: true }));
    if (words() !== first) return { regions: regions.length, first, changed: true };
  }
  return { regions: regions.length, first, changed: false };
}"""


def all_of(pages, theme="light") -> Visit:
    return pages([make() for make in MAKERS.values()], theme=theme)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tab_walks_through_every_control_in_reading_order_with_a_ring_and_out_again(pages, theme):
    visit = all_of(pages, theme)
    page = visit.page
    page.evaluate("""() => { for (const [id, where] of [["start", "afterbegin"], ["end", "beforeend"]]) {
      const button = document.createElement("button");
      button.id = id;
      button.textContent = id;
      document.body.insertAdjacentElement(where, button);
    } document.getElementById("start").focus(); }""")
    reachable, walked = page.evaluate(f"() => ({REACHED})().length"), []
    for _ in range(reachable + 1):
        page.keyboard.press("Tab")
        walked.append(page.evaluate(STOP))
    assert [stop["place"] for stop in walked] == [*range(reachable), -1], walked
    assert walked[-1]["end"]
    dim = [stop for stop in walked[:-1] if not stop["ring"] or stop["contrast"] < 3]
    assert not dim, dim
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(STOP)["place"] == reachable - 1
    assert visit.problems == {}


def test_every_control_has_a_name_and_stands_where_it_is_read(pages):
    page = all_of(pages).page
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(REORDERED) == []


def test_a_moved_control_is_told_by_a_live_region(pages):
    visit = all_of(pages)
    for at, kind in enumerate(MAKERS):
        heard = visit.page.locator(".mpl-exhibit").nth(at).evaluate(HEARD)
        assert heard["regions"] and heard["first"].strip() and heard["changed"], (kind, heard)
    assert visit.problems == {}


WRITE = """([root, harm]) => {
  const all = "input:not([type]), input[type=text]:not([readonly]), input[type=number], textarea";
  const fields = [...root.querySelectorAll(all)];
  for (const field of fields) {
    field.value = harm;
    for (const name of ["input", "change", "blur"]) field.dispatchEvent(new Event(name, { bubbles: true }));
    field.form?.requestSubmit?.();
  }
  for (const button of root.querySelectorAll("button:not([data-action=copy-link])")) button.click();
  return fields.length;
}"""


def test_what_is_written_into_any_field_stays_text(pages):
    visit, fields = all_of(pages), {}
    for at, kind in enumerate(MAKERS):
        root = visit.page.locator(".mpl-exhibit").nth(at).element_handle()
        fields[kind] = visit.page.evaluate(WRITE, [root, HARM])
    assert {kind for kind, sample in SAMPLES.items() if sample.texts} <= {kind for kind, n in fields.items() if n}
    assert_unharmed(visit)


def assert_unharmed(visit: Visit) -> None:
    visit.page.wait_for_timeout(100)
    assert visit.page.evaluate("window.harmed ?? null") is None
    assert visit.page.locator("main img, .mpl-exhibit script").count() == 0
    assert visit.problems == {}


def test_names_that_a_reader_gave_stay_text(pages):
    tensors = {HARM: torch.tensor([1e-6, 0.5]), "</script><b>x</b>": torch.tensor([2.0, 3.0])}
    exhibits = [Windows.from_tensors(tensors, name="a"), LossScaleLab({HARM: tensors}, name="b")]
    exhibits.append(SameTensorTwoFormats(tensors, name="c"))
    visit = pages(exhibits)
    assert [said(visit, at) for at in range(3)] == [exhibit.result() for exhibit in exhibits]
    options = visit.page.locator("option").evaluate_all("all => all.map((o) => o.textContent)")
    assert {*tensors} <= {*options}
    assert_unharmed(visit)
