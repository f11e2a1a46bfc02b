"""How long a batch may take until its worker counts as hung, learnt from how long batches took."""

from __future__ import annotations

MARGIN = 10.0
"""A batch may be so many times as slow as the slowest before it."""
PRIOR = 0.05
"""Seconds an atom for structures larger than any before: twice what mace-torch takes for a large model on two cores."""
FEW = 100
"""A batch of fewer atoms counts as one of so many: what it costs to begin says nothing of what an atom costs."""
FORGET = 0.999
"""What is left of the slowest rate with each new system, or one hiccup would count for ever. Steps don't wear it off:
a session's first structure may cost fifty times its later ones, and so may the next session's."""


class HangLimit:
    """The slowest seconds an atom, and what follows from them.

    Args:
        least: seconds that any batch may take.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._slowest = 0.0
        self.largest = 0
        """Atoms of the largest evaluation that was done."""
        self.ordinary = 0.0
        """Seconds up to which a batch teaches nothing, whatever its size."""

    def learn(self, atoms: int, largest: int, seconds: float) -> None:
        """A batch of so many atoms, the largest of its evaluations so many, took so long."""
        self.largest = max(self.largest, largest)
        rate = seconds / max(FEW, atoms)
        self._slowest = max(self._slowest, rate)
        self.ordinary = FEW * self._slowest

    def new_system(self) -> None:
        """A system comes whose first structure will say anew how slow it may be."""
        self._slowest *= FORGET
        self.ordinary = FEW * self._slowest

    def seconds(self, atoms: int, largest: int) -> float:
        """How long a batch of so many atoms, the largest of its evaluations so many, may take."""
        rate = self._slowest if largest <= self.largest else max(self._slowest, PRIOR)
        return max(self._least, MARGIN * rate * max(atoms, FEW))
