"""How long a batch may take until its worker counts as hung, learnt from how long batches took."""

from __future__ import annotations

MARGIN = 10.0
"""A batch may be so many times as slow as the slowest before it."""
PRIOR = 0.05
"""Seconds an atom for structures larger than any before: twice what mace-torch takes for a large model on two cores."""
FEW = 100
"""A batch of fewer atoms counts as one of so many: what it costs to begin says nothing of what an atom costs."""
FORGET = 0.999
"""What is left of the slowest rates with each new system, or one hiccup would count for ever. Steps don't wear it off:
a session's first structure may cost fifty times its later ones, and so may the next session's."""


class HangLimit:
    """The slowest seconds an atom, and what follows from them.

    Batches in which somebody's first structure is have a rate of their own: what one of these took, which is compared
    and may be compiled for, says nothing of how long others' steps may hang.

    Args:
        least: seconds that any batch may take.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._slowest = {False: 0.0, True: 0.0}
        """By whether there was a first structure in the batch."""
        self.ordinary = 0.0
        """Seconds up to which a batch without one teaches nothing, whatever its size."""

    def learn(self, atoms: int, seconds: float, *, first: bool) -> float:
        """A batch of so many atoms took so long: its rate, in seconds an atom."""
        rate = seconds / max(FEW, atoms)
        self._slowest[first] = max(self._slowest[first], rate)
        self.ordinary = FEW * self._slowest[False]
        return rate

    def new_system(self) -> None:
        """A system comes whose first structure will say anew how slow it may be."""
        for first in self._slowest:
            self._slowest[first] *= FORGET
        self.ordinary = FEW * self._slowest[False]

    def seconds(self, atoms: int, *, first: bool, larger: bool = False, own: float = 0.0) -> float:
        """How long a batch of so many atoms may take.

        Args:
            atoms: of all of it.
            first: somebody's first structure is in it.
            larger: so is an evaluation that is larger than any before.
            own: the rate of the first step of somebody of whom no other is known: their next may be as slow.
        """
        rate = max(own, *self._slowest.values()) if first else max(own, self._slowest[False])
        if larger:
            rate = max(rate, PRIOR)
        return max(self._least, MARGIN * rate * max(atoms, FEW))
