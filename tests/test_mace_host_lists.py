"""Neighbour lists on the host that last: at each step the edges of a new list, whatever the atoms did meanwhile."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mace")

from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mace_backends import AWKWARD, STRUCTURES, cutoffs_of, engine, medium, task

from rootstockd.worker.engines import Task
from rootstockd.worker.engines.mace import host_lists
from rootstockd.worker.engines.mace.graph import Edges
from rootstockd.worker.engines.mace.host_lists import HostLists
from rootstockd.worker.engines.mace.neighbours import Neighbours
from rootstockd.worker.engines.mace.skin import UNUSED, WIDTH

CUTOFF = 4.5


@pytest.fixture
def made(monkeypatch):
    """The cutoffs of all lists that last."""
    return cutoffs_of(monkeypatch, Neighbours, "lasting")


def rows(edges: Edges):
    """Receiver, sender and vector of each edge, in one order whatever theirs is; none so close to the cutoff that
    rounding decides."""
    lengths = np.linalg.norm(edges.vectors, axis=1)
    assert (lengths < CUTOFF + 1e-9).all()
    assert (np.diff(edges.receiver) >= 0).all(), "sorted by receiver"
    kept = lengths < CUTOFF - 1e-9
    found = np.column_stack([edges.receiver, edges.sender, edges.vectors])[kept]
    return found[np.lexsort(np.round(found, 5).T[::-1])]


def check(lists: HostLists, tasks: list[Task]) -> None:
    for one, found in zip(tasks, lists.edges(tasks), strict=True):
        assert found.atoms == len(one.positions)
        right = Neighbours(CUTOFF).edges(one, one.system.pbc)
        np.testing.assert_allclose(rows(found), rows(right), atol=1e-9)


def moved(one: Task, way, cell=None) -> Task:
    return Task(one.system, one.cell if cell is None else cell, one.positions + way, stress=True, energies=True)


def test_they_are_those_of_a_new_list_in_each_structure():
    lists, of = HostLists(CUTOFF), engine(medium())
    check(lists, [task(of, atoms) for atoms in {**STRUCTURES, **AWKWARD}.values()])


def test_a_list_serves_until_an_atom_has_moved_by_half_the_skin(made):
    lists, one = HostLists(CUTOFF), task(engine(medium()), STRUCTURES["alloy"])
    way = np.zeros_like(one.positions)
    for far in (0.0, 0.2 * WIDTH, 0.49 * WIDTH, -0.49 * WIDTH):
        way[1, 2] = far
        check(lists, [moved(one, way)])
    assert made == [CUTOFF + WIDTH]
    way[1, 2] = 0.51 * WIDTH
    check(lists, [moved(one, way)])
    assert made == [CUTOFF + WIDTH] * 2


def test_structures_that_have_nothing_to_do_with_each_other_soon_have_no_skin(made):
    lists, one = HostLists(CUTOFF), task(engine(medium()), STRUCTURES["alloy"])
    for seed in range(2 * UNUSED):
        check(lists, [moved(one, np.random.default_rng(seed).normal(size=one.positions.shape))])
    assert made == [CUTOFF + WIDTH] * UNUSED + [CUTOFF] * UNUSED


def test_of_large_batches_and_when_memory_lacks_nothing_is_kept(made, monkeypatch):
    lists, of = HostLists(CUTOFF), engine(medium())
    tasks = [task(of, bulk("Cu", cubic=True) * (2, 1, 1)) for _ in range(4)]
    monkeypatch.setattr(host_lists, "LARGE", 32)
    check(lists, tasks)
    assert not made
    for _ in range(2):
        check(lists, tasks[:3])
    assert len(made) == 3
    lists.forget()
    check(lists, tasks[:3])
    assert len(made) == 6


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    atoms=st.integers(1, 30),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    left_handed=st.booleans(),
    steps=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.3, 3.0, 100.0, "cell", "wrapped"]), min_size=1, max_size=12),
)
def test_no_edge_is_missed_whatever_atoms_do(seed, atoms, pbc, left_handed, steps):
    rng = np.random.default_rng(seed)
    cell = rng.uniform(3, 9) * (np.eye(3) + 0.2 * rng.uniform(-1, 1, (3, 3)))
    if left_handed:
        cell[0] *= -1
    one = task(engine(medium()), Atoms(f"Cu{atoms}", rng.uniform(0, 1, (atoms, 3)) @ cell, cell=cell, pbc=pbc))
    lists = HostLists(CUTOFF)
    for step in ["cell", *steps]:
        if step == "cell":
            one = moved(one, 0.0, one.cell * (1 + 0.02 * rng.uniform(-1, 1)))
        elif step == "wrapped":  # as some drivers do on the way
            inside = np.where(pbc, np.floor(one.positions @ np.linalg.inv(one.cell)), 0.0)
            one = moved(one, -inside @ one.cell)
        else:
            one = moved(one, step * rng.uniform(-1, 1, one.positions.shape))
        check(lists, [one])
