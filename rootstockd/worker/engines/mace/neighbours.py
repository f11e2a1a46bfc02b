"""Neighbour lists on the host, by bins of about the cutoff's width.

Edges are counted before memory is taken for them: a list that does not fit is a MemoryError that leaves nothing behind.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from rootstockd.worker.engines import Array, Task
from rootstockd.worker.engines.mace.gathering import manageable
from rootstockd.worker.engines.mace.graph import Edges
from rootstockd.worker.engines.mace.kernels import KEEP

_MARGIN = 1e-6
"""Å; what rounding may do to distances of atoms that were brought into the cell from 1e8 Å away."""


class Bins(NamedTuple):
    """Where atoms are, in bins along the cell vectors: none is thinner than the cutoff, but where a cell is thinner."""

    wraps: Array
    """(N, 3) float64: how many cells away from the first each atom is."""
    places: Array
    """(N, 3) int64: each atom's bin."""
    counts: Array
    """(3,) int64: how many bins there are; of empty ones side by side, one."""
    reach: Array
    """(3,) int64: how many bins further a neighbour may be."""


def bins(cell: Array, positions: Array, cutoff: float) -> Bins:
    """The bins of a structure.

    Args:
        cell: (3, 3), Å, vectors in rows.
        positions: (N, 3), Å; N > 0.
        cutoff: in Å.
    """
    inverse = np.linalg.inv(cell)
    heights = 1.0 / np.linalg.norm(inverse, axis=0)  # between the faces of the cell
    fractions = positions @ inverse
    wraps = np.floor(fractions)
    inside = fractions - wraps
    fine = np.clip(heights / cutoff, 1, 2**20).astype(np.int64)
    most = 4 * len(positions) + 64
    counts = fine.copy()
    places = _places(inside, fine)
    if counts.prod() > most:  # most are empty
        for axis in range(3):
            places[:, axis], counts[axis] = _without_empty(places[:, axis], counts[axis])
    while counts.prod() > most:  # larger ones will do
        axis = int(counts.argmax())
        fine[axis] = (fine[axis] + 1) // 2
        places[:, axis], counts[axis] = _without_empty(_places(inside, fine)[:, axis], fine[axis])
    return Bins(wraps, places, counts, np.ceil(cutoff * fine / heights).astype(np.int64))


def _places(inside: Array, fine: Array) -> Array:
    """The bin of each atom by where in the cell it is, (N, 3), with so many along each vector."""
    places: Array = np.minimum((inside * fine).astype(np.int64), fine - 1)
    return places


def _without_empty(places: Array, count: int) -> tuple[Array, int]:
    """Bins along one vector, where some are empty side by side with only one of these, so that no others come together.

    Args:
        places: (N,) each atom's.
        count: how many there are.
    """
    occupied, which = np.unique(places, return_inverse=True)
    steps = np.minimum(np.diff(occupied, append=occupied[0] + count), 2)
    return (steps.cumsum() - steps)[which], int(steps.sum())


class Neighbours:
    """Lists edges.

    Args:
        cutoff: in Å; a pair at exactly this distance may or may not be there, and its contribution is zero.
    """

    def __init__(self, cutoff: float) -> None:
        self._cutoff = cutoff

    def edges(self, task: Task, pbc: tuple[bool, bool, bool]) -> Edges:
        """A structure's edges.

        Raises:
            MemoryError: there are too many; so does `lasting`.
        """
        cell, positions = manageable(task.cell, task.positions, pbc, self._cutoff)
        return Edges(len(positions), *self._listed(cell, positions, vectors=True))

    def lasting(self, cell: Array, positions: Array) -> tuple[Array, Array, Array]:
        """The edges of a structure that is `manageable`, in a form that holds while atoms move.

        Returns:
            (E,) int64 receivers, sorted; (E,) int64 senders; and (E, 3) float64, Å, the lattice vector to be added to
            receiver's less sender's position for the vector from sender to receiver.
        """
        return self._listed(cell, positions, vectors=False)

    def _listed(self, cell: Array, positions: Array, *, vectors: bool) -> tuple[Array, Array, Array]:
        wraps, places, counts, reach = bins(cell, positions, self._cutoff)
        first, order, home = _in_order(places, counts)
        inside = positions - wraps @ cell
        atoms = positions, wraps, inside, order, home, inside[order]
        cells = cell, counts, reach, first, self._cutoff
        begins = np.zeros(len(positions) + 1, np.int64)
        nowhere, nothing = np.empty(0, np.int64), np.empty((0, 3))
        _walk(atoms, cells, begins, False, False, nowhere, nowhere, nothing)  # noqa: FBT003 - numba has no keywords here
        total = begins.cumsum(out=begins)[-1]
        receiver, sender, third = np.empty(total, np.int64), np.empty(total, np.int64), np.empty((total, 3))
        _walk(atoms, cells, begins, True, vectors, receiver, sender, third)  # noqa: FBT003
        return receiver, sender, third


