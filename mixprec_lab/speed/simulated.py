"""A GPU in ten lines: work is queued and runs later, the host does not wait, and the clock is exact.

Real GPUs do three things that spoil timings: a launch returns before the kernel has run, the first call pays for
compilation and allocation, and earlier work may still be in the queue.  ``SimulatedGPU`` does the same three on a clock
of whole nanoseconds, so that a timing bug shows on any machine, and always by the same amount.
"""

from collections.abc import Callable


class SimulatedGPU:
    """A device with one queue and a host clock in nanoseconds that moves only when something happens.

    Launching costs the host ``launch`` ns; the first launch of a kernel costs it ``first`` ns more.
    """

    def __init__(self, launch: int = 5_000, first: int = 300_000_000) -> None:
        if launch < 0 or first < 0:
            raise ValueError(f"expected costs of at least 0 ns, got {launch} and {first}")
        self.launch, self.first = launch, first
        self._now, self._free = 0, 0
        self._known: set[str] = set()

    def perf_counter_ns(self) -> int:
        """The host's clock."""
        return self._now

    def synchronize(self) -> None:
        """The host waits until the queue is empty."""
        self._now = max(self._now, self._free)

    def kernel(self, name: str, duration: int) -> Callable[[], None]:
        """A function that queues ``duration`` ns of work under ``name`` and returns at once."""
        if duration < 0:
            raise ValueError(f"expected a duration of at least 0 ns, got {duration}")

        def run() -> None:
            self._now += self.launch + (0 if name in self._known else self.first)
            self._known.add(name)
            self._free = max(self._free, self._now) + duration

        return run
