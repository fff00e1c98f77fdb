"""Exhibits to test and a page of them: the state as MyST-NB embeds it, and the host script of the book."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from urllib.parse import parse_qsl

import anywidget
import torch
import traitlets
from conftest import ROOT, Visit
from house.policy import secured
from ipywidgets.embed import dependency_state, embed_data
from regime_record import small_record, wide_record

from mixprec_lab.exhibits import (
    AutocastMicroscope,
    BitExplorer,
    Clinic,
    Drill,
    LossScaleLab,
    LostUpdateMap,
    MemoryCalculator,
    Museum,
    NumberLine,
    OneTensorEveryScheme,
    PrecisionChooser,
    RegimeComparison,
    SameTensorTwoFormats,
    ScaleHistory,
    ScalerSimulator,
    StallingSum,
    SumOverRanks,
    WillItBeFaster,
    Windows,
)
from mixprec_lab.exhibits.scaler_simulator import OVERRIDES
from mixprec_lab.formats import FORMATS
from mixprec_lab.interview import get_question

HOST = ROOT / "book/_ext/static/widget-host.js"

_PAGE = """<!doctype html>
<html lang="en" data-theme="{theme}"><head><meta charset="utf-8"><title>Exhibits</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ margin: 16px auto; padding: 0 12px; max-width: 800px; font-family: system-ui, sans-serif;
background: #fff }} html[data-theme="dark"] body {{ background: #14181e; color: #e6ebf0 }}</style></head>
<body><main><h1>Exhibits</h1>{views}</main>
<script type="application/vnd.jupyter.widget-state+json">{state}</script><script>{host}</script></body></html>
"""


def page_of(widgets: Sequence[anywidget.AnyWidget], theme: str = "light") -> str:
    """The HTML of a page that shows ``widgets``, one below the other, under the policy of a page of the book."""
    # Without a state of its own the page would carry every widget that this process ever made.
    data = embed_data(views=list(widgets), state=dependency_state(list(widgets), drop_defaults=False))
    views = "".join(
        f'<div class="cell_output"><script type="application/vnd.jupyter.widget-view+json">{json.dumps(spec)}'
        "</script></div>"
        for spec in data["view_specs"]
    )
    state = json.dumps(data["manager_state"], sort_keys=True).replace("</", "<\\/")
    return secured(_PAGE.format(theme=theme, views=views, state=state, host=HOST.read_text(encoding="utf-8")))


def tensors() -> dict[str, torch.Tensor]:
    """Two recordings: small gradients with a few zeros, and values on every threshold of FP16."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3000, generator=generator) * 2e-6
    gradients[:30] = 0.0
    fp16 = FORMATS["fp16"]
    edges = [2.0**-25, 2.0**-24, fp16.smallest_normal - 2.0**-25, fp16.smallest_normal, 65504.0, 65520.0, 70000.0]
    return {"gradients": gradients, "edges": torch.tensor([*edges, *(-e for e in edges)])}


def gradients() -> dict[str, dict[str, torch.Tensor]]:
    """Two stages of tensors: a cloud of gradients, magnitudes at every edge of four formats, and degenerate cases."""
    generator = torch.Generator().manual_seed(1)
    cloud = torch.exp2(torch.randn(2000, generator=generator) * 6 - 20)
    cloud[:100] = 0.0
    edges = [edge for name in ("fp16", "bf16", "fp8_e5m2", "fp8_e4m3") for edge, _ in FORMATS[name].nearest_edges]
    exact = torch.tensor([m for e in edges for m in (e, -e, e * (1 - 2.0**-12), e * (1 + 2.0**-12)) if m < 2.0**127])
    first = {
        "cloud": cloud,
        "edges": exact,
        "zeros": torch.zeros(5),
        "tiny": torch.tensor([2.0**-149, 3 * 2.0**-149, 2.0**-126, 0.0]),
        "broken": torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 0.0]),
    }
    return {"early": first, "late": {name: x / 32 for name, x in first.items()}}


CARDS = ("four-pillars", "ridge-point", "what-autocast-casts", "code-kahan", "cast-overhead", "code-stochastic")


def cards() -> list:
    """Six questions of three themes and all levels, two of them with code."""
    return [get_question(id) for id in CARDS]


@dataclass(frozen=True)
class Sample:
    """One exhibit as the tests meet it."""

    make: Callable[[], anywidget.AnyWidget]  #: a small one, the same every time
    state: tuple[str, ...]  #: the traits that a link carries
    change: dict[str, object]  #: another state, to be restored by a link
    mouse: dict[str, str] | None = None  #: drive its sliders by mouse too, after choosing these (select name -> value)
    heavy: Callable[[], anywidget.AnyWidget] | None = None  #: the slowest state there is, for the frame time
    texts: tuple[str, ...] = ()  #: what its first text field must accept


