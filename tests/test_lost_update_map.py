"""The lost-update map: its shares against brute force, its JavaScript against Python, mouse and keys on its cells."""

import math
import random

import numpy as np
import pytest
import torch
import traitlets
from oracles import code_values, table_round
from widget_page import assert_page_is_python, said

from mixprec_lab.exhibits import LostUpdateMap
from mixprec_lab.exhibits.lost_update_map import (
    DIRECTIONS,
    MEASURES,
    PLACES,
    RATES,
    STEPS,
    WEIGHTS,
    stalled_compensation,
)
from mixprec_lab.formats import FORMATS, FloatFormat
from mixprec_lab.master_weights import UPDATE_METHODS, simulate_weight
from mixprec_lab.rounding import rounder

FORMATS_HERE = ("fp16", "bf16", "fp8_e5m2", "fp8_e4m3")
COLUMNS = (-20, -16, -14, -9, -6, -1, 0, 3)
UPDATES = np.array([float(np.float32(rate)) for rate in RATES])


def weights(name: str, k: int) -> np.ndarray:
    """The values of a format from 2**k up to 2**(k + 1), from the codes of numpy and ml_dtypes."""
    values = np.unique(code_values(name)[np.isfinite(code_values(name))])
    return values[(values >= 2.0**k) & (values < 2.0 ** (k + 1))]


def nearest(x: np.ndarray, name: str) -> np.ndarray:
    return table_round(x, name, "nearest_even", saturate=False)


