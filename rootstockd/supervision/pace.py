"""How fast a worker is just now: what it did in the last seconds."""

from __future__ import annotations

from collections import deque

SPAN = 10.0
"""Seconds that count."""
NEWEST = 0.3
"""How much the newest look at a queue counts in its average."""


class Pace:
    """Of evaluations, of time spent on them, and of how many wait, from samples."""

    def __init__(self) -> None:
        self.queue = 0.0
        """Evaluations that wait or are under way, on average."""
        self._samples: deque[tuple[float, int, float]] = deque()

    def sample(self, now: float, evaluations: int, computed: float, queue: int = 0) -> None:
        """Note how things are now.

        Args:
            now: seconds, of any clock.
            evaluations: those that were ever done.
            computed: seconds of work on them.
            queue: those that wait or are under way.
        """
        self.queue += NEWEST * (queue - self.queue)
        samples = self._samples
        samples.append((now, evaluations, computed))
        while len(samples) > 2 and now - samples[1][0] >= SPAN:  # noqa: PLR2004 - two make a difference
            samples.popleft()

    @property
    def rate(self) -> float:
        """Evaluations a second."""
        return self._differences()[0]

    @property
    def load(self) -> float:
        """The part of the time that was spent computing, from 0 to 1."""
        return min(1.0, self._differences()[1])

    def _differences(self) -> tuple[float, float]:
        if not self._samples:
            return 0.0, 0.0
        (then, evaluations, computed), (now, done, total) = self._samples[0], self._samples[-1]
        seconds = now - then
        return ((done - evaluations) / seconds, (total - computed) / seconds) if seconds > 0 else (0.0, 0.0)