@numba.njit(cache=KEEP)
def _in_order(places, counts):
    """Atoms by bins.

    Args:
        places: (N, 3)
        counts: (3,)

    Returns:
        (bins + 1,) where each bin's atoms begin in (N,) atoms in order of their bins, and (N,) each atom's bin.
    """
    atoms = places.shape[0]
    home = np.empty(atoms, np.int64)
    first = np.zeros(counts[0] * counts[1] * counts[2] + 1, np.int64)
    for i in range(atoms):
        home[i] = (places[i, 0] * counts[1] + places[i, 1]) * counts[2] + places[i, 2]
        first[home[i] + 1] += 1
    for number in range(first.shape[0] - 1):
        first[number + 1] += first[number]
    at, order = first.copy(), np.empty(atoms, np.int64)
    for i in range(atoms):
        order[at[home[i]]] = i
        at[home[i]] += 1
    return first, order, home


@numba.njit(cache=KEEP)
def _walk(atoms, cells, begins, fill, vectors, receiver, sender, third):
    """Go over the neighbours of each atom, and count them or write them down.

    Args:
        atoms: positions, (N, 3); how many cells away from the first each is, (N, 3); positions of their images in the
            first, (N, 3); atoms in order of their bins, (N,); each atom's bin, (N,); those images in that order.
        cells: the cell, (3, 3); how many bins there are, (3,); how many further a neighbour may be, (3,); where each
            bin's atoms begin in that order, (bins + 1,); the cutoff.
        begins: (N + 1,) where each receiver's edges begin; or overwritten, with each atom's neighbours behind a zero.
        fill: whether to write them down.
        vectors: whether `third` is to have vectors from sender to receiver, or the lattice vectors in them.
        receiver: (E,) overwritten.
        sender: (E,) overwritten.
        third: (E, 3) overwritten.
    """
    positions, wraps, inside, order, home, binned = atoms
    cell, counts, reach, first, cutoff = cells
    images, lattice, way = np.empty(3, np.int64), np.empty(3), np.empty(3)
    near, square = (cutoff + _MARGIN) ** 2, cutoff**2
    for i in range(positions.shape[0]):
        found = begins[i] if fill else 0
        z = home[i] % counts[2]
        y = home[i] // counts[2] % counts[1]
        x = home[i] // (counts[2] * counts[1])
        for x_there in range(x - reach[0], x + reach[0] + 1):
            images[0] = x_there // counts[0]
            for y_there in range(y - reach[1], y + reach[1] + 1):
                images[1] = y_there // counts[1]
                for z_there in range(z - reach[2], z + reach[2] + 1):
                    images[2] = z_there // counts[2]
                    row = (x_there - images[0] * counts[0]) * counts[1] + y_there - images[1] * counts[1]
                    number = row * counts[2] + z_there - images[2] * counts[2]
                    for axis in range(3):
                        moved = images[0] * cell[0, axis] + images[1] * cell[1, axis] + images[2] * cell[2, axis]
                        way[axis] = inside[i, axis] - moved
                    x_from, y_from, z_from = way[0], way[1], way[2]
                    here = images[0] == 0 and images[1] == 0 and images[2] == 0
                    for place in range(first[number], first[number + 1]):
                        x_way, y_way, z_way = (
                            x_from - binned[place, 0],
                            y_from - binned[place, 1],
                            z_from - binned[place, 2],
                        )
                        if x_way * x_way + y_way * y_way + z_way * z_way > near:
                            continue
                        j = order[place]
                        if here and i == j:
                            continue
                        # as positions have it: the same both ways, to the last bit
                        total = 0.0
                        a = images[0] + wraps[i, 0] - wraps[j, 0]
                        b = images[1] + wraps[i, 1] - wraps[j, 1]
                        c = images[2] + wraps[i, 2] - wraps[j, 2]
                        for axis in range(3):
                            lattice[axis] = -(a * cell[0, axis] + b * cell[1, axis] + c * cell[2, axis])
                            way[axis] = positions[i, axis] - positions[j, axis] + lattice[axis]
                            total += way[axis] * way[axis]
                        if total > square:
                            continue
                        if fill:
                            receiver[found], sender[found] = i, j
                            for axis in range(3):
                                third[found, axis] = way[axis] if vectors else lattice[axis]
                        found += 1
        if not fill:
            begins[i + 1] = found
