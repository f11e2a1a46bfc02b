"""A slot as an engine sees it: tasks from what lies in it, and results into it if they are fit to be seen."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np

from rootstockd.worker.engines import LEAVE_OUT, Engine, EngineError, Result, System, Task
from rootstockd.worker.slots import Slot
from rootstockd.worker.units import BOHR, HARTREE

A_DEFECT = "This is a defect of the model's code; `rootstockd logs` may have more."

_BOHR, _PER_HARTREE, _FORCE = np.array(BOHR), np.array(1 / HARTREE), np.array(BOHR / HARTREE)
"""Arrays: numpy takes several times as long to look at a float."""


_FARTHEST = 1e8
"""Å from the origin: there a float64 has no digits left that matter to forces."""

_UNPREPARED = object()


class Attached:
    """A slot and what the engine keeps for its system."""

    _system: Any

    def __init__(self, slot: Slot, fields: dict[str, Any], engine: Engine, fingerprint: str) -> None:
        self.slot = slot
        self.number: int = fields["slot"]
        self.stress: bool = fields["stress"]
        self.energies: bool = fields["energies"]
        self._fingerprint = fingerprint
        self._positions, self._forces, self._virials = list(slot.positions), list(slot.forces), list(slot.virials)
        self._cells: list[np.ndarray] = []
        self._seen = b""
        """The cells as they were at the last step."""
        self._backend: str | None = None
        """What the extras in the slot say, if that is all that they say."""
        pbc = tuple(fields["pbc"])
        self._wanted = System(
            slot.numbers.copy(),
            pbc,
            fields["charge"],
            fields["spin"],
            fields["head"],
            fields["exact"],
            fields["tolerance"],
            fields["session"],
        )
        self._engine, self._system = engine, _UNPREPARED

    def add_tasks(self, tasks: list[Task]) -> None:
        """One task a frame. What is in it belongs to the engine, so that it may keep it.

        Raises:
            EngineError: the engine knows no such system, or positions are not finite, or nowhere.
        """
        if self._system is _UNPREPARED:  # not when it comes: whatever is wrong with it fails one evaluation, no more
            self._system = self._engine.prepare(self._wanted)
        if (cells := self.slot.cells_bytes.tobytes()) != self._seen:
            self._seen, self._cells = cells, list(self.slot.cells * _BOHR)
        for frame, bohr in enumerate(self._positions):
            positions = bohr * _BOHR
            if not is_within(positions, _FARTHEST):
                (atom, _), where = np.argwhere(~(np.abs(positions) < _FARTHEST))[0], f" of structure {frame}"
                where = where if self.slot.frames > 1 else ""
                raise EngineError(
                    "invalid-structure",
                    f"the position of atom {atom}{where} is {positions[atom].tolist()} Å.",
                    "Look at the steps before: at the time step, and at how far from equilibrium the start was.",
                )
            tasks.append(Task(self._system, self._cells[frame], positions, self.stress, self.energies))

    def store(self, results: list[Result]) -> None:
        """Write what the engine gave into the reply, in atomic units, if it is fit to be seen."""
        slot, told = self.slot, not self.energies
        finite = True
        for frame, result in enumerate(results):
            forces = result.forces
            out = self._forces[frame]
            if forces.__class__ is not np.ndarray or forces.dtype is not _FLOAT or forces.shape != out.shape:
                forces = real_numbers(forces, out.shape, "forces")
            np.multiply(forces, _FORCE, out)
            energy = result.energy
            if energy.__class__ is not float:
                energy = real_numbers(energy, (), "energy").item()
            energy /= HARTREE
            finite = finite and math.isfinite(energy)
            slot.energies[frame] = energy
            if self.stress:  # else they are zeros and stay so: the driver did not want it and knows it
                if result.virial is None:
                    raise EngineError("unsupported", "the engine computed no stress", LEAVE_OUT)
                virial = result.virial
                if virial.__class__ is not np.ndarray or virial.dtype is not _FLOAT or virial.shape != (3, 3):
                    virial = real_numbers(virial, (3, 3), "virial")
                np.multiply(virial, _PER_HARTREE, self._virials[frame])
            told = told and result.backend == self._backend
        if not (finite and is_finite(slot.results)):
            raise not_finite()
        if not told:
            self._tell(results)

    def _tell(self, results: list[Result]) -> None:
        """Write the extras. Without per-atom energies they stay the same for thousands of steps."""
        extras = []
        for result in results:
            extra: dict[str, Any] = {"backend": result.backend} if result.backend else {}
            if self._fingerprint:
                extra["fingerprint"] = self._fingerprint
            if self.energies:
                if result.energies is None:
                    raise EngineError("unsupported", "the engine computed no per-atom energies", LEAVE_OUT)
                energies = real_numbers(result.energies, (self.slot.natoms,), "per-atom energies") / HARTREE
                if not is_finite(energies):
                    raise not_finite()
                # digits would take a µs an atom
                extra["energies"] = base64.b64encode(energies.astype("<f8").tobytes()).decode()
            extras.append(json.dumps(extra).encode() if extra else b"")
        self.slot.set_extras(extras)
        backends = {result.backend for result in results}
        self._backend = backends.pop() if len(backends) == 1 else None


_FLOAT = np.dtype(np.float64)


def real_numbers(given: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """What an engine gave as float64, where it is what it should be: numpy would broadcast, parse and unmask.

    Raises:
        EngineError: it is something else.
    """
    numbers = np.ma.filled(given, np.nan) if np.ma.isMaskedArray(given) else np.array(given)
    if numbers.dtype.kind not in "fiu" or numbers.shape != shape:
        raise EngineError(
            "evaluation",
            f"the engine gave {what} of shape {numbers.shape} and type {numbers.dtype} where {shape} of real numbers "
            "were due",
            A_DEFECT,
        )
    with np.errstate(over="ignore"):  # infinity is found with the rest
        return numbers.astype(np.float64)


def not_finite() -> EngineError:
    """What is said of numbers that are none."""
    return EngineError(
        "evaluation",
        "the model gave NaN or infinite numbers for this structure",
        "Look for atoms that lie on top of each other or far outside what the model was trained on.",
    )


_FEW = 10_000
"""So many numbers BLAS multiplies in one thread, and does not wake others up that would be in an engine's way."""


def is_finite(array: np.ndarray) -> bool:
    """Whether all of a contiguous array's numbers are finite: only then their sum is, or that of their squares."""
    if array.size <= _FEW and math.isfinite(np.vdot(array, array)):  # the fastest of all; infinite for enormous ones
        return True
    return math.isfinite(np.add.reduce(array, None)) or bool(np.isfinite(array).all())


def is_within(array: np.ndarray, bound: float) -> bool:
    """Whether all of a contiguous array's numbers are finite, and smaller than this."""
    if array.size <= _FEW and np.vdot(array, array) < bound * bound:
        return True
    return bool(array.min() > -bound and array.max() < bound)
