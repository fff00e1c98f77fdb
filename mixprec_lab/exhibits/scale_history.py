"""The scale history: how delayed, current and fixed scaling follow a tensor whose amax jumps, and what lags cost."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
import traitlets as t

from mixprec_lab.exhibits._base import choice, es_module, table_of
from mixprec_lab.exhibits._casts import cast_counts
from mixprec_lab.exhibits._live import LiveExhibit, Measured, Tensors, place_of
from mixprec_lab.exhibits._text import percent, significant
from mixprec_lab.exhibits.stalling_sum import _mulberry32
from mixprec_lab.fp8 import (
    CurrentScaling,
    DelayedScaling,
    FixedScaling,
    ScalingRun,
    lognormal_shape,
    normal_shape,
    simulate_scaling,
)

RECIPES = ("delayed", "current", "fixed")
HISTORIES = ("1", "4", "16", "64", "256", "1024")
ALGORITHMS = ("max", "most_recent")
STEPS = ("64", "128", "256")
_VALUES = 128  # of a shape: what the page carries
SHAPES = MappingProxyType({"normal": normal_shape(_VALUES), "log-normal": lognormal_shape(_VALUES)})
OWN = "own"
INFINITE = 21  # the height of a jump to infinity
_HIGHEST, _LONGEST, _MOST = 20, 256, 12  # binades and steps of a jump; jumps
_BOUND = 60  # no amax leaves 2**-60 to 2**60, however many jumps overlap
# The traits that a run depends on; moving along its steps computes nothing again.
_OF_THE_RUN = (
    "recipe", "history", "algorithm", "margin", "format", "shape", "steps", "level", "drift", "noise", "seed", "jumps",
)  # fmt: skip
_JUMP = r"\d{1,3}:(?:0|-?[1-9]\d?):\d{1,3}"
_JUMPS = re.compile(rf"(?:{_JUMP}(?:,{_JUMP})*)?", re.ASCII)

Jump = tuple[int, int, int]  #: first step, height in binades (21: inf), length in steps
_Origin = tuple[int | None, int | None]  # the step whose amax made the scale, the infinity that froze it


class ScaleHistory(LiveExhibit):
    """One tensor over many steps, its amax, and the largest value that fits at the scale an FP8 recipe gives it.

    The amax of the ``steps`` steps is about ``2**level`` (-20 to 8); it drifts by ``drift`` binades (-16 to 16) over
    the run, jitters by about ``noise`` (0 to 8) quarters of a binade, seeded by ``seed`` (0 to 20), and is multiplied
    by ``2**height`` during each of the ``jumps`` (first step, height -20 to 20 or 21 for infinity, length 1 to 256).
    The tensor is the amax times 128 values of the ``shape`` "normal" or "log-normal".  ``recipe`` is "delayed",
    "current" or "fixed" at 1; ``history``, ``algorithm`` and ``margin`` (-2 to 6) are those of ``DelayedScaling``.
    ``step`` is the step that is described in words; ``height`` and ``length`` are those of the next jump.  TraitError
    for anything else.

    ``tensor`` adds the shape "own": 128 quantiles of your tensor (finite, not all zero), divided by its amax.  In a
    live notebook the kernel casts all of its values, on ``device`` (see ``place_of``), with the amax and the scale of
    the chosen step.
    """

    _esm = es_module("scale_history")
    _kind = "scale-history"
    _controls = (*_OF_THE_RUN, "step", "height", "length")
    _last: tuple[tuple, ScalingRun] | None = None

    data = t.Dict(help="what the lists offer, and the values of the shapes").tag(sync=True)
    recipe = t.Unicode("delayed").tag(sync=True)
    history = t.Unicode("16").tag(sync=True)
    algorithm = t.Unicode("max").tag(sync=True)
    margin = t.Int(0, min=-2, max=6).tag(sync=True)
    format = t.Unicode("fp8_e4m3").tag(sync=True)
    shape = t.Unicode("log-normal").tag(sync=True)
    steps = t.Unicode("128").tag(sync=True)
    level = t.Int(-8, min=-20, max=8).tag(sync=True)
    drift = t.Int(0, min=-16, max=16).tag(sync=True)
    noise = t.Int(0, min=0, max=8).tag(sync=True)
    seed = t.Int(0, min=0, max=20).tag(sync=True)
    jumps = t.Unicode("24:5:20,76:12:1").tag(sync=True)
    step = t.Int(77, min=0, max=int(STEPS[-1]) - 1).tag(sync=True)
    height = t.Int(8, min=-_HIGHEST, max=INFINITE).tag(sync=True)
    length = t.Int(1, min=1, max=_LONGEST).tag(sync=True)

    def __init__(
        self,
        jumps: str | Iterable[Jump] | None = None,
        *,
        tensor: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
        **state: Any,
    ) -> None:
        if jumps is not None:
            state["jumps"] = jumps if isinstance(jumps, str) else _written(jumps)
        given = {} if tensor is None else {OWN: _checked(tensor)}
        held = Tensors(given, place_of(device, given.values()))
        self._shapes = dict(SHAPES) | ({OWN: _quantiles(held.at(OWN))} if given else {})
        if given:
            state.setdefault("shape", OWN)
        super().__init__(table_of(["fp8_e4m3", "fp8_e5m2"]), name, held, **state)
        self.data = {
            "recipes": RECIPES,
            "histories": HISTORIES,
            "algorithms": ALGORITHMS,
            "steps": STEPS,
            "shapes": {key: values.tolist() for key, values in self._shapes.items()},
        }

    _check_recipe = t.validate("recipe")(choice("recipe", lambda self: RECIPES))
    _check_history = t.validate("history")(choice("history", lambda self: HISTORIES))
    _check_algorithm = t.validate("algorithm")(choice("algorithm", lambda self: ALGORITHMS))
    _check_format = t.validate("format")(choice("format", lambda self: self._offered))
    _check_shape = t.validate("shape")(choice("shape", lambda self: self._shapes))
    _check_steps = t.validate("steps")(choice("steps", lambda self: STEPS))

    @t.validate("jumps")
    def _check_jumps(self, proposal: Any) -> str:
        jumps = _read(proposal.value) if _JUMPS.fullmatch(proposal.value) else None
        starts = [start for start, _, _ in jumps or ()]
        fine = jumps is not None and len(jumps) <= _MOST and starts == sorted(set(starts))
        if not fine or not all(
            start < int(STEPS[-1]) and -_HIGHEST <= height <= INFINITE and 1 <= length <= _LONGEST
            for start, height, length in jumps
        ):
            raise t.TraitError(
                f"expected at most {_MOST} jumps 'step:height:length', separated by commas, in the order of their "
                f"steps (height -{_HIGHEST} to {_HIGHEST}, or {INFINITE} for inf, length 1 to {_LONGEST}), "
                f"got {proposal.value!r}"
            )
        return proposal.value

    def stream(self) -> list[float]:
        """The amax of every step, float32 values.

        Its log2 is linear within a binade instead of logarithmic, which makes page and Python agree to the last bit.
        """
        steps, draws, amaxes = int(self.steps), _mulberry32(self.seed), []
        for step, lift in enumerate(_lifts(_read(self.jumps), steps)):
            jitter = sum(islice(draws, 4)) - 2
            log2 = self.level + self.drift * step / steps + self.noise * jitter / 4 + lift
            log2 = min(max(log2, -_BOUND), _BOUND)
            binade = math.floor(log2)
            amaxes.append(2.0**binade * (1 + (log2 - binade)) if lift < math.inf else math.inf)
        return torch.tensor(amaxes, dtype=torch.float32).tolist()

    def rule(self) -> DelayedScaling | CurrentScaling | FixedScaling:
        """The recipe of the library that the present state names."""
        fp8_format = self.format.removeprefix("fp8_")
        if self.recipe == "delayed":
            return DelayedScaling(self.margin, int(self.history), self.algorithm, fp8_format)
        return CurrentScaling(fp8_format) if self.recipe == "current" else FixedScaling(fp8_format)

    def run(self) -> ScalingRun:
        """What the recipe does to the tensor, step by step."""
        asked = tuple(getattr(self, key) for key in _OF_THE_RUN)
        if self._last is None or self._last[0] != asked:
            self._last = asked, simulate_scaling(self.rule(), self.stream(), shape=self._shapes[self.shape])
        return self._last[1]

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        run, at, largest = self.run(), min(self.step, int(self.steps) - 1), self._format(self.format).largest
        origin = (None, None)
        if self.recipe == "delayed":
            length = int(self.history) if self.algorithm == "max" else 1
            origin = next(islice(_origins(run.amax, length), at, None))
        texts = {"jumps": self._jump_text(), "rule": self._rule_text(largest), "verdict": _verdict(run)}
        texts["at"] = f"Step {at}: {_fit(run.amax[at], largest / run.scale[at])}."
        texts["now-origin"] = self._origin_text(run.amax[at], *origin)
        return texts | _now(run, at, largest) | _extremes(run)

    def _measure(self) -> Measured:
        run, at, place = self.run(), min(self.step, int(self.steps) - 1), self._tensors.place
        fmt, amax = self._format(self.format), run.amax[at]
        if not math.isfinite(amax):
            return Measured(f"Step {at}: nothing is cast at an infinite amax.", f"{place.type}: no cast", 0)
        shape = self._tensors.at(OWN).float() if self.shape == OWN else self._shapes[self.shape].to(place)
        lowest, highest = torch.aminmax(shape)
        own = float(torch.maximum(-lowest, highest))
        found = cast_counts((shape.double() * (amax / own)).float(), fmt, run.scale[at])
        becomes = f" (the first becomes {found.becomes})" if found.becomes else ""
        whose = f"your {found.total}" if self.shape == OWN else f"the {found.total}"
        said = (
            f"Step {at}, cast for real: of {whose} values {found.overflowed} clip{becomes} and {found.flushed} become "
            f"zero."
        )
        return Measured(said, found.path, found.total)

    def _rule_text(self, largest: float) -> str:
        top = f"scale = {significant(largest, 5)}"
        if self.recipe == "current":
            return f"{top} / amax of this step"
        if self.recipe == "fixed":
            return "scale = 1"
        source = "of the step before"
        if self.algorithm == "max" and self.history != "1":
            source = f"the largest of the {self.history} steps before"
        margin = f" / 2^{self.margin}" if self.margin else ""
        return f"{top}{margin} / amax, {source}"

    def _origin_text(self, amax: float, source: int | None, frozen: int | None) -> str:
        if self.recipe == "fixed":
            return "fixed at 1"
        if self.recipe == "current":
            return "its own amax" if amax < math.inf else "none: 1 for an infinite amax"
        kept = "" if frozen is None else f", kept because of the infinity at step {frozen}"
        return f"{'1, where it starts' if source is None else f'amax of step {source}'}{kept}"

    def _jump_text(self) -> str:
        jumps = [
            f"step {start} (x {'inf' if height == INFINITE else f'2^{height}'}, {_plural(length, 'step')})"
            for start, height, length in _read(self.jumps)
        ]
        full = " No more fit." if len(jumps) == _MOST else ""
        return f"Jumps: {', '.join(jumps)}.{full}" if jumps else "No jump yet."


def _checked(x: torch.Tensor) -> torch.Tensor:
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        raise TypeError(f"expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return x


def _quantiles(x: torch.Tensor) -> torch.Tensor:
    """128 of the values in order, the largest magnitude among them, divided by that; float64 on the CPU."""
    values = x.detach().float().flatten()
    if not values.numel() or not bool(values.isfinite().all()) or not bool(values.any()):
        raise ValueError("expected finite values that are not all zero, got none, NaN, infinity or only zeros")
    ordered = values.sort().values
    at = ((torch.arange(_VALUES, dtype=torch.float64) + 0.5) / _VALUES * len(ordered)).long().to(x.device)
    low, high = ordered[0], ordered[-1]
    picked = ordered[at]
    picked[0 if -low > high else -1] = low if -low > high else high
    return (picked.double() / picked.double().abs().max()).cpu()


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _written(jumps: Iterable[Jump]) -> str:
    return ",".join(":".join(map(str, jump)) for jump in sorted(jumps))


def _read(text: str) -> list[Jump]:
    return [tuple(map(int, jump.split(":"))) for jump in text.split(",")] if text else []


def _lifts(jumps: Iterable[Jump], steps: int) -> list[float]:
    """The binades by which the jumps raise every step."""
    lifts = [0.0] * steps
    for start, height, length in jumps:
        for step in range(start, min(start + length, steps)):
            lifts[step] += math.inf if height == INFINITE else height
    return lifts


def _origins(amaxes: Sequence[float], length: int) -> Iterator[_Origin]:
    """For each step the one whose amax made its delayed scale, and the infinity in the history that keeps it since."""
    source: int | None = None
    for step in range(len(amaxes)):
        window = range(step - 1, max(step - length, 0) - 1, -1)
        latest = max(window, key=lambda i: amaxes[i], default=None)  # the last of equals
        frozen = latest if latest is not None and math.isinf(amaxes[latest]) else None
        source = source if frozen is not None else latest
        yield source, frozen


def _tenths(v: float) -> Decimal:
    """Rounded to tenths, halves away from zero: log2 and sums in another order differ far behind that."""
    return Decimal(v).quantize(Decimal("0.1"), rounding=ROUND_HALF_UP) + 0  # no -0


def _decibels(v: float) -> str:
    return f"{_tenths(v)} dB" if math.isfinite(v) else "\u2014"


def _size_text(v: float) -> str:
    """``2^-8``, ``448`` or, far from 1, ``1.048 x 2^-24``."""
    fraction, exponent = math.frexp(v)
    if fraction == 0.5 and v != 1:
        return f"2^{exponent - 1}"
    return significant(v, 4) if 1e-4 <= v < 1e4 else f"{significant(2 * fraction, 4)} x 2^{exponent - 1}"


def _fit(amax: float, limit: float) -> str:
    if math.isinf(amax):
        return "the tensor holds an infinity, which saturates"
    room = _tenths(math.log2(amax / limit))
    if room == 0:
        return "the amax is the largest value that fits"
    where, cost = ("above", "what is above saturates") if room > 0 else ("below", "the low end loses as much range")
    return f"the amax is {abs(room)} binades {where} the largest value that fits: {cost}"


def _now(run: ScalingRun, at: int, largest: float) -> dict[str, str]:
    """What the table says of the chosen step."""
    return {
        "now-amax": _size_text(run.amax[at]) if run.amax[at] < math.inf else "inf",
        "now-scale": _size_text(run.scale[at]),
        "now-limit": _size_text(largest / run.scale[at]),
        "now-clipped": percent(run.clipped[at]),
        "now-flushed": percent(run.flushed[at]),
        "now-sqnr": _decibels(run.sqnr_db[at]),
    }


def _extremes(run: ScalingRun) -> dict[str, str]:
    """What the table says of the whole run."""
    low = _lowest(run.sqnr_db)
    return {
        "clipped": _worst(run.clipped),
        "flushed": _worst(run.flushed),
        "sqnr": "\u2014" if low is None else f"{_decibels(run.sqnr_db[low])}, step {low}",
    }


def _worst(shares: Sequence[float]) -> str:
    top = max(shares)
    return f"{percent(top)}, step {shares.index(top)}" if top else "0 %"


def _lowest(sqnr: Sequence[float]) -> int | None:
    """The first step of the lowest SQNR, to a tenth of a decibel: sums in another order must not choose the step."""
    known = {step: _tenths(v) for step, v in enumerate(sqnr) if math.isfinite(v)}
    return min(known, key=known.__getitem__, default=None)


def _verdict(run: ScalingRun) -> str:
    steps, known = len(run.amax), [v for v in run.sqnr_db if math.isfinite(v)]
    clipping, flushing = (sum(share > 0 for share in shares) for shares in (run.clipped, run.flushed))
    mean = _decibels(sum(known) / len(known)) if known else "\u2014"
    left = "" if len(known) == steps else f", without {_plural(steps - len(known), 'step')} with an infinity"
    return (
        f"Of {_plural(steps, 'step')} {clipping} clip values and {flushing} flush some to zero. "
        f"The mean SQNR is {mean}{left}."
    )
