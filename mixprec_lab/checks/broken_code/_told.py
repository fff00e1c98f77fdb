"""What the checks of the museum share."""

import warnings
from collections.abc import Callable


def told(got: object, words: Callable[[object], object]) -> object:
    """``words(got)``; a stub's None or ... stays what it is."""
    return got if got is None or got is ... else words(got)


def with_warnings(call: Callable[[], object]) -> tuple[object, int]:
    """What ``call`` returns, and how many warnings it raised on the way."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        got = call()
    return got, len(raised)