SAMPLES = {
    "bit-explorer": Sample(
        lambda: BitExplorer(name="bits"),
        ("format", "text", "code", "rounding", "overflow"),
        {"format": "bf16", "code": 0x7FC1, "rounding": "up"},
        texts=("65520", "-0", "nan", "inf", "-inf", "1e-8", "2^-24", "0x1p-3", "-1.5*2^3"),
    ),
    "windows": Sample(
        lambda: Windows.from_tensors(tensors(), name="win"),
        ("source", "centre", "spread", "scale"),
        {"source": "edges", "scale": 7},
        mouse={"Tensor": "a model: log2 |x| normal"},
    ),
    "stalling-sum": Sample(
        lambda: StallingSum(count=400, name="sum"),
        ("addend", "count", "format", "method", "seed"),
        {"addend": "0.3", "count": 1500, "format": "bf16", "method": "kahan"},
        mouse={"Method": "stochastic"},
        heavy=lambda: StallingSum(count=20_000, method="kahan", name="sum"),
        texts=("0.3", "-1e-3", "2^-12", "1e5", "1e-9", "1e30"),
    ),
    "sum-over-ranks": Sample(
        lambda: SumOverRanks(log2_ranks=6, name="ranks"),
        ("format", "log2_ranks", "noise", "size", "seed"),
        {"format": "fp16", "log2_ranks": 9, "noise": 5, "size": 13, "seed": 4},
        mouse={},
        heavy=lambda: SumOverRanks(noise=16, name="ranks"),
    ),
    "number-line": Sample(
        lambda: NumberLine(name="line"),
        ("x", "first", "second", "rounding", "centre", "zoom"),
        {"x": "-3.3", "centre": -3.3, "first": "bf16", "rounding": "stochastic", "zoom": 4},
        mouse={},
        texts=("-0", "0.1", "448", "1e9", "-2^-7"),
    ),
    "lost-update-map": Sample(
        lambda: LostUpdateMap(name="lost"),
        ("format", "method", "weight", "rate", "place", "direction", "shows", "seed"),
        {"format": "fp16", "method": "kahan", "weight": -7, "rate": "2e-6", "place": "last", "shows": "unmoved"},
        mouse={"Update rule": "stochastic"},
    ),
    "loss-scale-lab": Sample(
        lambda: LossScaleLab(gradients(), name="lab"),
        ("stage", "tensor", "format", "log2_scale", "phase", "guess", "expected"),
        {"stage": "late", "tensor": "edges", "format": "fp8_e4m3", "log2_scale": 9, "phase": "revealed", "guess": 3},
        mouse={},
    ),
    "scaler-simulator": Sample(
        lambda: ScalerSimulator(name="sim"),
        ("steps", "seed", "drift", "noise", "spikes", "step", "height", "length", "batch_size", *OVERRIDES),
        {"steps": "2000", "drift": 24, "spikes": "", "init_scale": "1", "backoff_factor": "0.8", "step": 1999},
        mouse={},
        heavy=lambda: ScalerSimulator([(200 * i, 41, 50) for i in range(24)], steps="6000", window="10", name="sim"),
    ),
    "scale-history": Sample(
        lambda: ScaleHistory(name="scales"),
        (
            *("recipe", "history", "algorithm", "margin", "format", "shape", "steps"),
            *("level", "drift", "noise", "seed", "jumps", "step", "height", "length"),
        ),
        {"recipe": "current", "format": "fp8_e5m2", "steps": "256", "jumps": "9:-20:256", "step": 255, "margin": 6},
        mouse={},
        heavy=lambda: ScaleHistory([(20 * i, 21 - 3 * i, 9) for i in range(12)], steps="256", noise=8, name="scales"),
    ),
    "autocast-microscope": Sample(
        lambda: AutocastMicroscope(name="micro"),
        ("autocast", "policy", "manual", "softmax", "forward_pass", "operator"),
        {"autocast": "bf16", "policy": "cpu", "manual": "half", "softmax": "float", "operator": "norm 2"},
    ),
    "memory-calculator": Sample(
        lambda: MemoryCalculator(name="mem"),
        (
            "model",
            "layers",
            "width",
            "vocabulary",
            "regime",
            "stage",
            "world",
            "batch",
            "sequence",
            "stored",
            "attention",
            "rank",
            "base",
            "gpu",
        ),
        {
            "model": "own sizes",
            "layers": 5,
            "vocabulary": 256,
            "stage": 2,
            "sequence": 131072,
            "rank": 64,
            "base": "nf4",
        },
        mouse={"Model": "own sizes"},
    ),
    "precision-chooser": Sample(
        lambda: PrecisionChooser(name="choose"),
        ("hardware", "task", "priority"),
        {"hardware": "v100", "task": "gan", "priority": "speed"},
    ),
    "museum": Sample(lambda: Museum(name="rooms"), ("theme", "level"), {"theme": "repair", "level": "3"}),
    "clinic": Sample(
        lambda: Clinic(("nan_in_input", "scaler_calibration", "clip_before_unscale"), name="ward"),
        ("patient", "step", "ordered", "diagnosis", "place", "phase", "rate", "precision", "scaler", "spike"),
        {"patient": "2", "step": 39, "ordered": "scaler,cheap", "diagnosis": "none", "phase": "revealed"},
        mouse={"Patient": "own"},
        heavy=lambda: Clinic(("stale_amax", "scaler_state_not_restored"), name="ward"),
    ),
    "drill": Sample(
        lambda: Drill(cards(), now="2026-11-26T09:30:00", name="drill"),
        ("mode", "theme", "level", "order", "pile", "card", "side", "count", "minutes"),
        {"theme": "coding", "order": "themes", "pile": "all", "card": "code-kahan", "side": "back", "minutes": 60},
        heavy=lambda: Drill(now="2026-11-26T09:30:00", name="drill"),
    ),
    "regimes": Sample(
        lambda: RegimeComparison(small_record(), name="every"),
        ("task", "baseline", "shown", "interval", "seeds", "at"),
        {"task": "images", "baseline": "bf16_nearest", "shown": "fp32,mxfp8", "interval": "unpaired", "at": 1},
        mouse={},
        heavy=lambda: RegimeComparison(wide_record(), name="every"),
    ),
    "one-tensor": Sample(
        lambda: OneTensorEveryScheme(name="one"),
        ("distribution", "outlier", "frequency", "place", "rule", "axis", "scheme"),
        {"distribution": "wide", "outlier": 5, "place": "channels", "axis": "columns", "scheme": "nvfp4"},
        mouse={},
        heavy=lambda: OneTensorEveryScheme("wide", 4, 4, scheme="mxfp4", name="one"),
    ),
    "same-tensor": Sample(
        lambda: SameTensorTwoFormats(name="same"),
        ("tensor", "scale", "outliers", "size"),
        {"tensor": "gradients: log2 |x| normal", "scale": -20, "outliers": 3, "size": 12},
        mouse={},
    ),
    "will-it-be-faster": Sample(
        lambda: WillItBeFaster(name="faster"),
        ("m", "k", "n", "device", "pair", "recipe", "layouts", "before", "after", "bandwidth", "launch", "share"),
        {"m": 10, "k": 11, "n": 10, "device": "l40s", "recipe": "block", "layouts": "one", "after": 55, "launch": 23},
        mouse={},
    ),
}
MAKERS = {kind: sample.make for kind, sample in SAMPLES.items()}
STATE = {kind: sample.state for kind, sample in SAMPLES.items()}

