"""Which cells can be evaluated."""

from __future__ import annotations

import numpy as np
import pytest

from rootstock_client.errors import InvalidStructureError
from rootstock_client.units import BOHR
from rootstockd.sessions.cells import SHORTEST, check_cells

BULK, SLAB, WIRE = (True, True, True), (True, True, False), (True, False, False)


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.diag([4.0, 4.0, 4.0]), BULK),
        (np.diag([4.0, 4.0, 1.01 * SHORTEST]), BULK),
        (np.diag([4.0, 4.0, 1e-9]), SLAB),  # how long the third vector is means nothing
        (np.diag([4.0, 0.0, 0.0]), WIRE),
        (np.array([[3.0, 0, 0], [50, 3, 0], [-40, 60, 3]]), BULK),  # skewed, but its vectors are long
        (-np.diag([4.0, 4.0, 4.0]), BULK),
    ],
)
def test_cells_that_can_be_evaluated(cell, pbc):
    check_cells(np.array([cell]), pbc)


@pytest.mark.parametrize(
    ("cell", "pbc", "words"),
    [
        (np.diag([1.0, 1.0, 0.0]), BULK, "span no volume"),
        (np.diag([1.0, np.nan, 1.0]), BULK, "not finite"),
        (np.diag([2.0, 2.0, 0.5 * SHORTEST]), BULK, f"of only {0.5 * SHORTEST * BOHR:.2g} Å"),
        (np.diag([2.0, 2.0, 1e-4 * SHORTEST]), BULK, "lattice vector of only"),
        (np.diag([0.5 * SHORTEST, 0.0, 0.0]), WIRE, "lattice vector of only"),
    ],
)
def test_cells_that_can_not(cell, pbc, words):
    with pytest.raises(InvalidStructureError, match=words):
        check_cells(np.array([np.diag([4.0] * 3), cell]), pbc)
