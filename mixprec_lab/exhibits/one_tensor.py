"""One tensor, every scheme: a tensor with outliers in every block scheme side by side, and a map of the errors."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import traitlets as t

from mixprec_lab.block_scaling import SCHEMES, BlockReport, BlockScheme, SchemeLike, block_report, get_scheme
from mixprec_lab.block_scaling import quantize_blocks as round_trip
from mixprec_lab.exhibits._base import choice, es_module
from mixprec_lab.exhibits._live import LiveExhibit, Measured, Tensors, place_of
from mixprec_lab.exhibits._text import error_text, percent, significant
from mixprec_lab.formats import FloatFormat

ROWS, COLUMNS = 32, 256
LARGEST = 1 << 13  #: elements of a tensor that the page carries
DISTRIBUTIONS = {"normal": "normal", "student": "Student's t, 2 degrees of freedom", "wide": "wide: log2 |x| normal"}
OWN = "own"
PLACES = {"scattered": "scattered", "channels": "in channels (columns)", "tokens": "in tokens (rows)"}
RULES = {"floor": "floor (OCP)", "round_up": "round up", "even": "round, then floor"}
AXES = {"rows": "along rows", "columns": "along columns"}
_SEEDS = {"normal": 1, "student": 2, "wide": 3}
_PLACE_SEED = 4


class OneTensorEveryScheme(LiveExhibit):
    """A 32 x 256 tensor in every scheme: errors, what is flushed or saturates, bits per value, and a map of the errors.

    ``distribution`` names the ordinary values; about one in ``2**frequency`` (4 to 12) of them is multiplied by
    ``10**outlier`` (0 to 6; None: 3, and 0 for a tensor of your own), ``place`` says which.  ``rule`` is the scale rule
    of the MX schemes, ``axis`` the direction of one-dimensional blocks, ``scheme`` the one that the map shows.
    ``schemes`` are those that are offered (names or ``BlockScheme``; None: all of ``SCHEMES``).  ``tensor`` adds one of
    your own: two dimensions of 2 or more, finite, taken in FP32.  Of one with more than 8,192 values the page carries
    the first 32 rows and 256 columns.  In a live notebook the kernel answers on ``device`` (see ``place_of``), and puts
    the whole of your tensor through the scheme that is shown.

    Everything is drawn with the small generator that page and Python share, and with arithmetic that is exact or
    correctly rounded, so that both hold the same bits.  Raises TypeError or ValueError for another tensor, ValueError
    for no schemes, KeyError for an unknown one, TraitError for a state out of range.
    """

    _esm = es_module("one_tensor")
    _kind = "one-tensor"
    _controls = ("distribution", "outlier", "frequency", "place", "rule", "axis", "scheme")

    schemes = t.Dict(help="name -> the scheme, for the page").tag(sync=True)
    own = t.Dict(help="rows, columns and values of a tensor that was given").tag(sync=True)
    distribution = t.Unicode("normal").tag(sync=True)
    outlier = t.Int(3, min=0, max=6).tag(sync=True)
    frequency = t.Int(8, min=4, max=12).tag(sync=True)
    place = t.Unicode("scattered").tag(sync=True)
    rule = t.Unicode("floor").tag(sync=True)
    axis = t.Unicode("rows").tag(sync=True)
    scheme = t.Unicode("mxfp8").tag(sync=True)

    def __init__(
        self,
        distribution: str | None = None,
        outlier: int | None = None,
        frequency: int = 8,
        place: str = "scattered",
        *,
        rule: str = "floor",
        axis: str = "rows",
        scheme: str | None = None,
        schemes: Iterable[SchemeLike] | None = None,
        tensor: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        chosen = [get_scheme(s) for s in (SCHEMES if schemes is None else schemes)]
        if not chosen:
            raise ValueError("expected at least one scheme, got none")
        self._schemes = {s.name: s for s in chosen}
        held = Tensors(*_held(tensor, device))
        self._own = None if tensor is None else _corner(held.at(OWN))
        first = scheme or ("mxfp8" if "mxfp8" in self._schemes else chosen[0].name)
        state = {
            "distribution": distribution or ("normal" if tensor is None else OWN),
            "outlier": (3 if tensor is None else 0) if outlier is None else outlier,
            "frequency": frequency, "place": place, "rule": rule, "axis": axis, "scheme": first,
        }  # fmt: skip
        formats = {f.name: f for s in chosen for f in (s.element, s.scale)}
        super().__init__(formats, name, held, **state)
        self.schemes = {key: _described(s) | {"rank": i} for i, (key, s) in enumerate(self._schemes.items())}
        if self._own is not None:
            rows, columns = self._own.shape
            self.own = {"rows": rows, "columns": columns, "values": self._own.flatten().double().tolist()}
            if tensor.shape != self._own.shape:
                self.own |= {"of": list(tensor.shape)}

    _check_place = t.validate("place")(choice("place", lambda self: PLACES))
    _check_rule = t.validate("rule")(choice("rule", lambda self: RULES))
    _check_axis = t.validate("axis")(choice("axis", lambda self: AXES))
    _check_scheme = t.validate("scheme")(choice("scheme", lambda self: self._schemes))
    _check_distribution = t.validate("distribution")(
        choice("distribution", lambda self: [*DISTRIBUTIONS, *([OWN] if self._own is not None else [])])
    )

    def tensor(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor that is quantized, float32, and which of its elements are outliers."""
        x = self._own if self.distribution == OWN else torch.from_numpy(_drawn(self.distribution)).view(ROWS, COLUMNS)
        hit = _places(self.place, self.frequency, *x.shape)
        # The product is exact in float64, so that the page rounds it once, as this does.
        return torch.where(hit, (x.double() * 10.0**self.outlier).float(), x), hit

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        return self._texts(*self.tensor())

    def _measure(self) -> Measured:
        place, shown = self._tensors.place, self._with_rule(self._schemes[self.scheme])
        x, hit = self.tensor()
        texts, said, count = self._texts(x.to(place), hit.to(place)), "", x.numel()
        if self.distribution == OWN and "of" in self.own:
            whole = self._tensors.at(OWN).float()
            back = round_trip(whole, shown, self._axis())
            lost = torch.count_nonzero(whole) - torch.count_nonzero(back)
            noise = float((back - whole).norm() / whole.norm())
            count = whole.numel()
            said = (
                f"All {whole.shape[0]} x {whole.shape[1]} values of your tensor, as they are, in {shown.title}: SQNR "
                f"{decibels(noise)} dB, {int(lost)} flushed to zero."
            )
        return Measured(said, f"{place.type}: emulated {shown.element.title}", count, texts)

    def _axis(self) -> int:
        return -1 if self.axis == "rows" else 0

    def _texts(self, x: torch.Tensor, hit: torch.Tensor) -> dict[str, str]:
        axis, texts, ordinary = self._axis(), {}, {}
        for key, scheme in self._schemes.items():
            scheme = self._with_rule(scheme)
            whole, rest = block_report(x, scheme, axis), block_report(x, scheme, axis, where=~hit)
            ordinary[key] = rest
            texts |= {
                f"{key}-error": error_text(rest.relative_rms),
                f"{key}-sqnr": decibels(whole.relative_rms),
                f"{key}-flushed": percent(whole.flushed),
                f"{key}-saturated": percent(whole.saturated),
                f"{key}-bits": significant(whole.bits_per_value, 4),
            }
        return texts | {"verdict": self._verdict(x, ordinary), "summary": self._summary(x, hit)}

    def _with_rule(self, scheme: BlockScheme) -> BlockScheme:
        return replace(scheme, rule=self.rule) if scheme.scale.name == "e8m0" else scheme

    def _verdict(self, x: torch.Tensor, ordinary: dict[str, BlockReport]) -> str:
        shown = ordinary[self.scheme]
        best = min(ordinary, key=lambda key: ordinary[key].relative_rms)
        error, least = shown.relative_rms, ordinary[best].relative_rms
        told = f"{shown.scheme.title} rounds the ordinary values with an error of {error_text(error)}"
        if error == least:
            told += ", the least of all schemes."
        else:
            told += f"; the least is {error_text(least)}, in {ordinary[best].scheme.title}."
        if shown.flushed:
            told += f" It flushes {percent(shown.flushed)} of them to zero."
        return f"{told} {self._turned(x)}"

    def _turned(self, x: torch.Tensor) -> str:
        """How many values depend on the direction of the blocks."""
        scheme = self._with_rule(self._schemes[self.scheme])
        moved = float((round_trip(x, scheme, -1) != round_trip(x, scheme, 0)).double().mean())
        if not moved:
            return "Transposing the tensor first changes nothing."
        return f"Transposing the tensor first changes {percent(moved)} of the values."

    def _summary(self, x: torch.Tensor, hit: torch.Tensor) -> str:
        count, rows, columns = int(hit.sum()), *x.shape
        size = significant(float(x.abs().max()), 3)
        told = f"{rows} rows of {columns} values; {count} are multiplied by {10**self.outlier}. The largest is {size}."
        if self.distribution != OWN or "of" not in self.own:
            return told
        return f"{told} They are the first of your {self.own['of'][0]} x {self.own['of'][1]} values."


