"""What batches of each size cost, learnt from those that were done: no batch shall be slower than its parts."""

from __future__ import annotations

WORSE = 1.2
"""A larger batch may cost this much more an atom before it counts as slower: timings are noisy."""
FASTER, SLOWER = 0.5, 0.05
"""How much the newest timing counts: much where it is faster, little where something else may have got in its way."""
ENOUGH = 3
"""Batches of a size until it can be found slow."""
PATIENCE = 300
"""Batches after which all is learnt anew: whatever else used the device may be gone, and structures may be others."""

GAIN = 0.85
"""The part of what it takes by itself that something may cost in a batch with others to gain by it: more is noise."""
STALE = 100
"""Batches without one of a size, after which what was known of that size may be true no more."""
UNKNOWN = 1e-4
"""Seconds an atom until the first batch is done."""


class CostCurve:
    """Seconds an atom, by powers of two of the atoms in a batch."""

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._latest: dict[int, int] = {}
        """Which was the latest batch of a size."""
        self._learnt = 0
        self.limit: int | None = None
        """The most atoms that a batch of several evaluations should have; None while no size is known to be slow."""
        self.cheapest = UNKNOWN
        """Seconds an atom in batches of the size where it costs least."""

    def learn(self, atoms: int, seconds: float) -> None:
        """A batch of so many atoms took so long."""
        self._learnt += 1
        if self.limit is not None and self._learnt % PATIENCE == 0:
            self._rates.clear()
            self._counts.clear()
            self._latest.clear()
        size, rate = atoms.bit_length(), seconds / atoms
        known = self._rates.get(size, rate)
        self._rates[size] = known + (FASTER if rate < known else SLOWER) * (rate - known)
        self._counts[size] = self._counts.get(size, 0) + 1
        self._latest[size] = self._learnt
        self.cheapest = min(self._rates.values())
        self._find_limit()

    def seconds(self, atoms: int) -> float:
        """What a batch of so many atoms probably costs; as for the nearest smaller size where none was that large."""
        rates, size = self._rates, atoms.bit_length()
        if (rate := rates.get(size)) is None:
            below = [known for known in rates if known < size]
            rate = rates[max(below) if below else min(rates)] if rates else UNKNOWN
        return rate * atoms

    def gains(self, atoms: int, more: int) -> bool:
        """Whether so many atoms more cost less with so many than by themselves; true where that is not known."""
        size = (atoms + more).bit_length()
        if self._counts.get(size, 0) < ENOUGH or self._learnt - self._latest[size] > STALE:
            return True
        return self.seconds(atoms + more) - self.seconds(atoms) < GAIN * self.seconds(more)

    def _find_limit(self) -> None:
        cheapest = float("inf")
        self.limit = None
        for size in sorted(self._rates):
            if self._counts[size] < ENOUGH:
                continue
            rate = self._rates[size]
            if rate > WORSE * cheapest:
                self.limit = 2 ** (size - 1) - 1  # the largest batch of the size below
                return
            cheapest = min(cheapest, rate)
