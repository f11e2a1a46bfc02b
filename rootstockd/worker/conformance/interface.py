"""Checks of what the interface asks for: types, batches, sessions, and refusing what is not there."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from rootstockd.worker.conformance.subject import (
    PREFERRED,
    SPACING,
    Skipped,
    Subject,
    refused,
    require,
    variants,
)
from rootstockd.worker.engines import EngineError

PROPERTIES = {"energy", "free_energy", "forces", "stress", "energies"}
UNLIKELY = 118
"""An element that nobody has a potential for."""


def says_what_it_is(subject: Subject) -> None:
    """Its info is of the right types, and goes into JSON."""
    info = subject.engine.info
    json.dumps(dataclasses.asdict(info))
    require({"energy", "forces"} <= set(info.properties) <= PROPERTIES, f"properties: {info.properties}")
    require(all(type(number) is int and number > 0 for number in info.elements), f"elements: {info.elements}")
    require(all(type(head) is str for head in info.heads), f"heads: {info.heads}")
    require(info.backend, "it does not say what computes")
    memory = subject.engine.memory()
    require(memory is None or (type(memory) is int and memory >= 0), f"memory: {memory!r}")


def shapes_and_types(subject: Subject) -> None:
    """Results are numpy arrays of float64 of the right shapes, with what was asked for."""
    for structure in subject.structures:
        atoms = len(structure.numbers)
        for stress in {False, subject.stress and any(structure.pbc)}:
            for energies in {False, subject.energies}:
                result = subject.evaluate(structure, stress=stress, energies=energies)
                where = f"{structure.name}, stress {stress}, energies {energies}"
                require(isinstance(result.energy, float), f"{where}: an energy of {type(result.energy)}")
                require(np.isfinite(result.energy), f"{where}: an energy of {result.energy}")
                array(result.forces, (atoms, 3), f"{where}: forces")
                if stress:
                    array(result.virial, (3, 3), f"{where}: virial")
                if energies:
                    array(result.energies, (atoms,), f"{where}: per-atom energies")


def array(value: Any, shape: tuple[int, ...], what: str) -> None:
    """Whether it is a finite array of float64 of this shape."""
    require(isinstance(value, np.ndarray), f"{what}: {type(value)}, and no numpy array")
    require(value.dtype == np.float64, f"{what} of {value.dtype}, and not float64")
    require(value.shape == shape, f"{what} of shape {value.shape} where {shape} is due")
    require(np.isfinite(value).all(), f"{what} that are not finite")


def batch_equals_solo(subject: Subject) -> None:
    """Whoever else is in a batch, in whatever order, and whatever they want to know."""
    structures = variants(subject)
    solo = [subject.evaluate(structure, energies=subject.energies) for structure in structures]
    for order in (range(len(structures)), reversed(range(len(structures)))):
        chosen = list(order)
        systems = [subject.settle(structures[index]) for index in chosen]
        tasks = [
            subject.task(structures[index], system, energies=subject.energies and index % 2 == 0)
            for index, system in zip(chosen, systems)
        ]
        results = subject.engine.evaluate(tasks)
        require(len(results) == len(tasks), f"{len(results)} results for {len(tasks)} tasks")
        for index, result in zip(chosen, results):
            subject.same(result, solo[index], f"of structure {index} ({structures[index].name}) in a batch")
    require(subject.engine.evaluate([]) == [], "a batch of nothing has results")


def sessions_do_not_mix(subject: Subject) -> None:
    """Sessions that take turns get what each would get alone, also when they want to know other things."""
    structures = variants(subject)
    alone = [subject.evaluate(structure, subject.settle(structure)) for structure in structures]
    systems = [subject.settle(structure) for structure in structures]
    for turn in range(2):
        for structure, system, expected in zip(structures, systems, alone):
            result = subject.evaluate(structure, system, energies=subject.energies and turn == 1)
            subject.same(result, expected, f"of a {structure.name} between other sessions")


def results_stay(subject: Subject) -> None:
    """What an evaluation gave is not changed by the next, nor is what it was given."""
    for structure in subject.structures:
        system = subject.settle(structure)
        task = subject.task(structure, system, energies=subject.energies)
        (result,) = subject.engine.evaluate([task])
        kept = dataclasses.replace(
            result,
            forces=result.forces.copy(),
            virial=None if result.virial is None else result.virial.copy(),
            energies=None if result.energies is None else result.energies.copy(),
        )
        moved = dataclasses.replace(structure, positions=structure.positions * 1.01, cell=structure.cell * 1.01)
        subject.evaluate(moved, system, energies=subject.energies)
        subject.same(result, kept, f"of a {structure.name} after the next evaluation")
        require(
            (task.positions == structure.positions).all(), f"{structure.name}: it changed the positions it was given"
        )
        require((task.cell == structure.cell).all(), f"{structure.name}: it changed the cell it was given")
        subject.same(subject.evaluate(structure, system), kept, f"of a {structure.name} that comes again")


def missing_properties_are_refused(subject: Subject) -> None:
    """What it does not compute is refused as unsupported."""
    crystal = subject.structures[0]
    missing = [name for name in ("stress", "energies") if name not in subject.engine.info.properties]
    if not missing:
        raise Skipped("it computes all that there is")
    for name in missing:
        wanted = {"stress": name == "stress", "energies": name == "energies"}
        refused(lambda wanted=wanted: subject.evaluate(crystal, **wanted), "unsupported", name)  # type: ignore[misc]


def unknown_elements_are_refused(subject: Subject) -> None:
    """An element that it does not know, or one that nobody does."""
    info = subject.engine.info
    if not info.elements:
        raise Skipped("it does not say which elements it knows")
    crystal = subject.structures[0]
    unknown = next(number for number in (*PREFERRED, *range(UNLIKELY, 0, -1)) if number not in info.elements)
    for number in {unknown, UNLIKELY} - set(info.elements):
        numbers = crystal.numbers.copy()
        numbers[-1] = number
        other = dataclasses.replace(crystal, numbers=numbers)
        refused(lambda other=other: subject.evaluate(other), "unknown-element", f"element {number}")  # type: ignore[misc]


def too_many_atoms_are_refused(subject: Subject) -> None:
    """A structure above its limit."""
    limit = subject.engine.info.max_atoms
    if limit is None:
        raise Skipped("it has no limit")
    large = dataclasses.replace(
        subject.structures[0],
        numbers=np.full(limit + 1, subject.first),
        positions=SPACING * np.arange(3.0 * (limit + 1)).reshape(-1, 3),
    )
    refused(lambda: subject.evaluate(large), "limit", f"{limit + 1} atoms")


def charge_and_spin(subject: Subject) -> None:
    """They make a difference, or are refused as unsupported; what is the usual for nothing said is not."""
    crystal = subject.structures[-1]
    usual = subject.evaluate(crystal)
    for name, neutral, other in (("charge", 0.0, 1.0), ("spin", 1.0, 3.0)):
        subject.same(
            subject.evaluate(crystal, subject.prepare(crystal, **{name: neutral})), usual, f"with {name} {neutral}"
        )
        try:
            result = subject.evaluate(crystal, subject.prepare(crystal, **{name: other}))
        except EngineError as error:
            require(error.code == "unsupported", f"{name}: refused with {error.code!r}")
        else:
            change = abs(result.energy - usual.energy)
            require(
                change > subject.tolerance.energy, f"a {name} of {other:g} is neither refused nor taken into account"
            )


def heads(subject: Subject) -> None:
    """Each of its heads is taken, no other is, and those that differ do so also in one batch, whatever the sizes."""
    crystal, names = subject.structures[0], subject.engine.info.heads
    refused(lambda: subject.prepare(crystal, head="no such head"), "unsupported", "a head that there is not")
    try:
        subject.prepare(crystal, head=None)
    except EngineError as error:
        require(names and error.code == "unsupported", f"no head: refused with {error.code!r}: {error.message}")
    if len(names) > 1:
        wanted = [(structure, name) for structure in variants(subject) for name in names]
        solo = [subject.evaluate(structure, subject.prepare(structure, head=name)) for structure, name in wanted]
        for order in (slice(None), slice(None, None, -1)):
            tasks = [subject.task(structure, subject.settle(structure, head=name)) for structure, name in wanted[order]]
            for (structure, name), result, expected in zip(wanted[order], subject.engine.evaluate(tasks), solo[order]):
                subject.same(result, expected, f"of a {structure.name}, head {name!r}, in a batch of several")
        energies = [result.energy for result in solo[: len(names)]]
        require(len(set(energies)) > 1, f"all heads give the same energy, {energies[0]}")


def exact_means_the_same_bits(subject: Subject) -> None:
    """With `exact`, a structure has the same result whatever came before, and whoever is in the batch."""
    for structure in subject.structures:
        system = subject.prepare(structure, exact=True)
        task = subject.task(structure, system)
        (first,) = subject.engine.evaluate([task])
        others = [subject.task(other) for other in variants(subject)]
        for result in (subject.engine.evaluate([*others, task])[-1], subject.evaluate(structure, system)):
            require(result.energy == first.energy, f"{structure.name}: the energy has other bits")
            require((result.forces == first.forces).all(), f"{structure.name}: the forces have other bits")
