"""The memory calculator: bills are ``training_memory``'s, JavaScript equals Python, rows answer to mouse and keys."""

import json
import random

import pytest
import traitlets
from conftest import run_node
from test_plots import contrast
from widget_page import assert_page_is_python, said

from mixprec_lab.exhibits import MemoryCalculator
from mixprec_lab.exhibits._base import es_module
from mixprec_lab.exhibits.memory_calculator import OWN, RANKS, SEQUENCES, STORED, VOCABULARIES
from mixprec_lab.memory import GPUS, MODELS, REGIMES, TERMS, lora_parameters, training_memory
from mixprec_lab.plots import TERM_COLOURS


def random_state(draw: random.Random) -> dict[str, object]:
    return {
        "model": draw.choice([*MODELS, OWN, OWN]), "layers": draw.randint(1, 128), "width": draw.randint(1, 128),
        "vocabulary": draw.choice(VOCABULARIES), "regime": draw.choice(list(REGIMES)), "stage": draw.randint(0, 3),
        "world": draw.randint(1, 13), "batch": draw.choice([0, 1, 3, 64]), "sequence": draw.choice(SEQUENCES),
        "stored": draw.choice(STORED), "attention": draw.choice(["flash", "full"]), "rank": draw.choice(RANKS),
        "base": draw.choice(["bf16", "nf4"]), "gpu": draw.choice(list(GPUS)),
    }  # fmt: skip


def test_javascript_gives_the_bills_and_the_texts_of_python(tmp_path):
    draw = random.Random(0)
    states = [random_state(draw) for _ in range(150)]
    (tmp_path / "module.mjs").write_text(es_module("memory_calculator"), "utf-8")
    traits = {"tables": MemoryCalculator().tables}
    run_node("states.mjs", tmp_path, {"kind": "memory-calculator", "traits": traits, "states": states})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    for state, answer in zip(states, answers, strict=True):
        exhibit = MemoryCalculator(**state)
        assert answer["texts"] == exhibit.result(), state
        for name in REGIMES:
            bill, got = exhibit.bill(name), answer["bills"][name]
            # Exact where a double holds the integers: activations of 10**16 bytes are beyond it.
            expected = {t: getattr(bill, t) for t in TERMS if bill.terms[t].bytes < 2**53}
            assert {t: got["terms"][t]["bytes"] for t in expected} == expected
            assert got["formula"] == bill.formula


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        ({}, "total", "154.8 GB"),  # 16 * 8.03 = 128.5 GB of states, 22.1 of activations, 4.2 of logits
        ({}, "verdict", "Llama 3 8B takes 154.8 GB on one GPU: it does not fit into the A100 and H100 80GB."),
        ({}, "held", "B200 180GB, MI300X 192GB"),
        ({}, "convention", "16 bytes a trained parameter: 2 weights + 2 gradients + 4 masters + 8 moments"),
        ({"batch": 0}, "formula", "2*8030261248 + 2*8030261248 + 4*8030261248 + 8*8030261248"),
        ({"stage": 3, "world": 6, "batch": 0}, "weights", "0.2509 GB"),
        ({"model": "deepseek_v3"}, "held", "none of these"),
        ({"rank": 16, "base": "nf4", "batch": 0, "regime": "autocast"}, "weights", "4.31 GB"),
        ({"rank": 16}, "parameters", "8.072 billion, 41.94 million of them in adapters"),
        ({"regime": "bf16_master_adam8bit"}, "convention",
         "10.0313 bytes a trained parameter: 2 weights + 2 gradients + 4 masters + 2.03125 moments"),
    ],
)  # fmt: skip
def test_the_calculator_says(arguments, field, text):
    assert MemoryCalculator(**arguments).result()[field] == text


def test_a_model_with_experts_is_trained_whole_and_says_so():
    exhibit = MemoryCalculator("deepseek_v3", rank=8)
    assert exhibit.bill().adapters == 0
    assert exhibit.result()["verdict"].endswith(" LoRA is not counted for DeepSeek-V3.")


def test_a_bill_is_training_memory_of_the_same_choices():
    exhibit = MemoryCalculator("llama3_70b", "autocast", stage=3, world=4, batch=2, sequence=8192, rank=16,
                               stored=STORED[1], attention="full")  # fmt: skip
    every = ("query", "key", "value", "output", "gate", "up", "down")
    expected = training_memory("llama3_70b", "autocast", zero_stage=3, world_size=16, sequence=8192, batch=2,
                               activation_checkpointing=True, attention="full",
                               adapters=lora_parameters("llama3_70b", 16, every))  # fmt: skip
    assert exhibit.bill() == expected


