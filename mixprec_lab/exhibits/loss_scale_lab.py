"""The loss-scale lab: recorded gradients, moved by log2 S, against the window of a format."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import traitlets as t
from torch import nn

from mixprec_lab import device as devices
from mixprec_lab import models
from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.exhibits._text import percent
from mixprec_lab.formats import FloatFormat, FormatLike, RangeShares, get_format
from mixprec_lab.loss_scaling import GradientRecord, MagnitudeHistogram, record_gradients

Recorded = MagnitudeHistogram | torch.Tensor
Stage = Mapping[str, Recorded] | GradientRecord
MOST_TENSORS = 64  # of a stage: the page carries every histogram
_FORMATS = ("fp16", "bf16", "fp8_e5m2", "fp8_e4m3")
_PHASES = ("off", "predict", "revealed")
_FATES = ("zero", "flushed", "subnormal", "normal", "overflowed", "invalid")
_HIDDEN = "?"
_TASK = (
    "Set S to the largest power of two that you think is safe, and the share that you expect it to flush. "
    "Then press Reveal."
)


class LossScaleLab(Exhibit):
    """``recordings`` of gradients, multiplied by S = ``2**log2_scale`` (-8 to 40), in the window of ``format``.

    ``recordings`` is stage -> (name -> tensor or ``MagnitudeHistogram``), stage -> ``GradientRecord``, or, for one
    stage, just name -> tensor or histogram; every stage holds the same names.  Without it a small convolutional network
    is trained on the digits and recorded three times, which takes seconds.  Every share is the exact one that
    ``formats.classify`` gives.

    In ``phase`` "predict" the result is hidden; ``guess`` (log2 S) and ``expected`` (percent flushed) are compared with
    it in phase "revealed"; "off" just shows it.

    Raises ValueError for no tensors, an empty one, more than 64 of a stage, stages that differ in their names, unsigned
    formats and histograms made for other formats; TypeError for anything but tensors and histograms; TraitError for a
    state out of range.
    """

    _esm = es_module("loss_scale_lab")
    _kind = "loss-scale-lab"

    recordings = t.Dict(help="stages, names, histograms, and the edges of the formats").tag(sync=True)
    device = t.Unicode(help="where the gradients were recorded, in words").tag(sync=True)
    stage = t.Unicode().tag(sync=True)
    tensor = t.Unicode().tag(sync=True)
    format = t.Unicode("fp16").tag(sync=True)
    log2_scale = t.Int(0, min=-8, max=40).tag(sync=True)
    phase = t.Unicode("off").tag(sync=True)
    guess = t.Int(0, min=-8, max=40).tag(sync=True)
    expected = t.Int(0, min=0, max=100).tag(sync=True)

    def __init__(
        self,
        recordings: Mapping[str, Stage | Recorded] | None = None,
        stage: str | None = None,
        tensor: str | None = None,
        format: FormatLike = "fp16",
        log2_scale: int = 0,
        *,
        phase: str = "off",
        formats: Iterable[FormatLike] | None = None,
        recorded_on: str | None = None,
        name: str | None = None,
    ) -> None:
        fmt = get_format(format)
        offered = table_of(formats, _FORMATS)
        offered.setdefault(fmt.name, fmt)
        if recordings is None:
            recordings, recorded_on = _digits_at_three_stages()
        self._stages = _histograms(recordings, offered)
        first = next(iter(self._stages))
        state = {
            "stage": stage if stage is not None else first,
            "tensor": tensor if tensor is not None else next(iter(self._stages[first])),
            "format": fmt.name,
            "log2_scale": log2_scale,
            "phase": phase,
        }
        super().__init__(offered, name, **state)
        # Set apart, because the name of the links must not depend on the machine that recorded.
        self.recordings = _for_the_page(self._stages, offered)
        self.device = f"Recorded on {recorded_on}." if recorded_on else "Recorded before and given to this exhibit."

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        device: torch.device | str | None = None,
        *,
        layers: Iterable[str] | None = None,
        **options: Any,
    ) -> "LossScaleLab":
        """The lab over the gradients of one batch of your own model, recorded now (see ``record_gradients``).

        It is recorded on ``device``; if that is None, where the model is, or on ``device.pick()`` if that is the CPU.
        A model that is elsewhere is copied there; inputs and targets (tensors, or tuples, lists and dicts of them)
        follow.  ``layers`` are names of ``model.named_modules()``; None means every layer with parameters of its own.
        ``options`` go to the constructor.  Raises KeyError for an unknown layer.
        """
        place = _place(model, device)
        if any(p.device != place for p in model.parameters()):
            model = copy.deepcopy(model).to(place)
        record = record_gradients(model, _moved(inputs, place), _moved(targets, place), loss_fn)
        return cls({"this batch": _named(record, model, layers)}, recorded_on=_said(place), **options)

    _check_stage = t.validate("stage")(choice("stage", lambda self: self._stages))
    _check_tensor = t.validate("tensor")(choice("tensor", lambda self: next(iter(self._stages.values()))))
    _check_format = t.validate("format")(choice("format", lambda self: self._offered))
    _check_phase = t.validate("phase")(choice("phase", lambda self: _PHASES))

    def shares(self, log2_scale: int | None = None) -> RangeShares:
        """What the present format makes of the present tensor at ``2**log2_scale`` (None: the present scale)."""
        k = self.log2_scale if log2_scale is None else log2_scale
        return self._stages[self.stage][self.tensor].shares(self.format, k)

    def largest_safe_scale(self) -> int | None:
        """log2 of the largest S at which no element of the present tensor overflows; None where S decides nothing."""
        return _safest(self._stages[self.stage][self.tensor], self._format(self.format))

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        shown = self._shares_texts() | self._stage_texts()
        if self.phase == "predict":
            return dict.fromkeys(shown, _HIDDEN) | {"verdict": _TASK, "score": "", "device": self.device}
        score = self._score() if self.phase == "revealed" else ""
        return shown | {"verdict": self._verdict(), "score": score, "device": self.device}

    def _shares_texts(self) -> dict[str, str]:
        total, texts = self._stages[self.stage][self.tensor].total, {}
        now, one = _by_fate(self.shares()), _by_fate(self.shares(0))
        for fate, at_now, at_one in zip(_FATES, now, one, strict=True):
            texts |= {f"{fate}-one": percent(at_one), f"{fate}-now": percent(at_now)}
            texts[f"{fate}-count"] = str(round(at_now * total))
        return texts

    def _stage_texts(self) -> dict[str, str]:
        fmt, texts = self._format(self.format), {}
        for i, histogram in enumerate(self._stages[self.stage].values()):
            shares, best = histogram.shares(fmt, self.log2_scale), _safest(histogram, fmt)
            undecided = "none" if shares.infinite + shares.nan else "any"
            texts |= {f"t{i}-flushed": percent(shares.flushed), f"t{i}-overflowed": percent(shares.overflowed)}
            texts[f"t{i}-safe"] = undecided if best is None else f"2^{best}"
        return texts | {"stage": self._stage_verdict()}

    def _verdict(self) -> str:
        fmt, best, k = self._format(self.format), self.largest_safe_scale(), self.log2_scale
        histogram, now = self._stages[self.stage][self.tensor], self.shares()
        if invalid := histogram.infinite + histogram.nan:
            return f"{_plural(invalid, 'element')} inf or NaN already: the step is skipped at every S."
        if best is None:
            return "Every element is zero: no S is too large, and none helps."
        flushes = [percent(self.shares(at).flushed) for at in (best, 0)]
        head = f"The largest safe S in {fmt.title} is 2^{best}: it flushes {flushes[0]} of the elements; "
        head += f"S = 1 flushes {flushes[1]}."
        if k > best:
            over = f"{round(now.overflowed * histogram.total)} of {histogram.total} elements overflow"
            return f"{head} S = 2^{k} is {_plural(k - best, 'binade')} too large: {over}."
        room = _plural(best - k, "binade")
        return f"{head} S = 2^{k} leaves {room} of head-room and flushes {percent(now.flushed)}."

    def _score(self) -> str:
        best, guess = self.largest_safe_scale(), self.guess
        flushed = percent(self.shares(guess).flushed)
        if best is None:
            found = "For this tensor there is no largest safe S to find."
        elif guess == best:
            found = f"Your S = 2^{guess} is the largest safe one."
        elif guess == self.traits()["guess"].max < best:
            found = f"Your S = 2^{guess} is safe, and so is any that the slider offers: up to 2^{best}."
        elif guess < best:
            found = f"Your S = 2^{guess} is {_plural(best - guess, 'binade')} below the largest safe one, 2^{best}."
        else:
            off = _plural(guess - best, "binade")
            found = f"Your S = 2^{guess} is {off} above the largest safe one, 2^{best}: it overflows."
        return f"{found} You expected it to flush {self.expected} %; it flushes {flushed}."

    def _stage_verdict(self) -> str:
        fmt, stage = self._format(self.format), self._stages[self.stage]
        limits = [best for h in stage.values() if (best := _safest(h, fmt)) is not None]
        shares = {name: h.shares(fmt, self.log2_scale) for name, h in stage.items()}
        number = sum(s.overflowed + s.infinite + s.nan > 0 for s in shares.values())
        over = f"{number} of {len(stage)} overflow" if number else "none overflows"
        worst = max(shares, key=lambda name: shares[name].flushed)
        these = "this tensor" if len(stage) == 1 else "these tensors"
        one = f"S decides nothing for {these}."
        if limits:
            one = f"The largest S that is safe for all {_plural(len(stage), 'tensor')} is 2^{min(limits)}."
        most = f"the most is flushed in {worst} ({percent(shares[worst].flushed)})"
        lost = most if shares[worst].flushed > 0 else "nothing is flushed"
        return f"{one} At S = 2^{self.log2_scale}, {over}, and {lost}."


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _by_fate(s: RangeShares) -> tuple[float, ...]:
    return s.zero, s.flushed, s.subnormal, s.normal, s.overflowed, s.infinite + s.nan


def _safest(histogram: MagnitudeHistogram, fmt: FloatFormat) -> int | None:
    """log2 of the largest safe S; None if inf or NaN are in the tensor, or only zeros."""
    if histogram.infinite or histogram.nan or not histogram.binades:
        return None
    aligned = fmt.max_exponent - max(histogram.binades)  # brings the largest element into the format's top binade
    return aligned if histogram.shares(fmt, aligned).overflowed == 0 else aligned - 1


def _histograms(
    recordings: Mapping[str, Stage | Recorded], formats: Mapping[str, FloatFormat]
) -> dict[str, dict[str, MagnitudeHistogram]]:
    """Histograms by stage and name; see ``LossScaleLab`` for what is taken and what is refused."""
    if not isinstance(recordings, Mapping) or not recordings:
        raise ValueError(f"expected a mapping with at least one recording, got {recordings!r}: give stage -> tensors")
    if all(isinstance(value, Recorded) for value in recordings.values()):
        recordings = {"recorded": recordings}
    stages = {name: _stage(name, value, formats) for name, value in recordings.items()}
    first = next(iter(stages))
    for name, stage in stages.items():
        if not 1 <= len(stage) <= MOST_TENSORS:
            raise ValueError(f"expected 1 to {MOST_TENSORS} tensors in {name!r}, got {len(stage)}: choose some layers")
        if list(stage) != list(stages[first]):
            differing = sorted(set(stage) ^ set(stages[first])) or "another order"
            raise ValueError(f"expected the same tensors in {first!r} and {name!r}, they differ in {differing}")
    return stages


def _stage(name: str, stage: Stage, formats: Mapping[str, FloatFormat]) -> dict[str, MagnitudeHistogram]:
    if isinstance(stage, GradientRecord):
        by_kind = {"weights": stage.weights, "activations": stage.activations}
        stage = {f"{layer}: {kind}": h for kind, layers in by_kind.items() for layer, h in layers.items()}
    if not isinstance(stage, Mapping):
        raise TypeError(f"expected {name!r} to hold tensors or histograms by name, got {type(stage).__name__}")
    return {key: _histogram(f"{key!r} of {name!r}", value, formats) for key, value in stage.items()}


def _histogram(what: str, value: Recorded, formats: Mapping[str, FloatFormat]) -> MagnitudeHistogram:
    if not isinstance(value, Recorded):
        raise TypeError(f"expected {what} to be a tensor or a MagnitudeHistogram, got {type(value).__name__}")
    if isinstance(value, torch.Tensor):
        value = MagnitudeHistogram.of(value, formats=formats.values())
    for fmt in formats.values():
        value.shares(fmt)  # says what is wrong: empty, or made for other formats
    return value


def _for_the_page(stages: Mapping[str, Mapping[str, MagnitudeHistogram]], formats: Mapping[str, FloatFormat]) -> dict:
    """The histograms with just the thresholds that the formats need; an edge is [number of its threshold, exponent]."""
    thresholds = MagnitudeHistogram.of(formats=formats.values()).thresholds
    edges = {}
    for key, fmt in formats.items():
        split = [(*math.frexp(edge), upper) for edge, upper in fmt.nearest_edges]
        edges[key] = [[thresholds.index((2 * fraction - 1, upper)), e - 1] for fraction, e, upper in split]
    return {
        "stages": list(stages),
        "names": list(next(iter(stages.values()))),
        "fractions": [1 + fraction for fraction, _ in thresholds],
        "edges": edges,
        "tensors": [[_narrowed(h, thresholds) for h in stage.values()] for stage in stages.values()],
    }


def _narrowed(histogram: MagnitudeHistogram, thresholds: tuple[tuple[float, bool], ...]) -> dict:
    """``histogram.as_dict()`` with the cells between the given thresholds joined."""
    known = histogram.as_dict()
    ends = [0, *(histogram.thresholds.index(kept) + 1 for kept in thresholds), len(histogram.thresholds) + 1]
    rows = [[sum(row[a:b]) for a, b in zip(ends, ends[1:], strict=False)] for row in known["counts"]]
    return {key: value for key, value in known.items() if key != "thresholds"} | {"counts": rows}


def _place(model: nn.Module, wanted: torch.device | str | None) -> torch.device:
    """The device to record on; ValueError for a model without parameters."""
    if wanted is None:
        here = {p.device for p in model.parameters()}
        if len(here) != 1:
            got = ", ".join(sorted(map(str, here))) or "no parameters"
            raise ValueError(f"expected a model on one device, got {got}: say with device= where to record")
        wanted = devices.pick().device if here == {torch.device("cpu")} else here.pop()
    return torch.empty(0, device=wanted).device  # with its number, as parameters have it


def _said(place: torch.device) -> str:
    return f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else str(place)


def _moved(x: Any, place: torch.device) -> Any:
    if isinstance(x, dict):
        return {key: _moved(value, place) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_moved(value, place) for value in x)
    return x.to(place) if isinstance(x, torch.Tensor) else x


def _named(
    record: GradientRecord, model: nn.Module, layers: Iterable[str] | None = None
) -> dict[str, MagnitudeHistogram]:
    """The histograms of the chosen layers, named after the layer, its class and the kind of gradient."""
    modules = dict(model.named_modules())
    chosen = list(record.weights) if layers is None else list(layers)
    if unknown := [layer for layer in chosen if layer not in record.weights and layer not in record.activations]:
        recorded = sorted({*record.weights, *record.activations})
        raise KeyError(f"expected layers with a recorded gradient ({', '.join(recorded)}), got {', '.join(unknown)}")
    return {
        f"{layer} {type(modules[layer]).__name__}: {kind}".strip(): found[layer]
        for layer in chosen
        for kind, found in (("weights", record.weights), ("activations", record.activations))
        if layer in found
    }


def _digits_at_three_stages() -> tuple[dict[str, Stage], str]:
    """The gradients of one batch of digits before, early in and late in the training of ``models.convnet``."""
    place = devices.pick().device
    data, model, stages, done = models.digits(place), models.convnet().to(place), {}, 0
    for steps in (0, 100, 400):
        with devices.one_thread():
            models.train(model, data, steps - done, seed=steps)
        done = steps
        batch = data.train_images[:256], data.train_labels[:256]
        record = record_gradients(model, *batch, nn.functional.cross_entropy)
        stages[f"after {steps} steps" if steps else "before training"] = _named(record, model)
    return stages, _said(place)
