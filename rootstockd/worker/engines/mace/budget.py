"""How much may be evaluated in one pass: learnt from what passes took, so that memory is not found out by running out.

What a pass takes grows with its atoms and with its edges, and how fast is the model's secret. It need not be known: a
pass that has k times the atoms and m times the edges of one that was measured takes max(k, m) times as much, at most.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

SAFE = 0.8
"""The part of the free memory that a pass may take: allocators leave gaps, and others take memory meanwhile."""
LARGER = 1.25
"""A pass this much larger than those that were measured is measured, too: taking more is never quite in proportion."""
UNTRIED = 0.5
"""The part of the free memory that such a pass may take."""
LEAST = 2**24
"""Bytes that a pass is taken to need, at least: the kernel counts small amounts roughly."""
GROW_AFTER = 300
"""Passes after which larger ones are tried again where memory lacked once: whatever else had it may be gone."""


class Size(NamedTuple):
    """Of a structure, or of all that are in one pass."""

    atoms: int
    edges: int


def total(sizes: Sequence[Size]) -> Size:
    """Of all of them in one pass."""
    return Size(sum(size.atoms for size in sizes), sum(size.edges for size in sizes))


class _Measured(NamedTuple):
    atoms: int
    edges: int
    taken: int


class Budget:
    """What passes take, and which structures go into the same one. No I/O, so that tests walk every path."""

    def __init__(self) -> None:
        self._measured: list[_Measured] = []
        """The largest ones: none has both fewer atoms and fewer edges than another."""
        self._limit: Size | None = None
        """Where memory lacked: for passes of several structures."""
        self._failed = Size(0, 0)
        """The pass for which it lacked."""
        self._good = 0
        """Passes since."""

    def is_new(self, size: Size) -> bool:
        """Whether a pass is so much larger than those before that it is to be measured."""
        atoms, edges = size
        return not any(atoms <= LARGER * known.atoms and edges <= LARGER * known.edges for known in self._measured)

    def learn(self, size: Size, taken: int) -> None:
        """A pass has taken so many bytes, at its worst."""
        new = _Measured(max(size.atoms, 1), max(size.edges, 1), max(taken, LEAST))
        self._measured = [known for known in self._measured if known.atoms > new.atoms or known.edges > new.edges]
        self._measured.append(new)

    def need(self, size: Size) -> float:
        """Bytes that a pass takes, at most; 0 as long as none was measured."""
        return min(
            (taken * max(size.atoms / atoms, size.edges / edges) for atoms, edges, taken in self._measured),
            default=0.0,
        )

    def would_fit(self, size: Size, free: int) -> int:
        """Of a structure for which memory lacked: atoms that one like it may have; 0 where that is not known.

        Args:
            size: its own.
            free: bytes that there were for it.
        """
        need = self.need(size)
        return int(size.atoms * SAFE * free / need) if need > free else 0

    def count(self, sizes: Sequence[Size], free: int) -> int:
        """How many structures, from the first on, go into the next pass.

        Args:
            sizes: of each structure.
            free: bytes.

        Returns:
            At least 1: a structure that is too large for any pass is tried, alone.
        """
        if self._fits(total(sizes), free):
            return len(sizes)
        atoms, edges = sizes[0]
        for number, size in enumerate(sizes[1:], start=1):
            atoms, edges = atoms + size.atoms, edges + size.edges
            if not self._fits(Size(atoms, edges), free):
                return number
        return len(sizes)

    def _fits(self, size: Size, free: int) -> bool:
        if self._limit is not None and (size.atoms > self._limit.atoms or size.edges > self._limit.edges):
            return False
        return self.need(size) <= (UNTRIED if self.is_new(size) else SAFE) * free

    def went_well(self) -> None:
        """A pass had what it needed."""
        if self._limit is None:
            return
        self._good += 1
        if self._good % GROW_AFTER == 0:
            grown = Size(*(most + most // 4 + 1 for most in self._limit))
            failed = self._failed
            self._limit = None if grown.atoms >= failed.atoms and grown.edges >= failed.edges else grown

    def back_off(self, size: Size) -> None:
        """Memory lacked for a pass of several structures all the same: smaller ones from now on."""
        self._failed, self._limit = size, Size(max(1, size.atoms // 2), max(1, size.edges // 2))
        self._good = 0
