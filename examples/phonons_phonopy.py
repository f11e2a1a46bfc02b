"""Phonons of aluminium through rootstockd, with phonopy: frequencies at X and L, and the heat capacity.

Start a daemon first: `rootstockd start --model mace-emt-small`. Then `pip install phonopy`, and
`python phonons_phonopy.py`.
The model imitates ASE's EMT, so that EMT on the same displacements is the reference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from rootstock_client import RootstockClient

POINTS = {"X": (0.5, 0.0, 0.5), "L": (0.5, 0.5, 0.5)}  # of the primitive cell's reciprocal lattice


def phonons(element: str, calculator: Calculator, repeat: int) -> dict[str, float]:
    """Relax the cell, displace one atom by what symmetry leaves to do, and diagonalize.

    Returns:
        Frequencies at X and L in THz, transverse (twofold) and longitudinal, and C_V at 300 K in J/K/mol.
    """
    crystal = bulk(element, cubic=True)
    crystal.calc = calculator
    BFGS(FrechetCellFilter(crystal), logfile=None).run(fmax=1e-4)
    cell = PhonopyAtoms(symbols=crystal.symbols, cell=crystal.cell, scaled_positions=crystal.get_scaled_positions())
    phonon = Phonopy(cell, supercell_matrix=np.eye(3, dtype=int) * repeat, primitive_matrix="F")
    phonon.generate_displacements(distance=0.02)  # Å
    forces = []
    for number, displaced in enumerate(phonon.supercells_with_displacements, 1):
        atoms = Atoms(displaced.symbols, positions=displaced.positions, cell=displaced.cell, pbc=True)
        atoms.calc = calculator
        forces.append(atoms.get_forces())
        print(f"displacement {number}/{len(phonon.supercells_with_displacements)}  {len(atoms)} atoms", flush=True)
    phonon.forces = forces
    phonon.produce_force_constants()
    phonon.symmetrize_force_constants()  # the acoustic sum rule
    phonon.run_qpoints(list(POINTS.values()))
    result = {}
    for name, frequencies in zip(POINTS, phonon.qpoints.frequencies, strict=True):
        transverse, _, longitudinal = sorted(frequencies)
        result |= {f"transverse_{name}_thz": float(transverse), f"longitudinal_{name}_thz": float(longitudinal)}
    phonon.run_mesh((16, 16, 16), is_gamma_center=True)
    phonon.run_thermal_properties(temperatures=[300], cutoff_frequency=0.01)  # THz: without those that are zero
    result["heat_capacity_j_per_k_mol"] = float(phonon.thermal_properties.heat_capacity[0])
    return result


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--element", default="Al", help="a metal that is fcc")
    parser.add_argument("--repeat", type=int, default=3, help="cubic cells along each side of the supercell")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    # float64 whatever the model's own: what is differentiated are small differences of forces
    calculator = RootstockClient().calculator(options.model, dtype="float64")
    found = phonons(options.element, calculator, options.repeat)
    reference = phonons(options.element, EMT(), options.repeat)
    result = {"element": options.element, **found, **{f"reference_{name}": value for name, value in reference.items()}}
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
