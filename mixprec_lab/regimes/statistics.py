"""What paired seeds can tell: an interval for a difference, and how many seeds a difference needs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_TAIL = 1e-9  #: the smallest chance whose quantile is found


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) for Student's t with ``df`` degrees of freedom: a finite sum, exact up to rounding.

    Abramowitz and Stegun, 26.7.3 and 26.7.4.  ValueError for ``df`` that is no whole number of at least 1.
    """
    if not isinstance(df, int) or df < 1:
        raise ValueError(f"expected a whole number of degrees of freedom of at least 1, got {df!r}")
    angle = math.atan2(t, math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if df % 2:
        term = total = math.cos(angle) if df > 1 else 0.0
        for k in range(3, df - 1, 2):
            term *= square * (k - 1) / k
            total += term
        inside = (angle + sine * total) * 2 / math.pi
    else:
        term = total = 1.0
        for k in range(2, df - 1, 2):
            term *= square * (k - 1) / k
            total += term
        inside = sine * total
    return 0.5 + inside / 2


def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = ``p``, by bisection.  ValueError unless 1e-9 <= p <= 1 - 1e-9.

    Beyond, the distribution function has too few digits left; there the relative error is 1e-7.
    """
    if not _TAIL <= p <= 1 - _TAIL:
        raise ValueError(f"expected a probability from {_TAIL:g} to 1 - {_TAIL:g}, got {p!r}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return middle


@dataclass(frozen=True)
class PairedDifference:
    """Differences of paired runs, variant minus baseline, with their mean and its confidence interval."""

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    deviation: float  #: standard deviation of the differences
    low: float
    high: float
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out 0: the seeds tell this difference from noise."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}] over {len(self.seeds)} seeds"


def paired_difference(
    baseline: Mapping[int, float], variant: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference:
    """The difference of two sets of results, seed -> result, and its Student interval over the seeds.

    Raises ValueError for other seeds on the two sides (they are no pairs), fewer than two, results that are not finite
    (a diverged run is a result of its own), and a confidence outside of 0 to 1.
    """
    if set(baseline) != set(variant):
        raise ValueError(f"expected results of the same seeds, got {sorted(baseline)} and {sorted(variant)}")
    if len(baseline) < 2:
        raise ValueError(f"expected at least two seeds, got {len(baseline)}: one pair has no spread")
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence!r}")
    seeds = tuple(sorted(baseline))
    found = tuple(variant[s] - baseline[s] for s in seeds)
    if not all(math.isfinite(d) for d in found):
        raise ValueError("expected finite results, got NaN or infinity: a diverged run is a result of its own")
    n, mean = len(found), math.fsum(found) / len(found)
    deviation = math.sqrt(_squares(found, mean) / (n - 1))
    half = t_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return PairedDifference(seeds, found, mean, deviation, mean - half, mean + half, confidence)


def unpaired_interval(
    baseline: Iterable[float], variant: Iterable[float], confidence: float = 0.95
) -> tuple[float, float]:
    """The Student interval for the same difference when nobody knows which results are pairs.

    The spread of the seeds stays in it: two samples of one variance, ``len(baseline) + len(variant) - 2`` degrees of
    freedom.  Raises ValueError for fewer than two results on a side, results that are not finite, and a confidence
    outside of 0 to 1.
    """
    first, second = list(baseline), list(variant)
    if min(len(first), len(second)) < 2:
        raise ValueError(f"expected at least two results on each side, got {len(first)} and {len(second)}")
    if not all(math.isfinite(x) for x in (*first, *second)):
        raise ValueError("expected finite results, got NaN or infinity: a diverged run is a result of its own")
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence!r}")
    means, df = [math.fsum(x) / len(x) for x in (first, second)], len(first) + len(second) - 2
    variance = (_squares(first, means[0]) + _squares(second, means[1])) / df
    half = t_quantile((1 + confidence) / 2, df) * math.sqrt(variance * (1 / len(first) + 1 / len(second)))
    return means[1] - means[0] - half, means[1] - means[0] + half


def _squares(values: Iterable[float], mean: float) -> float:
    """The sum of squared distances from ``mean``; products, because pow is not rounded alike everywhere."""
    return math.fsum((x - mean) * (x - mean) for x in values)


def power(difference: float, deviation: float, seeds: int, alpha: float = 0.05) -> float:
    """The chance that a paired t test at level ``alpha`` over ``seeds`` pairs sees ``difference``.

    ``deviation`` is the standard deviation of the paired differences.  The statistic is noncentral t; its tail is
    integrated numerically over the distribution of the estimated deviation (Simpson, 2,000 steps).  ValueError for a
    deviation that is not positive, fewer than two seeds, and an ``alpha`` outside of 2e-9 to 1.
    """
    if not deviation > 0 or not math.isfinite(deviation) or not math.isfinite(difference):
        raise ValueError(f"expected a positive deviation and a finite difference, got {deviation!r}, {difference!r}")
    if not isinstance(seeds, int) or seeds < 2:
        raise ValueError(f"expected at least two seeds, got {seeds!r}")
    if not 2 * _TAIL <= alpha < 1:
        raise ValueError(f"expected alpha from {2 * _TAIL:g} to 1, got {alpha!r}")
    df, shift = seeds - 1, abs(difference) / deviation * math.sqrt(seeds)
    critical = t_quantile(1 - alpha / 2, df)
    log_norm = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)

    def seen(s: float) -> float:  # s: estimated over true deviation; its density times the chance to exceed
        density = math.exp(log_norm + (df - 1) * math.log(s) - df * s * s / 2) if s > 0 else 0.0
        return density * (_normal(shift - critical * s) + _normal(-shift - critical * s))

    spread, steps = 12 / math.sqrt(2 * df), 2000
    low, top = max(0.0, 1 - spread), min(1 + spread, (shift + 9) / critical)  # beyond, the integrand is nothing
    width = (top - low) / steps
    first = low or (width * 1e-6 if df == 1 else 0.0)  # for df 1 the density does not vanish at 0
    inner = math.fsum((4 if i % 2 else 2) * seen(low + i * width) for i in range(1, steps))
    return min(1.0, (seen(first) + inner + seen(top)) * width / 3)


def seeds_needed(difference: float, deviation: float, chance: float = 0.8, alpha: float = 0.05) -> int:
    """The fewest paired seeds with which ``difference`` is seen with a probability of at least ``chance``.

    Errors as in ``power``; ValueError for a difference of 0, which no number of seeds tells from nothing, for a
    ``chance`` outside of 0 to 1, and beyond 4,096 seeds.
    """
    if difference == 0:
        raise ValueError("expected a difference other than 0: no number of seeds tells it from nothing")
    if not 0 < chance < 1:
        raise ValueError(f"expected a chance between 0 and 1, got {chance!r}")
    high = 2
    while power(difference, deviation, high, alpha) < chance:
        high *= 2
        if high > 2**12:
            raise ValueError(f"expected a difference that 4,096 seeds show, got {difference!r} at {deviation!r}")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, deviation, middle, alpha) >= chance else (middle, high)
    return max(high, 2)


def _normal(x: float) -> float:
    """P(Z <= x)."""
    return math.erfc(-x / math.sqrt(2)) / 2
