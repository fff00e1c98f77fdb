"""A rollback: where training goes on, and what it leaves out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rollback:
    """Where training goes on after a rollback, and what it leaves out."""

    step: int  #: that was restored: batch ``step`` is the first that the state has not seen
    skip: frozenset[int]  #: numbers of the batches to leave out

    def remaining(self, batches: Iterable[Any], first: int = 0) -> Iterator[tuple[int, Any]]:
        """Pairs (number, batch) from ``step`` on, without those to skip; the first of ``batches`` has number ``first``.

        Raises ValueError if ``batches`` begin after ``step``: those in between would be lost without a word.
        """
        if first > self.step:
            raise ValueError(f"expected batches from number {self.step} or earlier, got them from {first} on")
        return ((i, b) for i, b in enumerate(batches, first) if i >= self.step and i not in self.skip)


def numbers_of(batches: Any) -> list[int]:
    """The numbers of the bad batches; none if ``batches`` is how many there are."""
    if isinstance(batches, int) and not isinstance(batches, bool):
        if batches < 1:
            raise ValueError(f"expected at least one batch to skip, got {batches}")
        return []
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise TypeError(f"expected how many batches to skip, or their numbers, got a {type(batches).__name__}")
    numbers = list(batches)
    wrong = [n for n in numbers if not isinstance(n, int) or isinstance(n, bool)]
    if wrong:
        raise TypeError(f"expected the numbers of the batches, got a {type(wrong[0]).__name__} among them")
    if not numbers or min(numbers) < 0:
        raise ValueError(f"expected numbers of batches of at least 0, got {numbers}")
    return numbers
