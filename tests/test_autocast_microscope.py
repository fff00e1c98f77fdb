"""The autocast microscope: every setting against a trace of its own, the page against Python, mouse and keys."""

import itertools
import json

import pytest
import torch
import traitlets
from conftest import run_node
from torch import nn
from widget_page import assert_page_is_python, said

from mixprec_lab.amp import trace_autocast
from mixprec_lab.exhibits import AutocastMicroscope
from mixprec_lab.exhibits.autocast_microscope import (
    AUTOCAST,
    LABELS,
    MANUAL,
    PASSES,
    POLICIES,
    SOFTMAX,
    _packed,
    _setting,
)
from mixprec_lab.models import transformer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
RESULTS = {
    "fp16": {"softmax": ("FP32", "FP16"), "logits": ("FP16", "FP16"), "residual 1": ("FP32", "FP32")},
    "bf16": {"softmax": ("FP32", "BF16"), "logits": ("BF16", "BF16"), "residual 1": ("FP32", "FP32")},
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_it_shows_what_the_trace_of_the_bare_model_shows(name, policy):
    model, images = transformer(seed=0, depth=1), torch.rand(2, 1, 8, 8)
    calls = trace_autocast(
        model, images, DTYPES[name], policy, loss_fn=nn.functional.cross_entropy, targets=torch.tensor([3, 7])
    ).calls
    shown = AutocastMicroscope(name, policy)
    seen = [shown.calls[i] for i in shown.settings[f"{name}/{policy}/none/inside"]["passes"]["first"]]
    assert len(seen) == len(calls)
    for row, call in zip(seen, calls, strict=True):
        known = call.as_dict()
        assert row[1:] == [known[k] for k in ("operation", "inputs", "output", "rule", "backward", "casts", "reused")]


@pytest.mark.parametrize("name", DTYPES)
def test_the_known_dtypes_of_both_devices(name):
    for label, expected in RESULTS[name].items():
        got = tuple(AutocastMicroscope(name, policy, operator=label).result()["output"] for policy in ("cuda", "cpu"))
        assert got == expected
    for softmax, output in (("outside", name.upper()), ("float", "FP32")):
        assert AutocastMicroscope(name, "cuda", softmax=softmax).result()["output"] == output


def test_the_second_batch_finds_every_weight_in_the_cache():
    first, second = (AutocastMicroscope(forward_pass=p).result()["casts"] for p in PASSES)
    made, kept = int(first.split()[0]), int(second.split()[0])
    weights = sum(2 for name, m in transformer(depth=1).named_modules() if isinstance(m, nn.Linear))
    assert first.endswith(" 0 reused") and second == f"{made - weights} made, {weights} reused" and kept < made


@pytest.mark.parametrize(
    ("state", "verdict"),
    [
        ({"manual": "half"}, "ValueError: Attempting to unscale FP16 gradients."),
        ({"autocast": "off", "manual": "half"}, "mat1 and mat2 must have the same dtype, but got Float and Half"),
        ({"autocast": "bf16", "manual": "bfloat16"}, "no FP32 copy holds small updates"),
        ({"autocast": "bf16"}, "BF16 has their range, so no loss is scaled"),
        ({"autocast": "off"}, "Runs in FP32 from end to end."),
        ({"autocast": "bf16", "policy": "cpu", "manual": "half"}, "Stops at norm 1: RuntimeError: mixed dtype (CPU)"),
    ],
)
def test_the_verdict_tells_what_happens(state, verdict):
    assert verdict in AutocastMicroscope(**state).result()["verdict"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("autocast", "fp8"), ("policy", "tpu"), ("manual", "float"), ("softmax", "no"), ("forward_pass", "third"),
     ("operator", "conv")],
)  # fmt: skip
def test_a_setting_that_is_none_is_refused(key, value):
    with pytest.raises(traitlets.TraitError, match=f"expected {key} to be one of .*got '{value}'"):
        AutocastMicroscope(**{key: value})


def test_running_every_setting_leaves_threads_and_autocast_as_they_were():
    before = torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.random.get_rng_state().tolist()
    _setting.cache_clear()
    _packed.__wrapped__()
    assert (torch.get_num_threads(), torch.is_autocast_enabled("cpu")) == before[:2]
    assert torch.random.get_rng_state().tolist() == before[2]


def test_javascript_says_what_python_says_in_every_state(tmp_path):
    shown = AutocastMicroscope()
    states = [
        dict(zip(("autocast", "policy", "manual", "softmax", "forward_pass", "operator"), values, strict=True))
        for values in itertools.product(AUTOCAST, POLICIES, MANUAL, SOFTMAX, PASSES, LABELS[::3])
    ]
    traits = {key: getattr(shown, key) for key in ("formats", "steps", "rules", "calls", "settings")}
    (tmp_path / "module.mjs").write_text(shown._esm, "utf-8")
    run_node("states.mjs", tmp_path, {"kind": "autocast-microscope", "traits": traits, "states": states})
    answers = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    for state, words in zip(states, answers, strict=True):
        for key, value in state.items():
            setattr(shown, key, value)
        assert words == shown.result(), state


def test_clicks_and_arrow_keys_choose_the_operator(pages):
    visit = pages([AutocastMicroscope(name="micro")])
    page, drawing = visit.page, visit.page.locator(".mpl-exhibit svg.mpl-pick")
    drawing.locator("[data-step='key']").click()
    assert said(visit)["operation"] == "key: linear"
    assert_page_is_python("autocast-microscope", visit)
    drawing.focus()
    for key, operation in (("ArrowRight", "value: linear"), ("ArrowLeft", "key: linear"), ("ArrowUp", "query: linear")):
        page.keyboard.press(key)
        assert said(visit)["operation"] == operation
    for _ in LABELS:
        page.keyboard.press("ArrowLeft")
    assert said(visit)["operation"] == "embed: linear"
    for _ in LABELS:
        page.keyboard.press("ArrowDown")
    assert said(visit)["operation"] == "loss: nll_loss"
    drawing.locator("[data-step='float()']").click()  # not in this setting: the operator after it
    assert said(visit)["operation"] == "softmax: softmax"
    assert_page_is_python("autocast-microscope", visit)


@pytest.mark.parametrize("width", [390, 1280])
def test_boxes_stay_inside_and_apart_and_nothing_jumps(pages, width):
    visit = pages([AutocastMicroscope(name="micro")], width=width)
    inside, apart = visit.page.evaluate("""() => {
      const all = document.querySelector("svg.mpl-pick"), frame = all.getBoundingClientRect();
      const boxes = [...all.querySelectorAll("[data-step]")].map(
        (g) => g.querySelector("rect").getBoundingClientRect());
      const texts = [...all.querySelectorAll("[data-step] text")].map((t) =>
        [t.getBoundingClientRect(), t.parentNode.querySelector("rect").getBoundingClientRect()]);
      const meets = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
      return [boxes.every((b) => b.left >= frame.left - 1 && b.right <= frame.right + 1 && b.bottom <= frame.bottom + 1)
        && texts.every(([t, b]) => t.left >= b.left && t.right <= b.right),
        boxes.every((a, i) => boxes.every((b, k) => i === k || !meets(a, b)))];
    }""")
    assert inside and apart
    heights = set()
    for name, values in (
        ("Autocast", AUTOCAST),
        ("Lists of", POLICIES),
        ("The model", MANUAL),
        ("The softmax", SOFTMAX),
    ):
        for value in values:
            visit.page.get_by_label(name, exact=True).select_option(value)
            heights.add(round(visit.page.locator(".mpl-body").bounding_box()["height"] / 4))
    assert len(heights) <= 2