def decibels(relative: float) -> str:
    """The signal-to-quantization-noise ratio that belongs to a relative RMS error, to a tenth of a decibel."""
    if math.isnan(relative) or relative == 0:
        return "\u2014" if math.isnan(relative) else "inf"
    tenths = math.floor(-200 * math.log10(relative) + 0.5)
    sign, tenths = ("-" if tenths < 0 else ""), abs(tenths)
    return f"{sign}{tenths // 10}.{tenths % 10}"


def _described(scheme: BlockScheme) -> dict[str, Any]:
    element: FloatFormat = scheme.element
    return {
        "name": scheme.name, "title": scheme.title, "element": element.name, "scale": scheme.scale.name,
        "block": list(scheme.block), "rule": scheme.rule, "second_level": scheme.second_level,
    }  # fmt: skip


def _held(x: torch.Tensor | None, device: torch.device | str | None) -> tuple[dict[str, torch.Tensor], torch.device]:
    if x is None:
        return {}, place_of(device)
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        raise TypeError(f"expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 2 or min(x.shape) < 2:
        raise ValueError(f"expected two dimensions of 2 or more, got shape {tuple(x.shape)}: reshape it")
    return {OWN: x}, place_of(device, [x])


def _corner(x: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that the page carries, FP32 on the CPU."""
    if not bool(x.float().isfinite().all()):
        raise ValueError("expected finite values in FP32, got NaN or infinity")
    part = x if x.numel() <= LARGEST else x[:ROWS, :COLUMNS]
    part = part.detach().to("cpu", torch.float32, copy=True)  # of its own: a view would hold the whole
    if not bool(part.any()):
        raise ValueError("expected values that are not all zero in the part that is shown, got only zeros")
    return part


def _uniform(seed: int, count: int) -> np.ndarray:
    """The first ``count`` draws of mulberry32, the page's generator (T. Ettinger, public domain), as one array."""
    mask = np.uint64(2**32 - 1)
    state = (np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x6D2B79F5)) & mask
    z = ((state ^ (state >> np.uint64(15))) * (state | np.uint64(1))) & mask
    z ^= (z + (((z ^ (z >> np.uint64(7))) * (z | np.uint64(61))) & mask)) & mask
    return (z ^ (z >> np.uint64(14))).astype(np.float64) / 2.0**32


def _normal(draws: np.ndarray) -> np.ndarray:
    """Nearly normal values: twelve draws each, added up in order, less 6."""
    return np.add.accumulate(draws.reshape(-1, 12), axis=1)[:, -1] - 6.0


def _drawn(distribution: str) -> np.ndarray:
    """The ordinary values, float32."""
    count, seed = ROWS * COLUMNS, _SEEDS[distribution]
    if distribution == "normal":
        return _normal(_uniform(seed, 12 * count)).astype(np.float32)
    if distribution == "student":
        p = (_uniform(seed, count) * 2.0**32 + 0.5) / 2.0**32
        return ((2 * p - 1) / np.sqrt(2 * p * (1 - p))).astype(np.float32)
    draws = _uniform(seed, 14 * count).reshape(-1, 14)
    magnitude = np.ldexp(1.0, np.floor(3 * _normal(draws[:, :12].copy())).astype(int)) * (1 + draws[:, 12])
    return np.where(draws[:, 13] < 0.5, -magnitude, magnitude).astype(np.float32)


def _places(place: str, frequency: int, rows: int, columns: int) -> torch.Tensor:
    """Which elements are outliers: one of each ``2**frequency``, or as many whole columns or rows, at least one."""
    draws = _uniform(_PLACE_SEED, max(rows, columns, rows * columns >> frequency, 1))
    hit = torch.zeros(rows, columns, dtype=torch.bool)
    lines = {"scattered": rows * columns, "channels": columns, "tokens": rows}[place]
    wanted = max(1, lines >> frequency)
    each = lines // wanted
    at = torch.tensor([i * each + math.floor(draws[i] * each) for i in range(wanted)])
    if place == "scattered":
        hit.view(-1)[at] = True
    elif place == "channels":
        hit[:, at] = True
    else:
        hit[at] = True
    return hit
