"""What batches of each size cost, learnt from those that were done: no batch shall be slower than its parts."""

from __future__ import annotations

WORSE = 1.2
"""A larger batch may cost this much more an atom before it counts as slower: timings are noisy."""
WEIGHT = 0.2
"""How much the newest timing counts."""
PATIENCE = 500
"""Batches after which a size that was found slow is tried again: whatever else used the device may be gone."""


class CostCurve:
    """Seconds an atom, by powers of two of the atoms in a batch."""

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}
        self._learnt = 0
        self.limit: int | None = None
        """The most atoms that a batch of several evaluations should have; None while no size is known to be slow."""

    def learn(self, atoms: int, seconds: float) -> None:
        """A batch of so many atoms took so long."""
        size = atoms.bit_length()
        rate = seconds / atoms
        known = self._rates.get(size)
        self._rates[size] = rate if known is None else known + WEIGHT * (rate - known)
        self._learnt += 1
        if self.limit is not None and self._learnt % PATIENCE == 0:
            self._rates = {other: rate for other, rate in self._rates.items() if 2**other <= self.limit}
        self._find_limit()

    def _find_limit(self) -> None:
        cheapest = float("inf")
        self.limit = None
        for size in sorted(self._rates):
            rate = self._rates[size]
            if rate > WORSE * cheapest:
                self.limit = 2 ** (size - 1) - 1  # the largest batch of the size below
                return
            cheapest = min(cheapest, rate)