def test_own_sizes_are_a_gpt_with_heads_of_128():
    shape = MemoryCalculator(OWN, layers=12, width=6, vocabulary=50257).shape
    assert (shape.hidden, shape.heads, shape.inner) == (768, 6, 3072)
    assert shape.parameters == MODELS["gpt2"].parameters - 1024 * 768


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "gpt5"}, {"regime": "fp4"}, {"stage": 4}, {"world": 0}, {"batch": 65}, {"sequence": 1000},
        {"vocabulary": 1}, {"stored": "some"}, {"attention": "sparse"}, {"rank": 3}, {"base": "int3"},
        {"gpu": "abacus"}, {"layers": 0}, {"width": 129},
    ],
)  # fmt: skip
def test_wrong_state_is_refused_and_changes_nothing(changes):
    exhibit = MemoryCalculator()
    ((key, value),) = changes.items()
    before = getattr(exhibit, key)
    with pytest.raises(traitlets.TraitError):
        setattr(exhibit, key, value)
    assert getattr(exhibit, key) == before
    with pytest.raises(TypeError, match="MemoryCalculator has no colour"):
        MemoryCalculator(colour="red")


def test_terms_have_colours_that_show_in_both_themes():
    assert list(TERM_COLOURS) == list(TERMS)
    for theme, page in ((0, "#ffffff"), (1, "#14181e")):
        colours = [pair[theme] for pair in TERM_COLOURS.values()]
        assert len(set(colours)) == len(TERMS)
        assert all(contrast(colour, page) >= 2.4 for colour in colours)


def test_rows_answer_to_mouse_and_arrow_keys(pages):
    visit = pages([MemoryCalculator(name="mem")])
    bars = visit.page.locator("svg.mpl-pick")
    names = list(REGIMES)
    bars.scroll_into_view_if_needed()
    bars.click(position={"x": 200, "y": 30 + 27 * 9 + 12})
    assert visit.page.get_by_label("Regime", exact=True).input_value() == names[9]
    assert_page_is_python("memory-calculator", visit)
    bars.focus()
    for key, row in (("ArrowDown", 10), ("ArrowUp", 9), ("ArrowUp", 8)):
        visit.page.keyboard.press(key)
        assert visit.page.get_by_label("Regime", exact=True).input_value() == names[row]
    assert_page_is_python("memory-calculator", visit)
    bars.focus()  # the comparison with Python pressed a button
    for _ in range(12):
        visit.page.keyboard.press("ArrowUp")
    assert visit.page.get_by_label("Regime", exact=True).input_value() == names[0]


def test_the_formula_can_be_copied_or_stands_selected(pages):
    visit = pages([MemoryCalculator(name="mem")])
    visit.page.evaluate("""() => Object.defineProperty(navigator, "clipboard",
      { value: { writeText: (text) => { window.copied = text; return Promise.resolve(); } }, configurable: true })""")
    visit.page.get_by_role("button", name="Copy formula").click()
    assert visit.page.evaluate("window.copied") == said(visit)["formula"] == MemoryCalculator().bill().formula
    visit.page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    visit.page.get_by_role("button", name="Copy formula").click()
    assert visit.page.evaluate("String(getSelection())").replace("\n", "") == said(visit)["formula"]
    assert "the formula is selected" in visit.page.locator(".mpl-row [role=status]").inner_text()


def test_controls_without_effect_are_off(pages):
    visit = pages([MemoryCalculator("deepseek_v3", batch=0, name="mem")])
    off = ["GPUs", "Tokens a sequence", "Forward pass keeps", "Attention", "LoRA rank (0: train all)", "Frozen base in",
           "Layers", "Width"]  # fmt: skip
    assert all(visit.page.get_by_label(label, exact=True).is_disabled() for label in off)
    visit.page.get_by_label("Model", exact=True).select_option(OWN)
    visit.page.get_by_label("Sharding").select_option("1")
    assert all(visit.page.get_by_label(label, exact=True).is_enabled() for label in ("GPUs", "Layers", "Width"))
    rank = visit.page.get_by_label("LoRA rank (0: train all)", exact=True)
    rank.focus()
    visit.page.keyboard.press("End")
    for base in ("nf4", "bf16"):
        visit.page.get_by_label("Frozen base in").select_option(base)
        assert_page_is_python("memory-calculator", visit)
