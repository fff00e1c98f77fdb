"""The lost-update map: which updates a weight of each size notices, and 200 steps of one weight."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch
import traitlets as t
from torch import nn

from mixprec_lab.exhibits._base import choice, es_module, read_number, table_of
from mixprec_lab.exhibits._live import LiveExhibit, Measured, Tensors, place_of
from mixprec_lab.exhibits._text import percent, power_form, shortest, significant
from mixprec_lab.exhibits.stalling_sum import _mulberry32
from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.master_weights import UPDATE_METHODS, simulate_weight, unchanged
from mixprec_lab.rounding import quantize, ulp

STEPS = 200
WEIGHTS = range(-20, 4)
#: The rows of the map, as text: 1, 2, 5 in every decade.
RATES = (*(f"{digit}e-{decade}" for decade in range(8, 1, -1) for digit in (1, 2, 5)), "1e-1")
PLACES = ("first", "middle", "last")
DIRECTIONS = ("away", "toward")
MEASURES = ("lost", "unmoved")
_DEFAULT = ("fp16", "bf16", "fp8_e5m2", "fp8_e4m3")


class LostUpdateMap(LiveExhibit):
    """The plane of ``|w|`` and learning rate in one format, and ``STEPS`` equal updates of the weight chosen in it.

    The update is the learning rate itself, as FP32: the normalised step of Adam has a size near 1.  A cell counts every
    value of the format in ``[2**weight, 2 * 2**weight)`` once in both directions; ``shows`` says what is counted:

    - ``lost``: however often the update comes, the state stays as it is: the weight, with ``kahan`` the
      compensation beside it once it has stopped growing, with ``fp32_master`` the master.  ``stochastic`` loses nothing
      on average.
    - ``unmoved``: the weight that the model sees is the same after one update; for ``stochastic`` the chance of that.

    ``method`` is one of ``mixprec_lab.master_weights.UPDATE_METHODS``; ``rate`` one of ``RATES``, as text or number;
    the weight that is followed is the ``place`` (first, middle, last) of its binade and goes in ``direction`` (away
    from zero or toward it); ``seed`` (0 to 20) feeds stochastic rounding by the generator that page and Python share.

    ``weights`` are your own (a model, a tensor, or tensors by name).  In a live notebook the kernel counts, on
    ``device`` (see ``place_of``), how many of them lose the chosen update.

    TraitError for anything else; ValueError for formats that saturate (FP6, FP4: at the top nothing could move), have
    no sign, or more than 10 mantissa bits (too many weights in a binade to count one by one).
    """

    _esm = es_module("lost_update_map")
    _kind = "lost-update-map"
    _controls = ("format", "method", "weight", "rate", "place", "direction", "shows", "seed")

    format = t.Unicode("bf16").tag(sync=True)
    method = t.Unicode("nearest").tag(sync=True)
    weight = t.Int(0, min=WEIGHTS.start, max=WEIGHTS.stop - 1).tag(sync=True)
    rate = t.Unicode("1e-3").tag(sync=True)
    place = t.Unicode("first").tag(sync=True)
    direction = t.Unicode("away").tag(sync=True)
    shows = t.Unicode("lost").tag(sync=True)
    seed = t.Int(0, min=0, max=20).tag(sync=True)

    def __init__(
        self,
        format: FormatLike = "bf16",
        method: str = "nearest",
        weight: int = 0,
        rate: str | float = "1e-3",
        *,
        place: str = "first",
        direction: str = "away",
        shows: str = "lost",
        seed: int = 0,
        formats: Iterable[FormatLike] | None = None,
        weights: torch.Tensor | nn.Module | Mapping[str, torch.Tensor] | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        fmt = get_format(format)
        offered = table_of(formats, _DEFAULT) | {fmt.name: fmt}
        if unfit := [f.title for f in offered.values() if not _countable(f)]:
            raise ValueError(
                f"expected formats with a sign, 1 to 10 mantissa bits and an overflow of their own, got "
                f"{', '.join(unfit)}: choose among fp16, bf16, tf32 and the FP8 formats"
            )
        state = {"format": fmt.name, "method": method, "weight": weight, "rate": _as_rate(rate), "place": place}
        given = _given(weights)
        self._counted: dict[str, tuple[list[int | None], torch.Tensor, torch.Tensor]] = {}
        held = Tensors(given, place_of(device, given.values()))
        super().__init__(offered, name, held, **state, direction=direction, shows=shows, seed=seed)

    _check_format = t.validate("format")(choice("format", lambda self: self._offered))
    _check_method = t.validate("method")(choice("method", lambda self: UPDATE_METHODS))
    _check_rate = t.validate("rate")(choice("rate", lambda self: RATES))
    _check_place = t.validate("place")(choice("place", lambda self: PLACES))
    _check_direction = t.validate("direction")(choice("direction", lambda self: DIRECTIONS))
    _check_shows = t.validate("shows")(choice("shows", lambda self: MEASURES))

    def shares(self, weight: int, shows: str, rates: Sequence[str] = RATES) -> torch.Tensor:
        """One column of the map, float64: the share, 0 to 1, for each rate; NaN where the format has no such weight."""
        fmt, values = self._format(self.format), self._values(weight)
        if values.numel() == 0:
            return torch.full((len(rates),), math.nan, dtype=torch.float64)
        updates = torch.tensor([_update(rate) for rate in rates], dtype=torch.float64)
        if self.method == "stochastic":
            return torch.zeros_like(updates) if shows == "lost" else _chance_unmoved(values, updates, fmt)
        both = torch.stack([updates, -updates], dim=1)[..., None]
        if shows == "lost":
            same = self._lost(values, both)
        else:
            same = simulate_weight(values, both, 1, fmt, self.method)[..., 1] == values
        return same.double().mean(dim=(1, 2))

    def grid(self) -> torch.Tensor:
        """What the map draws, float64: the shares, a row for each of ``RATES``, a column for each of ``WEIGHTS``."""
        return torch.stack([self.shares(weight, self.shows) for weight in WEIGHTS], dim=1)

    def path(self) -> torch.Tensor:
        """The followed weight before and after each update, float64, shape (STEPS + 1,); empty if there is none."""
        values = self._values(self.weight)
        if values.numel() == 0:
            return values
        at = {"first": 0, "middle": len(values) // 2, "last": len(values) - 1}[self.place]
        draws = None
        if self.method == "stochastic":
            draws = torch.tensor(list(islice(_mulberry32(self.seed), STEPS)), dtype=torch.float64)
        update = self._sign() * _update(self.rate)
        return simulate_weight(values[at], update, STEPS, self._format(self.format), self.method, draws=draws)

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        path, fmt, update = self.path(), self._format(self.format), _update(self.rate)
        lost, unmoved = (percent(float(self.shares(self.weight, shows, [self.rate]))) for shows in MEASURES)
        texts = dict.fromkeys(("start", "gap", "end", "update", "exact"), "\u2014")
        if path.numel():
            gap = float(_gap_beside(path[:1], self.direction, fmt))
            texts = {
                "start": significant(float(path[0]), 7),
                "gap": power_form(gap),
                "end": significant(float(path[-1]), 7),
                "update": f"{significant(update / gap, 3)} gaps",
                "exact": significant(float(path[0]) + self._sign() * STEPS * update, 7),
            }
            lost += " on average" if self.method == "stochastic" else " for good"
            unmoved += " by one update"
        verdict = self._verdict(path, fmt) if path.numel() else _no_such_weight(fmt)
        return {"verdict": verdict, "lost": lost, "unmoved": unmoved, **texts, "bytes": _bytes(fmt, self.method)}

    def _measure(self) -> Measured:
        fmt, place = self._format(self.format), self._tensors.place.type
        if not list(self._tensors):
            return Measured("", f"{place}: emulated {fmt.title}", 0)
        values, counts = self._occupied(fmt)
        update = torch.where(values < 0, -1.0, 1.0) * (self._sign() * _update(self.rate))
        total, path = int(counts.sum()), f"{place}: exact histogram of {fmt.title} weights"
        if self.method == "stochastic":
            return Measured(f"Of your {total} weights, none loses an update on average.", path, total)
        lost = int(counts[self._lost(values, update)].sum())
        way = "away from zero" if self.direction == "away" else "toward zero"
        said = (
            f"Of your {total} weights in {fmt.title}, {lost} ({percent(lost / total)}) lose every update of {self.rate}"
        )
        return Measured(f"{said} {way}.", path, total)

    def _occupied(self, fmt: FloatFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of the format among the weights, float64, and how often each occurs; kept until one changes."""
        versions, known = self._tensors.versions(), self._counted.get(fmt.name)
        if known is None or known[0] != versions or None in versions:
            parts = [_tally(self._tensors.at(key), fmt) for key in self._tensors]
            values, index = torch.cat([v for v, _ in parts]).unique(return_inverse=True)
            counts = torch.zeros_like(values, dtype=torch.int64).index_add_(0, index, torch.cat([n for _, n in parts]))
            known = self._counted[fmt.name] = versions, values, counts
        return known[1:]

    def _park(self) -> None:
        super()._park()
        self._counted.clear()

    def _let_go(self) -> None:
        super()._let_go()
        self._counted = {}

    def _sign(self) -> int:
        return 1 if self.direction == "away" else -1

    def _values(self, weight: int) -> torch.Tensor:
        """The values of the format in one binade, in order, float64."""
        fmt, low = self._format(self.format), 2.0**weight
        if not fmt.smallest <= low <= fmt.largest:
            return torch.empty(0, dtype=torch.float64)
        gap = float(ulp(torch.tensor(low, dtype=torch.float64), fmt))
        return torch.arange(low, min(2 * low, fmt.largest + gap), gap, dtype=torch.float64)

    def _lost(self, values: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Whether equal updates leave the state of each weight for ever as it is."""
        fmt = self._format(self.format)
        if self.method == "fp32_master":
            return unchanged(values, update, "fp32")
        if self.method == "kahan":
            update = update + stalled_compensation(update.abs(), fmt).copysign(update)
        return unchanged(values, update, fmt)

    def _verdict(self, path: torch.Tensor, fmt: FloatFormat) -> str:
        start, end, step = float(path[0]), float(path[-1]), self._sign() * _update(self.rate)
        at = significant(end, 7)
        if not math.isfinite(end):
            return f"The weight leaves the range of {fmt.title} after {int(path.isfinite().sum())} updates."
        if bool((path == start).all()):
            return self._standstill(path, fmt, at)
        if self.method == "nearest" and bool(unchanged(path[-1:], torch.tensor([step], dtype=torch.float64), fmt)):
            return f"Moves to {at} in {int((path != end).sum())} updates and stalls there."
        way = significant(100 * (end - start) / (STEPS * step), 4)
        return f"Moves to {at}: {way} % of the way that {STEPS} exact updates go."

    def _standstill(self, path: torch.Tensor, fmt: FloatFormat, at: str) -> str:
        update = torch.tensor([self._sign() * _update(self.rate)], dtype=torch.float64)
        if self.method == "stochastic":
            chance = percent(_update(self.rate) / float(_gap_beside(path[:1], self.direction, fmt)))
            return f"Not moved yet, and nothing is lost: every update moves the weight with a chance of {chance}."
        if bool(self._lost(path[:1], update)):
            return f"Lost: the weight stays at {at}, however often an update of {self.rate} comes."
        holder = "the compensation" if self.method == "kahan" else "the FP32 master"
        return f"Not moved yet, and nothing is lost: {holder} holds what is missing."


def _given(weights: torch.Tensor | nn.Module | Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The weights by name; TypeError for what is not floating-point, ValueError for none."""
    if weights is None:
        return {}
    if isinstance(weights, nn.Module):
        weights = dict(weights.named_parameters())
    if not isinstance(weights, torch.Tensor | Mapping):
        raise TypeError(f"expected a model, a tensor, or tensors by name, got {type(weights).__name__}")
    found = {"weights": weights} if isinstance(weights, torch.Tensor) else dict(weights)
    for key, x in found.items():
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"expected {key!r} to be a floating-point tensor, got {got}")
    if not sum(x.numel() for x in found.values()):
        raise ValueError("expected at least one weight, got none")
    return found


