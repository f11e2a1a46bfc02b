"""Programs that dial in as i-PI's clients do: LAMMPS, Quantum ESPRESSO, FHI-aims, VASP, any that speaks its protocol.

The catalogue says what to start and what input to write (`recipe`). A program is started with the first structure of a
system, in a folder of its own, and gets one structure after another over a Unix socket (`driver`). It keeps what it
has for the next (`pool`): a program that dies is started once more for the same structure, and ends with its worker
(`guard`).

What a program does with its first cell may stay: plane waves and meshes are chosen for it. So systems share a program
only if they began with the same cell, and one whose cell has become too different begins anew.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Tuple

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
    refuse_missing,
)
from rootstockd.worker.engines.ipi.driver import Answer, EndedError, NonsenseError
from rootstockd.worker.engines.ipi.frame import ALONE, APART, Frame
from rootstockd.worker.engines.ipi.pool import Key, Pool
from rootstockd.worker.engines.ipi.program import LAST_WORDS, Program, StartError
from rootstockd.worker.engines.ipi.recipe import SYMBOLS, Recipe, read_recipe
from rootstockd.worker.engines.ipi.templates import Context
from rootstockd.worker.files import digest_of
from rootstockd.worker.units import BOHR, HARTREE

log = logging.getLogger(__name__)


_Start = Tuple[Array, Array]
"""Cell and positions that a program is started with, (3, 3) and (natoms, 3), Å."""


@dataclass
class _Prepared:
    """A session's system."""

    system: System
    order: Array
    """(natoms,), which atom of the session's comes at each place of the program's."""
    start: _Start | None = None
    """What its program began with."""


@dataclass(frozen=True)
class _Evaluation:
    """One structure, turned as its program wants it."""

    system: System
    order: Array
    start: _Start
    frame: Frame
    positions: Array
    """(natoms, 3), Å, in the program's order and frame."""
    stress: bool

    @property
    def key(self) -> Key:
        """Which programs can evaluate it."""
        system = self.system
        return system.numbers.tobytes(), system.pbc, system.charge or 0, system.spin or 1, self.start[0].tobytes()


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
        self._pool = Pool(self._recipe.programs)
        parallel = self._recipe.parallel
        self._threads = ThreadPoolExecutor(parallel, "program") if parallel > 1 else None
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
        """So many at a time as the entry allows, each by a program of its own; else one after another."""
        evaluations = [self._evaluation(task) for task in tasks]
        if self._threads is None or len(tasks) == 1:
            return [self._one(evaluation) for evaluation in evaluations]
        futures = [self._threads.submit(self._one, evaluation) for evaluation in evaluations]
        wait(futures)  # also if one fails: the next call shall find all programs at rest
        return [future.result() for future in futures]

    def memory(self) -> int | None:
        """Nothing is known of a GPU."""
        return None

    def _evaluation(self, task: Task) -> _Evaluation:
        """A structure as its program shall see it.

        Raises:
            EngineError: no program can be shown such a one, or none computes what is asked for.
        """
        missing = ["energies"] * task.energies + ["stress"] * (task.stress and not self._recipe.stress)
        refuse_missing(self._name, missing)
        prepared: _Prepared = task.system
        frame = Frame(task.cell, prepared.system.pbc, triangular=self._recipe.triangular)
        if frame.is_too_large(task.positions):
            raise EngineError(
                "invalid-structure",
                f"model {self._name!r}: the structure spans more than {ALONE - APART:g} Å in a direction that is not "
                f"periodic, where {self._program} is given a box of {ALONE:g} Å",
                "Look for an atom that has flown off.",
            )
        positions = frame.place(task.positions[prepared.order])
        if prepared.start is None or prepared.system.exact or self._has_strayed(frame.cell, prepared.start[0]):
            prepared.start = frame.cell, positions
        return _Evaluation(prepared.system, prepared.order, prepared.start, frame, positions, task.stress)

    def _has_strayed(self, cell: Array, start: Array) -> bool:
        """Whether a cell is too far from that which the program was started with."""
        strain = np.linalg.solve(start, cell) - np.eye(3)
        return bool(np.abs(strain).max() > self._recipe.strain)

    def _one(self, evaluation: _Evaluation) -> Result:
        (energy, turned, virial), digest = self._ask(evaluation)
        frame = evaluation.frame
        forces = np.empty_like(turned)
        forces[evaluation.order] = frame.turn_back(turned) * (HARTREE / BOHR)
        self._gave_virial = self._gave_virial or bool(virial.any())
        if evaluation.stress and not self._gave_virial:
            raise EngineError(
                "unsupported",
                f"model {self._name!r}: {self._program} gave a virial of zeros: it computed no stress",
                "Its input may have to ask for it. Where it has none, stress = false in the entry says so.",
            )
        stress = frame.turn_back_tensor(virial) * HARTREE if evaluation.stress else None
        return Result(energy * HARTREE, forces, stress, backend=self._backend(digest))

    def _ask(self, evaluation: _Evaluation) -> Tuple[Answer, str]:
        """What a program says of a structure, and its SHA-256; one that ends over it gets a second try.

        Raises:
            EngineError: it says nothing of use, or nothing at all.
        """
        key, exact = evaluation.key, evaluation.system.exact
        ends = []
        for _ in range(2):
            program = self._pool.take(key, partial(self._start, evaluation), fresh=exact)
            try:
                answer = program.evaluate(evaluation.frame.cell / BOHR, evaluation.positions / BOHR)
            except EndedError:
                ends.append(program.finish(LAST_WORDS))
                self._pool.drop()
                log.warning("model %s: %s ended: %s", self._name, self._program, ends[-1])
            except BaseException as error:
                program.finish()
                self._pool.drop()
                if not isinstance(error, NonsenseError):
                    raise
                raise EngineError(
                    "evaluation",
                    f"model {self._name!r}: {self._program} {error}; it was ended",
                    "Look for atoms that lie on top of each other, and whether the entry's input is for such a system.",
                ) from error
            else:
                if exact:  # what it keeps for the next structure would play a part there
                    program.stop()
                    self._pool.drop()
                else:
                    self._pool.give_back(key, program)
                return answer, program.digest
        raise EngineError(
            "evaluation",
            f"model {self._name!r}: {self._program} ended over this structure, twice: {ends[-1]}",
            "What it printed says why; its input comes from the entry's `files`.",
        )

    def _start(self, evaluation: _Evaluation) -> Program:
        """A program for a system; one that is killed before it has connected is started once more.

        Its file may have changed since the last one was started: it is looked at again.

        Raises:
            EngineError: there is none.
        """
        killed = False
        while True:
            path, digest = check_program(self._name, self._recipe)
            try:
                return Program(self._recipe, path, digest, self._context(evaluation), confined=self._confined)
            except StartError as error:
                if not error.killed or killed:
                    raise EngineError(
                        "evaluation",
                        f"model {self._name!r}: {self._program} {error}",
                        "Its command and its input come from the catalogue's entry; what it printed says what is "
                        "wrong.",
                    ) from error
                log.warning("model %s: %s %s", self._name, self._program, error)
                killed = True

    def _backend(self, digest: str) -> str:
        return f"{self._program} (SHA-256 {digest[:12]}...)"

    def _context(self, evaluation: _Evaluation) -> Context:
        """What templates may name: numbers, symbols of elements, and what the entry says; nothing of a client's."""
        (cell, positions), system, element = evaluation.start, evaluation.system, self._recipe.element
        numbers = system.numbers[evaluation.order].tolist()
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
            "Install it, or name it with its whole path: it is looked for in the daemon's own PATH.",
        )
    digest = digest_of(path)
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
