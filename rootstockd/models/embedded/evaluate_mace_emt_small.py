"""Measure ``mace-emt-small.model`` against EMT on structures it never saw.

The held-out structures come from other seeds and other protocols than the
training set: longer molecular dynamics, larger cells, set strains.  The tables
are printed as Markdown, the same numbers are written as JSON.

Units are ASE's: Å, eV, eV/Å, eV/Å³, K; errors are printed in meV, meV/Å and
meV/Å³, bulk moduli in GPa.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk, fcc100, fcc110, fcc111
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

SEED = 777
#: EMT's fcc lattice constants, rounded, in Å: only a place to start from.
LATTICE = {"Al": 3.99, "Ni": 3.49, "Cu": 3.59, "Pd": 3.88, "Ag": 4.06, "Pt": 3.92, "Au": 4.06}
METALS = tuple(LATTICE)
SHORTEST = 0.62  # of the bulk distance; pairs closer than this are not judged


def vegard(symbols: list[str]) -> float:
    """Return the lattice constant (Å) of an fcc alloy of mean atomic volume."""
    return float(np.cbrt(np.mean([LATTICE[s] ** 3 for s in symbols])))


def fcc(symbols: list[str], repeat: tuple[int, int, int]) -> Atoms:
    """Return a cubic fcc cell, the symbols repeated over the sites in order."""
    atoms = bulk("Cu", "fcc", a=vegard(symbols), cubic=True)
    if len(symbols) == 4:
        atoms.symbols[:] = symbols
        return atoms.repeat(repeat)
    atoms = atoms.repeat(repeat)
    atoms.symbols[:] = [symbols[i % len(symbols)] for i in range(len(atoms))]
    return atoms


def ordered_alloys() -> list[Atoms]:
    """Return 32-atom L1_2 and L1_0 cells."""
    names = ["Cu Au Au Au", "Au Cu Cu Cu", "Cu Cu Au Au", "Al Ni Ni Ni", "Pt Pt Ni Ni"]
    names += ["Pd Pd Cu Cu", "Ag Al Al Al", "Pd Al Al Al", "Ag Ag Pt Pt"]
    return [fcc(name.split(), (2, 2, 2)) for name in names]


def random_alloys(rng: np.random.Generator, count: int, least: int = 2) -> list[Atoms]:
    """Return 32-atom random alloys of ``least`` to seven elements."""
    images = []
    for i in range(count):
        n = least + i % (8 - least)
        chosen = rng.choice(METALS, n, replace=False)
        images.append(fcc([str(s) for s in rng.choice(chosen, 32)], (2, 2, 2)))
    return images


def snapshots(atoms: Atoms, kelvin: float, rng: np.random.Generator, count: int = 4) -> list[Atoms]:
    """Return snapshots of an EMT Langevin run, 0.4 ps apart after 1.5 ps."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * kelvin, rng=rng)
    md = Langevin(atoms, 5 * units.fs, temperature_K=kelvin, friction=0.02 / units.fs, rng=rng)
    md.run(300)
    images = []
    for _ in range(count):
        md.run(80)
        images.append(atoms.copy())
    return images


def strained(base: Atoms, rng: np.random.Generator) -> list[Atoms]:
    """Return the cell strained by ±3 and ±5 % and sheared, barely displaced."""
    images = []
    for size in (-0.05, -0.03, 0.03, 0.05):
        for deformation in (
            np.eye(3) * (1 + size),
            np.diag([1 + size, 1.0, 1.0]),
            np.eye(3) + size * np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]]),
        ):
            image = base.copy()
            image.set_cell(image.cell.array @ deformation, scale_atoms=True)
            image.positions += rng.normal(0.0, 0.03, image.positions.shape)
            images.append(image)
    return images


def slab(build: Callable[..., Atoms], symbol: str, partner: str | None) -> Atoms:
    """Return a 2x2 slab of six layers with 10 Å of vacuum on each side."""
    a = LATTICE[symbol] if partner is None else vegard([symbol, partner])
    atoms = build(symbol, size=(2, 2, 6), a=a, vacuum=10.0)
    if partner is not None:
        atoms.symbols[::2] = partner
    atoms.pbc = True
    return atoms


def vacancies() -> list[Atoms]:
    """Return 31-atom cells, one of each metal and four alloys, one atom missing."""
    cells = [fcc([s], (2, 2, 2)) for s in METALS] + ordered_alloys()[:4]
    for cell in cells:
        del cell[5]
    return cells


