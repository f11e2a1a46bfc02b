"""Programs that dial in as i-PI's clients do: LAMMPS, Quantum ESPRESSO, FHI-aims, VASP, any that speaks its protocol.

The catalogue says what to start and what input to write (`recipe`). A program is started with the first structure of a
system, in a folder of its own, and gets one structure after another over a Unix socket (`driver`). It keeps what it
has for the next: a program that dies is started once more for the same structure, and ends with its worker (`guard`).

What a program does with its first cell may stay: plane waves and meshes are chosen for it. So systems share a program
only if they began with the same cell, and one whose cell has become too different begins anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Tuple

import numpy as np

from rootstockd.worker.engines import (
    Array,
    EngineError,
    EngineInfo,
    ModelSpec,
    Result,
    System,
    Task,
    check_system,
    choose_head,
)
from rootstockd.worker.engines.ipi.driver import Answer, EndedError, NonsenseError
from rootstockd.worker.engines.ipi.frame import ALONE, APART, Frame
from rootstockd.worker.engines.ipi.program import LAST_WORDS, Program, StartError
from rootstockd.worker.engines.ipi.recipe import SYMBOLS, Recipe, read_recipe
from rootstockd.worker.engines.ipi.templates import Context
from rootstockd.worker.units import BOHR, HARTREE

log = logging.getLogger(__name__)


_Key = Tuple[Any, ...]
"""Equal for systems that one program can evaluate."""


@dataclass
class _Prepared:
    """A session's system."""

    system: System
    order: Array
    """(natoms,), which atom of the session's comes at each place of the program's."""
    start: Tuple[Array, Array] | None = None
    """Cell and positions that its program is started with, (3, 3) and (natoms, 3), Å."""

    @property
    def key(self) -> _Key:
        """Which program."""
        system = self.system
        cell = b"" if self.start is None else self.start[0].tobytes()
        return system.numbers.tobytes(), system.pbc, system.charge or 0, system.spin or 1, cell


