"""Will it be faster?  One linear layer, two dtypes, a device: where the time goes, and what others measured."""

from collections.abc import Iterable
from typing import Any

import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module
from mixprec_lab.exhibits._text import significant
from mixprec_lab.plots.speed import PART_COLOURS
from mixprec_lab.speed import (
    DEVICES,
    DTYPE_BYTES,
    PARTS,
    PUBLISHED,
    RECIPES,
    Expected,
    PublishedPoint,
    amdahl,
    expected_speedup,
    roofline,
)

PAIRS = ("bf16 to fp8", "fp32 to bf16", "fp32 to tf32", "fp32 to fp16")
LAYOUTS = ("device", "both", "one")
_SCOPES = {"kernel": "products", "products": "with casts", "layer": "layer", "training": "training"}


class WillItBeFaster(Exhibit):
    """The time of a linear layer's three products in two dtypes, by what it is spent on, and their ratio.

    ``m``, ``k``, ``n`` are powers of two: sizes from 2**4 to 2**17.  ``device`` is a key of ``DEVICES``, ``pair`` one
    of ``PAIRS``, ``recipe`` a key of ``RECIPES`` (for FP8), ``layouts`` says how many FP8 copies are written (device:
    as it needs).  ``before``, ``after`` and ``bandwidth`` are percent of the published rates that are reached,
    ``launch`` tenths of a microsecond a kernel, ``share`` the percent of a training step that such layers take.

    Below stand ``points``: what was published or measured, beside what this model says of it.  TraitError for anything
    else.
    """

    _esm = es_module("will_it_be_faster")
    _kind = "will-it-be-faster"

    tables = t.Dict(help="devices, recipes, points and colours, for the page").tag(sync=True)
    m = t.Int(12, min=4, max=17).tag(sync=True)
    k = t.Int(13, min=4, max=17).tag(sync=True)
    n = t.Int(14, min=4, max=17).tag(sync=True)
    device = t.Unicode("h100").tag(sync=True)
    pair = t.Unicode(PAIRS[0]).tag(sync=True)
    recipe = t.Unicode("current").tag(sync=True)
    layouts = t.Unicode("device").tag(sync=True)
    before = t.Int(100, min=5, max=100).tag(sync=True)
    after = t.Int(100, min=5, max=100).tag(sync=True)
    bandwidth = t.Int(100, min=5, max=100).tag(sync=True)
    launch = t.Int(0, min=0, max=100).tag(sync=True)
    share = t.Int(60, min=0, max=100).tag(sync=True)

    def __init__(
        self,
        device: str = "h100",
        pair: str = PAIRS[0],
        *,
        points: Iterable[PublishedPoint] = PUBLISHED,
        name: str | None = None,
        **state: Any,
    ) -> None:
        defaults = self.trait_defaults()
        if unknown := [key for key in state if key not in defaults or key in ("tables", "formats")]:
            raise TypeError(f"WillItBeFaster has no {', '.join(unknown)}")
        self._points = tuple(points)
        super().__init__({}, name, device=device, pair=pair, **state)
        self.tables = _tables(self._points)

    _check_device = t.validate("device")(choice("device", lambda self: DEVICES))
    _check_pair = t.validate("pair")(choice("pair", lambda self: PAIRS))
    _check_recipe = t.validate("recipe")(choice("recipe", lambda self: RECIPES))
    _check_layouts = t.validate("layouts")(choice("layouts", lambda self: LAYOUTS))

    @property
    def dtypes(self) -> tuple[str, str]:
        """The two dtypes of ``pair``."""
        first, _, second = self.pair.partition(" to ")
        return first, second

    def _losses(self) -> dict[str, Any]:
        return {
            "before_efficiency": self.before / 100,
            "after_efficiency": self.after / 100,
            "memory_efficiency": self.bandwidth / 100,
            "launch": self.launch * 1e-7,
            "transposes": {"device": None, "both": True, "one": False}[self.layouts],
        }

    def expected(self) -> Expected | None:
        """What ``expected_speedup`` says of the present state; None where the device lacks one of the dtypes."""
        first, second = self.dtypes
        if {first, second} - set(DEVICES[self.device].peak):
            return None
        recipe = self.recipe if second == "fp8" else "none"
        return expected_speedup(2**self.m, 2**self.k, 2**self.n, first, second, self.device, recipe, **self._losses())

    def modelled(self, point: PublishedPoint) -> float | None:
        """The ratio the model gives for ``point`` under the present losses; None without shapes, or for other pairs."""
        if not point.shapes or self.pair != PAIRS[0]:
            return None
        runs = [expected_speedup(*shape, "bf16", "fp8", point.device, point.recipe, **self._losses())
                for shape in point.shapes]  # fmt: skip
        before = after = 0.0
        for run in runs:  # left to right, as the page adds
            before += run.before.total
            after += run.after.total
        return before / after

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        found, texts = self.expected(), {}
        for i, point in enumerate(self._points):
            modelled = self.modelled(point)
            texts[f"point-{i}-ratio"] = significant(point.ratio, 3)
            texts[f"point-{i}-model"] = "—" if modelled is None else significant(modelled, 3)
        return texts | (self._absent() if found is None else self._present(found))

    def _absent(self) -> dict[str, str]:
        device = DEVICES[self.device]
        missing = " and ".join(d.upper() for d in self.dtypes if d not in device.peak)
        words = f"The table has no {missing} rate for {device.title}: choose another device or pair."
        fields = ("intensity", "ceiling", "step", *(f"{s}-{p}" for s in ("before", "after") for p in (*PARTS, "total")))
        return {"verdict": words} | dict.fromkeys(fields, "—")

    def _present(self, found: Expected) -> dict[str, str]:
        device, (first, second) = DEVICES[self.device], self.dtypes
        texts = {}
        for side, split in (("before", found.before), ("after", found.after)):
            texts |= {f"{side}-{part}": _milliseconds(getattr(split, part)) for part in (*PARTS, "total")}
        times = significant(found.ratio, 3)
        most = found.after.bound
        share = significant(100 * getattr(found.after, most) / found.after.total, 3)
        sizes = [2**self.m, 2**self.k, 2**self.n]
        lines = [roofline(*sizes, dtype, device, training=True) for dtype in (first, second)]
        step = amdahl(self.share / 100, found.ratio)
        return texts | {
            "verdict": f"{second.upper()} takes {_milliseconds(found.after.total)} where {first.upper()} takes "
            f"{_milliseconds(found.before.total)}: {times} times as fast. {share} % of it is {most}.",
            "intensity": "; ".join(
                f"{dtype.upper()} {significant(line.intensity, 4)} (ridge {significant(device.ridge(dtype), 4)})"
                for dtype, line in zip((first, second), lines, strict=True)
            ),
            "ceiling": f"{significant(device.rate(second) / device.rate(first), 4)} times",
            "step": f"{significant(step, 4)} times, if {self.share} % of the step before is such layers",
        }


def _milliseconds(seconds: float) -> str:
    return f"{significant(seconds * 1e3, 4)} ms"


def _tables(points: tuple[PublishedPoint, ...]) -> dict[str, Any]:
    devices = {
        d.name: {"title": d.title, "peak": dict(d.peak), "bandwidth": d.bandwidth, "transposes": d.transposes,
                 "rank": i}
        for i, d in enumerate(DEVICES.values())
    }  # fmt: skip
    shown = [
        {"title": p.title, "device": p.device, "recipe": p.recipe, "scope": _SCOPES[p.scope], "ratio": p.ratio,
         "shapes": [list(s) for s in p.shapes]}
        for p in points
    ]  # fmt: skip
    return {
        "devices": devices,
        "recipes": {name: list(recipe) for name, recipe in RECIPES.items()},
        "bytes": dict(DTYPE_BYTES),
        "points": shown,
        "parts": [{"name": part, "colours": list(PART_COLOURS[part])} for part in PARTS],
    }
