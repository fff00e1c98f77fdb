"""What goes into a repair and what comes out: the monitor's report, checked, and the fixer's own."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Action = Literal["none", "skip", "restore", "cut_learning_rate"]

_COUNTS = ("grad_nan_count", "grad_inf_count", "param_nan_count", "param_inf_count")
_NEEDED = ("step", "loss", "loss_nan", "loss_inf", *_COUNTS)


@dataclass(frozen=True)
class FixReport:
    """What the fixer did, and why."""

    action: Action
    reason: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def skip(self) -> bool:
        """Whether the caller must leave this step out: step neither optimizer nor scheduler, update no scaler."""
        return self.action != "none"

    def __str__(self) -> str:
        return f"{self.action}: {self.reason}"


def checked(report: Any) -> Mapping[str, Any]:
    """``report``, if it is one of ``check_model_health``; else TypeError or ValueError."""
    if not isinstance(report, Mapping):
        raise TypeError(f"expected the report of check_model_health(step, loss), got a {type(report).__name__}")
    missing = [key for key in _NEEDED if key not in report]
    if missing:
        raise ValueError(f"expected the report of check_model_health(step, loss), got one without {', '.join(missing)}")
    for key in ("step", *_COUNTS):
        if not is_count(report[key]):
            raise ValueError(f"expected {key} to be a whole number of at least 0, got {report[key]!r}")
    if isinstance(report["loss"], bool) or not isinstance(report["loss"], int | float):
        raise TypeError(f"expected the loss as a number, got a {type(report['loss']).__name__}")
    return report


def trouble_of(report: Mapping[str, Any]) -> str:
    """What is not finite in loss and gradients, in words; "" if nothing is."""
    if report["loss_nan"] or report["loss_inf"] or not math.isfinite(report["loss"]):
        return f"the loss is {report['loss']}"
    nan, inf = report["grad_nan_count"], report["grad_inf_count"]
    return f"{nan} NaN and {inf} infinite values in the gradients" if nan + inf else ""


def is_count(x: object) -> bool:
    """Whether ``x`` is a whole number of at least 0."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def listed(items: Iterable[Any]) -> str:
    """The first three, and how many more there are."""
    named = [f"{item:g}" if isinstance(item, float) else str(item) for item in items]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
