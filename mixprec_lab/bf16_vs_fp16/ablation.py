"""Telling a loss of precision from the noise of seeds: pairs of runs that differ in one thing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PairedComparison:
    """Differences of paired runs, variant minus baseline, and how surprising they are."""

    differences: tuple[float, ...]
    mean: float
    standard_error: float  #: of the mean
    seed_spread: float  #: standard deviation of the baseline over its seeds: the noise that pairing removes
    p_value: float  #: exact two-sided sign-flip test
    smallest_p: float  #: what that test can reach at best with so many pairs

    def __str__(self) -> str:
        return (
            f"{len(self.differences)} pairs: {self.mean:+.4f} +- {self.standard_error:.4f} (seed spread "
            f"{self.seed_spread:.4f}), p = {self.p_value:.3f}, at best {self.smallest_p:.3f}"
        )


def paired_comparison(baseline: Sequence[float], variant: Sequence[float]) -> PairedComparison:
    """The comparison of two lists of results, entry i of both from the same seed, data order and initial weights.

    The p-value is the share of all ``2**n`` sign patterns of the differences whose mean is at least as far from 0: if
    the variant changed nothing, every pattern was as likely as the one seen (Fisher's randomization test).  It assumes
    no distribution, and says how many pairs are needed at least: with n pairs it cannot fall below ``2 / 2**n``.

    Raises ValueError for lists of different lengths, fewer than 2 or more than 24 pairs, and results that are not
    finite: a run that diverged is the finding, and no average of it means anything.
    """
    if len(baseline) != len(variant) or not 2 <= len(baseline) <= 24:
        raise ValueError(
            f"expected two lists of the same 2 to 24 seeds, got {len(baseline)} and {len(variant)} results"
        )
    before, after = (torch.tensor(list(x), dtype=torch.float64) for x in (baseline, variant))
    if not bool((before.isfinite() & after.isfinite()).all()):
        raise ValueError("expected finite results, got NaN or infinity: a diverged run is a result of its own")
    differences = after - before
    n = len(differences)
    sums = torch.zeros(1, dtype=torch.float64)
    for d in differences:
        sums = torch.cat([sums + d, sums - d])
    # The first sum is the one observed; the tolerance keeps equal patterns equal in floating point.
    extreme = sums.abs() >= sums[0].abs() - 1e-12 * float(differences.abs().sum())
    return PairedComparison(
        tuple(differences.tolist()),
        float(differences.mean()),
        float(differences.std()) / n**0.5,
        float(before.std()),
        float(extreme.double().mean()),
        2.0 / 2**n,
    )
