"""The scaler simulator: the rules of torch, DeepSpeed and Megatron on one stream of gradients with spikes."""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import islice
from statistics import median_low
from types import MappingProxyType
from typing import Any

import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.exhibits._text import percent, significant
from mixprec_lab.exhibits.stalling_sum import _mulberry32
from mixprec_lab.formats import get_format
from mixprec_lab.loss_scaling import RULES, ScalerRule, ScalerRun, simulate_scaler

TITLES = MappingProxyType({"torch": "torch", "deepspeed": "DeepSpeed", "megatron": "Megatron"})
STEPS = ("600", "2000", "6000")
BATCH_SIZES = ("1", "8", "64", "256", "1024", "4096")
PRESET = "preset"
#: What may replace the value of a preset, by control; "preset" leaves every rule its own.
OVERRIDES: MappingProxyType[str, dict[str, float]] = MappingProxyType({
    "init_scale": {"1": 1.0} | {f"2^{k}": 2.0**k for k in range(4, 33, 4)},
    "window": {str(n): n for n in (10, 20, 50, 100, 200, 500, 1000, 2000)},
    "backoff_factor": {"0.25": 0.25, "0.5": 0.5, "0.8": 0.8},
    "hysteresis": {str(n): n for n in (1, 2, 3, 4, 8)},
    "min_scale": {"none": 0.0, "2^-10": 2.0**-10, "1": 1.0},
})  # fmt: skip
LEVEL = -2  # log2 of the largest gradient without drift, noise and spikes
INFINITE = 41  # the height of a spike that is not finite
_LONGEST, _MOST = 50, 24  # steps of a spike; spikes
_SPIKES = re.compile(r"(?:\d{1,5}:\d{1,2}:\d{1,2}(?:,\d{1,5}:\d{1,2}:\d{1,2})*)?", re.ASCII)

Spike = tuple[int, int, int]  #: first step, height in binades (41: inf), length in steps


class ScalerSimulator(Exhibit):
    """Three rules for a dynamic loss scale on one stream of each step's largest \\|gradient\\|, FP16.

    The stream has ``steps`` steps at about 2**-2; it drifts by ``drift`` binades (-24 to 24) over the run, jitters by
    about ``noise`` (0 to 4) binades, seeded by ``seed`` (0 to 20), and is multiplied by ``2**height`` during each of
    the ``spikes`` (first step, height 1 to 40 or 41 for infinity, length 1 to 50).  ``init_scale``, ``window``,
    ``backoff_factor``, ``hysteresis`` and ``min_scale`` are texts of ``OVERRIDES``, or "preset".  ``step`` is the step
    that is described in words; ``height`` and ``length`` are those of the next spike.  TraitError for anything else.
    """

    _esm = es_module("scaler_simulator")
    _kind = "scaler-simulator"

    rules = t.Dict(help="the presets, what may replace their values, and FP16's overflow").tag(sync=True)
    steps = t.Unicode("600").tag(sync=True)
    seed = t.Int(0, min=0, max=20).tag(sync=True)
    drift = t.Int(0, min=-24, max=24).tag(sync=True)
    noise = t.Int(1, min=0, max=4).tag(sync=True)
    spikes = t.Unicode("300:8:1,420:12:6").tag(sync=True)
    init_scale = t.Unicode(PRESET).tag(sync=True)
    window = t.Unicode("50").tag(sync=True)
    backoff_factor = t.Unicode(PRESET).tag(sync=True)
    hysteresis = t.Unicode(PRESET).tag(sync=True)
    min_scale = t.Unicode(PRESET).tag(sync=True)
    batch_size = t.Unicode("64").tag(sync=True)
    step = t.Int(300, min=0, max=int(STEPS[-1]) - 1).tag(sync=True)
    height = t.Int(8, min=1, max=INFINITE).tag(sync=True)
    length = t.Int(1, min=1, max=_LONGEST).tag(sync=True)

    def __init__(self, spikes: str | Iterable[Spike] | None = None, *, name: str | None = None, **state: Any) -> None:
        if spikes is not None:
            state["spikes"] = spikes if isinstance(spikes, str) else _written(spikes)
        super().__init__(table_of(["fp16"]), name, **state)
        self.rules = _for_the_page()

    _check_steps = t.validate("steps")(choice("steps", lambda self: STEPS))
    _check_batch = t.validate("batch_size")(choice("batch_size", lambda self: BATCH_SIZES))

    @t.validate(*OVERRIDES)
    def _check_override(self, proposal: Any) -> str:
        key = proposal.trait.name
        return choice(key, lambda self: (PRESET, *OVERRIDES[key]))(self, proposal)

    @t.validate("spikes")
    def _check_spikes(self, proposal: Any) -> str:
        spikes = _read(proposal.value) if _SPIKES.fullmatch(proposal.value) else None
        starts = [start for start, _, _ in spikes or ()]
        fine = spikes is not None and len(spikes) <= _MOST and starts == sorted(set(starts))
        if not fine or not all(
            start < int(STEPS[-1]) and 1 <= height <= INFINITE and 1 <= length <= _LONGEST
            for start, height, length in spikes
        ):
            raise t.TraitError(
                f"expected at most {_MOST} spikes 'step:height:length', separated by commas, in the order of their "
                f"steps (height 1 to {INFINITE}, length 1 to {_LONGEST}), got {proposal.value!r}"
            )
        return proposal.value

    def stream(self) -> list[float]:
        """The largest |gradient| of every step.

        Its log2 is linear within a binade instead of logarithmic, which makes page and Python agree to the last bit.
        """
        steps, draws, magnitudes = int(self.steps), _mulberry32(self.seed), []
        for step, lift in enumerate(_lifts(_read(self.spikes), steps)):
            jitter = sum(islice(draws, 4)) - 2
            log2 = LEVEL + self.drift * step / steps + self.noise * jitter + lift
            binade = math.floor(log2) if lift < math.inf else 0
            magnitudes.append(2.0**binade * (1 + (log2 - binade)))
        return magnitudes

    def rule(self, name: str) -> ScalerRule:
        """The preset ``name`` with the present replacements."""
        chosen = {key: OVERRIDES[key][text] for key in OVERRIDES if (text := getattr(self, key)) != PRESET}
        return replace(RULES[name], **chosen)

    def runs(self) -> dict[str, ScalerRun]:
        """What every rule does on the stream."""
        stream = self.stream()
        return {name: simulate_scaler(self.rule(name), stream, "fp16", int(self.batch_size)) for name in TITLES}

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        stream, runs, at = self.stream(), self.runs(), min(self.step, int(self.steps) - 1)
        texts = {"spikes": self._spike_text(), "verdict": _verdict(runs, len(stream))}
        texts["at"] = f"At step {at} the largest |gradient| is {significant(stream[at], 4)}."
        for name, run in runs.items():
            texts |= {f"{name}-{key}": text for key, text in _rows(run, stream, at).items()}
        return texts

    def _spike_text(self) -> str:
        spikes = [
            f"step {start} (x {'inf' if height == INFINITE else f'2^{height}'}, {_plural(length, 'step')})"
            for start, height, length in _read(self.spikes)
        ]
        full = " No more fit." if len(spikes) == _MOST else ""
        return f"Spikes: {', '.join(spikes)}.{full}" if spikes else "No spike yet."


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _written(spikes: Iterable[Spike]) -> str:
    return ",".join(":".join(map(str, spike)) for spike in sorted(spikes))


