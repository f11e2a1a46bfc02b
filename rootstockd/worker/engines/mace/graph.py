"""Neighbours: from structures to the edges of one graph, for vesin's lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import vesin

from rootstockd.worker.engines import Array, Task


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
    """Makes graphs.

    Args:
        cutoff: in Å; a pair at exactly this distance may or may not be there, and its contribution is zero.
    """

    def __init__(self, cutoff: float) -> None:
        # one thread: the lists are a hundredth of an evaluation, and more threads only get in the way of its own
        self._list = vesin.NeighborList(cutoff=cutoff, full_list=True, sorted=True, n_threads=1)

    def graph(self, tasks: Sequence[Task], pbc: Sequence[tuple[bool, bool, bool]]) -> Graph:
        """The union of the tasks' graphs."""
        receivers, senders, vectors, ends, atoms = [], [], [], [], 0
        for task, periodic in zip(tasks, pbc):
            i, j, d = self._list.compute(
                points=np.ascontiguousarray(task.positions),
                box=usable_cell(task.cell, periodic),
                periodic=np.array(periodic),
                quantities="ijD",
                copy=False,
            )
            receivers.append(i.astype(np.int64) + atoms)
            senders.append(j.astype(np.int64) + atoms)
            vectors.append(-d)
            atoms += len(task.positions)
            ends.append(atoms)
        receiver = _joined(receivers)
        first = np.searchsorted(receiver, np.arange(atoms + 1))
        return Graph(receiver, _joined(senders), _joined(vectors), first, np.array(ends))


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def usable_cell(cell: Array, pbc: tuple[bool, bool, bool]) -> Array:
    """A cell of full rank: lattice vectors without pbc may be zero or anything, and are replaced by normals."""
    if all(pbc):
        return cell
    if not any(pbc):
        return np.eye(3)
    whole = cell.copy()
    periodic = [axis for axis in range(3) if pbc[axis]]
    # the last rows of v span what the periodic vectors leave
    normals = np.linalg.svd(cell[periodic])[2][len(periodic) :]
    for axis, normal in zip((axis for axis in range(3) if not pbc[axis]), normals):
        whole[axis] = normal * np.linalg.norm(cell[periodic[0]])
    return whole
