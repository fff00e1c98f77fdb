"""The exhibits as Python objects, and in a real browser with no kernel: what the page says is what Python computes."""

import functools
import json
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qsl, quote

import pytest
import torch
import traitlets
from conftest import QuietHandler, Visit
from widget_page import page_of

from mixprec_lab.exhibits import BitExplorer, NumberLine, StallingSum, Windows
from mixprec_lab.formats import FORMATS, classify
from mixprec_lab.rounding import METHODS, ROUNDING_MODES, accumulate, quantize


def tensors() -> dict[str, torch.Tensor]:
    """Two recordings: small gradients with a few zeros, and values on every threshold of FP16."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3000, generator=generator) * 2e-6
    gradients[:30] = 0.0
    fp16 = FORMATS["fp16"]
    edges = [2.0**-25, 2.0**-24, fp16.smallest_normal - 2.0**-25, fp16.smallest_normal, 65504.0, 65520.0, 70000.0]
    return {"gradients": gradients, "edges": torch.tensor([*edges, *(-e for e in edges)])}


MAKERS = {
    "bit-explorer": lambda: BitExplorer(name="bits"),
    "windows": lambda: Windows.from_tensors(tensors(), name="win"),
    "stalling-sum": lambda: StallingSum(count=400, name="sum"),
    "number-line": lambda: NumberLine(name="line"),
}
STATE = {
    "bit-explorer": ("format", "text", "code", "rounding", "overflow"),
    "windows": ("source", "centre", "spread", "scale"),
    "stalling-sum": ("addend", "count", "format", "method", "seed"),
    "number-line": ("x", "first", "second", "rounding", "centre", "zoom"),
}


# ---- the objects ----


@pytest.mark.parametrize("kind", MAKERS)
def test_the_text_output_is_the_same_in_every_run(kind):
    first, second = MAKERS[kind](), MAKERS[kind]()
    assert repr(first) == repr(second) and type(first).__name__ in repr(first)
    assert first.name == second.name and len(repr(first)) < 110


def test_the_names_of_links_differ_with_the_start():
    assert BitExplorer().name == BitExplorer().name != BitExplorer("bf16").name


def test_importing_the_package_does_not_load_the_widgets():
    import subprocess
    import sys

    code = "import sys, mixprec_lab, mixprec_lab.exhibits; sys.exit('anywidget' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (BitExplorer, {"format": "fp99"}), (BitExplorer, {"text": "0,1"}), (BitExplorer, {"code": 2**16}),
        (BitExplorer, {"rounding": "stochastic"}), (BitExplorer, {"overflow": "wrap"}), (BitExplorer, {"name": "a b"}),
        (Windows, {"source": "nothing"}), (Windows, {"scale": 25}), (Windows, {"spread": 0}),
        (StallingSum, {"addend": "0"}), (StallingSum, {"addend": "inf"}), (StallingSum, {"count": 0}),
        (StallingSum, {"count": 20_001}), (StallingSum, {"method": "sort"}), (StallingSum, {"format": "e4m3"}),
        (NumberLine, {"x": "nan"}), (NumberLine, {"first": "e8m0"}), (NumberLine, {"rounding": "even"}),
        (NumberLine, {"zoom": 17}),
    ],
)  # fmt: skip
def test_wrong_state_is_refused_and_changes_nothing(make, changes):
    exhibit = make()
    ((key, value),) = changes.items()
    before = getattr(exhibit, key)
    with pytest.raises(traitlets.TraitError):
        setattr(exhibit, key, value)
    assert getattr(exhibit, key) == before


def test_refusals_say_what_was_expected_and_got():
    with pytest.raises(traitlets.TraitError, match=r"expected format to be one of fp32, .*got 'fp99'"):
        BitExplorer().format = "fp99"
    with pytest.raises(traitlets.TraitError, match="expected a number as text, got 'x'"):
        BitExplorer(text="x")


def test_code_and_text_of_the_bit_explorer_agree():
    bits = BitExplorer("fp16", 0.1)
    assert bits.code == 0x2E66 and bits.bits.value == 0.0999755859375
    bits.code = 0x7C00
    assert bits.text == "inf"
    bits.text = "-0"
    assert bits.code == 0x8000
    bits.format = "bf16"
    assert bits.code == 0x8000
    bits.text = "nan"
    bits.code = 0x7FFF
    assert bits.text == "nan"
    bits.format = "fp4_e2m1"
    assert (bits.text, bits.code) == ("0", 0)
    with pytest.raises(traitlets.TraitError, match="has a code for, got nan"):
        bits.text = "nan"
    assert (bits.text, bits.code) == ("0", 0)


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        ({"text": "65520"}, "value", "65504"),
        ({"text": "65520", "overflow": "native"}, "value", "inf"),
        ({"text": "65520"}, "bf16-value", "65536"),
        ({"text": "65520"}, "fp8_e4m3-outcome", "held at the largest"),
        ({"text": "65520", "overflow": "native"}, "fp8_e4m3-outcome", "becomes NaN"),
        ({"text": "1e-8"}, "fp16-outcome", "flushed to zero"),
        ({"text": "2^-24"}, "class", "subnormal"),
        ({"text": "0.1"}, "power", "819 × 2^-13"),
        ({"text": "0.1"}, "exponent", "01011 = 11, scale 2^-4"),
        ({"text": "0.1"}, "below", "0.09991455078125"),
        ({"text": "0.1"}, "above", "0.10003662109375"),
        ({"text": "0.1"}, "fp16-error", "0.000244"),
        ({"text": "-1e6", "format": "fp8_e4m3", "overflow": "native"}, "code", "0xFF (255)"),
        ({"text": "1"}, "gap", "2^-10"),
        ({"text": "-1", "format": "e8m0"}, "class", "NaN"),
        ({"format": "fp32", "text": "2^-149"}, "value", "1.401298464324817e-45 (rounded)"),
    ],
)
def test_the_bit_explorer_says(arguments, field, text):
    assert BitExplorer(**arguments).result()[field] == text


@pytest.mark.parametrize("scale", [-24, -3, 0, 7, 24])
@pytest.mark.parametrize("source", ["gradients", "edges"])
def test_recorded_shares_are_exact(source, scale):
    exhibit = Windows.from_tensors(tensors(), source=source, scale=scale)
    x = tensors()[source]
    for name in exhibit.formats:
        s = classify(x, name, 2.0**scale)
        expected = (s.zero, s.flushed, s.subnormal, s.normal, s.overflowed)
        assert exhibit.shares(FORMATS[name]) == pytest.approx(expected, abs=1e-12)


def test_shares_of_the_model_distribution_are_those_of_a_sample():
    exhibit = Windows(centre=-20, spread=3, scale=2)
    log2 = torch.randn(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 - 18
    for name in ("fp16", "fp8_e5m2", "fp8_e4m3"):
        s = classify(torch.exp2(log2), name)
        expected = (s.flushed, s.subnormal, s.normal, s.overflowed)
        assert exhibit.shares(FORMATS[name])[1:] == pytest.approx(expected, abs=0.004)


def test_the_numbers_of_the_stalling_sum_are_the_known_ones():
    assert StallingSum("1e-7", 5000, "fp16").result()["verdict"].startswith("Stalls after 2048 additions")
    bf16 = StallingSum("1", 1000, "bf16").result()
    assert bf16["total"] == "256" and bf16["verdict"].startswith("Stalls after 256 additions at 256")
    assert "flushed to zero" in StallingSum("1e-8", 10, "fp16").result()["verdict"]
    assert StallingSum("1000", 100, "fp16").result()["verdict"].endswith("leave the range of FP16: the sum is inf.")
    assert StallingSum("100", 9, "fp8_e4m3", "kahan").result()["verdict"].endswith("FP8 E4M3: the sum is nan.")
    assert StallingSum("1", 1000, "bf16", "fp32").result()["total"] == "1000"
    assert StallingSum("1", 1000, "bf16", "pairwise").result()["error"] == "0"


def test_stochastic_rounding_of_the_stalling_sum_stays_near_the_exact_sum():
    totals = [float(StallingSum("1", 1000, "bf16", "stochastic", seed=s).sums()[-1]) for s in range(21)]
    assert len(set(totals)) > 5 and sum(totals) / 21 == pytest.approx(1000, rel=0.03)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "stochastic"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8_e4m3"])
def test_the_last_partial_sum_is_accumulate(name, method):
    values = torch.full((150,), 0.3, dtype=torch.float64)
    total = float(StallingSum("0.3", 150, name, method).sums()[-1])
    assert total == pytest.approx(float(accumulate(values, name, method)), rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("mode", ROUNDING_MODES[:5])
@pytest.mark.parametrize("x", ["0.1", "-0.3", "1", "0", "-0", "500", "-1e9", "0.0001"])
def test_all_of_an_interval_of_the_number_line_rounds_to_its_value(x, mode):
    exhibit = NumberLine(x, ("fp8_e4m3", "fp4_e2m1"), mode)
    said = exhibit.result()
    for prefix, name in (("first", "fp8_e4m3"), ("second", "fp4_e2m1")):
        low, high = (float(end) for end in said[f"{prefix}-interval"].split(" to "))
        value, top = float(said[f"{prefix}-value"]), FORMATS[name].largest * 4
        low, high = max(low, -top), min(high, top)
        inside = torch.linspace(low, high, 101, dtype=torch.float64)[1:-1]
        assert bool((quantize(inside, name, mode) == value).all())
        assert low <= float(x) <= high or abs(float(x)) > top
        outside = torch.tensor([low - (high - low) / 50, high + (high - low) / 50], dtype=torch.float64)
        moved = quantize(outside, name, mode) != value
        assert bool((moved | (outside.abs() >= top)).all())


# ---- the page ----


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    """``pages(exhibits, scheme, theme, width, fragment)`` -> a visit to a page that holds just them."""
    folder = tmp_path_factory.mktemp("exhibits")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    context, opened = browser.new_context(), []

    def open_(exhibits, scheme="http", theme="light", width=1280, fragment="") -> Visit:
        path = folder / f"{len(opened)}.html"
        path.write_text(page_of(exhibits, theme), "utf-8")
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.set_viewport_size({"width": width, "height": 900})
        opened.append(page)
        visit = Visit(page)
        base = path.as_uri() if scheme == "file" else f"http://127.0.0.1:{server.server_port}/{path.name}"
        page.goto(base + fragment)
        page.wait_for_function("document.querySelectorAll('[data-widget=ready]').length === " + str(len(exhibits)))
        return visit

    yield open_
    context.close()
    server.shutdown()
    thread.join()
    server.server_close()


SAID = """root => Object.fromEntries([...root.querySelectorAll("[data-field]")]
  .filter(e => e.dataset.field !== "link-status").map(e => [e.dataset.field, e.textContent]))"""


def said(visit: Visit, at: int = 0) -> dict[str, str]:
    """Every text of the exhibit, by its data-field."""
    return visit.page.locator(".mpl-exhibit").nth(at).evaluate(SAID)


LINK = """async () => {
  Object.defineProperty(navigator, "clipboard", { value: undefined, configurable: true });
  document.querySelector("[data-action=copy-link]").click();
  await new Promise((done) => setTimeout(done));
  return document.querySelector(".mpl-link").value;
}"""


def link_of(visit: Visit) -> str:
    """The link to the present state, by the button and without a clipboard."""
    return visit.page.evaluate(LINK)


def test_without_a_clipboard_the_link_stands_in_a_field(pages):
    visit = pages([MAKERS["bit-explorer"]()], "file")
    link = link_of(visit)
    assert "#bits:" in link and visit.page.get_by_label("Link to this state").is_visible()
    assert "clipboard is not available" in visit.page.locator("[data-field=link-status]").inner_text()
    assert visit.problems == {}


def python_twin(kind: str, link: str):
    """The exhibit in Python, in the state that the link names."""
    state = dict(parse_qsl(link.split("#")[1].split(":", 1)[1]))
    twin = MAKERS[kind]()
    assert set(state) == set(STATE[kind])
    order = [key for key in STATE[kind] if key != "code"] + ["code"] * ("code" in state)
    for key in order:
        trait = twin.traits()[key]
        convert = int if isinstance(trait, traitlets.Int) else float if isinstance(trait, traitlets.Float) else str
        setattr(twin, key, convert(state[key]))
    return twin


def assert_page_is_python(kind: str, visit: Visit) -> None:
    """The texts of the page are ``result()`` of the same state."""
    page, expected = said(visit), python_twin(kind, link_of(visit)).result()
    assert page == expected
    assert visit.problems == {}


def drive_selects(kind: str, visit: Visit) -> None:
    root = visit.page.locator(".mpl-exhibit")
    for i in range(root.locator("select").count()):
        field = root.locator("select").nth(i)
        values = field.locator("option").evaluate_all("options => options.map(o => o.value)")
        for value in (values[-1], values[0]):
            field.select_option(value)
            assert_page_is_python(kind, visit)
        field.focus()
        visit.page.keyboard.press("ArrowDown")
        assert_page_is_python(kind, visit)


def drive_ranges(kind: str, visit: Visit, by: str) -> None:
    root = visit.page.locator(".mpl-exhibit")
    for i in range(root.locator("input[type=range]:enabled").count()):
        field = root.locator("input[type=range]:enabled").nth(i)
        for end in ("min", "max"):
            if by == "keyboard":
                field.focus()
                visit.page.keyboard.press("Home" if end == "min" else "End")
            else:
                box = field.bounding_box()
                y = box["y"] + box["height"] / 2
                visit.page.mouse.move(box["x"] + box["width"] / 2, y)
                visit.page.mouse.down()
                visit.page.mouse.move(box["x"] + (-5 if end == "min" else box["width"] + 5), y, steps=3)
                visit.page.mouse.up()
            if field.get_attribute("name") != "position":  # the view moves with x, and the slider with the view
                assert field.input_value() == field.get_attribute(end)
            assert field.get_attribute("aria-valuetext")
            assert_page_is_python(kind, visit)


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_first_view_says_what_python_computes(pages, kind, scheme):
    visit = pages([MAKERS[kind]()], scheme)
    assert said(visit) == MAKERS[kind]().result()
    assert_page_is_python(kind, visit)
    root = visit.page.locator("div.mpl-exhibit")
    assert root.get_attribute("data-exhibit") == kind and root.get_attribute("aria-labelledby")


@pytest.mark.parametrize("kind", MAKERS)
def test_every_list_and_slider_moves_the_texts_to_what_python_computes(pages, kind):
    visit = pages([MAKERS[kind]()], "file")
    drive_selects(kind, visit)
    drive_ranges(kind, visit, "keyboard")


@pytest.mark.parametrize("kind", ["windows", "stalling-sum", "number-line"])
def test_sliders_follow_the_mouse_to_both_ends(pages, kind):
    visit = pages([MAKERS[kind]()])
    if kind == "windows":
        visit.page.locator("select").first.select_option(index=2)
    if kind == "stalling-sum":
        visit.page.locator("select").nth(1).select_option("stochastic")
        assert_page_is_python(kind, visit)
    drive_ranges(kind, visit, "mouse")


GOOD = {
    "bit-explorer": ("65520", "-0", "nan", "inf", "-inf", "1e-8", "2^-24", "0x1p-3", "-1.5*2^3"),
    "stalling-sum": ("0.3", "-1e-3", "2^-12", "1e5", "1e-9", "1e30"),
    "number-line": ("-0", "0.1", "448", "1e9", "-2^-7"),
}
LABELS = {"bit-explorer": "Number", "stalling-sum": "Addend", "number-line": "x"}


@pytest.mark.parametrize("kind", GOOD)
def test_numbers_may_be_typed(pages, kind):
    visit = pages([MAKERS[kind]()])
    field = visit.page.locator("input[type=text]:not([readonly])").first
    for text in GOOD[kind]:
        field.fill(text)
        field.press("Enter")
        assert_page_is_python(kind, visit)


@pytest.mark.parametrize("kind", GOOD)
def test_bad_text_is_named_and_changes_nothing(pages, kind):
    visit = pages([MAKERS[kind]()])
    field, complaint = (
        visit.page.locator("input[type=text]:not([readonly])").first,
        visit.page.locator(".mpl-error").first,
    )
    for text in ("", "0,1", "1e400", "<img src=x onerror=alert(1)>", "\u221e"):
        before = said(visit)
        field.fill(text)
        field.press("Tab")
        assert complaint.inner_text() and field.get_attribute("aria-invalid") == "true"
        assert said(visit) == before and visit.page.locator("img").count() == 0
        field.fill("0.5")
        assert complaint.inner_text() == "" and field.get_attribute("aria-invalid") == "false"
        assert_page_is_python(kind, visit)


def test_bits_answer_to_mouse_and_keyboard(pages):
    visit = pages([MAKERS["bit-explorer"]()])
    page, bits = visit.page, visit.page.locator(".mpl-bit")
    assert bits.count() == 16
    bits.nth(0).click()
    assert said(visit)["code"] == "0xAE66 (44646)"
    assert_page_is_python("bit-explorer", visit)
    bits.nth(0).focus()
    for key in ("End", "Space", "ArrowLeft", "Space", "Home", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert said(visit)["code"] == f"0x{(0xAE66 ^ 0b11) ^ (1 << 14):X} ({(0xAE66 ^ 0b11) ^ (1 << 14)})"
    assert_page_is_python("bit-explorer", visit)
    assert page.locator(".mpl-bit[tabindex='0']").count() == 1
    assert bits.nth(1).get_attribute("aria-pressed") == "true"
    assert bits.nth(1).get_attribute("aria-label") == "exponent bit 4: 1"


@pytest.mark.parametrize("name", ["fp32", "fp16", "fp8_e4m3fnuz", "e8m0"])
def test_the_codes_can_be_walked_to_both_ends(pages, name):
    fmt = FORMATS[name]
    last = 2**fmt.bits - 1
    visit = pages([BitExplorer(name, code=1, name="bits")], "file")
    for code, press, off in ((1, "previous", 0), (last - 1, "next", last)):
        if code != 1:
            visit.page.goto(f"{visit.page.url.split('#')[0]}#bits:text={_typed(code, fmt)}&code={code}")
        visit.page.locator(f"[data-action={press}]").click()
        assert said(visit)["code"].endswith(f"({off})")
        assert visit.page.locator(f"[data-action={press}]").is_disabled()
        assert said(visit) == BitExplorer(name, code=off).result()
    assert visit.problems == {}


def _typed(code, fmt) -> str:
    return quote(BitExplorer(fmt, code=code).text)


@pytest.mark.parametrize("kind", MAKERS)
def test_links_restore_the_state_and_touch_no_other_exhibit(pages, kind):
    changes = {
        "bit-explorer": {"format": "bf16", "code": 0x7FC1, "rounding": "up"},
        "windows": {"source": "edges", "scale": 7},
        "stalling-sum": {"addend": "0.3", "count": 1500, "format": "bf16", "method": "kahan"},
        "number-line": {"x": "-3.3", "centre": -3.3, "first": "bf16", "rounding": "stochastic", "zoom": 4},
    }[kind]
    twin = MAKERS[kind]()
    for key, value in changes.items():
        setattr(twin, key, value)
    fragment = "&".join(f"{key}={quote(str(getattr(twin, key)))}" for key in STATE[kind])
    visit = pages([m() for m in MAKERS.values()], "file", fragment=f"#{twin.name}:{fragment}")
    for at, (other, make) in enumerate(MAKERS.items()):
        assert said(visit, at) == (twin if other == kind else make()).result()
    assert visit.problems == {}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_link_with_nonsense_changes_nothing(pages, kind):
    wrong = "&".join(f"{key}=%3Cb%3E" for key in STATE[kind])
    visit = pages([MAKERS[kind]()], fragment=f"#{MAKERS[kind]().name}:{wrong}&code=-1&count=1e9&zoom=99&scale=x")
    assert said(visit) == MAKERS[kind]().result() and visit.problems == {}


COUNT_AND_CLEAN = """async (entry) => {
  const handlers = new Map(), state = entry;
  const model = {
    get: (k) => state[k], save_changes() {},
    set(k, v) { state[k] = v; for (const f of [...(handlers.get("change:" + k) || [])]) f(); },
    on(n, f) { if (!handlers.has(n)) handlers.set(n, new Set()); handlers.get(n).add(f); },
    off(n, f) { handlers.get(n)?.delete(f); },
  };
  const url = URL.createObjectURL(new Blob([entry._esm], { type: "text/javascript" }));
  const widget = (await import(url)).default, el = document.createElement("div");
  document.body.append(el);
  let listening = 0;
  const add = window.addEventListener, remove = window.removeEventListener;
  const own = (target) => (target === window || !target ? 1 : 0);
  window.addEventListener = function (...a) { listening += own(this); return add.apply(this || window, a); };
  window.removeEventListener = function (...a) { listening -= own(this); return remove.apply(this || window, a); };
  const views = [widget.render({ model, el }), widget.render({ model, el })];
  const held = () => [...handlers.values()].reduce((n, s) => n + s.size, 0);
  const during = held(), painted = el.querySelectorAll("[data-field]").length;
  const moved = [...el.querySelectorAll(".mpl-exhibit")];
  const change = moved[0].querySelector("select");
  change.selectedIndex = change.options.length - 1;
  change.dispatchEvent(new Event("change"));
  const texts = moved.map((e) => [...e.querySelectorAll("[data-field]")].map((n) => n.textContent).join("|"));
  views.forEach((end) => end());
  const result = { during, after: held(), listening, painted, same: texts[0] === texts[1] };
  window.addEventListener = add; window.removeEventListener = remove;
  return result;
}"""


@pytest.mark.parametrize("kind", MAKERS)
def test_two_views_of_one_model_agree_and_leave_nothing_behind(pages, kind):
    visit = pages([MAKERS[kind]()])
    exhibit = MAKERS[kind]()
    state = {key: getattr(exhibit, key) for key in exhibit.keys if not key.startswith("_") and key not in ("layout",)}
    state = {k: v for k, v in state.items() if isinstance(v, str | int | float | list | dict)} | {"_esm": exhibit._esm}
    found = visit.page.evaluate(COUNT_AND_CLEAN, json.loads(json.dumps(state)))
    assert found["during"] > 0 and found["painted"] > 0 and found["same"]
    assert (found["after"], found["listening"]) == (0, 0)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_controls_are_labelled_large_enough_and_fit_the_page(pages, theme, width):
    visit = pages([*(m() for m in MAKERS.values()), BitExplorer("fp32", name="wide")], theme=theme, width=width)
    assert not visit.page.evaluate("document.documentElement.scrollWidth > innerWidth")
    small, bare = visit.page.evaluate("""() => {
      const all = [...document.querySelectorAll(".mpl-exhibit :is(button, input, select)")].filter(e => e.offsetParent);
      const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
      if (new Set(ids).size !== ids.length) throw new Error("two elements share an id");
      return [all.filter(e => e.offsetWidth < 24 || e.offsetHeight < 24).length,
        all.filter(e => e.tagName !== "BUTTON" && !e.labels.length).length];
    }""")
    assert (small, bare) == (0, 0)
    background = visit.page.locator(".mpl-exhibit").first.evaluate("e => getComputedStyle(e).backgroundColor")
    dark = sum(map(int, background[4:-1].split(","))) < 3 * 128
    assert dark == (theme == "dark")


@pytest.mark.parametrize("kind", MAKERS)
def test_moving_a_control_takes_less_than_a_frame(pages, kind):
    visit = pages([StallingSum(count=20_000, method="kahan", name="sum") if kind == "stalling-sum" else MAKERS[kind]()])
    times = visit.page.evaluate("""() => {
      const field = document.querySelector("input[type=range]:enabled") || document.querySelector("select");
      const range = field.type === "range", out = [];
      for (let i = 0; i < 40; i++) {
        if (range) field.value = Number(field.min) + (i % 2 ? 0.4 : 0.6) * (field.max - field.min);
        else field.selectedIndex = i % field.options.length;
        const start = performance.now();
        field.dispatchEvent(new Event(range ? "input" : "change"));
        document.body.getBoundingClientRect();
        out.push(performance.now() - start);
      }
      return out.sort((a, b) => a - b);
    }""")
    # The lower quartile: on a shared machine the median measures the neighbours.
    assert times[10] < 16.7, f"{times[10]:.1f} ms"
