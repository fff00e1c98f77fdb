"""The stalling sum: one addend, added again and again, the running sum kept in a format."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, read_number, table_of
from mixprec_lab.exhibits._text import error_text, parse_number, power_form, shortest, significant
from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.rounding import METHODS, accumulate, quantize, running_sum

_DEFAULT = ("fp32", "tf32", "bf16", "fp16", "fp8_e5m2", "fp8_e4m3")


class StallingSum(Exhibit):
    """``count`` additions of ``addend`` to a sum that starts at zero and is kept in ``format``.

    ``addend`` is text as in ``BitExplorer`` (or a float), finite and not zero; ``method`` is one of
    ``mixprec_lab.rounding.METHODS``; ``seed`` (0 to 20) feeds stochastic rounding, whose draws come from the small
    generator that page and Python share (mulberry32).  TraitError for anything else.
    """

    _esm = es_module("stalling_sum")
    _kind = "stalling-sum"

    addend = t.Unicode("1e-7").tag(sync=True)
    count = t.Int(4000, min=1, max=20_000).tag(sync=True)
    format = t.Unicode("fp16").tag(sync=True)
    method = t.Unicode("naive").tag(sync=True)
    seed = t.Int(0, min=0, max=20).tag(sync=True)

    def __init__(
        self,
        addend: str | float = "1e-7",
        count: int = 4000,
        format: FormatLike = "fp16",
        method: str = "naive",
        *,
        seed: int = 0,
        formats: Iterable[FormatLike] | None = None,
        name: str | None = None,
    ) -> None:
        offered = table_of(formats, _DEFAULT)
        fmt = get_format(format)
        offered.setdefault(fmt.name, fmt)
        text = addend if isinstance(addend, str) else shortest(addend)
        state = {"addend": text, "count": count, "format": fmt.name, "method": method, "seed": seed}
        super().__init__(offered, name, **state)

    _check_format = t.validate("format")(choice("format", lambda self: self._offered))
    _check_method = t.validate("method")(choice("method", lambda self: METHODS))

    @t.validate("addend")
    def _check_addend(self, proposal: Any) -> str:
        value = read_number(proposal.value)
        if not math.isfinite(value) or value == 0:
            raise t.TraitError(f"expected a finite addend other than zero, got {proposal.value!r}")
        return proposal.value.strip()

    def sums(self) -> torch.Tensor:
        """The partial sums that the page draws, shape (count,), float64; for pairwise only the last one, shape (1,)."""
        fmt = self._offered[self.format]
        values = torch.full((self.count,), parse_number(self.addend), dtype=torch.float64)
        if self.method == "stochastic":
            addend = float(quantize(values[:1], fmt, overflow="native"))
            return torch.tensor(list(_stochastic_sums(addend, self.count, fmt, self.seed)), dtype=torch.float64)
        if self.method == "pairwise":
            return accumulate(values, fmt, "pairwise").reshape(1)
        return running_sum(values, fmt, self.method)

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        fmt, wanted = self._offered[self.format], parse_number(self.addend)
        addend = float(quantize(torch.tensor([wanted], dtype=torch.float64), fmt, overflow="native"))
        sums, exact = self.sums(), wanted * self.count
        total = float(sums[-1])
        return {
            "verdict": self._verdict(sums, fmt),
            "stored": f"{significant(addend, 7)} (error {error_text(_apart(wanted, addend))})",
            "total": significant(total, 9),
            "exact": significant(exact, 9),
            "error": error_text(_apart(exact, total)),
        }

    def _verdict(self, sums: torch.Tensor, fmt: FloatFormat) -> str:
        total = float(sums[-1])
        if not math.isfinite(total):
            return f"{self.count} additions leave the range of {fmt.title}: the sum is {significant(total, 7)}."
        at = f"{significant(total, 7)} = {power_form(total)}"
        if self.method != "naive":
            return f"{self.count} additions, sum {at}."
        if len(sums) < 2 or sums[-1] != sums[-2]:
            return f"{self.count} additions, no stall."
        if sums[0] == 0:
            return f"The addend is flushed to zero in {fmt.title}: the sum never leaves it."
        return f"Stalls after {int((sums != sums[-1]).sum()) + 1} additions at {at}."


def _apart(exact: float, got: float) -> float:
    return 0.0 if exact == got else abs(got - exact) / abs(exact)


def _mulberry32(seed: int) -> Iterator[float]:
    """The page's generator (T. Ettinger, public domain): multiples of 2**-32 in [0, 1)."""
    state, mask = seed, 2**32 - 1
    while True:
        state = (state + 0x6D2B79F5) & mask
        z = ((state ^ (state >> 15)) * (state | 1)) & mask
        z ^= (z + (((z ^ (z >> 7)) * (z | 61)) & mask)) & mask
        yield ((z ^ (z >> 14)) & mask) / 2**32


def _stochastic_sums(addend: float, count: int, fmt: FloatFormat, seed: int) -> Iterator[float]:
    """Partial sums, stochastically rounded: away from zero where the draw is below the distance from the inner one."""
    random, total = _mulberry32(seed), 0.0
    for _ in range(count):
        draw, exact = next(random), total + addend
        if math.isfinite(exact) and exact != 0:
            exponent = min(max(math.frexp(exact)[1] - 1, fmt.min_exponent), fmt.max_exponent)
            steps = abs(exact) / 2.0 ** (exponent - fmt.mantissa_bits)
            whole = math.floor(steps)
            total = math.copysign((whole + (draw < steps - whole)) * 2.0 ** (exponent - fmt.mantissa_bits), exact)
            if abs(total) > fmt.largest:
                total = math.copysign(math.inf, total) if fmt.has_inf else math.nan
        else:
            total = exact
        yield total
