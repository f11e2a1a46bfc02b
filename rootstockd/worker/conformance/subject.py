"""An engine under examination, the structures it is examined with, and how far numbers may be apart."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rootstockd.worker.engines import Array, Engine, EngineError, ModelSpec, Result, System, Task
from rootstockd.worker.failures import describe

PREFERRED = (29, 47, 13, 14, 8, 1)
"""Elements to check with, of those that the engine knows: metals first, which have no directed bonds to break."""
SPACING = 2.65
"""Å between neighbours."""
_SHARP = 5e-2
SEED = 20_261_124


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
        rng = np.random.default_rng(SEED)
        edge = SPACING * np.sqrt(2)
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

    def settle(self, structure: Structure, **more: Any) -> Any:
        """A session's system whose first structure was evaluated: some engines compare ways to compute on that."""
        system = self.prepare(structure, session=next(self._sessions), **more)
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


def variants(subject: Subject) -> list[Structure]:
    """All structures, each also with its atoms a little elsewhere, and one of half of its atoms."""
    rng, found = np.random.default_rng(SEED), []
    for structure in subject.structures:
        shaken = structure.positions + rng.normal(scale=0.05, size=structure.positions.shape)
        found.append(structure)
        found.append(dataclasses.replace(structure, positions=shaken))
        found.append(dataclasses.replace(structure, numbers=structure.numbers[:2], positions=structure.positions[:2]))
    return found