def _tally(x: torch.Tensor, fmt: FloatFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that ``x`` takes in the format and how often, on its device, without sorting where torch has codes."""
    x = x.detach().reshape(-1)
    stored = quantize(x if x.dtype == torch.float64 else x.float(), fmt, overflow="native")
    if not bool(stored.isfinite().all()):
        raise ValueError(f"expected weights that are finite in {fmt.title}, got NaN, infinity or an overflow")
    dtype = fmt.torch_dtype
    if dtype is None:
        return stored.double().unique(return_counts=True)
    codes = stored.to(dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int8).int() & (1 << fmt.bits) - 1
    counts = torch.bincount(codes, minlength=1 << fmt.bits)
    occupied = counts.nonzero().flatten()
    narrow = occupied.to(torch.int32).to(torch.int16 if dtype.itemsize == 2 else torch.int8)
    return narrow.view(dtype).double(), counts[occupied]


def stalled_compensation(updates: torch.Tensor, fmt: FormatLike) -> torch.Tensor:
    """Where the compensation of an unmoved weight ends when updates of these sizes (> 0) keep coming, float64.

    It grows by rounded additions until an update is at most half of its own gap: at the first power of two whose
    binade has gaps of twice the update or more.  An update that rounds to 0 leaves it at 0.
    """
    fmt = get_format(fmt)
    mantissa, exponent = torch.frexp(updates.double())
    power = exponent - (mantissa == 0.5).int() + fmt.mantissa_bits + 1
    return torch.ldexp(torch.ones_like(mantissa), power).masked_fill_(updates <= fmt.smallest / 2, 0.0)


def _chance_unmoved(values: torch.Tensor, updates: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    """The chance, over all values and both directions, that stochastic rounding takes an update back."""
    gaps, counts = torch.cat([_gap_beside(values, side, fmt) for side in DIRECTIONS]).unique(return_counts=True)
    return ((1 - updates[:, None] / gaps).clamp_(min=0) * counts).sum(dim=1) / counts.sum()


def _countable(fmt: FloatFormat) -> bool:
    return fmt.signed and fmt.specials != "none" and 1 <= fmt.mantissa_bits <= 10


def _as_rate(rate: str | float) -> str:
    """The row of the map that a text or number names; anything else unchanged, to be refused by the trait."""
    text = rate if isinstance(rate, str) else shortest(rate)
    value = read_number(text)
    return next((row for row in RATES if float(row) == value), text)


def _update(rate: str) -> float:
    """The size of the update: the learning rate as FP32."""
    return float(torch.tensor(float(rate), dtype=torch.float32))


def _gap_beside(values: torch.Tensor, side: str, fmt: FloatFormat) -> torch.Tensor:
    """The distance of positive values of the format to their neighbours away from zero or toward it."""
    gap = ulp(values, fmt)
    if side == "away":
        return gap
    lowest_of_binade = (torch.frexp(values).mantissa == 0.5) & (values > fmt.smallest_normal)
    return torch.where(lowest_of_binade, gap / 2, gap)


def _no_such_weight(fmt: FloatFormat) -> str:
    ends = f"{power_form(fmt.smallest)} to {significant(fmt.largest, 6)}"
    return f"{fmt.title} has no weight of this size: its values reach from {ends}."


def _bytes(fmt: FloatFormat, method: str) -> str:
    """Bytes that a weight costs: itself, and what the method keeps beside it."""
    own = fmt.storage_bits / 8
    more = {"kahan": own, "fp32_master": 4.0}.get(method, 0.0)
    return f"{own + more:g} ({own:g} + {more:g})" if more else f"{own:g}"
