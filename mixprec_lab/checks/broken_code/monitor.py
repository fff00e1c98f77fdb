"""The rooms of the theme "monitor": a watchman that looks at the wrong number, or not at all."""

import math
from collections.abc import Callable

import torch

from mixprec_lab.checks._verdict import check
from mixprec_lab.checks.broken_code._told import told
from mixprec_lab.checks.broken_code.stand_ins import HostReads

Tensor = torch.Tensor


def other_key(function: Callable[[list[dict[str, int]]], int]) -> None:
    """``broken_code``: the NaN gradients of a whole history."""

    def total(*counts: int) -> object:
        return function([{"step": i, "grad_nan_count": n} for i, n in enumerate(counts)])

    check(total, ((run, sum(run)) for run in ((0, 3, 4), (0, 0), (1,))))


def stable_nan(function: Callable[[float], str]) -> None:
    """``broken_code``: a loss is not finite, unusually high (above 100) or fine."""
    answers = {2.5: "fine", 1e4: "unusually high", math.nan: "not finite", math.inf: "not finite", 100.0: "fine"}
    check(function, (((loss,), answer) for loss, answer in answers.items()))


def forgotten_issue(function: Callable[[dict[str, float]], list[str]]) -> None:
    """``broken_code``: every count of a report that is not zero is an issue."""

    def issues(**report: float) -> object:
        return told(function(report), lambda names: ", ".join(sorted(names)) or "none")

    def of(loss_nan: int, grad_nan: int, grad_inf: int, param_nan: int) -> object:
        return issues(loss_nan=loss_nan, grad_nan=grad_nan, grad_inf=grad_inf, param_nan=param_nan)

    cases = [
        ((1, 0, 0, 0), "loss_nan"),
        ((0, 0, 0, 0), "none"),
        ((0, 5, 0, 1), "grad_nan, param_nan"),
        ((0, 0, 2, 0), "grad_inf"),
    ]
    check(of, cases)


def mean_of_norms(function: Callable[[list[Tensor]], float]) -> None:
    """``broken_code``: the Euclidean norm of all tensors together."""

    def norm(*values: list[float]) -> object:
        return function([torch.tensor(v) for v in values])

    runs = ([[3.0], [4.0]], [[1.0, 2.0], [2.0], [4.0, 0.0, 0.0]])
    cases = [(tuple(run), math.sqrt(sum(x * x for v in run for x in v))) for run in runs]
    check(norm, cases, relative=1e-6)


def three_reads(function: Callable[[dict[str, Tensor]], dict[str, list[float]]]) -> None:
    """``broken_code``: norm and largest magnitude by name, with one read by the host."""

    def statistics(*names: str) -> object:
        tensors = {name: torch.tensor([3.0, -4.0]) * 2**i for i, name in enumerate(names)}
        with HostReads() as reads:
            got = function(tensors)
        few = "at most 1 host read" if reads.count <= 1 else f"{reads.count} host reads"
        return told(got, lambda g: f"{ {k: [float(x) for x in v] for k, v in g.items()} }, {few}")

    def answer(*names: str) -> str:
        return f"{ {name: [5.0 * 2**i, 4.0 * 2**i] for i, name in enumerate(names)} }, at most 1 host read"

    check(statistics, ((run, answer(*run)) for run in (("a", "b"), ("a", "b", "c", "d"))))


def scaled_threshold(function: Callable[[float, float], str]) -> None:
    """``broken_code``: a true gradient norm explodes (above 100), vanishes (below 1e-6) or is fine."""
    runs = ((3 * 2.0**16, 2.0**16, "fine"), (300.0, 1.0, "explodes"), (300 * 2.0**16, 2.0**16, "explodes"),
            (2.0**-10, 2.0**16, "vanishes"), (50.0, 1.0, "fine"))  # fmt: skip
    check(function, (((norm, scale), answer) for norm, scale, answer in runs))
