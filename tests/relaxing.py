"""Tasks for Dask's workers, which import them from here."""

from __future__ import annotations

import time
from pathlib import Path

from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.optimize import BFGS
from distributed import get_worker

from rootstock_client.dask import calculator
from rootstock_client.errors import ModelChangedError


def rattled(seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=seed)
    return atoms


def relaxed(seed: int, calculator: Calculator) -> tuple[float, int]:
    """The energy (eV) of a cell that was rattled and relaxed, and the evaluations that it took."""
    atoms = rattled(seed)
    atoms.calc = calculator
    optimizer = BFGS(atoms, logfile=None)
    optimizer.run(fmax=0.02)
    return atoms.get_potential_energy(), optimizer.nsteps + 1


def task(seed: int, diary: Path | None = None, victim: str = "", held: Path | None = None) -> tuple[int, float, int]:
    """A relaxation with the node's daemon.

    Args:
        seed: of the structure.
        diary: has a line for each that begins.
        victim: the address of a worker where none ends.
        held: a file that is there as soon as one has begun on that.
    """
    if diary is not None:
        with diary.open("a") as file:
            file.write(f"{seed}\n")
    while held is not None and get_worker().address == victim:
        held.touch()
        time.sleep(0.02)
    return seed, *relaxed(seed, calculator("emt"))


def stubborn(seed: int) -> str:
    """A task that spoils the calculator which it is given."""
    atoms = rattled(seed)
    atoms.calc = calculator("emt")
    atoms.calc.set(exact=True)
    atoms.calc.fingerprint = "0" * 16
    try:
        atoms.get_forces()
    except ModelChangedError as error:
        return error.code
    return ""


def decent(seed: int) -> tuple[str, str | None]:
    """One that leaves it as it is: which calculator, and its potential."""
    atoms = rattled(seed)
    atoms.calc = calculator("emt")
    atoms.get_forces()
    return repr(atoms.calc), atoms.calc.fingerprint


def evaluated(seed: int) -> Atoms:
    """A task that returns atoms with their calculator."""
    atoms = rattled(seed)
    atoms.calc = calculator("emt")
    atoms.get_forces()
    return atoms
