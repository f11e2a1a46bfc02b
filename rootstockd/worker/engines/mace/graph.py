"""Neighbours: from structures to their edges, by vesin's lists, and to the edges of one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import vesin

from rootstockd.worker.engines import Array, EngineBrokenError, Task
from rootstockd.worker.engines.mace.candidates import NotApplicableError
from rootstockd.worker.engines.mace.gathering import manageable
from rootstockd.worker.failures import out_of_memory

_MOST_CELLS = 1e5
"""vesin's MAX_NUMBER_OF_CELLS, into which it divides a structure at most."""


class Edges(NamedTuple):
    """One structure's directed edges, sorted by receiver; E of them."""

    atoms: int
    receiver: Array
    """(E,) int64."""
    sender: Array
    """(E,) int64."""
    vectors: Array
    """(E, 3) float64, Å, from sender to receiver."""


@dataclass(frozen=True)
class Graph:
    """The union of some structures' graphs: N atoms, E directed edges, sorted by receiver."""

    receiver: Array
    """(E,) int64."""
    sender: Array
    """(E,) int64."""
    vectors: Array
    """(E, 3) float64, Å, from sender to receiver."""
    first: Array
    """(N + 1,) int64: where each receiver's edges begin."""
    ends: Array
    """(structures,) int64: where each structure's atoms end."""


class Neighbours:
    """Lists edges.

    Args:
        cutoff: in Å; a pair at exactly this distance may or may not be there, and its contribution is zero.
    """

    def __init__(self, cutoff: float) -> None:
        self._cutoff = cutoff
        # one thread: the lists are a hundredth of an evaluation, and more threads only get in the way of its own
        self._list = vesin.NeighborList(cutoff=cutoff, full_list=True, sorted=True, n_threads=1)

    def edges(self, task: Task, pbc: tuple[bool, bool, bool]) -> Edges:
        """A structure's edges.

        Raises:
            NotApplicableError: vesin can't do this cell; so does `lasting`.
        """
        cell, positions = manageable(task.cell, task.positions, pbc, self._cutoff)
        i, j, d = self._compute(positions, cell, "ijD")
        return Edges(len(positions), i.astype(np.int64), j.astype(np.int64), -d)

    def lasting(self, cell: Array, positions: Array) -> tuple[Array, Array]:
        """The edges of a structure that is `manageable`, in a form that holds while atoms move.

        Returns:
            (E, 2) int64, sender and receiver, sorted by receiver; and (E, 3) float64, Å, the lattice vector to be added
            to receiver's less sender's position for the vector from sender to receiver.
        """
        i, j, shifts = self._compute(positions, cell, "ijS")
        return np.stack([j, i], 1).astype(np.int64), -(shifts @ cell)

    def _compute(self, positions: Array, cell: Array, quantities: str) -> tuple[Array, Array, Array]:
        heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        cells = np.maximum(heights // self._cutoff, 1.0)
        if (total := cells.prod()) > _MOST_CELLS and cells.min() * np.cbrt(_MOST_CELLS / total) < 2.0:  # noqa: PLR2004
            # it makes as many fewer along each vector, and where that is none it divides by zero (SIGFPE)
            raise NotApplicableError(f"a cell with heights of {heights.round(2).tolist()} Å")
        try:
            i, j, d = self._list.compute(points=positions, box=cell, periodic=True, quantities=quantities, copy=False)
        except RuntimeError as error:
            if out_of_memory(error):  # vesin 0.6 has freed arrays by now that it will write to next time
                raise EngineBrokenError from error
            raise
        return i, j, d


def union(parts: Sequence[Edges]) -> Graph:
    """One graph of some structures' edges; of one, these arrays are the graph's."""
    ends = list(accumulate(part.atoms for part in parts))
    begins = [0, *ends]
    receiver = _joined([part.receiver + begin if begin else part.receiver for part, begin in zip(parts, begins)])
    sender = _joined([part.sender + begin if begin else part.sender for part, begin in zip(parts, begins)])
    first = np.searchsorted(receiver, np.arange(ends[-1] + 1))
    return Graph(receiver, sender, _joined([part.vectors for part in parts]), first, np.array(ends))


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
