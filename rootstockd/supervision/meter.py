"""What workers have done, counted for as long as the daemon lives.

On the path of a step numbers are only noted down, which costs a tenth of a microsecond; once a second, and when
somebody asks, they are counted all at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.pace import SPAN

_SERIES = (1.0, 2.0, 5.0)
SECONDS = (*(m * 10.0**e for e in range(-5, 2) for m in _SERIES), 100.0)
"""Bounds for evaluations: 10 µs to 100 s."""
LOAD_SECONDS = tuple(float(2**e) for e in range(-1, 10))
"""Bounds for loading a model: 0.5 s to 512 s."""
EVALUATIONS = tuple(float(2**e) for e in range(14))
"""Bounds for the evaluations in a batch: 1 to 8,192."""
ATOMS = tuple(float(2**e) for e in range(3, 19))
"""Bounds for the atoms in a batch: 8 to 262,144."""
MOST_NOTES = 4_096
"""Evaluations that are noted down and not counted yet, at most."""
MOST_KEPT = 1_000
"""Latencies that are kept of those counted at once."""


class Histogram:
    """How often a value was up to each of several bounds.

    Args:
        bounds: in ascending order; each belongs to what is below it.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        """(len(bounds) + 1,), of values up to each bound that are above the one before; the last of those above all."""
        self.sum = 0.0
        self._edges = np.array(bounds)

    def add(self, values: ArrayLike, times: ArrayLike = 1) -> None:
        """Count values, each so many times."""
        values, times = np.broadcast_arrays(np.atleast_1d(values), times)
        np.add.at(self.counts, self._edges.searchsorted(values), times)
        self.sum += float(values @ times)


class Totals:
    """What was done of one model on one device. It never goes back, whatever becomes of the workers."""

    def __init__(self) -> None:
        self.queue, self.worker = Histogram(SECONDS), Histogram(SECONDS)
        """Seconds of an evaluation until it went to the worker, and there: those of its batch."""
        self.evaluations, self.atoms = Histogram(EVALUATIONS), Histogram(ATOMS)
        """Of a batch; their sums are those of all."""
        self.loading = Histogram(LOAD_SECONDS)
        """Seconds."""
        self.busy = 0.0
        """Seconds in which a worker computed."""
        self.restarts = 0


class _Look(NamedTuple):
    """What was counted at once."""

    time: float
    latencies: NDArray[Any]
    """Seconds from an evaluation's submission to its end, of some."""
    evaluations: int
    batches: int


class Meter:
    """Notes down what one worker after another of a model does on a device.

    Args:
        totals: where it is counted.
    """

    def __init__(self, totals: Totals) -> None:
        self.totals = totals
        self._waits: list[float] = []
        self._seconds: list[float] = []
        self._sizes: list[int] = []
        self._atoms: list[int] = []
        self._looks: deque[_Look] = deque()

    def done(self, batch: Sequence[Evaluation[Any]], sent: float, seconds: float) -> None:
        """A batch is done.

        Args:
            batch: its evaluations.
            sent: when it went to the worker, by `time.perf_counter`.
            seconds: how long it took there.
        """
        atoms, waits = 0, self._waits
        for evaluation in batch:
            atoms += evaluation.atoms
            waits.append(sent - evaluation.submitted)
        self._seconds.append(seconds)
        self._sizes.append(len(batch))
        self._atoms.append(atoms)
        if len(waits) > MOST_NOTES:
            self.count()

    def count(self) -> None:
        """Count what was noted down."""
        if not self._sizes:
            return
        waits, seconds = np.array(self._waits), np.array(self._seconds)
        sizes, atoms = np.array(self._sizes), np.array(self._atoms)
        for notes in (self._waits, self._seconds, self._sizes, self._atoms):
            notes.clear()
        totals = self.totals
        totals.queue.add(waits)
        totals.worker.add(seconds, sizes)
        totals.evaluations.add(sizes)
        totals.atoms.add(atoms)
        totals.busy += float(seconds.sum())
        latencies = (waits + np.repeat(seconds, sizes))[:: len(waits) // MOST_KEPT + 1]
        self._looks.append(_Look(time.monotonic(), latencies, len(waits), len(sizes)))
        self._forget()

    def _forget(self) -> None:
        oldest = time.monotonic() - SPAN
        while self._looks and self._looks[0].time < oldest:
            self._looks.popleft()

    def latencies(self, *quantiles: float) -> list[float] | None:
        """Quantiles of the seconds that evaluations took from submission to result lately; None if there were none."""
        self._forget()
        if not self._looks:
            return None
        latencies = np.concatenate([look.latencies for look in self._looks])
        return [float(latency) for latency in np.quantile(latencies, quantiles)]

    @property
    def batch_size(self) -> float | None:
        """Evaluations in a batch, on average, lately; None if there were none."""
        self._forget()
        batches = sum(look.batches for look in self._looks)
        return sum(look.evaluations for look in self._looks) / batches if batches else None
