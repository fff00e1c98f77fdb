"""The sum over ranks: one gradient of many ranks, added by a ring, by a tree and in FP32, its messages in a format."""

import math
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.exhibits._text import significant
from mixprec_lab.exhibits.stalling_sum import _mulberry32
from mixprec_lab.formats import FloatFormat, get_format
from mixprec_lab.scaling_out import ORDERS, exact_sum, on_the_wire, simulate_reduction

_FORMATS = ("bf16", "fp16", "fp32")
_ADJECTIVES = MappingProxyType({"ring": "ring", "tree": "tree", "wide": "wide sum"})


class SumOverRanks(Exhibit):
    """One element of a gradient, summed over ``2**log2_ranks`` ranks (1 to 10) with messages in ``format``.

    Rank r holds ``2**size * (1 + noise / 4 * d)``, rounded to FP32: ``size`` from -24 to 16, ``noise`` from 0 to 16,
    and d between -2 and 2 around zero, drawn by the generator that page and Python share from ``seed`` (0 to 20).
    ``format`` is bf16, fp16 or fp32.  TraitError for anything else.
    """

    _esm = es_module("sum_over_ranks")
    _kind = "sum-over-ranks"

    format = t.Unicode("bf16").tag(sync=True)
    log2_ranks = t.Int(10, min=1, max=10).tag(sync=True)
    noise = t.Int(0, min=0, max=16).tag(sync=True)
    size = t.Int(0, min=-24, max=16).tag(sync=True)
    seed = t.Int(0, min=0, max=20).tag(sync=True)

    def __init__(self, format: str = "bf16", log2_ranks: int = 10, *, name: str | None = None, **state: Any) -> None:
        super().__init__(table_of(_FORMATS), name, format=format, log2_ranks=log2_ranks, **state)

    _check_format = t.validate("format")(choice("format", lambda self: self._offered))

    def contributions(self) -> torch.Tensor:
        """What each rank holds, shape (ranks, 1), float32."""
        draws = _mulberry32(self.seed)
        values = [1 + self.noise / 4 * (sum(islice(draws, 4)) - 2) for _ in range(2**self.log2_ranks)]
        return (torch.tensor(values, dtype=torch.float64) * 2.0**self.size).float().unsqueeze(1)

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        fmt, x = self._offered[self.format], self.contributions()
        exact, ranks = float(exact_sum(x)), len(x)
        sums = {order: float(simulate_reduction(x, fmt, order)) for order in ORDERS}
        moved = {"ring": _moved(x.flip(0), fmt, fmt), "wide": _moved(x, fmt, get_format("fp32"))}
        texts = {"exact": significant(exact, 5)}
        for order, total in sums.items():
            texts[f"{order}-sum"] = significant(total, 5)
            texts[f"{order}-error"] = significant(_apart(exact, total), 3)
            texts[f"{order}-moved"] = f"{moved[order]} of {ranks}" if order in moved else "\u2014"
        errors = ", ".join(f"{texts[f'{order}-error']} by {_ADJECTIVES[order]}" for order in ORDERS)
        texts["verdict"] = f"{ranks} ranks, {fmt.title} messages: relative error {errors}."
        return texts


def _apart(exact: float, got: float) -> float:
    return math.nan if math.isnan(got) else abs(got - exact) / abs(exact)


def _moved(x: torch.Tensor, wire: FloatFormat, accumulator: FloatFormat) -> int:
    """How many ranks change a running sum kept in ``accumulator`` when their values arrive in ``wire``."""
    running, moved = torch.zeros(1), 0
    for value in on_the_wire(x, wire):
        after = on_the_wire(running + value, accumulator)
        moved += int(not torch.allclose(after, running, rtol=0.0, atol=0.0, equal_nan=True))
        running = after
    return moved