def _read(text: str) -> list[Spike]:
    return [tuple(map(int, spike.split(":"))) for spike in text.split(",")] if text else []


def _lifts(spikes: Iterable[Spike], steps: int) -> list[float]:
    """The binades by which the spikes raise every step."""
    lifts = [0.0] * steps
    for start, height, length in spikes:
        for step in range(start, min(start + length, steps)):
            lifts[step] += math.inf if height == INFINITE else height
    return lifts


def _for_the_page() -> dict[str, Any]:
    edge, on_it = get_format("fp16").nearest_edges[2]
    return {
        "presets": [asdict(RULES[name]) | {"title": title} for name, title in TITLES.items()],
        "overrides": {key: [[text, value] for text, value in texts.items()] for key, texts in OVERRIDES.items()},
        "steps": STEPS,
        "batch_sizes": BATCH_SIZES,
        "edge": edge,
        "on_it": on_it,
    }


def _scale_text(scale: float) -> str:
    fraction, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if fraction == 0.5 else significant(scale, 4)


def _rows(run: ScalerRun, stream: list[float], at: int) -> dict[str, str]:
    """The column of one rule in the table."""
    rule, ran = run.rule, len(run.scale_before)
    steps = zip(stream, run.scale_before, run.overflow, strict=False)
    edge = run.format.nearest_edges[2][0]
    rooms = [math.frexp(edge / (amax * s))[1] - 1 for amax, s, over in steps if not over and amax * s > 0]
    return {
        "start": _scale_text(rule.init_scale),
        "window": str(rule.window),
        "hysteresis": str(rule.hysteresis),
        "floor": _scale_text(rule.min_scale) if rule.min_scale else "none",
        "skipped": f"{run.skipped} ({percent(run.skipped / ran)})",
        "lost": str(run.lost_samples),
        "last": _scale_text(run.final_scale),
        "lowest": _scale_text(min(*run.scale_before, run.final_scale)),
        "below": str(sum(s < 1 for s in run.scale_before)),
        "room": _plural(median_low(rooms), "binade") if rooms else "\u2014",
        "end": f"after {_plural(ran, 'step')}" if run.ended_at is None else f"error at step {run.ended_at}",
        "now": _event(run, at),
    }


def _event(run: ScalerRun, at: int) -> str:
    """What happens to the scale at a step, in words."""
    if at >= len(run.scale_before):
        return "the run has ended"
    before, after, left = run.scale_before[at], run.scale_after[at], run.hysteresis_left[at]
    scale = _scale_text(before)
    if run.ended_at == at:
        return f"{scale}: overflow at the floor, the run ends"
    if not run.overflow[at]:
        return f"{scale}: taken, grows to {_scale_text(after)}" if after > before else f"{scale}: taken"
    if after < before:
        return f"{scale}: skipped, falls to {_scale_text(after)}"
    patient = left < (run.hysteresis_left[at - 1] if at else run.rule.hysteresis)
    return f"{scale}: skipped, {'hysteresis holds it' if patient else 'can fall no further'}"


def _verdict(runs: dict[str, ScalerRun], steps: int) -> str:
    skips = [f"{TITLES[name]} skips {run.skipped}" for name, run in runs.items()]
    lost = ", ".join(str(run.lost_samples) for run in runs.values())
    text = f"Of {steps} steps {', '.join(skips[:-1])} and {skips[-1]}; samples lost: {lost}."
    for name, run in runs.items():
        if run.ended_at is not None:
            text += f" {TITLES[name]} ends at step {run.ended_at}: \u201cCurrent loss scale already at minimum\u201d."
    return text
