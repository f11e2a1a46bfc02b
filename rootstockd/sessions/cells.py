"""Which structures can't be evaluated, by their cells and by how crowded they are."""

from __future__ import annotations

import numpy as np

from rootstock_client import ipi
from rootstock_client.errors import InvalidStructureError
from rootstock_client.units import BOHR
from rootstockd.worker.lattice import normals, spanned

SHORTEST = 0.02
"""Bohr; an atom's own images so close are no structure, and a sphere reaches more of them than there is memory for."""
FLATTEST = 1e-3
"""The least part of the product of their lengths that lattice vectors may span: one plane of a flatter cell has
thousands of images within reach, and who lists neighbours looks at all."""
LONGEST = 1e8 / BOHR
"""Bohr (1e8 Å); across such a cell a float64 has no digits left that matter to forces."""
DENSEST = 20 * BOHR**3
"""Atoms per cubic Bohr (20 per cubic Å), over a hundred times as dense as solids are, and more than hydrogen under
terapascals: what is denser has another unit, and thousands of neighbours for each atom."""
AROUND = 0.5 / BOHR
"""Bohr (0.5 Å); so much room atoms have in all along a direction without pbc, be they in one plane."""


def check_cells(cells: ipi.FloatArray, pbc: tuple[bool, bool, bool], positions: ipi.FloatArray) -> None:
    """Refuse structures whose cells can't be repeated along `pbc`, or that are too dense to be meant.

    Args:
        cells: (frames, 3, 3), Bohr, lattice vectors as rows.
        pbc: which of them are periodic.
        positions: (frames, natoms, 3), Bohr. That these are finite is for the worker to see.

    Raises:
        InvalidStructureError: cells are not finite; or lattice vectors with pbc span next to nothing, or one of them
            is next to nothing or enormous; or there is hardly any room for so many atoms.
    """
    if not np.isfinite(cells).all():
        raise InvalidStructureError("the cell has numbers that are not finite.")
    for cell, places in zip(cells, positions, strict=True):
        vectors = cell[list(pbc)]
        room = _check_lattice(vectors, pbc) if any(pbc) else 1.0
        if not all(pbc):
            with np.errstate(invalid="ignore", over="ignore"):
                room *= np.prod(np.ptp(places @ normals(vectors).T, axis=0) + AROUND)
        if (density := len(places) / room) > DENSEST:
            raise InvalidStructureError(
                f"{len(places)} atoms have {room * BOHR**3:.2g} Å³, which is {density / BOHR**3:.2g} atoms per Å³; "
                f"at most {DENSEST / BOHR**3:.3g} are taken to be meant.",
                "Look at the units of cell and positions: Å in ASE, Bohr in i-PI's messages.",
            )


def _check_lattice(vectors: ipi.FloatArray, pbc: tuple[bool, bool, bool]) -> float:
    """What the lattice vectors with pbc span, in Bohr to the power of their number."""
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
    if (longest := lengths.max()) > LONGEST:
        raise InvalidStructureError(
            f"the system is periodic (pbc {list(pbc)}) with a lattice vector of {longest * BOHR:.2g} Å; "
            f"at most {LONGEST * BOHR:.2g} Å are taken.",
            "Look at the cell's units, or switch pbc off along that vector.",
        )
    room = spanned(vectors)
    if not room > 1e-6 * lengths.prod():
        raise InvalidStructureError(
            f"the system is periodic (pbc {list(pbc)}), but its lattice vectors span no volume.",
            "Set a cell, or switch pbc off.",
        )
    if (part := room / lengths.prod()) < FLATTEST:
        raise InvalidStructureError(
            f"the system is periodic (pbc {list(pbc)}) with nearly parallel lattice vectors, which span {part:.1g} of "
            f"the product of their lengths; at least {FLATTEST:.1g} is wanted.",
            "Choose shorter vectors of the same lattice, as ase.build.niggli_reduce does.",
        )
    if (shortest := lengths.min()) < SHORTEST:
        raise InvalidStructureError(
            f"the system is periodic (pbc {list(pbc)}) with a lattice vector of only {shortest * BOHR:.2g} Å; "
            f"at least {SHORTEST * BOHR:.2g} Å are wanted.",
            "Look at the cell's units, or switch pbc off along that vector.",
        )
    return room
