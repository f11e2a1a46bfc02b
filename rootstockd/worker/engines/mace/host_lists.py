"""Edges on the host from lists that last: what is left of them at each step is a loop over what may have come near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from rootstockd.worker.engines import Array, Task
from rootstockd.worker.engines.mace.gathering import manageable
from rootstockd.worker.engines.mace.graph import Edges
from rootstockd.worker.engines.mace.kernels import KEEP
from rootstockd.worker.engines.mace.lasting import Lasting
from rootstockd.worker.engines.mace.neighbours import Neighbours
from rootstockd.worker.engines.mace.reference import System
from rootstockd.worker.engines.mace.skin import WIDTH

MOST_EDGES = 1_000_000
"""Edges of all lists that are kept beside those of the last pass, of 32 bytes each."""
LARGE = 20_000
"""Atoms of a batch from which on nothing is kept: it would be a large part of the memory."""


@dataclass(eq=False)
class _List:
    """Pairs that may be edges, E of them, sorted by receiver."""

    receiver: Array
    """(E,) int32."""
    sender: Array
    """(E,) int32."""
    shifts: Array
    """(E, 3) float64, Å: to be added to receiver's less sender's position."""
    skin: float
    """Å."""

    def __len__(self) -> int:
        return len(self.sender)


class HostLists:
    """Lists edges.

    Args:
        cutoff: in Å; a pair at exactly this distance may or may not be there.
    """

    def __init__(self, cutoff: float) -> None:
        self._cutoff = cutoff
        self._lasting = Lasting(self._make, MOST_EDGES)
        self._neighbours = {skin: Neighbours(cutoff + skin) for skin in (0.0, WIDTH)}

    def edges(self, tasks: Sequence[Task]) -> list[Edges]:
        """Of each structure."""
        if sum(len(task.positions) for task in tasks) >= LARGE:
            return [self._neighbours[0.0].edges(task, task.system.pbc) for task in tasks]
        return [self._near(made, task.positions) for made, task in zip(self._lasting.lists(tasks), tasks)]

    def forget(self) -> None:
        """Keep nothing."""
        self._lasting.forget()

    def _make(self, task: Task, skin: float) -> _List:
        system: System = task.system
        cell, positions = manageable(task.cell, task.positions, system.pbc, self._cutoff + skin)
        receiver, sender, shifts = self._neighbours[skin].lasting(cell, positions)
        return _List(receiver.astype(np.int32), sender.astype(np.int32), shifts, skin)

    def _near(self, made: _List, positions: Array) -> Edges:
        room = len(made) + 1  # each is written where the next one goes, whether it is near or not
        receiver, sender, vectors = np.empty(room, np.int64), np.empty(room, np.int64), np.empty((room, 3))
        count = _near(made.receiver, made.sender, made.shifts, positions, self._cutoff**2, receiver, sender, vectors)
        return Edges(len(positions), receiver[:count], sender[:count], vectors[:count])


@numba.njit(cache=KEEP)
def _near(receivers, senders, shifts, positions, square, receiver, sender, vectors):
    """The pairs of a list that are within the cutoff.

    Args:
        receivers: (L,) of the list.
        senders: (L,)
        shifts: (L, 3)
        positions: (N, 3)
        square: of the cutoff.
        receiver: (L + 1,) overwritten, as are the next two.
        sender: (L + 1,)
        vectors: (L + 1, 3) from sender to receiver.

    Returns:
        How many there are.
    """
    count = 0
    for pair in range(receivers.shape[0]):
        i, j = receivers[pair], senders[pair]
        receiver[count], sender[count] = i, j
        total = 0.0
        for axis in range(3):
            component = positions[i, axis] - positions[j, axis] + shifts[pair, axis]
            vectors[count, axis] = component
            total += component * component
        if total < square:
            count += 1
    return count
