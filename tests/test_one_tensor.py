"""One tensor, every scheme: JavaScript against Python bit by bit, the tensor against its description, known figures."""

import json
import random
from dataclasses import replace

import pytest
import torch
import traitlets
from conftest import run_node
from widget_page import said

from mixprec_lab.block_scaling import SCHEMES, get_scheme, quantize_blocks
from mixprec_lab.exhibits import OneTensorEveryScheme
from mixprec_lab.exhibits.one_tensor import AXES, DISTRIBUTIONS, PLACES, RULES, _uniform, decibels
from mixprec_lab.exhibits.stalling_sum import _mulberry32

KEYS = ("distribution", "outlier", "frequency", "place", "rule", "axis", "scheme")
VARIANTS = [
    replace(get_scheme("mxfp8"), name="mxfp8_e5m2", element="fp8_e5m2"),
    replace(get_scheme("mxfp6"), name="mxfp6_e2m3", element="fp6_e2m3"),
    replace(get_scheme("nvfp4"), name="nvfp4_16x16", block=(16, 16)),
    replace(get_scheme("tile_1x128"), name="tile_pow2", rule="round_up"),
]


def own() -> torch.Tensor:
    """Zeros, ties, extreme exponents and short blocks, in 20 rows of 70."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 70, generator=generator) * torch.exp2(torch.randint(-30, 30, (20, 70), generator=generator))
    x[2], x[3, :40], x[5, 3], x[6, 3] = 0.0, -0.0, 3.0e38 / 1e6, 2.0**-149
    return x


def states(shown: OneTensorEveryScheme, number: int) -> list[dict]:
    draw = random.Random(1)
    distributions = [*DISTRIBUTIONS, *(["own"] if shown.own else [])]
    return [
        {"distribution": draw.choice(distributions), "outlier": draw.randint(0, 6), "frequency": draw.randint(4, 12),
         "place": draw.choice(list(PLACES)), "rule": draw.choice(list(RULES)), "axis": draw.choice(list(AXES)),
         "scheme": draw.choice(list(shown.schemes))}
        for _ in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [{}, {"tensor": own(), "schemes": [*SCHEMES, *VARIANTS]}], ids=["distributions", "own"]
)
def test_javascript_holds_the_bits_and_says_the_words_of_python(arguments, tmp_path):
    shown = OneTensorEveryScheme(**arguments)
    traits = {key: getattr(shown, key) for key in ("formats", "schemes", "own")}
    wanted = states(shown, 60)
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    run_node("states.mjs", tmp_path, {"kind": "one-tensor", "traits": traits, "states": wanted})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    for state, answer in zip(wanted, answers, strict=True):
        for key in KEYS:
            setattr(shown, key, state[key])
        x, hit = shown.tensor()
        assert answer["x"] == x.flatten().tolist() and answer["hit"] == hit.int().flatten().tolist(), state
        scheme = shown._with_rule(shown._schemes[state["scheme"]])
        back = quantize_blocks(x, scheme, -1 if state["axis"] == "rows" else 0)
        assert answer["back"] == back.flatten().tolist(), state
        assert answer["texts"] == shown.result(), state


def test_the_draws_are_those_of_the_shared_generator():
    one_by_one = _mulberry32(7)
    assert _uniform(7, 5000).tolist() == [next(one_by_one) for _ in range(5000)]


def test_the_distributions_are_what_they_are_called():
    normal, student, wide = (OneTensorEveryScheme(name, 0).tensor()[0].double() for name in DISTRIBUTIONS)
    assert abs(float(normal.mean())) < 0.04 and float(normal.std()) == pytest.approx(1, abs=0.03)
    assert float((normal.abs() < 1).double().mean()) == pytest.approx(0.683, abs=0.02)
    assert float((student.abs() < 2.92).double().mean()) == pytest.approx(0.9, abs=0.01)  # 95 % quantile of t with 2
    log2 = wide.abs().log2()
    assert float(log2.std()) == pytest.approx(3, abs=0.15) and float((wide < 0).double().mean()) == pytest.approx(
        0.5, abs=0.02
    )


@pytest.mark.parametrize(
    ("place", "frequency", "count"),
    [("scattered", 8, 32), ("scattered", 12, 2), ("scattered", 4, 512), ("channels", 4, 16 * 32), ("channels", 12, 32),
     ("tokens", 4, 2 * 256), ("tokens", 12, 256)],
)  # fmt: skip
def test_outliers_stand_where_they_should(place, frequency, count):
    shown = OneTensorEveryScheme(outlier=3, place=place, frequency=frequency)
    x, hit = shown.tensor()
    plain = OneTensorEveryScheme(outlier=0, place=place, frequency=frequency).tensor()[0]
    assert int(hit.sum()) == count and f"{count} are multiplied by 1000." in shown.result()["summary"]
    assert torch.equal(x[~hit], plain[~hit]) and torch.equal(x[hit], (plain[hit].double() * 1000).float())
    lines = {"channels": hit.sum(0), "tokens": hit.sum(1)}.get(place)
    if lines is not None:
        assert set(lines.tolist()) == {0, 32 if place == "channels" else 256}


def test_a_tensor_of_ones_own_is_shown_as_it_is():
    shown = OneTensorEveryScheme(tensor=own())
    assert shown.distribution == "own" and torch.equal(shown.tensor()[0], own())
    assert "20 rows of 70 values" in shown.result()["summary"]


def test_an_outlier_of_100_kills_int8_and_leaves_e4m3_alone():
    mild = OneTensorEveryScheme(outlier=2).result()
    assert float(mild["per_tensor-error"]) < 0.03 and float(mild["int8-error"]) > 0.4
    huge = OneTensorEveryScheme(outlier=6).result()
    assert huge["per_tensor-error"] == "1" and float(huge["mxfp8-error"]) < 0.3


def test_row_scales_save_the_rows_and_not_the_columns():
    rows, columns = (OneTensorEveryScheme(outlier=6, place="tokens", axis=axis).result() for axis in AXES)
    assert float(rows["per_row-error"]) < 0.03 < 0.7 < float(columns["per_row-error"])
    assert float(OneTensorEveryScheme(outlier=6, place="channels").result()["per_row-error"]) > 0.7


def test_the_sentence_names_scheme_best_losses_and_what_transposing_does():
    words = OneTensorEveryScheme(outlier=4, scheme="int8").result()["verdict"]
    assert words.startswith(
        "INT8 per tensor rounds the ordinary values with an error of 1; the least is 0.0262, in E4M3"
    )
    assert words.endswith("of them to zero. Transposing the tensor first changes nothing.")
    best = OneTensorEveryScheme(outlier=4, scheme="tile_1x128").result()["verdict"]
    assert "the least of all schemes." in best and "% of the values." in best


def test_bits_count_the_scales_of_short_blocks_too():
    said_ = OneTensorEveryScheme(axis="columns").result()
    assert (said_["mxfp8-bits"], said_["tile_1x128-bits"], said_["per_tensor-bits"]) == ("8.25", "9", "8.004")


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.1, "20.0"), (1.0, "0.0"), (2.0, "-6.0"), (0.0, "inf"), (float("nan"), "\u2014"), (1e-4, "80.0")],
)
def test_decibels(error, text):
    assert decibels(error) == text


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tensor": torch.ones(4)}, ValueError, r"two dimensions of 2 or more, got shape \(4,\)"),
        ({"tensor": torch.ones(1, 4)}, ValueError, "two dimensions of 2 or more"),
        ({"tensor": torch.zeros(4, 4)}, ValueError, "not all zero"),
        ({"tensor": torch.full((4, 4), torch.nan)}, ValueError, "finite values"),
        ({"tensor": torch.ones(4, 4, dtype=torch.int8)}, TypeError, "torch.int8"),
        ({"schemes": []}, ValueError, "at least one scheme"),
        ({"schemes": ["fp3"]}, KeyError, "fp3"),
        ({"distribution": "own"}, traitlets.TraitError, "got 'own'"),
        ({"outlier": 7}, traitlets.TraitError, "outlier"),
        ({"frequency": 3}, traitlets.TraitError, "frequency"),
        ({"place": "here"}, traitlets.TraitError, "got 'here'"),
        ({"rule": "nearest"}, traitlets.TraitError, "got 'nearest'"),
        ({"axis": "0"}, traitlets.TraitError, "got '0'"),
        ({"scheme": "none"}, traitlets.TraitError, "got 'none'"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        OneTensorEveryScheme(**arguments)


def test_a_click_on_a_row_shows_its_map(pages):
    visit = pages([OneTensorEveryScheme(name="one")])
    visit.page.locator("[data-field=nvfp4-error]").click()
    assert visit.page.get_by_label("The map shows", exact=True).input_value() == "nvfp4"
    assert said(visit) == OneTensorEveryScheme(scheme="nvfp4").result()


def test_the_map_has_a_cell_for_every_value_that_is_not_exact(pages):
    visit = pages([OneTensorEveryScheme(outlier=6, scheme="int8", name="one")])
    boxes = "paths => paths.map(p => p.getBBox()).map(b => [b.width, b.height])"
    sizes = visit.page.locator("svg[role=img] path").evaluate_all(boxes)
    assert max(high for _, high in sizes) == pytest.approx(160, abs=1) and max(wide for wide, _ in sizes) > 600
    flushed = visit.page.locator("svg[role=img] path").nth(5).get_attribute("d")
    x, hit = OneTensorEveryScheme(outlier=6, scheme="int8").tensor()
    lost = (quantize_blocks(x, "int8") == 0) & (x != 0)
    runs = int((lost & ~torch.cat([torch.zeros(32, 1, dtype=torch.bool), lost[:, :-1]], 1)).sum())
    assert flushed.count("M") == runs
