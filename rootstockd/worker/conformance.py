"""What every engine has to do right, checked on the engine itself.

`python -m rootstockd.worker.conformance SPEC` does it for a ModelSpec in JSON, in the Python environment of the model,
and needs no more than the worker does. From a test: `Subject(load_engine(spec), spec)`, and then each of CHECKS.
A check raises ConformanceError, or Skipped where the engine has nothing to check.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rootstockd.worker.engines import Array, Engine, EngineError, ModelSpec, Result, System, Task, load_engine
from rootstockd.worker.failures import describe

PROPERTIES = {"energy", "free_energy", "forces", "stress", "energies"}
PREFERRED = (29, 47, 13, 14, 8, 1)
"""Elements to check with, of those that the engine knows: metals first, which have no directed bonds to break."""
UNLIKELY = 118
"""An element that nobody has a potential for."""
_SPACING = 2.65
"""Å between neighbours."""
_SHARP = 5e-2
_SEED = 20_261_124


class ConformanceError(AssertionError):
    """The engine does not do what it should."""


class Skipped(Exception):
    """The engine has nothing of this kind."""


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may be apart that should be the same."""

    energy: float
    """eV an atom; also of virials."""
    force: float
    """eV/Å."""
    step: float
    """Å, of finite differences."""
    slope: float
    """How far a derivative may be from a finite difference, as part of the largest, if that is over 1."""


TOLERANCES = {
    "float32": Tolerance(energy=1e-4, force=1e-3, step=0.02, slope=3e-2),
    "float64": Tolerance(energy=1e-8, force=1e-8, step=2e-3, slope=1e-5),
}


@dataclass(frozen=True)
class Structure:
    """A structure in Å."""

    name: str
    numbers: Array
    positions: Array
    cell: Array
    pbc: tuple[bool, bool, bool]


class Subject:
    """An engine under examination.

    Args:
        engine: the engine.
        spec: what it was loaded from.
        exact: ask for its reference, one structure at a time.
        tolerance: how far numbers may be apart; by default what the spec's dtype allows.
    """

    def __init__(
        self, engine: Engine, spec: ModelSpec, *, exact: bool = False, tolerance: Tolerance | None = None
    ) -> None:
        self.engine, self.spec, self.exact = engine, spec, exact
        self.tolerance = tolerance or TOLERANCES[spec.dtype]
        if spec.dispersion is not None:  # its cutoffs are sharp
            self.tolerance = dataclasses.replace(self.tolerance, slope=max(_SHARP, self.tolerance.slope))
        self._sessions = itertools.count(1)
        known = engine.info.elements or PREFERRED
        usual = [number for number in PREFERRED if number in known] or list(known)
        self.first, self.second = usual[0], usual[-1 if len(usual) == 1 else 1]
        self.structures = [structure for structure in self._structures() if self.takes(structure)]
        """A crystal, and a slab and a cluster if the engine takes such."""

    @property
    def stress(self) -> bool:
        """Whether the engine computes it."""
        return "stress" in self.engine.info.properties

    @property
    def energies(self) -> bool:
        """Whether the engine has per-atom energies."""
        return "energies" in self.engine.info.properties

    def _structures(self) -> list[Structure]:
        rng = np.random.default_rng(_SEED)
        edge = _SPACING * np.sqrt(2)
        cell = edge * (np.eye(3) + rng.uniform(-0.04, 0.04, (3, 3)))
        fractions = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
        positions = fractions @ cell + rng.uniform(-0.1, 0.1, (4, 3))
        numbers = np.array([self.first, self.first, self.second, self.first])
        empty = cell.copy()
        empty[2] = [0, 0, 25.0]
        return [
            Structure("crystal", numbers, positions, cell, (True, True, True)),
            Structure("slab", numbers, positions, empty, (True, True, False)),
            Structure("cluster", numbers, positions, np.zeros((3, 3)), (False, False, False)),
        ]

    def takes(self, structure: Structure) -> bool:
        """Whether the engine evaluates such structures; it must take crystals."""
        try:
            self.evaluate(structure, stress=False, energies=False)
        except EngineError as error:
            if all(structure.pbc) or error.code != "unsupported":
                raise
            return False
        return True

    def prepare(self, structure: Structure, **more: Any) -> Any:
        """The structure as a system, of a session that all have that need none of their own."""
        head = next(iter(self.engine.info.heads), None)
        fields = {"exact": self.exact, "session": 0, "head": head, **more}
        return self.engine.prepare(System(structure.numbers.copy(), structure.pbc, **fields))

    def task(
        self, structure: Structure, system: Any = None, *, stress: bool | None = None, energies: bool = False
    ) -> Task:
        """The structure as a task; with stress by default if the engine has it and there is a volume."""
        if stress is None:
            stress = self.stress and any(structure.pbc)
        system = self.prepare(structure) if system is None else system
        return Task(system, structure.cell.copy(), structure.positions.copy(), stress, energies)

    def evaluate(self, structure: Structure, system: Any = None, **wanted: Any) -> Result:
        """One structure by itself."""
        (result,) = self.engine.evaluate([self.task(structure, system, **wanted)])
        return result

    def settle(self, structure: Structure) -> Any:
        """A session's system whose first structure was evaluated: some engines compare ways to compute on that."""
        system = self.prepare(structure, session=next(self._sessions))
        self.evaluate(structure, system)
        return system

    def same(self, result: Result, expected: Result, what: str, factor: int = 1) -> None:
        """Whether two results are the same, up to rounding; energy and virial of `factor` times as many atoms."""
        atoms, tolerance = len(expected.forces), self.tolerance
        near(result.energy / factor, expected.energy, atoms * tolerance.energy, f"the energy {what}")
        near(result.forces, expected.forces, tolerance.force, f"the forces {what}")
        if expected.virial is not None and result.virial is not None:
            near(result.virial / factor, expected.virial, atoms * tolerance.energy, f"the virial {what}")
        if expected.energies is not None and result.energies is not None:
            near(result.energies, expected.energies, tolerance.energy * 10, f"the per-atom energies {what}")


