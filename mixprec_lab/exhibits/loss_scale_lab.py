"""The loss-scale lab: recorded gradients, moved by log2 S, against the window of a format."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import traitlets as t
from torch import nn

from mixprec_lab import device as devices
from mixprec_lab import models
from mixprec_lab.exhibits._base import choice, es_module, table_of
from mixprec_lab.exhibits._casts import cast_counts, compared
from mixprec_lab.exhibits._live import LiveExhibit, Measured, Tensors, place_of, said_of
from mixprec_lab.exhibits._model_run import ModelRun, named
from mixprec_lab.exhibits._text import percent
from mixprec_lab.formats import FloatFormat, FormatLike, RangeShares, get_format
from mixprec_lab.loss_scaling import GradientRecord, MagnitudeHistogram, record_gradients

Recorded = MagnitudeHistogram | torch.Tensor
Stage = Mapping[str, Recorded] | GradientRecord
MOST_TENSORS = 64  # of a stage: the page carries every histogram
_FORMATS = ("fp16", "bf16", "fp8_e5m2", "fp8_e4m3")
_PHASES = ("off", "predict", "revealed")
_FATES = ("zero", "flushed", "subnormal", "normal", "overflowed", "invalid")
_BATCH = "this batch"
_AUTOCAST = ("fp16", "bf16")  # formats that torch.autocast has
_HIDDEN = "?"
_TASK = (
    "Set S to the largest power of two that you think is safe, and the share that you expect it to flush. "
    "Then press Reveal."
)


class LossScaleLab(LiveExhibit):
    """``recordings`` of gradients, multiplied by S = ``2**log2_scale`` (-8 to 40), in the window of ``format``.

    ``recordings`` is stage -> (name -> tensor or ``MagnitudeHistogram``), stage -> ``GradientRecord``, or, for one
    stage, just name -> tensor or histogram; every stage holds the same names.  Without it a small convolutional network
    is trained on the digits and recorded three times, which takes seconds.  Every share is the exact one that
    ``formats.classify`` gives; float64 tensors are taken in FP32.

    ``LossScaleLab(model, (inputs, targets), loss_fn)`` is ``from_model``.  In a live notebook the kernel answers every
    move on ``device`` (see ``place_of``): it casts the tensor for real, or runs the model under autocast with the loss
    times S.  ``refresh()`` looks at tensors and model again.

    In ``phase`` "predict" the result is hidden; ``guess`` (log2 S) and ``expected`` (percent flushed) are compared with
    it in phase "revealed"; "off" just shows it.

    Raises ValueError for no tensors, an empty one, more than 64 of a stage, stages that differ in their names, unsigned
    formats and histograms made for other formats; TypeError for anything but tensors and histograms; TraitError for a
    state out of range.
    """

    _esm = es_module("loss_scale_lab")
    _kind = "loss-scale-lab"
    _controls = ("stage", "tensor", "format", "log2_scale", "phase", "guess", "expected")

    _run: ModelRun | None = None

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
        recordings: Mapping[str, Stage | Recorded] | nn.Module | ModelRun | None = None,
        stage: str | tuple[Any, Any] | None = None,
        tensor: str | Callable[[Any, Any], torch.Tensor] | None = None,
        format: FormatLike = "fp16",
        log2_scale: int = 0,
        *,
        phase: str = "off",
        formats: Iterable[FormatLike] | None = None,
        recorded_on: str | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        fmt = get_format(format)
        offered = table_of(formats, _FORMATS)
        offered.setdefault(fmt.name, fmt)
        if isinstance(recordings, nn.Module):
            recordings = _run_of(recordings, stage, tensor, device)
            stage = tensor = None
        self._run = recordings if isinstance(recordings, ModelRun) else None
        if self._run is not None:
            recordings, recorded_on = {_BATCH: self._run.record()}, said_of(self._run.place)
        elif recordings is None:
            recordings, recorded_on = _digits_at_three_stages()
        stages = _by_stage(recordings)
        given = {(s, n): x for s, stage_ in stages.items() for n, x in stage_.items() if isinstance(x, torch.Tensor)}
        tensors = Tensors(given, place_of(device, given.values()) if self._run is None else self._run.place)
        self._stages = _histograms(stages, tensors, offered)
        first = next(iter(self._stages))
        state = {
            "stage": stage if stage is not None else first,
            "tensor": tensor if tensor is not None else next(iter(self._stages[first])),
            "format": fmt.name,
            "log2_scale": log2_scale,
            "phase": phase,
        }
        super().__init__(offered, name, tensors, **state)
        self._only_between_cells = self._run is not None
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
        return cls(ModelRun(model, inputs, targets, loss_fn, device, layers), **options)

    def refresh(self) -> None:
        """Record the model, or count the tensors, as they are now: after a step of training, say."""
        if self._run is not None:
            self._run.park()  # a copy on another device would be that of the older weights
            self._stages = {_BATCH: self._run.record()}
        for stage, name in self._tensors:
            self._stages[stage][name] = _counted(self._tensors.at((stage, name)), self._offered)
        self.recordings = _for_the_page(self._stages, self._offered)

    def _measure(self) -> Measured:
        histogram, key = self._stages[self.stage][self.tensor], (self.stage, self.tensor)
        fmt, shares, place = self._format(self.format), self.shares(), self._tensors.place.type
        if self._run is not None and fmt.name in _AUTOCAST:
            found = self._rerun(fmt)
        elif key in self._tensors:
            counts = cast_counts(self._tensors.at(key), fmt, 2.0**self.log2_scale)
            predicted = (round(share * histogram.total) for share in (shares.flushed, shares.overflowed))
            found = Measured(compared(counts, *predicted), counts.path, counts.total)
        else:
            found = Measured("", f"{place}: exact histogram", histogram.total)
        return replace(found, said="") if self.phase == "predict" else found

    def _rerun(self, fmt: FloatFormat) -> Measured:
        """The gradients of the model under autocast, with the loss times S."""
        here, k = self._stages[self.stage][self.tensor], self.log2_scale
        record = self._run.record(fmt.torch_dtype, k)
        found = record[self.tensor]
        broken = sum(h.infinite + h.nan > 0 for name, h in record.items() if name.endswith(": weights"))
        step = (
            f"{_plural(broken, 'weight gradient')} with inf or NaN: the step is skipped."
            if broken
            else "No weight gradient has inf or NaN: the step is taken."
        )
        dtype = str(fmt.torch_dtype).removeprefix("torch.")
        said = (
            f"Run for real under {dtype} autocast with the loss times 2^{k}: {percent(found.zero / found.total)} of "
            f"this gradient is zero, {percent(here.zero / here.total)} without autocast. {step}"
        )
        return Measured(said, f"{self._run.place.type}: {dtype} autocast", found.total)

    def _park(self) -> None:
        super()._park()
        if self._run is not None:
            self._run.park()

    def _let_go(self) -> None:
        super()._let_go()
        self._run = None

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


def _run_of(model: nn.Module, batch: Any, loss_fn: Any, device: torch.device | str | None) -> ModelRun:
    """The run of ``LossScaleLab(model, (inputs, targets), loss_fn)``; TypeError for anything else."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not callable(loss_fn):
        got = f"{type(batch).__name__} and {type(loss_fn).__name__}"
        raise TypeError(f"expected LossScaleLab(model, (inputs, targets), loss_fn), got {got} after the model")
    return ModelRun(model, *batch, loss_fn, device)