def held_out() -> Iterator[tuple[str, list[Atoms]]]:
    """Yield each held-out set with its name."""
    rng = np.random.default_rng(SEED)
    pure = [fcc([s], (2, 2, 2)) for s in METALS]
    alloys = ordered_alloys() + random_alloys(rng, 6)
    facets = (fcc100, fcc110, fcc111)
    slabs = [slab(build, s, None) for build in facets for s in METALS]
    slabs += [slab(build, a, b) for build in facets for a, b in (("Cu", "Au"), ("Pt", "Ni"))]
    for kelvin in (300.0, 1000.0):
        yield f"pure metals, {kelvin:.0f} K", [i for a in pure for i in snapshots(a, kelvin, rng)]
        yield f"alloys, {kelvin:.0f} K", [i for a in alloys for i in snapshots(a, kelvin, rng)]
    yield (
        "strained cells, ±3 and ±5 %",
        [i for a in pure + alloys[:5] for i in strained(a, rng)],
    )
    randoms = random_alloys(rng, 48)
    for atoms in randoms:
        atoms.rattle(rng.uniform(0.02, 0.15), rng=rng)
    yield "random alloys of 2-7 elements", randoms
    yield "slabs, ideal", slabs
    yield "slabs, 300 K", [i for a in slabs for i in snapshots(a, 300.0, rng, 2)]
    yield "vacancies, ideal", vacancies()
    yield "vacancies, 600 K", [i for a in vacancies() for i in snapshots(a, 600.0, rng, 2)]


def errors(images: list[Atoms], calc: Calculator) -> dict[str, float]:
    """Return the errors of ``calc`` against EMT over ``images``."""
    de, df, ds, reference = [], [], [], []
    for atoms in images:
        got, want = atoms.copy(), atoms.copy()
        got.calc, want.calc = calc, EMT()
        de.append((got.get_potential_energy() - want.get_potential_energy()) / len(atoms))
        df.append((got.get_forces() - want.get_forces()).ravel())
        reference.append(want.get_forces().ravel())
        ds.append(got.get_stress() - want.get_stress())
    forces = np.concatenate(df)

    def rms(x: Any) -> float:
        return round(float(np.sqrt(np.mean(np.square(x))) * 1e3), 3)

    return {
        "structures": len(images),
        "atoms": sum(len(a) for a in images),
        "energy_rmse_meV_per_atom": rms(de),
        "energy_max_meV_per_atom": round(float(np.abs(de).max() * 1e3), 3),
        "force_rmse_meV_per_A": rms(forces),
        "force_max_meV_per_A": round(float(np.abs(forces).max() * 1e3), 3),
        "force_rms_of_emt_meV_per_A": rms(np.concatenate(reference)),
        "stress_rmse_meV_per_A3": rms(ds),
    }


def fcc_properties(symbol: str, calc: Calculator) -> tuple[float, float]:
    """Return the fcc lattice constant (Å) and the bulk modulus (GPa)."""

    def pressure(a: float) -> float:
        atoms = bulk(symbol, "fcc", a=a, cubic=True)
        atoms.calc = calc
        return float(-np.mean(atoms.get_stress()[:3]))

    low, high = LATTICE[symbol] * 0.95, LATTICE[symbol] * 1.05
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if pressure(middle) > 0 else (low, middle)
    a = 0.5 * (low + high)
    step = 0.004 * a
    modulus = -(pressure(a + step) - pressure(a - step)) / (2 * step) * a / 3
    return a, float(modulus / units.GPa)


def relaxed(atoms: Atoms, calc: Calculator) -> dict[str, float]:
    """Relax cell and positions; return lengths (Å), energy (eV/atom) and steps."""
    atoms = atoms.copy()
    atoms.calc = calc
    optimiser = BFGS(FrechetCellFilter(atoms), logfile=None)
    converged = optimiser.run(fmax=0.005, steps=200)
    lengths = atoms.cell.lengths()
    return {
        "a": round(float(lengths[0]), 4),
        "c": round(float(lengths[2]), 4),
        "energy_eV_per_atom": round(float(atoms.get_potential_energy()) / len(atoms), 5),
        "steps": int(optimiser.nsteps),
        "converged": bool(converged),
    }


