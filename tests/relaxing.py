"""Tasks for Dask's workers, which import them from here."""

from __future__ import annotations

from pathlib import Path

from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.optimize import BFGS

from rootstock_client.dask import calculator


def relaxed(seed: int, calculator: Calculator) -> tuple[float, int]:
    """The energy (eV) of a cell that was rattled and relaxed, and the evaluations that it took."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = calculator
    optimizer = BFGS(atoms, logfile=None)
    optimizer.run(fmax=0.02)
    return atoms.get_potential_energy(), optimizer.nsteps + 1


def task(seed: int, diary: Path | None = None) -> tuple[int, float, int]:
    """A relaxation with the node's daemon; `diary` has a line for each that begins."""
    if diary is not None:
        with diary.open("a") as file:
            file.write(f"{seed}\n")
    return seed, *relaxed(seed, calculator("emt"))
