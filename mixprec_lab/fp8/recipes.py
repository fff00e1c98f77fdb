"""Recipes: which format an operand gets, and where its scale comes from.

A recipe is a value.  ``FP8Linear`` asks it for one quantizer an operand: ``recipe.quantizer(role)`` is an ``nn.Module``
called with a float tensor (rows, columns), ``record`` (may it remember what it sees?) and ``native`` (values in torch's
float8 dtype?); it answers with a NamedTuple whose ``along(axis)`` is a ``Scaled``: the operand of a product that sums
over ``axis``.  Its attribute ``dtype`` is set to the dtype that emulated products run in.  Roles are "input" (tokens,
in_features), "weight" (out_features, in_features) and "grad_output" (tokens, out_features).  Each of them is summed
over both its axes, in two of the three products:

    output      = input @ weight.T          input along 1, weight along 1
    grad_input  = grad_output @ weight      grad_output along 1, weight along 0
    grad_weight = grad_output.T @ input     grad_output along 0, input along 0

One scale for the whole tensor serves both; a scale for each row or block needs a second quantized copy.  A quantizer
that keeps state has ``update()``; a recipe for other schemes needs nothing but ``quantizer`` and ``fp8_format``.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from mixprec_lab.formats import FloatFormat, get_format
from mixprec_lab.fp8.scaling import CurrentQuantizer, DelayedQuantizer, FixedQuantizer

Role = Literal["input", "weight", "grad_output"]
FP8Format = Literal["hybrid", "e4m3", "e5m2"]
ROLES: tuple[Role, ...] = ("input", "weight", "grad_output")
_FORMATS = {"hybrid": ("e4m3", "e5m2"), "e4m3": ("e4m3", "e4m3"), "e5m2": ("e5m2", "e5m2")}


class Recipe(Protocol):
    """What ``FP8Linear`` needs of a recipe."""

    fp8_format: str
    backends: tuple[str, ...]  #: those that can run it

    def quantizer(self, role: Role) -> nn.Module:
        """A fresh quantizer for the operand ``role`` of one layer."""


@dataclass(frozen=True)
class DelayedScaling:
    """Scales from the amax of the last ``amax_history_len`` steps: one pass over a tensor, and a step behind.

    ``scale = largest / amax / 2**margin``, with the largest amax of the history (``amax_compute_algo="max"``) or the
    last one (``"most_recent"``); see ``delayed_update``.  ``fp8_format``: "hybrid" is E4M3 forward and E5M2 for
    gradients, "e4m3" and "e5m2" use one for all.  ``reduce_amax`` takes the largest amax of all ranks where
    ``torch.distributed`` is initialized.  Transformer Engine's defaults are the same but for the history: 1024.

    Raises ValueError for numbers out of range and unknown words.
    """

    margin: int = 0
    amax_history_len: int = 16
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    fp8_format: FP8Format = "hybrid"
    reduce_amax: bool = True

    def __post_init__(self) -> None:
        _check_format(self.fp8_format)
        if not isinstance(self.margin, int) or isinstance(self.margin, bool) or not -64 <= self.margin <= 64:
            raise ValueError(f"expected margin to be a whole number from -64 to 64, got {self.margin!r}")
        if not isinstance(self.amax_history_len, int) or self.amax_history_len < 1:
            raise ValueError(
                f"expected amax_history_len to be a whole number of at least 1, got {self.amax_history_len!r}"
            )
        if self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"expected amax_compute_algo to be 'max' or 'most_recent', got {self.amax_compute_algo!r}")

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that can run it."""
        return _runs_on(self.fp8_format, transformer_engine=True)

    def quantizer(self, role: Role) -> DelayedQuantizer:
        """A fresh quantizer for the operand ``role``: scale 1, empty history."""
        return DelayedQuantizer(
            format_of(self.fp8_format, role), self.margin, self.amax_history_len, self.amax_compute_algo
        )


@dataclass(frozen=True)
class CurrentScaling:
    """Scales from the tensor itself: two passes over it, and nothing to remember.

    ``granularity``: one scale a "tensor", or one for each "row" along the axis of the product's sum.  ``power_of_two``
    rounds scales down to powers of two, which makes scaling exact.  ``amax_epsilon`` is the smallest amax that is
    used; see ``current_scale`` for 0, inf and NaN.  ``fp8_format`` as in ``DelayedScaling``.

    Raises ValueError for numbers out of range and unknown words.
    """

    fp8_format: FP8Format = "hybrid"
    granularity: Literal["tensor", "row"] = "tensor"
    power_of_two: bool = False
    amax_epsilon: float = 0.0

    def __post_init__(self) -> None:
        _check_format(self.fp8_format)
        if self.granularity not in ("tensor", "row"):
            raise ValueError(f"expected granularity to be 'tensor' or 'row', got {self.granularity!r}")
        if not 0 <= self.amax_epsilon < math.inf:
            raise ValueError(f"expected amax_epsilon to be finite and not negative, got {self.amax_epsilon!r}")

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that can run it."""
        plain = self.granularity == "tensor" and not self.power_of_two and self.amax_epsilon == 0.0
        return _runs_on(self.fp8_format, transformer_engine=plain)

    def quantizer(self, role: Role) -> CurrentQuantizer:
        """A quantizer for the operand ``role``; it has no state."""
        return CurrentQuantizer(
            format_of(self.fp8_format, role), self.power_of_two, self.amax_epsilon, self.granularity
        )


@dataclass(frozen=True)
class FixedScaling:
    """Scales that never move, 1 by default: what FP8 is without scaling, and with a scale of your choice.

    Raises ValueError for scales that are not positive and finite, and for an unknown format.
    """

    fp8_format: FP8Format = "hybrid"
    input: float = 1.0
    weight: float = 1.0
    grad_output: float = 1.0

    def __post_init__(self) -> None:
        _check_format(self.fp8_format)
        for role in ROLES:
            if not 0 < getattr(self, role) < math.inf:
                raise ValueError(
                    f"expected the scale of {role} to be positive and finite, got {getattr(self, role)!r}"
                )

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that can run it."""
        return _runs_on(self.fp8_format, transformer_engine=False)

    def quantizer(self, role: Role) -> FixedQuantizer:
        """A quantizer for the operand ``role``."""
        return FixedQuantizer(format_of(self.fp8_format, role), getattr(self, role))


def _runs_on(fp8_format: str, *, transformer_engine: bool) -> tuple[str, ...]:
    """Backends by format: no kernel multiplies E5M2 by E5M2."""
    if fp8_format == "e5m2":
        return ("emulated",)
    return ("emulated", "scaled_mm", *(("transformer_engine",) if transformer_engine else ()))


def format_of(fp8_format: str, role: Role) -> FloatFormat:
    """The format of an operand under "hybrid", "e4m3" or "e5m2"."""
    return get_format("fp8_" + _FORMATS[fp8_format][role == "grad_output"])


def _check_format(fp8_format: str) -> None:
    if fp8_format not in _FORMATS:
        raise ValueError(f"expected fp8_format to be one of {', '.join(_FORMATS)}, got {fp8_format!r}")
