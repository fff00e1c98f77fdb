"""What a faster part does for the whole: Amdahl's law, and the question it answers backwards."""

import math


def amdahl(fraction: float, speedup: float) -> float:
    """The speed-up of a whole of which ``fraction`` of the time runs ``speedup`` times as fast.

    ``speedup`` may be inf (then 1 / (1 - fraction), inf for fraction 1) and may be below 1 (the part got slower).
    Raises ValueError for a fraction outside [0, 1] and a speed-up that is not positive.  G. Amdahl, AFIPS 1967.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected fraction to be a share of the time from 0 to 1, got {fraction!r}")
    if not speedup > 0:
        raise ValueError(f"expected speedup to be above 0 (inf for free), got {speedup!r}")
    rest = (1 - fraction) + fraction / speedup
    return 1 / rest if rest else math.inf


def amdahl_fraction(overall: float, speedup: float) -> float:
    """The share of the time that must have run ``speedup`` times as fast to make the whole ``overall`` times as fast.

    The share is of the time *before*.  Raises ValueError if ``speedup`` is 1 (it explains nothing), if a value is not
    positive, or if no share from 0 to 1 gives ``overall``: then something else got faster, or slower, too.
    """
    for name, value in (("overall", overall), ("speedup", speedup)):
        if not value > 0:
            raise ValueError(f"expected {name} to be above 0, got {value!r}")
    if speedup == 1:
        raise ValueError("expected a speedup other than 1: a part that runs as before explains no change")
    fraction = (1 - 1 / overall) / (1 - 1 / speedup)
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"expected overall between 1 and {speedup:g}, got {overall:g}: a part that is {speedup:g} times as fast "
            f"cannot explain it alone"
        )
    return fraction
