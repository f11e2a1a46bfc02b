"""Checks of what physics asks for: forces and virials are slopes, and the energy has the symmetries of space."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from rootstockd.worker.conformance.subject import SEED, Skipped, Structure, Subject, near
from rootstockd.worker.engines import Array


def per_atom_energies_add_up(subject: Subject) -> None:
    """Per-atom energies sum to the energy."""
    if not subject.energies:
        raise Skipped("it has no per-atom energies")
    for structure in subject.structures:
        result = subject.evaluate(structure, energies=True)
        assert result.energies is not None
        total, atoms = float(result.energies.sum()), len(structure.numbers)
        near(total, result.energy, atoms * subject.tolerance.energy, f"{structure.name}: the sum of per-atom energies")


def slope(subject: Subject, deformed: Callable[[float], Structure]) -> float:
    """The derivative of the energy at 0, by a finite difference of fourth order."""
    step = subject.tolerance.step
    system = subject.prepare(deformed(0.0))
    energies = {n: subject.evaluate(deformed(n * step), system, stress=False).energy for n in (-2, -1, 1, 2)}
    return float(energies[-2] - 8 * energies[-1] + 8 * energies[1] - energies[2]) / (12 * step)


def forces_are_slopes(subject: Subject) -> None:
    """Forces are minus the slope of the energy, in eV/Å, along random directions and for an atom."""
    rng = np.random.default_rng(SEED)
    for structure in subject.structures:
        forces = subject.evaluate(structure).forces
        single = np.zeros_like(structure.positions)
        single[0, 0] = 1.0
        for direction in [single, *(rng.normal(size=(2, *forces.shape)))]:

            def moved(step: float, direction: Array = direction, structure: Structure = structure) -> Structure:
                return dataclasses.replace(structure, positions=structure.positions + step * direction)

            expected, what = -slope(subject, moved), f"{structure.name}: forces against a finite difference"
            near(np.sum(forces * direction), expected, subject.tolerance.slope, what)


def virial_is_a_slope(subject: Subject) -> None:
    """The virial is minus the slope of the energy with a strain, in eV, and symmetric."""
    if not subject.stress:
        raise Skipped("it has no stress")
    for structure in subject.structures:
        if not any(structure.pbc):
            continue
        virial = subject.evaluate(structure, stress=True).virial
        assert virial is not None
        near(
            virial, virial.T, len(structure.numbers) * subject.tolerance.energy, f"{structure.name}: virial, transposed"
        )
        for i, j in itertools.product(range(3), repeat=2):

            def strained(step: float, i: int = i, j: int = j, structure: Structure = structure) -> Structure:
                deformation = np.eye(3)
                deformation[i, j] += step
                return dataclasses.replace(
                    structure, cell=structure.cell @ deformation, positions=structure.positions @ deformation
                )

            expected, what = -slope(subject, strained), f"{structure.name}: virial {i}{j} against a finite difference"
            near(virial[i, j], expected, subject.tolerance.slope, what)


def translation(subject: Subject) -> None:
    """A structure elsewhere is the same."""
    for structure in subject.structures:
        expected = subject.evaluate(structure)
        for vector in ([0.3, -0.2, 0.7], [40.0, -35.0, 0.0]):
            moved = dataclasses.replace(structure, positions=structure.positions + np.array(vector))
            subject.same(subject.evaluate(moved), expected, f"of a {structure.name} that was moved")


def permutation(subject: Subject) -> None:
    """The order of atoms does not matter."""
    for structure in subject.structures:
        order = np.array([2, 0, 3, 1])
        other = dataclasses.replace(structure, numbers=structure.numbers[order], positions=structure.positions[order])
        expected = subject.evaluate(structure, energies=subject.energies)
        expected.forces = expected.forces[order]
        if expected.energies is not None:
            expected.energies = expected.energies[order]
        actual = subject.evaluate(other, energies=subject.energies)
        subject.same(actual, expected, f"of a {structure.name} with its atoms in another order")


def rotation(subject: Subject) -> None:
    """A structure that was turned has the same energy, and turned forces and virial."""
    turn, _ = np.linalg.qr(np.random.default_rng(SEED).normal(size=(3, 3)))
    turn *= np.linalg.det(turn)
    for structure in subject.structures:
        other = dataclasses.replace(structure, positions=structure.positions @ turn, cell=structure.cell @ turn)
        expected = subject.evaluate(structure)
        expected.forces = expected.forces @ turn
        if expected.virial is not None:
            expected.virial = turn.T @ expected.virial @ turn
        subject.same(subject.evaluate(other), expected, f"of a {structure.name} that was turned")


def periodic_images(subject: Subject) -> None:
    """An atom is the same in any image of the cell; two cells have twice the energy of one; handedness is nothing."""
    for structure in subject.structures:
        if not structure.pbc[0]:
            continue
        expected = subject.evaluate(structure)
        positions = structure.positions.copy()
        positions[1] += 2 * structure.cell[0] - structure.cell[1]
        moved = dataclasses.replace(structure, positions=positions)
        subject.same(subject.evaluate(moved), expected, f"of a {structure.name} with an atom in another image")
        cell = structure.cell.copy()
        cell[0] *= 2
        doubled = dataclasses.replace(
            structure,
            numbers=np.tile(structure.numbers, 2),
            positions=np.concatenate([structure.positions, structure.positions + structure.cell[0]]),
            cell=cell,
        )
        twice = dataclasses.replace(expected, forces=np.tile(expected.forces, (2, 1)), energies=None)
        subject.same(subject.evaluate(doubled), twice, f"of two cells of a {structure.name}", factor=2)
        swapped = dataclasses.replace(structure, cell=structure.cell[[1, 0, 2]])
        subject.same(subject.evaluate(swapped), expected, f"of a {structure.name} in a left-handed cell")


def open_directions(subject: Subject) -> None:
    """Without pbc a lattice vector is nothing; a slab is a crystal with far more empty space than forces reach over."""
    for structure in subject.structures:
        if all(structure.pbc) or not any(structure.pbc):
            continue
        expected = subject.evaluate(structure)
        cell = structure.cell.copy()
        cell[2, 2] = 60.0
        longer = dataclasses.replace(structure, cell=cell)
        subject.same(subject.evaluate(longer), expected, "of a slab with another lattice vector across it")
        cell = cell.copy()
        cell[2, 2] = 300.0
        crystal = dataclasses.replace(structure, cell=cell, pbc=(True, True, True))
        subject.same(subject.evaluate(crystal), expected, "of a slab that is repeated after 300 Å")