def relaxations(calc: Calculator) -> dict[str, Any]:
    """Relax two rattled ordered alloys, cell and all, with the model and with EMT."""
    out: dict[str, Any] = {}
    for name, symbols in (("Cu3Au L1_2", "Au Cu Cu Cu"), ("CuAu L1_0", "Cu Au Au Cu")):
        start = fcc(symbols.split(), (1, 1, 1))
        start.rattle(0.05, seed=SEED)
        out[name] = {"model": relaxed(start, calc), "emt": relaxed(start, EMT())}
    return out


def equations_of_state(calc: Calculator) -> dict[str, dict[str, float]]:
    """Compare energies (meV/atom) over ±6 % of the lattice constant."""
    out: dict[str, dict[str, float]] = {}
    for symbol in METALS:
        curves = []
        for which in (calc, EMT()):
            curve = []
            for scale in np.linspace(0.94, 1.06, 31):
                atoms = bulk(symbol, "fcc", a=LATTICE[symbol] * scale, cubic=True)
                atoms.calc = which
                curve.append(atoms.get_potential_energy() / 4)
            curves.append(np.array(curve))
        model, emt = (curve * 1e3 for curve in curves)
        out[symbol] = {
            "max_error_meV_per_atom": round(float(np.abs(model - emt).max()), 3),
            "minima": int(np.sum(np.diff(np.sign(np.diff(model))) > 0)),
            "least_second_difference_meV": round(float(np.diff(model, 2).min()), 4),
            "least_second_difference_of_emt_meV": round(float(np.diff(emt, 2).min()), 4),
        }
    return out


def few_atoms(calc: Calculator) -> dict[str, Any]:
    """Look at lone atoms, pairs out of reach and pairs at all distances."""
    lone, walls, errs, finite = [], {}, [], True
    for symbol in METALS:
        one, far = Atoms(symbol), Atoms(f"{symbol}2", positions=[[0, 0, 0], [0, 0, 9.0]])
        want = Atoms(symbol, calculator=EMT()).get_potential_energy()
        for atoms in (one, far):
            atoms.calc = calc
            finite &= bool(np.isfinite(atoms.get_forces()).all())
            lone.append(abs(atoms.get_potential_energy() / len(atoms) - want))
    for a, b in itertools.combinations_with_replacement(METALS, 2):
        nearest = vegard([a, b]) / np.sqrt(2)
        for distance in np.arange(0.8, 6.5, 0.2):
            pair = Atoms([a, b], positions=[[0, 0, 0], [0, 0, distance]])
            reference = pair.copy()
            pair.calc, reference.calc = calc, EMT()
            force = float(pair.get_forces()[1, 2])
            finite &= bool(np.isfinite([force, pair.get_potential_energy()]).all())
            if distance > SHORTEST * nearest:
                errs.append(pair.get_potential_energy() - reference.get_potential_energy())
        # Inwards from the bulk distance: how high, and where, does the wall end?
        distances = np.arange(1.0, 0.3, -0.02) * nearest
        energies = []
        for distance in distances:
            pair = Atoms([a, b], positions=[[0, 0, 0], [0, 0, distance]], calculator=calc)
            energies.append(pair.get_potential_energy())
        well = int(np.argmin(energies[:11]))
        falls = np.flatnonzero(np.diff(energies[well:]) < 0)
        top = well + int(falls[0]) if len(falls) else len(energies) - 1
        walls[f"{a}-{b}"] = (energies[top] - energies[well], distances[top] / nearest)
    lowest = min(walls, key=lambda name: walls[name][0])
    farthest = max(walls, key=lambda name: walls[name][1])
    return {
        "finite": finite,
        "lone_atom_max_error_eV": round(float(max(lone)), 9),
        "pair_energy_rmse_eV": round(float(np.sqrt(np.mean(np.square(errs)))), 4),
        "lowest_wall_of_a_pair": [lowest, round(float(walls[lowest][0]), 2)],
        "wall_ends_at_share_of_bulk_distance": [farthest, round(float(walls[farthest][1]), 2)],
    }


