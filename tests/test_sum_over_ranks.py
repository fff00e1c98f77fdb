"""The exhibit of the sum over ranks: its JavaScript against ``simulate_reduction``, and what it must show."""

import json
import random

import pytest
import torch
import traitlets
from conftest import run_node

from mixprec_lab.exhibits import SumOverRanks

KIND = "sum-over-ranks"
KEYS = ("format", "log2_ranks", "noise", "size", "seed")
EDGES = [
    {"format": "bf16", "log2_ranks": 10, "noise": 0, "size": 0},
    {"format": "fp16", "log2_ranks": 10, "noise": 16, "size": 16},  # infinities of both signs
    {"format": "fp16", "log2_ranks": 3, "noise": 0, "size": 14},
    {"format": "fp16", "log2_ranks": 10, "noise": 9, "size": -24},
    {"format": "fp32", "log2_ranks": 10, "noise": 7, "size": 3},
    {"format": "bf16", "log2_ranks": 1, "noise": 16, "size": -5},
]


def states(number: int) -> list[dict]:
    draw, start = random.Random(0), {key: getattr(SumOverRanks(), key) for key in KEYS}
    drawn = [
        {"format": draw.choice(["bf16", "fp16", "fp32"]), "log2_ranks": draw.randint(1, 8)}
        | {"noise": draw.randint(0, 16), "size": draw.randint(-24, 16), "seed": draw.randint(0, 20)}
        for _ in range(number)
    ]
    return drawn + [start | edge for edge in EDGES]


def test_javascript_gives_the_contributions_and_the_texts_of_python_to_the_last_bit(tmp_path):
    shown, wanted = SumOverRanks(), states(60)
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    run_node("states.mjs", tmp_path, {"kind": KIND, "traits": {"formats": shown.formats}, "states": wanted})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    seen = set()
    for state, answer in zip(wanted, answers, strict=True):
        twin = SumOverRanks(**state)
        assert answer["values"] == twin.contributions()[:, 0].tolist(), state
        assert answer["texts"] == twin.result(), state
        seen |= {answer["texts"][f"{order}-error"] for order in ("ring", "tree", "wide")}
    assert {"inf", "nan", "0"} <= seen  # overflow, infinities of both signs, and exact sums were among them


def test_ones_stall_a_bf16_ring_at_256_and_an_fp16_ring_of_1024_not():
    words = SumOverRanks().result()
    assert [words[k] for k in ("ring-sum", "ring-error", "ring-moved")] == ["256", "0.75", "256 of 1024"]
    assert (words["tree-sum"], words["wide-sum"], words["wide-moved"]) == ("1024", "1024", "1024 of 1024")
    assert SumOverRanks("fp16").result()["ring-sum"] == words["exact"] == "1024"


def test_torchs_own_additions_give_the_ring_and_the_tree():
    shown = SumOverRanks("fp16", 7, noise=6, size=2, seed=3)
    x = shown.contributions()[:, 0].half()
    ring = x[-1]
    for value in x.flip(0)[1:]:
        ring = ring + value
    tree = x
    while len(tree) > 1:
        tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
    words = shown.result()
    assert float(words["ring-sum"]) == pytest.approx(ring.item(), rel=1e-4)
    assert float(words["tree-sum"]) == pytest.approx(tree.item(), rel=1e-4)


def test_a_sum_overflows_where_no_gradient_does():
    shown = SumOverRanks("fp16", 3, size=14)
    assert torch.isfinite(shown.contributions().half()).all()
    assert shown.result()["ring-sum"] == shown.result()["wide-sum"] == "inf"


@pytest.mark.parametrize(("key", "value"), [("format", "fp8_e4m3"), ("log2_ranks", 11), ("noise", 17), ("size", -25)])
def test_wrong_state_is_refused_and_changes_nothing(key, value):
    shown = SumOverRanks()
    before = getattr(shown, key)
    with pytest.raises(traitlets.TraitError):
        setattr(shown, key, value)
    assert getattr(shown, key) == before
