"""Neighbours: from structures to their edges, by vesin's lists, and to the edges of one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import vesin
from ase.geometry.minkowski_reduction import minkowski_reduce

from rootstockd.worker.engines import Array, EngineBrokenError, Task
from rootstockd.worker.failures import out_of_memory

_SKEWED = 0.1
"""A cell whose volume is less than this part of the product of its lengths is reduced."""

_FAR = 1e6
"""Å; structures so far from the origin are brought there, or how many cells away they are would be no integer."""

_NOWHERE = 1e15
"""Å; so far away a position has no digits left to say where it is across."""


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
        """A structure's edges."""
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


def manageable(cell: Array, positions: Array, pbc: tuple[bool, bool, bool], cutoff: float) -> tuple[Array, Array]:
    """A periodic cell and positions with the same neighbours at the same distances, such that no list explodes.

    Lattice vectors without pbc become normals of the others, so long that nothing has neighbours along them: vesin
    takes seconds where it is told that two are not periodic. Wide gaps along them are narrowed, so that an atom that
    flew off costs nothing; a cell so skewed that a sphere reaches many of its images is reduced.
    """
    positions = np.ascontiguousarray(positions)
    periodic = [axis for axis in range(3) if pbc[axis]]
    normals = np.eye(3)
    if periodic:
        cell = _reduced(cell, pbc)
        # the last rows of v span what the periodic vectors leave
        normals = np.linalg.svd(cell[periodic])[2][len(periodic) :]
    if len(normals) == 0:
        return cell, positions
    whole = cell.copy()
    for axis, normal in zip((axis for axis in range(3) if not pbc[axis]), normals):
        along = positions @ normal
        order = np.argsort(along, kind="stable")
        gaps = np.diff(along[order])
        if (gaps > 2.0 * cutoff).any() or not abs(along[order[0]]) < _FAR:
            moved = np.empty(len(order))
            moved[order] = np.concatenate([[0.0], np.cumsum(np.minimum(gaps, 2.0 * cutoff))])
            across = positions - along[:, None] * normal
            across -= (across @ normal)[:, None] * normal  # what rounding left of a long way
            across[np.abs(along) > _NOWHERE] = 0.0
            positions, along = across + moved[:, None] * normal, moved
        whole[axis] = normal * (np.ptp(along) + 3.0 * cutoff)
    return whole, positions


def _reduced(cell: Array, pbc: tuple[bool, bool, bool]) -> Array:
    """A cell of the same lattice with short vectors, where this one is so skewed that a search would be long."""
    vectors = cell[list(pbc)]
    volume = np.sqrt(max(np.linalg.det(vectors @ vectors.T), 0.0))
    if volume > _SKEWED * np.prod(np.linalg.norm(vectors, axis=1)):
        return cell
    return np.ascontiguousarray(minkowski_reduce(cell, pbc=pbc)[0])
