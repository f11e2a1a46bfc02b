"""How fast a worker is just now: what it did in the last seconds."""

from __future__ import annotations

from collections import deque

SPAN = 10.0
"""Seconds that count."""


class Pace:
    """Of evaluations, and of time spent on them, from samples of two counters."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, float]] = deque()

    def sample(self, now: float, evaluations: int, computed: float) -> None:
        """The counters as they are now: evaluations that were done, and seconds of work on them."""
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