class IpiEngine:
    """Programs of one kind, each with a system of its own.

    Args:
        spec: what the catalogue says.

    Raises:
        EngineError: there is no such program, or what the catalogue says makes no sense.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._name = spec.name
        try:
            self._recipe = read_recipe(spec.arguments, [SYMBOLS[number] for number in spec.elements])
        except ValueError as error:
            raise EngineError("model-load", f"model {spec.name!r}: {error}") from error
        self._program = Path(self._recipe.program).name
        self._running: OrderedDict[_Key, Program] = OrderedDict()
        """By the system that it was started for, the one used longest ago first."""
        self._gave_virial = False
        """One that is not zero, at any time: then zeros are meant so."""
        self._confined = spec.confine
        self.info = EngineInfo(
            properties=("energy", "forces", *(["stress"] * self._recipe.stress)),
            elements=tuple(spec.elements),
            backend=self._backend(check_program(spec.name, self._recipe)[1]),
        )

    def prepare(self, system: System) -> _Prepared:
        """The order that its atoms come in, and whether the program's input is for such a system."""
        check_system(self._name, self.info, system, self._recipe.understood)
        choose_head(self._name, (), system.head)
        if system.pbc not in self._recipe.pbc:
            has = " or ".join("".join("FT"[way] for way in pbc) for pbc in self._recipe.pbc)
            raise EngineError(
                "unsupported",
                f"model {self._name!r} is for structures with pbc = {has}, and this one's is "
                f"{''.join('FT'[way] for way in system.pbc)}",
                "Give the structure a cell and pbc=True in all directions, with empty space around what is no crystal."
                if (True, True, True) in self._recipe.pbc
                else "The entry's `pbc` says which its input is for.",
            )
        numbers = system.numbers
        order = np.argsort(numbers, kind="stable") if self._recipe.grouped else np.arange(len(numbers))
        return _Prepared(system, order)

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Each in its turn."""
        return [self._one(task) for task in tasks]

    def memory(self) -> int | None:
        """Nothing is known of a GPU."""
        return None

    def _one(self, task: Task) -> Result:
        if missing := ["energies"] * task.energies + ["stress"] * (task.stress and not self._recipe.stress):
            raise EngineError("unsupported", f"model {self._name!r} computes no {' and no '.join(missing)}")
        prepared: _Prepared = task.system
        frame = Frame(task.cell, prepared.system.pbc, triangular=self._recipe.triangular)
        if frame.is_too_large(task.positions):
            raise EngineError(
                "invalid-structure",
                f"model {self._name!r}: the structure spans more than {ALONE - APART:g} Å in a direction that is not "
                f"periodic, where {self._program} is given a box of {ALONE:g} Å",
                "Look for an atom that has flown off.",
            )
        positions = frame.turn(task.positions[prepared.order])
        if prepared.start is None or prepared.system.exact or self._has_strayed(frame.cell, prepared.start[0]):
            prepared.start = frame.cell, positions
        try:
            (energy, turned, virial), digest = self._ask(prepared, frame.cell, positions)
        finally:
            if prepared.system.exact:  # what it keeps for the next structure would play a part there
                self._end(prepared.key)
        forces = np.empty_like(turned)
        forces[prepared.order] = frame.turn_back(turned) * (HARTREE / BOHR)
        self._gave_virial = self._gave_virial or bool(virial.any())
        if task.stress and not self._gave_virial:
            raise EngineError(
                "unsupported",
                f"model {self._name!r}: {self._program} gave a virial of zeros: it computed no stress",
                "Its input may have to ask for it. Where it has none, stress = false in the entry says so.",
            )
        stress = frame.turn_back_tensor(virial) * HARTREE if task.stress else None
        return Result(energy * HARTREE, forces, stress, backend=self._backend(digest))

    def _has_strayed(self, cell: Array, start: Array) -> bool:
        """Whether a cell is too far from that which the program was started with."""
        strain = np.linalg.solve(start, cell) - np.eye(3)
        return bool(np.abs(strain).max() > self._recipe.strain)

    def _ask(self, prepared: _Prepared, cell: Array, positions: Array) -> Tuple[Answer, str]:
        """What the system's program says of a structure, and its SHA-256; one that ends over it gets a second try.

        Raises:
            EngineError: it says nothing of use, or nothing at all.
        """
        ends = []
        for _ in range(2):
            program = self._program_for(prepared)
            try:
                return program.evaluate(cell / BOHR, positions / BOHR), program.digest
            except EndedError:
                ends.append(program.finish(LAST_WORDS))
                self._running.pop(prepared.key)
                log.warning("model %s: %s ended: %s", self._name, self._program, ends[-1])
            except NonsenseError as error:
                self._running.pop(prepared.key).finish()
                raise EngineError(
                    "evaluation",
                    f"model {self._name!r}: {self._program} {error}; it was ended",
                    "Look for atoms that lie on top of each other, and whether the entry's input is for such a system.",
                ) from error
        raise EngineError(
            "evaluation",
            f"model {self._name!r}: {self._program} ended over this structure, twice: {ends[-1]}",
            "What it printed says why; its input comes from the entry's `files`.",
        )

    def _program_for(self, prepared: _Prepared) -> Program:
        """The one that runs for this system, started if need be; whoever was used longest ago makes room.

        The file may have changed since the last start: it is looked at again.
        """
        if prepared.system.exact:
            self._end(prepared.key)
        elif prepared.key in self._running:
            self._running.move_to_end(prepared.key)
            return self._running[prepared.key]
        while len(self._running) >= self._recipe.programs:
            self._end(next(iter(self._running)))
        path, digest = check_program(self._name, self._recipe)
        try:
            program = Program(self._recipe, path, digest, self._context(prepared), confined=self._confined)
        except StartError as error:
            raise EngineError(
                "evaluation",
                f"model {self._name!r}: {self._program} {error}",
                "Its command and its input come from the catalogue's entry; what it printed says what is wrong.",
            ) from error
        self._running[prepared.key] = program
        return program

    def _end(self, key: _Key) -> None:
        if key in self._running:
            self._running.pop(key).stop()

    def _backend(self, digest: str) -> str:
        return f"{self._program} (SHA-256 {digest[:12]}...)"

    def _context(self, prepared: _Prepared) -> Context:
        """What templates may name: numbers, symbols of elements, and what the entry says; nothing of a client's."""
        assert prepared.start is not None
        (cell, positions), system, element = prepared.start, prepared.system, self._recipe.element
        numbers = system.numbers[prepared.order].tolist()
        kinds = sorted(set(numbers))
        species = {
            number: {**element[SYMBOLS[number]], "type": kind, "symbol": SYMBOLS[number], "number": number}
            for kind, number in enumerate(kinds, 1)
        }
        return {
            "natoms": len(numbers),
            "nelements": len(kinds),
            "charge": float(system.charge or 0),
            "spin": float(system.spin or 1),
            "cell": [_vector(row) for row in cell],
            "lx": float(cell[0, 0]),
            "ly": float(cell[1, 1]),
            "lz": float(cell[2, 2]),
            "xy": float(cell[1, 0]),
            "xz": float(cell[2, 0]),
            "yz": float(cell[2, 1]),
            "elements": [{**species[number], "count": numbers.count(number)} for number in kinds],
            "atoms": [
                {**species[number], **_vector(position), "index": index}
                for index, (number, position) in enumerate(zip(numbers, positions), 1)
            ],
        }


def _vector(row: Array) -> Context:
    return dict(zip("xyz", row.tolist()))


def check_program(name: str, recipe: Recipe) -> Tuple[str, str]:
    """Whether the program is there, and is the one that is meant; its path and its SHA-256.

    Raises:
        EngineError: it is not.
    """
    path = shutil.which(recipe.program)
    if path is None:
        raise EngineError(
            "model-load",
            f"model {name!r}: there is no program {recipe.program!r}",
            "Install it, or name it with its whole path: the daemon's own PATH is where it is looked for, "
            f"{os.environ.get('PATH', '')}.",
        )
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if recipe.sha256 not in ("", digest):
        raise EngineError(
            "model-load",
            f"model {name!r}: {path} has the SHA-256 {digest}, where the catalogue says {recipe.sha256}: the program "
            "is another, or was changed. It was not started",
            f'If you trust this one, write sha256 = "{digest}" into its arguments and `rootstockd reload`.',
        )
    return path, digest


def load(spec: ModelSpec) -> IpiEngine:
    """Look whether all is there; programs start when their systems come.

    Raises:
        EngineError: it is not, or the entry makes no sense.
    """
    return IpiEngine(spec)
