"""NVE molecular dynamics of copper through rootstockd: does the energy stay what it was?

Start a daemon first: `rootstockd start --model mace-emt-small`. Then `python md_nve.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet

from rootstock_client import RootstockClient


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--steps", type=int, default=100, help="steps of 2 fs")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    atoms = bulk("Cu", cubic=True) * 3  # 108 atoms
    atoms.calc = RootstockClient().calculator(options.model)
    rng = np.random.default_rng(1)
    spread = np.sqrt(atoms.get_masses() * units.kB * 300)  # Maxwell-Boltzmann momenta at 300 K
    atoms.set_momenta(spread[:, None] * rng.standard_normal((len(atoms), 3)))
    Stationary(atoms)  # no drift of the crystal as a whole

    dynamics = VelocityVerlet(atoms, timestep=2 * units.fs)
    energies: list[float] = []  # total energy, eV/atom

    def observe() -> None:
        energies.append(atoms.get_total_energy() / len(atoms))
        if dynamics.nsteps % 10 == 0:
            drift = 1000 * (energies[-1] - energies[0])
            print(
                f"step {dynamics.nsteps}/{options.steps}  {atoms.get_temperature():.0f} K  {drift:+.4f} meV/atom",
                flush=True,
            )

    dynamics.attach(observe)
    dynamics.run(options.steps)

    times = 0.002 * np.arange(len(energies))  # ps
    result = {
        "steps": options.steps,
        "initial_energy_ev_per_atom": energies[0],
        # Verlet's energy oscillates about a constant: the slope of a line shows a drift, two points would show luck
        "drift_mev_per_atom_per_ps": 1000 * float(np.polyfit(times, energies, 1)[0]) if options.steps else 0.0,
        "worst_deviation_mev_per_atom": 1000 * float(np.abs(np.array(energies) - energies[0]).max()),
    }
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
