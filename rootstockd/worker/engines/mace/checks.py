"""No backend is believed: each is compared with the reference, on these structures and on every session's first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from ase.geometry import wrap_positions

from rootstockd.worker.engines import Array, Result, Task
from rootstockd.worker.engines.mace.reference import System
from rootstockd.worker.lattice import normals, spanned

LARGEST = 500
"""Atoms of a session's first structure up to which it is compared whole; of a larger one, a cluster is."""
CROWDED = 150
"""Neighbours, on average, up to which it is: mace-torch takes time and memory by the edge. Solids have 60 to 100."""
FEW = 100
"""The same where memory lacks for that."""
NEUTRAL = {"total_charge": 0.0, "total_spin": 1.0}
_KINDS = ((True, True, True), (True, True, False), (False, False, False))
"""Periodicity of crystals, slabs and clusters."""
_SPACING = 2.6
_SEED = 20_261_124


def structures(elements: Sequence[int], heads: Sequence[str], together: int = 8) -> Iterator[list[Task]]:
    """Structures that span a model's elements: crystals, slabs and clusters of eight atoms and `together` elements.

    Each kind is among them, however few elements there are.

    The last is an atom alone: without edges, some kernels for GPUs may end the process. Each as tasks for all heads, so
    that what is made for its elements is made once.
    """
    rng = np.random.default_rng(_SEED)
    groups = [elements[begin : begin + together] for begin in range(0, len(elements), together)]
    for number in range(max(len(groups), len(_KINDS))):
        numbers = np.array(([*groups[number % len(groups)]] * 8)[:8])
        grid = np.array(list(itertools.product(range(2), repeat=3)), float)
        cell = _SPACING * 2 * (np.eye(3) + rng.uniform(-0.05, 0.05, (3, 3)))
        positions = grid @ cell / 2 + rng.uniform(-0.2, 0.2, grid.shape)
        yield _tasks(numbers, _KINDS[number % len(_KINDS)], cell, positions, heads)
    yield _tasks(np.array(elements[:1]), (False, False, False), np.zeros((3, 3)), np.zeros((1, 3)), heads)


def crystal(elements: Sequence[int], heads: Sequence[str], repeats: int) -> Task:
    """A crystal of 8 atoms, repeated along each of its vectors: to be timed, as a step of MD of one element."""
    (one, *_), *_ = structures(elements[:1], heads[:1])
    cells = np.array(list(itertools.product(range(repeats), repeat=3))) @ one.cell
    system = dataclasses.replace(one.system, numbers=np.tile(one.system.numbers, len(cells)))
    positions = (cells[:, None] + one.positions).reshape(-1, 3)
    return Task(system, repeats * one.cell, positions, stress=True, energies=False)


def _tasks(
    numbers: Array, pbc: tuple[bool, bool, bool], cell: Array, positions: Array, heads: Sequence[str]
) -> list[Task]:
    """A structure, for each head."""
    systems = [
        System(
            numbers,
            pbc,
            head,
            number,
            NEUTRAL,
            exact=False,
            tolerance=0.0,
            session=0,
            check=((), 0, pbc, head, 0.0),
        )
        for number, head in enumerate(heads)
    ]
    return [Task(system, cell, positions, stress=True, energies=True) for system in systems]


def piece(task: Task, cutoff: float, most: int = LARGEST) -> Task:
    """The structure; or, of one with more than `most` atoms, a part with all of its elements, as a cluster.

    So of one with fewer that are crowded. The part is the atom in the middle and what surrounds it, and one atom of
    each element that is not there, with its surroundings. Distances are those of the structure wrapped into its cell,
    so a cluster at its edge has fewer neighbours; both backends are given the same.
    """
    if len(task.positions) * max(1.0, _neighbours(task, cutoff) / CROWDED) <= most:
        return task
    numbers, positions = task.system.numbers, task.positions
    if any(task.system.pbc):
        positions = wrap_positions(positions, task.cell, task.system.pbc)
    from_middle = np.linalg.norm(positions - positions.mean(axis=0), axis=1)
    centres = [int(np.argmin(from_middle))]
    chosen = _around(positions, centres, cutoff, most // 2)
    while len(missing := np.setdiff1d(numbers, numbers[chosen])):  # each time another
        (there,) = np.nonzero(numbers == missing[0])
        centres.append(int(there[np.argmin(from_middle[there])]))
        chosen = _around(positions, centres, cutoff, most // 2)
    system = dataclasses.replace(task.system, numbers=numbers[chosen], pbc=(False, False, False))
    return Task(system, task.cell, positions[chosen], stress=task.stress, energies=task.energies)


def _around(positions: Array, centres: Sequence[int], cutoff: float, most: int) -> Array:
    """About so many atoms, those nearest to some: for each as many."""
    chosen = []
    for centre in centres:
        distances = np.linalg.norm(positions - positions[centre], axis=1)
        nearest = np.argsort(distances)[: max(2, most // len(centres))]
        chosen.append(nearest[distances[nearest] <= 2 * cutoff])
    return np.unique(np.concatenate(chosen))


def joined(task: Task, cutoff: float) -> frozenset[int]:
    """Elements of atoms that have neighbours."""
    # numba, which may end a worker when it is imported, and is not needed where there is nothing to be compared
    from rootstockd.worker.engines.mace.neighbours import Neighbours  # noqa: PLC0415

    edges = Neighbours(cutoff).edges(task, task.system.pbc)
    return frozenset(task.system.numbers[edges.receiver].tolist())


def _neighbours(task: Task, cutoff: float) -> float:
    """How many neighbours an atom has about, by the density of the structure as a whole."""
    pbc: tuple[bool, bool, bool] = task.system.pbc
    vectors = task.cell[list(pbc)]
    extents = np.ptp(task.positions @ normals(vectors).T, axis=0)
    volume = spanned(vectors) * np.prod(np.maximum(extents, cutoff))
    within = len(task.positions) * 4 / 3 * np.pi * cutoff**3 / max(volume, 1e-9)
    return float(within if any(pbc) else min(within, len(task.positions)))


def slope_error(results: dict[str, Result], step: float) -> float:
    """How far a force is from the finite difference of the energy, as part of the largest force.

    Args:
        results: of the structure (`here`), and with its first atom moved along x by `step` (`up`) and -`step` (`down`).
        step: in Å.
    """
    finite = -(results["up"].energy - results["down"].energy) / (2 * step)
    largest = max(1.0, float(np.abs(results["here"].forces).max()))
    return abs(float(results["here"].forces[0, 0]) - finite) / largest


def moved(task: Task, step: float) -> Task:
    """The structure with its first atom moved along x."""
    positions: Array = task.positions.copy()
    positions[0, 0] += step
    return dataclasses.replace(task, positions=positions)