def near(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    """Whether numbers are as close as they should be, by the largest of those that are due, if that is over 1."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    require(actual.shape == expected.shape, f"{what}: of shape {actual.shape} where {expected.shape} is due")
    difference = np.abs(actual - expected).max()
    allowed = tolerance * max(1.0, float(np.abs(expected).max()))
    require(difference <= allowed, f"{what}: {difference:.3g} off, where {allowed:.3g} is rounding")


def require(condition: Any, otherwise: str) -> None:
    """Raise if it is not so."""
    if not condition:
        raise ConformanceError(otherwise)


def refused(function: Callable[[], Any], code: str, what: str) -> None:
    """Whether it is refused with the right error."""
    try:
        function()
    except EngineError as error:
        require(error.code == code, f"{what}: refused with {error.code!r} where {code!r} is due: {error.message}")
        require(error.message.strip(), f"{what}: refused without a message")
    except Exception as error:
        raise ConformanceError(f"{what}: {describe(error)}, where an EngineError with {code!r} is due") from error
    else:
        raise ConformanceError(f"{what}: not refused")


# --- the checks


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
    rng = np.random.default_rng(_SEED)
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
    turn, _ = np.linalg.qr(np.random.default_rng(_SEED).normal(size=(3, 3)))
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


def variants(subject: Subject) -> list[Structure]:
    """All structures, each also with its atoms a little elsewhere, and one of half of its atoms."""
    rng, found = np.random.default_rng(_SEED), []
    for structure in subject.structures:
        shaken = structure.positions + rng.normal(scale=0.05, size=structure.positions.shape)
        found.append(structure)
        found.append(dataclasses.replace(structure, positions=shaken))
        found.append(dataclasses.replace(structure, numbers=structure.numbers[:2], positions=structure.positions[:2]))
    return found


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
        positions=_SPACING * np.arange(3.0 * (limit + 1)).reshape(-1, 3),
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
    """Each of its heads is taken, no other is, and those that differ do so also in one batch."""
    crystal, names = subject.structures[0], subject.engine.info.heads
    refused(lambda: subject.prepare(crystal, head="no such head"), "unsupported", "a head that there is not")
    try:
        subject.prepare(crystal, head=None)
    except EngineError as error:
        require(names and error.code == "unsupported", f"no head: refused with {error.code!r}: {error.message}")
    solo = [subject.evaluate(crystal, subject.prepare(crystal, head=name)) for name in names]
    results = subject.engine.evaluate([subject.task(crystal, subject.prepare(crystal, head=name)) for name in names])
    for name, result, expected in zip(names, results, solo):
        subject.same(result, expected, f"of head {name!r} in a batch of several")
    if len(names) > 1:
        energies = [result.energy for result in solo]
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


CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        says_what_it_is,
        shapes_and_types,
        per_atom_energies_add_up,
        forces_are_slopes,
        virial_is_a_slope,
        translation,
        permutation,
        rotation,
        periodic_images,
        batch_equals_solo,
        sessions_do_not_mix,
        results_stay,
        missing_properties_are_refused,
        unknown_elements_are_refused,
        too_many_atoms_are_refused,
        charge_and_spin,
        heads,
        exact_means_the_same_bits,
    )
}


def main(arguments: list[str]) -> int:
    """Load and check; the process's exit status."""
    spec = ModelSpec(**json.loads(arguments[0]))
    engine = load_engine(spec)
    print(f"{spec.name}: {engine.info.backend}", flush=True)
    subject, failed = Subject(engine, spec, exact="--exact" in arguments), 0
    print(f"structures: {', '.join(structure.name for structure in subject.structures)}")
    for name, check in CHECKS.items():
        verdict = "ok"
        try:
            check(subject)
        except Skipped as reason:
            verdict = f"skipped: {reason}"
        except Exception as error:
            failed += 1
            verdict = f"FAILED: {error if isinstance(error, ConformanceError) else describe(error)}"
        print(f"{name}: {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
