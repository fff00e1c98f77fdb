"""Whether a loss has exploded, by the run's own measure."""

import statistics

_RECENT = 50  # losses that the median is taken over
_FIRST = 5  # losses that say where the run began
_EXPLODED = 100.0  # times the median, or the smallest
_ABOVE_START = 10.0  # times the largest of the first


class LossWatch:
    """The losses of steps without trouble: the first few, and the last ones."""

    def __init__(self) -> None:
        self._first: list[tuple[int, float]] = []
        self._recent: list[tuple[int, float]] = []

    def note(self, step: int, loss: float) -> None:
        """A finite loss of a good step."""
        self._recent = [*self._recent, (step, abs(loss))][-_RECENT:]
        if len(self._first) < _FIRST:
            self._first.append((step, abs(loss)))

    def rewind(self, step: int) -> None:
        """Forget what was seen at ``step`` and after it."""
        self._first = [(s, loss) for s, loss in self._first if s < step]
        self._recent = [(s, loss) for s, loss in self._recent if s < step]

    def explosion(self, loss: float) -> str:
        """In words, by how much ``loss`` is too large; "" if it is not, or too few are known.

        It is if it is over 100 times the median and over 10 times the largest of the first five: a run that has
        converged to nearly nothing may stumble.
        """
        if len(self._first) < _FIRST or not self._recent:
            return ""
        typical = statistics.median(value for _, value in self._recent)
        if abs(loss) > _EXPLODED * typical and abs(loss) > _ABOVE_START * max(value for _, value in self._first):
            return f"the loss is {loss:.3g}, its median {typical:.3g}"
        return ""

    def climbed(self) -> bool:
        """Whether the last loss is over 100 times the smallest of the recent ones."""
        return bool(self._recent) and self._recent[-1][1] > _EXPLODED * min(value for _, value in self._recent)