SAID = """root => Object.fromEntries([...root.querySelectorAll("[data-field]")]
  .filter(e => e.dataset.field !== "link-status").map(e => [e.dataset.field, e.textContent]))"""


def said(visit: Visit, at: int = 0) -> dict[str, str]:
    """Every text of the exhibit, by its data-field."""
    return visit.page.locator(".mpl-exhibit").nth(at).evaluate(SAID)


LINK = """async (root) => {
  Object.defineProperty(navigator, "clipboard", { value: undefined, configurable: true });
  root.querySelector("[data-action=copy-link]").click();
  await new Promise((done) => setTimeout(done));
  return root.querySelector(".mpl-link").value;
}"""
SAID_AND_LINK = f"async (root) => [({SAID})(root), await ({LINK})(root)]"


def link_of(visit: Visit, at: int = 0) -> str:
    """The link to the present state, by the button and without a clipboard."""
    return visit.page.locator(".mpl-exhibit").nth(at).evaluate(LINK)


def python_twin(kind: str, link: str):
    """The exhibit in Python, in the state that the link names."""
    state = dict(parse_qsl(link.split("#")[1].split(":", 1)[1], keep_blank_values=True))
    twin = MAKERS[kind]()
    assert set(state) == set(STATE[kind])
    order = [key for key in STATE[kind] if key != "code"] + ["code"] * ("code" in state)
    for key in order:
        trait = twin.traits()[key]
        convert = int if isinstance(trait, traitlets.Int) else float if isinstance(trait, traitlets.Float) else str
        setattr(twin, key, convert(state[key]))
    return twin


@cache
def python_result(kind: str, fragment: str) -> dict[str, str]:
    """What Python says for the state that a link ends with; a state is computed once, however often pages show it."""
    twin = python_twin(kind, "#" + fragment)
    found = twin.result()
    twin.close()
    return found


def assert_page_is_python(kind: str, visit: Visit, at: int = 0) -> None:
    """The texts of the exhibit at place ``at`` of the page are ``result()`` of the same state."""
    page, link = visit.page.locator(".mpl-exhibit").nth(at).evaluate(SAID_AND_LINK)
    assert page == python_result(kind, link.split("#")[1])
    assert visit.problems == {}
