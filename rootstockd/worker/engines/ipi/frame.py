"""A structure as a program may see it: the same atoms in a cell that is right-handed, whole, and turned if need be."""

from __future__ import annotations

from typing import Tuple

import numpy as np

from rootstockd.worker.engines import Array
from rootstockd.worker.lattice import normals

ALONE = 1000.0
"""Å from one image to the next in directions that are not periodic."""
APART = 100.0
"""Å that must be left between images there: far beyond where a short-ranged potential reaches."""


class Frame:
    """What turns a session's structure into the program's, and results back.

    Args:
        cell: (3, 3), Å, rows are lattice vectors; those of open directions play no part.
        pbc: which directions are periodic.
        triangular: turn it so that a lies along x and b in the xy plane, each on its positive side, and have all atoms
            within: LAMMPS is of this kind, and loses atoms that its first structure has two cells away, without a word.
    """

    def __init__(self, cell: Array, pbc: Tuple[bool, bool, bool], *, triangular: bool) -> None:
        self._within = triangular
        self._open, cell = _complete(cell, pbc)
        if np.linalg.det(cell) < 0:  # many programs want no left-handed one; inputs know directions by their places
            over = [0, 1, 2] if all(pbc) else [pbc.index(False)]  # the same lattice
            cell = cell.copy()
            cell[over] *= -1
        self._axes = np.eye(3)
        """(3, 3): what a row vector is multiplied by."""
        if triangular and (np.triu(cell, 1).any() or (np.diagonal(cell) < 0).any()):
            axes, upper = np.linalg.qr(cell.T)
            signs = np.sign(np.diagonal(upper))
            self._axes, cell = axes * signs, np.tril((upper.T * signs))
        self.cell = cell
        """(3, 3), Å, as the program sees it."""

    def is_too_large(self, positions: Array) -> bool:
        """Whether atoms, (natoms, 3), Å, would come near their images in a direction that is not periodic."""
        return bool((np.ptp(positions @ self._open.T, axis=0) > ALONE - APART).any())

    def place(self, positions: Array) -> Array:
        """Positions, (natoms, 3), Å, as the program sees them."""
        placed = self.turn(positions)
        if self._within:
            fractions: Array = np.linalg.solve(self.cell.T, placed.T).T
            placed -= np.floor(fractions) @ self.cell
        return placed

    def turn(self, vectors: Array) -> Array:
        """(natoms, 3), from the session's axes to the program's."""
        turned: Array = vectors @ self._axes
        return turned

    def turn_back(self, vectors: Array) -> Array:
        """(natoms, 3), from the program's axes to the session's."""
        turned: Array = vectors @ self._axes.T
        return turned

    def turn_back_tensor(self, tensor: Array) -> Array:
        """(3, 3), from the program's axes to the session's."""
        turned: Array = self._axes @ tensor @ self._axes.T
        return turned


def _complete(cell: Array, pbc: Tuple[bool, bool, bool]) -> Tuple[Array, Array]:
    """Open directions, (n, 3), and the cell with vectors along them that keep images apart."""
    if all(pbc):
        return np.empty((0, 3)), cell
    periodic = np.array(pbc)
    across = normals(cell[periodic])
    cell = cell.copy()
    cell[~periodic] = across * ALONE
    return across, cell