def _by_stage(recordings: Mapping[str, Stage | Recorded]) -> dict[str, dict[str, Recorded]]:
    """What was recorded by stage and name; see ``LossScaleLab`` for what is taken and what is refused."""
    if not isinstance(recordings, Mapping) or not recordings:
        raise ValueError(f"expected a mapping with at least one recording, got {recordings!r}: give stage -> tensors")
    if all(isinstance(value, Recorded) for value in recordings.values()):
        recordings = {"recorded": recordings}
    stages = {name: _stage(name, value) for name, value in recordings.items()}
    first = next(iter(stages))
    for name, stage in stages.items():
        if not 1 <= len(stage) <= MOST_TENSORS:
            raise ValueError(f"expected 1 to {MOST_TENSORS} tensors in {name!r}, got {len(stage)}: choose some layers")
        if list(stage) != list(stages[first]):
            differing = sorted(set(stage) ^ set(stages[first])) or "another order"
            raise ValueError(f"expected the same tensors in {first!r} and {name!r}, they differ in {differing}")
    return stages


def _stage(name: str, stage: Stage) -> dict[str, Recorded]:
    if isinstance(stage, GradientRecord):
        by_kind = {"weights": stage.weights, "activations": stage.activations}
        return {f"{layer}: {kind}": h for kind, layers in by_kind.items() for layer, h in layers.items()}
    if not isinstance(stage, Mapping):
        raise TypeError(f"expected {name!r} to hold tensors or histograms by name, got {type(stage).__name__}")
    for key, value in stage.items():
        if not isinstance(value, Recorded):
            got = type(value).__name__
            raise TypeError(f"expected {key!r} of {name!r} to be a tensor or a MagnitudeHistogram, got {got}")
    return dict(stage)


def _histograms(
    stages: Mapping[str, Mapping[str, Recorded]], tensors: Tensors, formats: Mapping[str, FloatFormat]
) -> dict[str, dict[str, MagnitudeHistogram]]:
    """A histogram for each recording, counted where the exhibit computes."""
    found: dict[str, dict[str, MagnitudeHistogram]] = {stage: {} for stage in stages}
    for stage, recorded in stages.items():
        for name, value in recorded.items():
            key = stage, name
            found[stage][name] = _counted(tensors.at(key), formats) if key in tensors else value
            for fmt in formats.values():
                found[stage][name].shares(fmt)  # says what is wrong: empty, or made for other formats
    return found


def _counted(x: torch.Tensor, formats: Mapping[str, FloatFormat]) -> MagnitudeHistogram:
    return MagnitudeHistogram.of(x.float() if x.dtype == torch.float64 else x, formats=formats.values())


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
        stages[f"after {steps} steps" if steps else "before training"] = named(record, model)
    return stages, said_of(torch.empty(0, device=place).device)
