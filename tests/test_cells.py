"""Which cells can be evaluated."""

from __future__ import annotations

import numpy as np
import pytest

from rootstock_client.errors import InvalidStructureError
from rootstock_client.units import BOHR
from rootstockd.sessions.cells import AROUND, DENSEST, LONGEST, SHORTEST, check_cells

BULK, SLAB, WIRE, FREE = (True, True, True), (True, True, False), (True, False, False), (False, False, False)
ONE = np.zeros((1, 3))


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.diag([4.0, 4.0, 4.0]), BULK),
        (np.diag([400.0, 400.0, 1.01 * SHORTEST]), BULK),
        (np.diag([4.0, 4.0, 1e-9]), SLAB),  # how long the third vector is means nothing
        (np.diag([4.0, 0.0, 0.0]), WIRE),
        (np.array([[3.0, 0, 0], [50, 3, 0], [-40, 60, 3]]), BULK),  # skewed, but its vectors are long
        (np.array([[4.0, 0, 0], [0, 4, 0], [0, 3900, 4]]), BULK),  # sheared by a strain of 1,000
        (-np.diag([4.0, 4.0, 4.0]), BULK),
    ],
)
def test_cells_that_can_be_evaluated(cell, pbc):
    check_cells(np.array([cell]), pbc, ONE[None])


@pytest.mark.parametrize(
    ("cell", "pbc", "words"),
    [
        (np.diag([1.0, 1.0, 0.0]), BULK, "span no volume"),
        (
            np.array([[4.0, 0, 0], [0, 4, 0], [0, 4100, 4]]),
            BULK,
            "nearly parallel .* span 0.001 of the",
        ),
        (np.array([[4.0, 0, 0], [400, 4, 0], [4000, 400, 4]]), BULK, "nearly parallel .* span 1e-05 of the"),
        (np.array([[4.0, 0, 0], [400, 0.2, 0], [0, 0, 0]]), SLAB, "nearly parallel"),
        (np.diag([1.0, np.nan, 1.0]), BULK, "not finite"),
        (np.diag([2.0, 2.0, 0.5 * SHORTEST]), BULK, f"of only {0.5 * SHORTEST * BOHR:.2g} Å"),
        (np.diag([2.0, 2.0, 1e-4 * SHORTEST]), BULK, "lattice vector of only"),
        (np.diag([0.5 * SHORTEST, 0.0, 0.0]), WIRE, "lattice vector of only"),
        (np.diag([4.0, 4.0, 1.1 * LONGEST]), BULK, r"a lattice vector of 1.1e\+08 Å"),
        (np.diag([4.0, 1e300, 4.0]), BULK, "a lattice vector of inf Å"),
    ],
)
def test_cells_that_can_not(cell, pbc, words):
    with pytest.raises(InvalidStructureError, match=words):
        check_cells(np.array([np.diag([4.0] * 3), cell]), pbc, np.zeros((2, 1, 3)))


@pytest.mark.parametrize("pbc", [BULK, SLAB, WIRE, FREE])
def test_so_many_atoms_as_there_is_room_for(pbc):
    side = (32 / DENSEST) ** (1 / 3)
    corners = np.zeros((32, 3))
    corners[1] = [side - (0 if repeated else AROUND) for repeated in pbc]
    cell, positions = side * np.eye(3), corners
    check_cells(1.001 * cell[None], pbc, 1.001 * positions[None])
    with pytest.raises(InvalidStructureError, match="32 atoms have 1.6 Å³, which is 20 atoms per Å³; at most 20 are"):
        check_cells(0.999 * cell[None], pbc, 0.999 * positions[None])


@pytest.mark.parametrize("pbc", [SLAB, WIRE, FREE])
def test_positions_that_are_no_numbers_are_for_the_worker(pbc):
    positions = np.array([[[0.0, 0.0, 0.0], [np.nan, np.inf, -np.inf]]])
    check_cells(np.diag([4.0] * 3)[None], pbc, positions)
