"""Same tensor, two formats: a distribution with outliers, rounded to FP16 and to BF16; what each errs and loses."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import traitlets as t

from mixprec_lab.bf16_vs_fp16 import RoundingCost, rounding_cost
from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.exhibits._text import error_text, percent, significant
from mixprec_lab.formats import FloatFormat, classify

MOST = 1024  #: magnitudes of a tensor that the page carries
PAIR = ("fp16", "bf16")
_PARTS = ("flushed", "subnormal", "normal", "overflowed")


class SameTensorTwoFormats(Exhibit):
    """One tensor, times ``2**scale``, in FP16 and in BF16: errors, and shares flushed, subnormal and overflowed.

    ``tensors`` is name -> finite floating-point tensor, taken in FP32; without it three distributions stand for
    weights, activations and gradients, each as 1024 quantiles of ``|x|``, so that nothing depends on a draw.  Signs
    play no part in rounding to nearest and are left away.  Of a larger tensor 1024 magnitudes are kept, evenly spaced
    in order, the smallest and the largest among them; the page says so.  ``outliers`` values are added, spread over the
    binade that begins at ``2**(scale + size)``.

    Raises ValueError for no tensors, an empty one or one with NaN or infinity, TypeError for anything but
    floating-point tensors, TraitError for a state out of range (``scale`` -28 to 12, ``outliers`` 0 to 64, ``size`` 1
    to 16).
    """

    _esm = es_module("same_tensor")
    _kind = "same-tensor"

    tensors = t.Dict(help="name -> magnitudes in order, size of the whole tensor, typical log2 scale").tag(sync=True)
    tensor = t.Unicode().tag(sync=True)
    scale = t.Int(0, min=-28, max=12).tag(sync=True)
    outliers = t.Int(0, min=0, max=64).tag(sync=True)
    size = t.Int(8, min=1, max=16).tag(sync=True)

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        tensor: str | None = None,
        scale: int | None = None,
        *,
        outliers: int = 0,
        size: int = 8,
        name: str | None = None,
    ) -> None:
        kept = _distributions() if tensors is None else {key: _record(key, x) for key, x in tensors.items()}
        if not kept:
            raise ValueError("expected at least one tensor, got none")
        first = next(iter(kept)) if tensor is None else tensor
        typical = kept[first]["typical"] if first in kept else 0
        state = {"tensor": first, "scale": typical if scale is None else scale, "outliers": outliers, "size": size}
        self._names = tuple(kept)
        super().__init__(table_of(PAIR), name, **state)
        # Under numbers, because the built page sorts the keys of a widget's state.
        self.tensors = {str(i): {"name": key, **value} for i, (key, value) in enumerate(kept.items())}

    _check_tensor = t.validate("tensor")(choice("tensor", lambda self: self._names))

    def values(self) -> torch.Tensor:
        """The magnitudes that are rounded, outliers last, in float64."""
        known = self.tensors[str(self._names.index(self.tensor))]["magnitudes"]
        added = [2.0**self.size * (1 + (i + 0.5) / self.outliers) for i in range(self.outliers)]
        return torch.tensor([*known, *added], dtype=torch.float64) * 2.0**self.scale

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        x, texts = self.values(), {}
        costs = [rounding_cost(x, fmt) for fmt in self._offered.values()]
        for name, cost in zip(self._offered, costs, strict=True):
            texts |= {f"{name}-{part}": percent(getattr(cost.shares, part)) for part in _PARTS}
            for kind in ("rms", "median", "worst"):
                texts[f"{name}-{kind}"] = error_text(getattr(cost, f"{kind}_relative"))
        return texts | {"verdict": _verdict(costs, x), "summary": self._summary(x)}

    def _summary(self, x: torch.Tensor) -> str:
        record = self.tensors[str(self._names.index(self.tensor))]
        kept, total = len(record["magnitudes"]), record["total"]
        what = f"{kept} magnitudes" if kept == total else f"{kept} of {total} magnitudes, evenly spaced in order"
        return (
            f"{what}, and {self.outliers} outlier{'' if self.outliers == 1 else 's'}; the largest is {_size(x.max())}."
        )


def _verdict(costs: list[RoundingCost], x: torch.Tensor) -> str:
    lost = [cost.shares.flushed + cost.shares.overflowed for cost in costs]
    first, second = (cost.format.title for cost in costs)
    if not any(lost):
        return f"Neither format loses a value. {_ratio(costs)}"
    worse = costs[0] if lost[0] >= lost[1] else costs[1]
    return f"{first} loses {percent(lost[0])}, {second} {percent(lost[1])}. {_ratio(costs)} {_cure(worse.format, x)}"


def _ratio(costs: list[RoundingCost]) -> str:
    first, second = (cost.median_relative for cost in costs)
    if first == second:
        return "Their median errors are equal."
    fine, coarse = sorted(costs, key=lambda cost: cost.median_relative)
    if fine.median_relative == 0:
        return f"{fine.format.title} holds most of the others exactly."
    ratio = significant(coarse.median_relative / fine.median_relative, 2)
    return f"The median error of {fine.format.title} is {ratio} times smaller."


def _cure(fmt: FloatFormat, x: torch.Tensor) -> str:
    """What the largest power of two that does not overflow would save, as a loss scale does."""
    k = _largest_safe(fmt, float(x.max()))
    shares = classify(x, fmt, 2.0**k)
    return f"Multiplied by 2^{k} first, {fmt.title} would lose {percent(shares.flushed + shares.overflowed)}."


def _largest_safe(fmt: FloatFormat, largest: float) -> int:
    aligned = fmt.max_exponent - (math.frexp(largest)[1] - 1)  # brings it into the format's top binade
    edge, upper = fmt.nearest_edges[2]
    over = largest * 2.0**aligned >= edge if upper else largest * 2.0**aligned > edge
    return aligned - 1 if over else aligned


def _size(value: torch.Tensor) -> str:
    return significant(float(value), 3)


def _record(name: str, x: torch.Tensor) -> dict[str, Any]:
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        raise TypeError(f"expected {name!r} to be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    magnitude = x.detach().float().abs().flatten().cpu().sort().values.double()
    if magnitude.numel() == 0 or not bool(magnitude[-1].isfinite()):
        raise ValueError(f"expected {name!r} to hold finite numbers, got an empty tensor, NaN or infinity in FP32")
    total = magnitude.numel()
    at = torch.linspace(0, total - 1, min(total, MOST), dtype=torch.float64).round().long()
    return {"magnitudes": magnitude[at].tolist(), "total": total, "typical": 0}


def _distributions() -> dict[str, dict[str, Any]]:
    """1024 quantiles of three distributions of ``|x|``, to six digits, so that every machine has the same numbers."""
    p = (torch.arange(MOST, dtype=torch.float64) + 0.5) / MOST
    upper = (1 + p) / 2
    laws = {
        "weights: normal": (torch.special.ndtri(upper), -6),
        "activations: Student's t": ((2 * upper - 1) / (2 * upper * (1 - upper)).sqrt(), 1),  # two degrees of freedom
        "gradients: log2 |x| normal": (torch.exp2(4 * torch.special.ndtri(p)), -18),
    }
    return {
        name: {"magnitudes": [float(f"{v:.6g}") for v in values.tolist()], "total": MOST, "typical": typical}
        for name, (values, typical) in laws.items()
    }
