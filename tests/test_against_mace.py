"""What comes through a real daemon equals mace-torch's MACECalculator in this process."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.md.verlet import VelocityVerlet

from conftest import EMBEDDED_MODEL, RunningDaemon
from rootstock_client import RootstockClient

LARGEST = 500
"""Atoms up to which a session's first structure is evaluated by mace-torch."""
TRIES = 10
"""How many structures without neighbours are."""


@cache
def reference(dtype: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mace.calculators import MACECalculator

        return MACECalculator(model_paths=str(EMBEDDED_MODEL), device="cpu", default_dtype=dtype)


def rattled(atoms: Atoms, stdev: float = 0.1) -> Atoms:
    atoms.rattle(stdev, seed=7)
    return atoms


def alloy() -> Atoms:
    atoms = bulk("Cu", a=3.8, cubic=True) * (2, 2, 2)
    atoms.numbers[::3] = 79
    atoms.numbers[1::5] = 13
    return rattled(atoms)


def triclinic() -> Atoms:
    atoms = bulk("Ni") * (2, 3, 2)
    strain = np.array([[1.02, 0.03, -0.05], [0.0, 0.98, 0.04], [0.02, 0.0, 1.01]])
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    return rattled(atoms)


def slab() -> Atoms:
    atoms = fcc111("Pt", (2, 2, 4), vacuum=8.0)
    assert atoms.pbc.tolist() == [True, True, False]
    return rattled(atoms)


def cluster() -> Atoms:
    """A molecule's geometry, of metals, with no cell at all."""
    atoms = molecule("CH4")
    atoms.numbers[:] = [29, 47, 47, 78, 28]
    atoms.positions *= 2.3
    return atoms


def left_handed() -> Atoms:
    atoms = triclinic()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


def far_away() -> Atoms:
    atoms = rattled(bulk("Ag", cubic=True))
    atoms.positions += [30.0, -45.0, 100.0]
    return atoms


STRUCTURES: dict[str, Callable[[], Atoms]] = {
    "bulk": lambda: rattled(bulk("Cu", cubic=True) * (2, 2, 2)),
    "primitive": lambda: bulk("Al"),
    "left-handed": left_handed,
    "alloy": alloy,
    "triclinic": triclinic,
    "slab": slab,
    "slab without third vector": lambda: rattled(fcc111("Pt", (2, 2, 3), vacuum=None)),
    "wire": lambda: Atoms("Au2", [[0, 0, 0], [0.2, 0, 2.7]], cell=[0, 0, 5.4], pbc=[False, False, True]),
    "molecule": cluster,
    "one atom": lambda: Atoms("Cu"),
    "two atoms out of reach": lambda: Atoms("CuAu", [[0, 0, 0], [0, 0, 50.0]]),
    "far from its cell": far_away,
    "1,000 atoms": lambda: rattled(bulk("Cu", cubic=True) * (5, 5, 10)),
}

LONELY = ("one atom", "two atoms out of reach")
"""Compared several times, as without neighbours they say nothing of those with."""


def close(ours: object, theirs: object, dtype: str, atoms: int = 1) -> None:
    """float64: within 1e-9 (eV, eV/Å, eV/Å³). float32: mace-torch's own rounding; it subtracts positions and sums the
    energies of all `atoms` in float32, and ours does in float64."""
    rounding = 3e-5 * atoms + 1e-5 * np.abs(theirs).max()
    tolerance = 1e-9 if dtype == "float64" else rounding
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_equals_mace_calculator(daemon: RunningDaemon, name: str, dtype: str) -> None:
    theirs = STRUCTURES[name]()
    ours = theirs.copy()
    ours.calc = daemon.client().calculator("mace-emt-small", dtype=dtype)
    theirs.calc = reference(dtype)
    close(ours.get_potential_energy(), theirs.get_potential_energy(), dtype, len(ours))
    assert ours.calc.backend == ("mace-torch" if len(ours) <= LARGEST else "fused"), "what a first structure gets"
    for _ in range(TRIES - 1 if name in LONELY else 1):
        ours.positions += 0.01
        ours.get_potential_energy()
    ours.positions[:] = theirs.positions
    close(ours.get_potential_energy(), theirs.get_potential_energy(), dtype, len(ours))
    assert ours.calc.backend == "fused"
    close(ours.get_forces(), theirs.get_forces(), dtype)
    close(ours.get_potential_energies(), theirs.get_potential_energies(), dtype)
    if theirs.pbc.all():
        close(ours.get_stress(), theirs.get_stress(), dtype)
    elif theirs.pbc.any() and theirs.cell.rank == 3:
        # MACECalculator divides by the volume of a cell that it stretched along the open directions;
        # ours, as everything else in ASE, by the volume of the cell that the structure has
        stretched = reference(dtype)._atoms_to_batch(theirs)["cell"].double().numpy()
        volume = abs(np.linalg.det(stretched))
        virial = theirs.get_stress() * volume
        close(ours.get_stress(), virial / theirs.get_volume(), dtype)
    ours.calc.close()


def drift(atoms: Atoms) -> tuple[float, float]:
    """Total energy in eV at the beginning and at the end of a short NVE run."""
    width = np.sqrt(atoms.get_masses() * 600 * units.kB)  # of the Maxwell-Boltzmann distribution at 600 K
    atoms.set_momenta(np.random.default_rng(3).normal(size=(len(atoms), 3)) * width[:, None])
    dynamics = VelocityVerlet(atoms, 2 * units.fs)
    before = atoms.get_total_energy()
    dynamics.run(40)
    return before, atoms.get_total_energy()


def test_nve_drift_is_the_same_through_the_daemon(daemon: RunningDaemon) -> None:
    theirs = bulk("Cu", cubic=True) * (2, 2, 2)
    ours = theirs.copy()
    ours.calc = daemon.client().calculator("mace-emt-small")
    theirs.calc = reference("float64")
    np.testing.assert_allclose(drift(ours), drift(theirs), rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.positions, theirs.positions, rtol=0, atol=1e-9)


def job(socket: str, number: int) -> list[tuple[float, np.ndarray]]:
    """A client process: some steps of a system of its own."""
    symbols = ["Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au", "Cu"]
    atoms = bulk(symbols[number], cubic=True) * (1 + number % 2, 1, 1 + number // 4)
    atoms.rattle(0.05, seed=number)
    if socket:
        atoms.calc = RootstockClient(socket).calculator("mace-emt-small")
    else:
        atoms.calc = reference("float64")
    results = []
    for step in range(8):
        atoms.rattle(0.02, seed=100 * number + step)
        results.append((atoms.get_potential_energy(), atoms.get_forces()))
    return results


def test_eight_processes_on_one_worker_get_their_solo_results(daemon: RunningDaemon) -> None:
    before = daemon.model("mace-emt-small")
    # a fresh interpreter each: this one has torch and its threads in it
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        together = pool.starmap(job, [(str(daemon.socket), number) for number in range(8)])
    after = daemon.model("mace-emt-small")
    assert after["pid"] == before["pid"]
    assert after["evaluations"] - before["evaluations"] == 64
    for number, results in enumerate(together):
        for (energy, forces), (solo_energy, solo_forces) in zip(results, job("", number), strict=True):
            close(energy, solo_energy, "float64")
            close(forces, solo_forces, "float64")
