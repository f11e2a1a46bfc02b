"""Variable-cell relaxation of ordered Cu3Au (L1_2) through rootstockd, from a strained and rattled start.

Start a daemon first: `rootstockd start --model mace-emt-small`. Then `python relax_alloy.py`.
The model imitates ASE's EMT, so that EMT, relaxed in the same way, is the reference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from rootstock_client import RootstockClient


def start() -> Atoms:
    """The cell of L1_2 Cu3Au (4 atoms), sheared and stretched by 1 to 2 %, its atoms displaced by 0.05 Å."""
    corner, faces = (0, 0, 0), [(0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
    atoms = Atoms("AuCu3", scaled_positions=[corner, *faces], cell=[3.8, 3.8, 3.8], pbc=True)
    strain = [[1.02, 0.01, 0], [0, 0.99, 0.01], [0, 0, 1.01]]
    atoms.set_cell(atoms.cell @ strain, scale_atoms=True)
    atoms.rattle(0.05, seed=2)
    return atoms


def relax(calculator: Calculator, steps: int, *, verbose: bool) -> tuple[float, int, bool]:
    """Relax cell and atoms.

    Returns:
        The lattice constant of the cubic cell (Å), the steps taken, and whether they were enough.
    """
    atoms = start()
    atoms.calc = calculator
    optimizer = BFGS(FrechetCellFilter(atoms), logfile=None)  # forces and stress together
    converged = False
    # irun also gives the start, which is step 0
    for done in optimizer.irun(fmax=0.005, steps=steps):
        converged = bool(done)
        if verbose and optimizer.nsteps % 2 == 0:
            constant = atoms.get_volume() ** (1 / 3)
            print(
                f"step {optimizer.nsteps}/{steps}  {atoms.get_potential_energy():.4f} eV  {constant:.4f} Å", flush=True
            )
    return float(atoms.get_volume() ** (1 / 3)), optimizer.nsteps, converged


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--steps", type=int, default=100, help="the most steps to take")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    constant, steps, converged = relax(RootstockClient().calculator(options.model), options.steps, verbose=True)
    if not converged:
        raise SystemExit(f"not converged to 0.005 eV/Å in {steps} steps")
    reference, _, _ = relax(EMT(), options.steps, verbose=False)
    result = {"steps": steps, "lattice_constant_a": constant, "reference_lattice_constant_a": reference}
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
