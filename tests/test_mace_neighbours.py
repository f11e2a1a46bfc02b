"""Neighbour lists on the host: those of vesin, and no memory taken for one that does not fit."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mace")

from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mace_backends import AWKWARD, STRUCTURES, engine, medium, task

from rootstockd.worker.engines.mace.gathering import manageable
from rootstockd.worker.engines.mace.neighbours import Neighbours, bins

vesin = pytest.importorskip("vesin")
CUTOFF = 4.5
ROUNDING = 1e-8
"""Å; so close to the cutoff it decides whether an edge is there."""


def rows(receiver, sender, vectors, cutoff):
    """Receiver, sender and vector of each edge, in one order whatever theirs is."""
    assert (np.diff(receiver) >= 0).all(), "sorted by receiver"
    lengths = np.linalg.norm(vectors, axis=1)
    assert (lengths < cutoff + ROUNDING).all()
    found = np.column_stack([receiver, sender, vectors])[lengths < cutoff - ROUNDING]
    return found[np.lexsort(np.round(found, 5).T[::-1])]


def check(cell, positions, pbc, cutoff=CUTOFF):
    """Both forms of the list, of a structure that is periodic along all of its vectors."""
    cell, positions = manageable(cell, positions, pbc, cutoff)
    lists = vesin.NeighborList(cutoff=cutoff, full_list=True, sorted=True)
    i, j, vectors = lists.compute(points=positions, box=cell, periodic=True, quantities="ijD")
    right = rows(i, j, -vectors, cutoff)

    neighbours = Neighbours(cutoff)
    receiver, sender, shifts = neighbours.lasting(cell, positions)
    vectors = positions[receiver] - positions[sender] + shifts
    np.testing.assert_allclose(rows(receiver, sender, vectors, cutoff), right, atol=1e-7)
    images = shifts @ np.linalg.inv(cell)
    np.testing.assert_allclose(images, np.rint(images), atol=1e-7)

    edges = neighbours._listed(cell, positions, vectors=True)
    for found, same in zip(edges, (receiver, sender, vectors), strict=True):
        np.testing.assert_array_equal(found, same)
    forth = np.column_stack(edges)
    back = np.column_stack([sender, receiver, -vectors])
    np.testing.assert_array_equal(np.unique(forth, axis=0), np.unique(back, axis=0))


@pytest.mark.parametrize("name", [*STRUCTURES, *AWKWARD])
def test_they_are_those_of_vesin(name):
    one = task(engine(medium()), {**STRUCTURES, **AWKWARD}[name])
    check(one.cell, one.positions, one.system.pbc)
    cell, positions = manageable(one.cell, one.positions, one.system.pbc, CUTOFF)
    edges = Neighbours(CUTOFF).edges(one, one.system.pbc)
    assert edges.atoms == len(one.positions)
    for found, same in zip(edges[1:], Neighbours(CUTOFF)._listed(cell, positions, vectors=True), strict=True):
        np.testing.assert_array_equal(found, same)


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    atoms=st.integers(1, 60),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    size=st.floats(1.0, 25.0),
    flat=st.sampled_from([1.0, -1.0, 0.2, -5.0, 100.0]),
    away=st.sampled_from([0.0, 1.0, 1e4]),
    filled=st.tuples(*[st.sampled_from([1.0, 1.0, 0.3, 0.05])] * 3),
    cutoff=st.floats(0.5, 6.0),
)
def test_they_are_those_of_vesin_whatever_the_cell(seed, atoms, pbc, size, flat, away, filled, cutoff):
    rng = np.random.default_rng(seed)
    cell = size * (np.eye(3) + 0.5 * rng.uniform(-1, 1, (3, 3)))
    if abs(np.linalg.det(cell)) < 0.05 * size**3:
        cell = size * np.eye(3)
    cell[0] *= flat
    fractions = rng.uniform(0, 1, 3) + rng.uniform(0, 1, (atoms, 3)) * filled + rng.integers(-2, 3, (atoms, 3))
    positions = fractions @ cell + away * rng.integers(-5, 5, (atoms, 3))
    check(cell, positions, pbc, cutoff)


def test_atoms_on_the_faces_of_a_cell():
    cell = np.diag([9.0, 9.0, 9.0])
    corners = np.array(np.meshgrid([0.0, 4.5, 9.0], [0.0, 4.5, -9.0], [-4.5, 0.0, 18.0])).reshape(3, -1).T
    check(cell, corners + 1e-17, (True, True, True), cutoff=5.0)
    check(cell, corners - 1e-17, (True, True, True), cutoff=5.0)


@pytest.mark.parametrize(
    ("side", "pbc"), [(1e3, (True, True, True)), (1e5, (True, True, True)), (1e5, (True, False, True))]
)
def test_clusters_in_a_vast_box_have_bins_of_their_own(side, pbc):
    """Or all pairs of atoms would be looked at."""
    cluster = bulk("Cu", cubic=True) * (8, 8, 8)

    def in_box(side):
        places = np.array([[0.0, 0.0, 0.0], [side / 2, 0.0, side / 2]])  # one lies across the faces of the cell
        positions = (cluster.positions - 14.0 + places[:, None]).reshape(-1, 3)
        return manageable(np.eye(3) * side, positions, pbc, CUTOFF)

    check(*in_box(100.0), (True, True, True))  # vesin can't do them all
    expected, edges = (
        rows(*Neighbours(CUTOFF)._listed(*in_box(length), vectors=True), CUTOFF) for length in (100.0, side)
    )
    np.testing.assert_allclose(edges, expected, atol=1e-7)
    cell, positions = in_box(side)
    found = bins(cell, positions, CUTOFF)
    assert found.counts.prod() <= 4 * len(positions) + 64
    _, in_each = np.unique(found.places, axis=0, return_counts=True)
    assert in_each.max() < 30


TOO_LARGE = """
import resource
from pathlib import Path

import numpy as np

from rootstockd.worker.engines.mace.neighbours import Neighbours

def data():
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()

rng, cell = np.random.default_rng(0), np.eye(3) * 60.0
large, small = rng.uniform(0, 60, (40_000, 3)), rng.uniform(0, 60, (1_000, 3))
neighbours = Neighbours(6.0)
right = neighbours.lasting(cell, small)
before = data()
resource.setrlimit(resource.RLIMIT_DATA, (before + 2**25, resource.RLIM_INFINITY))
for _ in range(3):
    try:
        neighbours.lasting(cell, large)
    except MemoryError:
        pass
    else:
        raise AssertionError("there was room")
    for found, same in zip(neighbours.lasting(cell, small), right, strict=True):
        np.testing.assert_array_equal(found, same)
assert data() < before + 2**23
"""


def test_one_that_does_not_fit_is_an_error_that_leaves_nothing():
    done = subprocess.run([sys.executable, "-c", TOO_LARGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
