"""Equation of state of fcc nickel through rootstockd: lattice constant and bulk modulus.

Start a daemon first: `rootstockd start --model mace-emt-small`. Then `python equation_of_state.py`.
The model imitates ASE's EMT, so that EMT on the same volumes is the reference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.eos import EquationOfState

from rootstock_client import RootstockClient


def equation_of_state(calculator: Calculator, element: str, points: int, *, verbose: bool) -> tuple[float, float]:
    """Fit Birch-Murnaghan's equation to energies at linear strains within ±3 %.

    Returns:
        Lattice constant of the cubic cell (Å) and bulk modulus (GPa).
    """
    atoms = bulk(element, cubic=True)  # 4 atoms
    atoms.calc = calculator
    cell = atoms.cell.copy()
    volumes, energies = [], []
    for number, scale in enumerate(np.linspace(0.97, 1.03, points), 1):
        atoms.set_cell(cell * scale, scale_atoms=True)
        volumes.append(atoms.get_volume())
        energies.append(atoms.get_potential_energy())
        if verbose:
            print(f"step {number}/{points}  {volumes[-1]:.3f} Å³  {energies[-1]:.5f} eV", flush=True)
    volume, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    return float(volume ** (1 / 3)), float(modulus / units.GPa)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--element", default="Ni", help="a metal that is fcc")
    parser.add_argument("--points", type=int, default=25, help="volumes to evaluate")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    calculator = RootstockClient().calculator(options.model)
    constant, modulus = equation_of_state(calculator, options.element, options.points, verbose=True)
    reference = equation_of_state(EMT(), options.element, options.points, verbose=False)
    result = {
        "element": options.element,
        "lattice_constant_a": constant,
        "reference_lattice_constant_a": reference[0],
        "bulk_modulus_gpa": modulus,
        "reference_bulk_modulus_gpa": reference[1],
    }
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