def both_ways(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each rate, every weight twice, and the updates away from zero and toward it, shape (rates, 2 * weights)."""
    return np.tile(w, (len(RATES), 2)), np.repeat(np.stack([UPDATES, -UPDATES], axis=1), w.size, axis=1)


def test_the_weights_of_the_brute_force_go_both_ways():
    w, u = both_ways(np.array([1.0, 1.5, 2.0]))
    assert w[0].tolist() == [1.0, 1.5, 2.0] * 2 and u[-1].tolist() == [np.float32(0.1)] * 3 + [-np.float32(0.1)] * 3


@pytest.mark.parametrize("name", FORMATS_HERE)
def test_shares_of_nearest_are_those_of_every_single_addition(name):
    exhibit = LostUpdateMap(name)
    for k in COLUMNS:
        w, u = both_ways(weights(name, k))
        lost, unmoved = (exhibit.shares(k, shows).numpy() for shows in MEASURES)
        assert np.isnan(lost).all() == (w.size == 0)
        if w.size:
            expected = (nearest(w + u, name) == w).mean(axis=1)
            assert np.array_equal(lost, expected) and np.array_equal(unmoved, expected)


@pytest.mark.parametrize("name", FORMATS_HERE)
def test_shares_of_an_fp32_master_are_those_of_numpy_float32(name):
    exhibit = LostUpdateMap(name, "fp32_master")
    for k in [k for k in COLUMNS if weights(name, k).size]:
        w, u = both_ways(weights(name, k))
        master = (w.astype(np.float32) + u.astype(np.float32)).astype(np.float64)
        lost, unmoved = (exhibit.shares(k, shows).numpy() for shows in MEASURES)
        assert np.array_equal(lost, (master == w).mean(axis=1))
        assert np.array_equal(unmoved, (nearest(master, name) == w).mean(axis=1))


@pytest.mark.parametrize("name", ["bf16", "fp8_e5m2", "fp8_e4m3"])
def test_shares_of_kahan_are_those_of_runs_long_enough_to_stall(name):
    exhibit = LostUpdateMap(name, "kahan")
    both = torch.from_numpy(np.stack([UPDATES, -UPDATES], axis=1))[..., None]
    steps = 2 ** (FORMATS[name].mantissa_bits + 3)  # the compensation stalls in half of that
    for k in (-9, -6, 0):
        w = torch.from_numpy(weights(name, k))
        still = (simulate_weight(w, both, steps, name, "kahan") == w[:, None]).all(dim=-1)
        assert torch.equal(exhibit.shares(k, "lost"), still.double().mean(dim=(1, 2)))
        assert 0 < int(still.sum()) < still.numel()


@pytest.mark.parametrize("name", FORMATS_HERE)
def test_a_compensation_stalls_where_it_is_said_to(name):
    sizes = [s * 2.0**e for e in (-26, -20, -17, -12, -10, -9) for s in (1.0, 1.01, 1.5, 1.99)]
    updates = torch.tensor(sizes, dtype=torch.float64)
    owed, before, round_to = torch.zeros_like(updates), None, rounder(name)
    while before is None or not torch.equal(owed, before):
        before, owed = owed, round_to(owed + updates)
    assert torch.equal(stalled_compensation(updates, name), owed)


@pytest.mark.parametrize("name", FORMATS_HERE)
def test_the_stochastic_share_is_the_chance_that_makes_the_mean_exact(name):
    exhibit = LostUpdateMap(name, "stochastic")
    ladder = np.unique(code_values(name)[np.isfinite(code_values(name))])
    for k in [k for k in COLUMNS if weights(name, k).size]:
        w, u = both_ways(weights(name, k))
        gap = np.abs(ladder[np.searchsorted(ladder, w) + np.sign(u).astype(int)] - w)
        chance = np.maximum(1 - np.abs(u) / gap, 0).mean(axis=1)
        assert exhibit.shares(k, "unmoved").numpy() == pytest.approx(chance, rel=0, abs=1e-12)
        assert not exhibit.shares(k, "lost").any()


def test_stochastic_paths_end_at_the_exact_weight_on_average():
    ends = [float(LostUpdateMap("bf16", "stochastic", 0, "1e-3", seed=s).path()[-1]) for s in range(21)]
    share = 1e-3 * 2**7  # the chance of a step of 2**-7
    deviation = 2.0**-7 * math.sqrt(STEPS * share * (1 - share) / 21)
    assert abs(sum(ends) / 21 - 1.2) < 4 * deviation and len(set(ends)) > 5


def edge(method: str, name: str) -> float:
    """The largest update of the map that every weight of [1, 2) loses, both ways."""
    return UPDATES[LostUpdateMap(name, method).shares(0, "lost").numpy() == 1].max()


def test_kahan_and_fp32_masters_lose_only_far_smaller_updates():
    # The hardest weight to hold is 1.0 on its way down, where half a gap is 2**-9 in BF16 = 1.95e-3.  A compensation
    # gets that far for updates above 2**-18 = 3.8e-6, and an FP32 master moves above 2**-25 = 3.0e-8.
    assert [edge(method, "bf16") for method in ("nearest", "kahan", "fp32_master")] == pytest.approx([1e-3, 2e-6, 2e-8])
    # FP16: 2**-12 = 2.4e-4, 2**-24 = 6.0e-8, 2**-25 again.
    assert [edge(method, "fp16") for method in ("nearest", "kahan", "fp32_master")] == pytest.approx([2e-4, 5e-8, 2e-8])


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        ({}, "verdict", "Lost: the weight stays at 1, however often an update of 1e-3 comes."),
        ({"rate": "2e-3"}, "lost", "99.61 % for good"),
        ({"rate": "2e-3", "weight": -1}, "verdict", "Moves to 1 in 128 updates and stalls there."),
        ({"rate": "2e-3", "direction": "toward"}, "verdict",
         "Moves to 0.359375: 160.2 % of the way that 200 exact updates go."),
        ({"rate": "2e-3", "direction": "toward"}, "gap", "2^-8"),
        ({"rate": 0.005}, "end", "2"),
        ({"method": "fp32_master"}, "end", "1.203125"),
        ({"method": "fp32_master"}, "bytes", "6 (2 + 4)"),
        ({"method": "kahan"}, "bytes", "4 (2 + 2)"),
        ({"method": "stochastic"}, "lost", "0 % on average"),
        ({"method": "stochastic"}, "unmoved", "87.15 % by one update"),
        ({"method": "fp32_master", "rate": "1e-5"}, "verdict",
         "Not moved yet, and nothing is lost: the FP32 master holds what is missing."),
        ({"method": "kahan", "rate": "1e-5"}, "verdict",
         "Not moved yet, and nothing is lost: the compensation holds what is missing."),
        ({"format": "fp8_e4m3", "weight": -10}, "verdict",
         "FP8 E4M3 has no weight of this size: its values reach from 2^-9 to 448."),
        ({"format": "fp8_e4m3", "weight": -10}, "start", "\u2014"),
        ({"format": "fp8_e4m3", "method": "fp32_master"}, "bytes", "5 (1 + 4)"),
    ],
)  # fmt: skip
def test_the_map_says(arguments, field, text):
    assert LostUpdateMap(**arguments).result()[field] == text


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "fp32"), ("method", "fp32"), ("weight", 4), ("weight", -21), ("rate", "3e-3"), ("rate", "0.001"),
     ("place", "second"), ("direction", "up"), ("shows", "all"), ("seed", 21), ("seed", -1)],
)  # fmt: skip
def test_wrong_state_is_refused_and_changes_nothing(key, value):
    exhibit = LostUpdateMap()
    before = getattr(exhibit, key)
    with pytest.raises(traitlets.TraitError):
        setattr(exhibit, key, value)
    assert getattr(exhibit, key) == before


@pytest.mark.parametrize("fmt", ["fp32", "fp4_e2m1", "e8m0", FloatFormat("wide", 5, 11)])
def test_formats_whose_weights_cannot_be_counted_are_refused(fmt):
    with pytest.raises(ValueError, match="mantissa bits and an overflow of their own"):
        LostUpdateMap(fmt)
    with pytest.raises(ValueError, match="choose among fp16, bf16"):
        LostUpdateMap(formats=["bf16", fmt])


def test_a_rate_may_be_a_number_but_must_be_a_row_of_the_map():
    assert LostUpdateMap(rate=0.002).rate == "2e-3" and LostUpdateMap(rate="0.1").rate == "1e-1"
    with pytest.raises(traitlets.TraitError, match="expected rate to be one of 1e-8, .*got '0.003'"):
        LostUpdateMap(rate=0.003)
    with pytest.raises(traitlets.TraitError, match="expected a number as text"):
        LostUpdateMap(rate="fast")


@pytest.fixture(scope="module")
def javascript(browser):
    """``javascript(body, argument)``: what the function body returns in a page with the module as ``js``."""
    page = browser.new_page()
    source = LostUpdateMap()._esm

    def run(body: str, argument: object) -> object:
        load = "const js = await import(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })));"
        return page.evaluate(f"async ([source, given]) => {{ {load} {body} }}", [source, argument])

    yield run
    page.close()


def set_state(exhibit: LostUpdateMap, state: dict[str, object]) -> None:
    for key, value in state.items():
        setattr(exhibit, key, value)


OFFERED = [*FORMATS_HERE, "tf32", "fp8_e4m3fnuz", FloatFormat("e3m4", 3, 4), FloatFormat("tiny", 2, 1)]


def states(count: int) -> list[dict[str, object]]:
    """Random states of a map that offers ``OFFERED``."""
    pick = random.Random(0).choice
    options = {
        "format": [f if isinstance(f, str) else f.name for f in OFFERED], "method": UPDATE_METHODS, "weight": WEIGHTS,
        "rate": RATES, "place": PLACES, "direction": DIRECTIONS, "shows": MEASURES, "seed": range(21),
    }  # fmt: skip
    return [{key: pick(values) for key, values in options.items()} for _ in range(count)]


def test_texts_and_paths_of_javascript_are_those_of_python(javascript):
    exhibit, given = LostUpdateMap(formats=OFFERED), states(70)
    body = """return given.states.map((s) => { const found = js.compute(s, given.formats);
      return [js.texts(found, s), Array.from(found.path ?? [])]; });"""
    answers = javascript(body, {"states": given, "formats": exhibit.formats})
    kinds = set()
    for state, (texts, path) in zip(given, answers, strict=True):
        set_state(exhibit, state)
        assert texts == exhibit.result(), state
        expected = exhibit.path()
        assert torch.equal(torch.tensor(path, dtype=torch.float64).nan_to_num(7e77), expected.nan_to_num(7e77)), state
        kinds.add(texts["verdict"].split()[0])
    assert {"Lost:", "Moves", "Not", "The", "FP8"} <= kinds


@pytest.mark.parametrize("method", UPDATE_METHODS)
def test_the_whole_map_of_javascript_is_that_of_python(javascript, method):
    exhibit = LostUpdateMap(method=method, formats=["fp16", "bf16", "fp8_e4m3", *OFFERED[-2:]])
    given = {"formats": exhibit.formats, "rates": RATES, "weights": list(WEIGHTS), "method": method, "shows": MEASURES}
    body = """const one = (f, shows) => given.rates.map((rate) => given.weights.map((k) =>
      js.share(k, js.updateOf(rate), f, given.method, shows)));
    return Object.fromEntries(Object.entries(given.formats).map(([name, f]) =>
      [name, given.shows.map((shows) => one(f, shows))]));"""
    answers = javascript(body, given)
    for name in exhibit.formats:
        for shows, found in zip(MEASURES, answers[name], strict=True):
            set_state(exhibit, {"format": name, "shows": shows})
            # Counts are exact; the stochastic chance is a quotient that both round once.
            tolerance = 1e-15 if method == "stochastic" else 0
            torch.testing.assert_close(
                torch.tensor(found, dtype=torch.float64), exhibit.grid(), rtol=0, atol=tolerance, equal_nan=True
            )


def cell(visit, weight: int, rate: str) -> tuple[float, float]:
    """The middle of a cell of the map, in pixels of the window."""
    visit.page.locator("svg.mpl-pick").scroll_into_view_if_needed()
    area = visit.page.locator("svg.mpl-pick rect[fill=none]").first.bounding_box()
    column, row = weight - WEIGHTS.start + 0.5, RATES.index(rate) + 0.5
    x = area["x"] + column / len(WEIGHTS) * area["width"]
    return x, area["y"] + (1 - row / len(RATES)) * area["height"]


def chosen(visit) -> tuple[str, str]:
    """What the two sliders say."""
    return tuple(visit.page.locator(f"[data-value={name}]").text_content() for name in ("weight", "rate"))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_chooses_the_cell_under_it_and_dragging_goes_on(pages, width):
    visit = pages([LostUpdateMap(name="lost")], "file", width=width)
    for weight, rate in ((-20, "1e-8"), (3, "1e-1"), (-7, "2e-6"), (0, "5e-4")):
        visit.page.mouse.click(*cell(visit, weight, rate))
        assert chosen(visit) == (f"2^{weight}", rate)
        assert said(visit) == LostUpdateMap(weight=weight, rate=rate).result()
    visit.page.mouse.move(*cell(visit, -3, "1e-3"))
    visit.page.mouse.down()
    visit.page.mouse.move(*cell(visit, -4, "2e-3"))
    visit.page.mouse.move(0, 0)
    visit.page.mouse.up()
    assert chosen(visit) in {("2^-20", "1e-1"), ("2^-4", "2e-3")}  # the last place over the map counts
    visit.page.mouse.move(*cell(visit, -9, "1e-5"))
    assert chosen(visit) != ("2^-9", "1e-5")  # a pointer that is not pressed chooses nothing
    assert_page_is_python("lost-update-map", visit)


def test_arrow_keys_walk_the_map_and_stop_at_its_edges(pages):
    visit = pages([LostUpdateMap(weight=2, rate="5e-2", name="lost")])
    visit.page.locator("svg.mpl-pick").focus()
    walk = {"ArrowRight": ("2^3", "5e-2"), "ArrowUp": ("2^3", "1e-1"), "ArrowLeft": ("2^2", "1e-1"),
            "ArrowDown": ("2^2", "5e-2"), "Tab": ("2^2", "5e-2")}  # fmt: skip
    for key, expected in walk.items():
        for _ in range(2 if key in ("ArrowRight", "ArrowUp") else 1):  # the second time there is no cell left
            visit.page.keyboard.press(key)
        assert chosen(visit) == expected
    assert not visit.page.evaluate("document.activeElement.matches('svg')")  # the map does not trap the focus
    assert_page_is_python("lost-update-map", visit)


def test_the_map_is_named_and_says_what_is_marked(pages):
    visit = pages([LostUpdateMap(name="lost")])
    name = visit.page.get_by_role("application").get_attribute("aria-label")
    assert "weights from 2^0, learning rate 1e-3, lost 100 % for good" in name and "Arrow keys" in name
