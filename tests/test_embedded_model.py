"""The embedded model is what its card says: EMT, closely enough, on structures that its training never saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc100, fcc110, fcc111
from ase.calculators.emt import EMT
from ase.eos import EquationOfState
from ase.md.langevin import Langevin

from conftest import EMBEDDED_MODEL, RunningDaemon

METALS = {"Al": 3.99, "Ni": 3.49, "Cu": 3.59, "Pd": 3.88, "Ag": 4.06, "Pt": 3.92, "Au": 4.06}
FORCES = 0.050  # eV/Å
ENERGY = 0.005  # eV/atom


def crystal(symbol: str, size: int = 2) -> Atoms:
    return bulk(symbol, a=METALS[symbol], cubic=True) * (size, size, size)


def md(atoms: Atoms, kelvin: float, snapshots: int, seed: int) -> Iterator[Atoms]:
    """Snapshots of a thermostatted run with EMT itself."""
    rng = np.random.default_rng(seed)
    atoms = atoms.copy()
    atoms.calc = EMT()
    width = np.sqrt(atoms.get_masses() * kelvin * units.kB)
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * width[:, None])
    dynamics = Langevin(atoms, 4 * units.fs, temperature_K=kelvin, friction=0.02 / units.fs, fixcm=False, rng=rng)
    dynamics.run(150)
    for _ in range(snapshots):
        dynamics.run(50)
        yield atoms.copy()


def mixed(seed: int, elements: int) -> Atoms:
    """A random alloy at the mean of its metals' lattice constants, rattled."""
    rng = np.random.default_rng(seed)
    symbols = rng.choice(list(METALS), elements, replace=False)
    lattice = np.mean([METALS[symbol] for symbol in symbols])
    atoms = bulk("Cu", a=lattice, cubic=True) * (2, 2, 2)
    atoms.symbols[:] = rng.choice(symbols, len(atoms))
    atoms.rattle(0.08, seed=seed)
    return atoms


def strained(seed: int) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = crystal(list(METALS)[seed % 7], 1)
    strain = np.eye(3) + rng.uniform(-0.04, 0.04, (3, 3))
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.rattle(0.03, seed=seed)
    return atoms


def held_out(kind: str) -> list[Atoms]:
    metals = list(METALS)
    if kind in ("300 K", "1000 K"):
        kelvin = float(kind.split(maxsplit=1)[0])
        return [shot for i, metal in enumerate(metals) for shot in md(crystal(metal), kelvin, 2, 900 + i)]
    if kind == "alloys":
        return [mixed(700 + i, 2 + i % 6) for i in range(12)]
    if kind == "strained":
        return [strained(800 + i) for i in range(14)]
    if kind == "surfaces":
        slabs = [build(m, (2, 2, 4), a=METALS[m], vacuum=7.0) for m in metals for build in (fcc111, fcc100, fcc110)]
        for i, slab in enumerate(slabs):
            slab.rattle(0.06, seed=600 + i)
        return slabs
    vacancies = [crystal(metal) for metal in metals]
    for i, atoms in enumerate(vacancies):
        del atoms[5]
        atoms.rattle(0.06, seed=500 + i)
    return vacancies


@pytest.mark.parametrize("kind", ["300 K", "1000 K", "alloys", "strained", "surfaces", "vacancies"])
def test_energies_and_forces_are_close_to_emt(daemon: RunningDaemon, kind: str) -> None:
    calculator, emt = daemon.client().calculator("mace-emt-small"), EMT()
    energies, forces = [], []
    for atoms in held_out(kind):
        ours, theirs = atoms.copy(), atoms.copy()
        ours.calc, theirs.calc = calculator, emt
        energies.append((ours.get_potential_energy() - theirs.get_potential_energy()) / len(atoms))
        forces.append((ours.get_forces() - theirs.get_forces()).ravel())
    energy, force = np.sqrt(np.mean(np.square(energies))), np.sqrt(np.mean(np.square(np.concatenate(forces))))
    print(f"{kind}: energies {1000 * energy:.2f} meV/atom, forces {1000 * force:.1f} meV/Å")
    assert energy < ENERGY
    assert force < FORCES


@pytest.mark.parametrize("metal", METALS)
def test_lattice_constants(daemon: RunningDaemon, metal: str) -> None:
    constants = []
    for calculator in (daemon.client().calculator("mace-emt-small"), EMT()):
        volumes, energies = [], []
        for scale in np.linspace(0.97, 1.03, 7):
            atoms = bulk(metal, a=METALS[metal] * scale)
            atoms.calc = calculator
            volumes.append(atoms.get_volume())
            energies.append(atoms.get_potential_energy())
        volume, _, _ = EquationOfState(volumes, energies).fit()
        constants.append((4 * volume) ** (1 / 3))
    assert constants[0] == pytest.approx(constants[1], rel=0.01)


def test_its_files() -> None:
    weights = EMBEDDED_MODEL.read_bytes()
    assert len(weights) < 2_000_000
    card = json.loads(EMBEDDED_MODEL.with_suffix(".json").read_text())
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert EMBEDDED_MODEL.with_suffix(".md").is_file()
