"""Which cells can be evaluated."""

from __future__ import annotations

import math

import numpy as np

from rootstock_client import ipi
from rootstock_client.errors import InvalidStructureError
from rootstock_client.units import BOHR

SHORTEST = 0.02
"""Bohr; an atom's own images so close are no structure, and a sphere reaches more of them than there is memory for."""


def check_cells(cells: ipi.FloatArray, pbc: tuple[bool, bool, bool]) -> None:
    """Refuse cells, (frames, 3, 3) with lattice vectors as rows, that can't be repeated along `pbc`.

    Raises:
        InvalidStructureError: they are not finite, or the lattice vectors with pbc span nothing, or one
            of them is next to nothing.
    """
    if not math.isfinite(cells.sum()):
        raise InvalidStructureError("the cell has numbers that are not finite.")
    if not any(pbc):
        return
    for cell in cells:
        vectors = cell[list(pbc)]
        lengths = np.linalg.norm(vectors, axis=1)
        if not np.linalg.det(vectors @ vectors.T) > (1e-6 * lengths.prod()) ** 2:
            raise InvalidStructureError(
                f"the system is periodic (pbc {list(pbc)}), but its lattice vectors span no volume.",
                "Set a cell, or switch pbc off.",
            )
        if (shortest := lengths.min()) < SHORTEST:
            raise InvalidStructureError(
                f"the system is periodic (pbc {list(pbc)}) with a lattice vector of only {shortest * BOHR:.2g} Å; "
                f"at least {SHORTEST * BOHR:.2g} Å are wanted.",
                "Look at the cell's units, or switch pbc off along that vector.",
            )