def dynamics(calc: Calculator) -> dict[str, Any]:
    """Run NVE of 108 Cu at 300 K (2 ps) and a hot alloy at 2000 K with the model."""
    rng = np.random.default_rng(SEED + 1)
    atoms = fcc(["Cu"], (3, 3, 3))
    atoms.calc = calc
    MaxwellBoltzmannDistribution(atoms, temperature_K=600, rng=rng)
    Stationary(atoms)
    md, totals, temperatures = VelocityVerlet(atoms, 5 * units.fs), [], []
    for _ in range(40):
        md.run(10)
        totals.append(atoms.get_total_energy() / len(atoms))
        temperatures.append(atoms.get_temperature())
    hot = random_alloys(rng, 1, least=7)[0]
    hot.calc = calc
    MaxwellBoltzmannDistribution(hot, temperature_K=2000, rng=rng)
    runner = Langevin(hot, 4 * units.fs, temperature_K=2000, friction=0.02 / units.fs, rng=rng)
    visited = []
    for _ in range(10):
        runner.run(40)
        visited.append(hot.copy())
    return {
        "nve_drift_meV_per_atom_per_ps": round(float(np.polyfit(np.arange(40) * 0.05, totals, 1)[0] * 1e3), 5),
        "nve_spread_meV_per_atom": round(float(np.ptp(totals) * 1e3), 4),
        "nve_mean_temperature_K": round(float(np.mean(temperatures[10:])), 1),
        "driven_by_the_model_at_2000_K": errors(visited, calc),
    }


def main() -> None:
    """Evaluate, print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", type=Path, default=here / "mace-emt-small.model")
    parser.add_argument("--json", type=Path, default=here / "mace-emt-small.json")
    parser.add_argument("--quick", action="store_true", help="the held-out sets only")
    args = parser.parse_args()
    # Imported late: --help should not take ten seconds.
    from mace.calculators import MACECalculator  # noqa: PLC0415

    calc = MACECalculator(model_paths=str(args.model), device="cpu", default_dtype="float64")
    network = calc.models[0]
    report: dict[str, Any] = {
        "name": "mace-emt-small",
        "file": "mace-emt-small.model",
        "sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "bytes": args.model.stat().st_size,
        "elements": list(METALS),
        "atomic_numbers": [int(z) for z in network.atomic_numbers],
        "r_max_A": float(network.r_max),
        "parameters": sum(p.numel() for p in network.parameters()),
        "versions": {name: version(name) for name in ("ase", "e3nn", "mace-torch", "torch")},
        "reference": "ase.calculators.emt.EMT, default settings",
        "held_out": {},
    }
    print("| set | structures | energy RMSE (max), meV/atom | force RMSE (max), meV/Å "
          "| EMT's force rms, meV/Å | stress RMSE, meV/Å³ |\n|---|---|---|---|---|---|")  # fmt: skip
    for name, images in held_out():
        e = report["held_out"][name] = errors(images, calc)
        print(
            f"| {name} | {e['structures']} "
            f"| {e['energy_rmse_meV_per_atom']:.2f} ({e['energy_max_meV_per_atom']:.2f}) "
            f"| {e['force_rmse_meV_per_A']:.1f} ({e['force_max_meV_per_A']:.0f}) "
            f"| {e['force_rms_of_emt_meV_per_A']:.0f} | {e['stress_rmse_meV_per_A3']:.2f} |",
            flush=True,
        )
    print("\n| metal | a (EMT), Å | a (model), Å | error, % | B (EMT), GPa | B (model), GPa "
          "| error, % |\n|---|---|---|---|---|---|---|")  # fmt: skip
    report["fcc"] = {}
    for symbol in METALS:
        (a, b), (a0, b0) = fcc_properties(symbol, calc), fcc_properties(symbol, EMT())
        da, db = 100 * (a / a0 - 1), 100 * (b / b0 - 1)
        report["fcc"][symbol] = {
            "a_emt_A": round(a0, 5), "a_A": round(a, 5), "a_error_percent": round(da, 4),
            "B_emt_GPa": round(b0, 3), "B_GPa": round(b, 3), "B_error_percent": round(db, 3),
        }  # fmt: skip
        print(f"| {symbol} | {a0:.4f} | {a:.4f} | {da:+.3f} | {b0:.1f} | {b:.1f} | {db:+.2f} |")
    sections: dict[str, Callable[[Calculator], dict[str, Any]]] = {
        "equation_of_state": equations_of_state,
        "few_atoms": few_atoms,
        "relaxation": relaxations,
        "dynamics": dynamics,
    }
    for key, section in sections.items() if not args.quick else ():
        report[key] = section(calc)
        print(f"\n{key}\n{json.dumps(report[key], indent=1, ensure_ascii=False)}", flush=True)
    args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
