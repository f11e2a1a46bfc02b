"""Barrier of a vacancy's hop in copper through rootstockd, by a nudged elastic band with a climbing image.

Start a daemon first: `rootstockd start --model mace-emt-small`. Then `python neb_vacancy.py`.
The images ask at the same time, and are evaluated in one batch. The model imitates ASE's EMT, so that EMT on the same
band is the reference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.mep import NEB
from ase.optimize import BFGS, FIRE

from rootstock_client import RootstockClient

FMAX = 0.02  # eV/Å


class ParallelNEB(NEB):
    """All images at once. Unlike ASE's `parallel=True` it does not go on without those that could not be evaluated."""

    def get_forces(self) -> Any:
        """Forces on the band, (images * natoms, 3), eV/Å."""
        with ThreadPoolExecutor(len(self.images)) as pool:
            list(pool.map(Atoms.get_forces, self.images[1:-1]))  # each image's calculator keeps what NEB asks for
        return super().get_forces()


def end_points(element: str) -> tuple[Atoms, Atoms]:
    """A vacancy in a cubic cell of 32 sites (31 atoms), before and after a nearest neighbour has hopped into it."""
    crystal = bulk(element, cubic=True) * 2
    neighbour = int(crystal.get_distances(0, range(1, 32), mic=True).argmin()) + 1
    before = crystal.copy()
    del before[0]  # the neighbour's index is one less now
    after = before.copy()
    after.positions[neighbour - 1] = crystal.positions[neighbour] + crystal.get_distance(
        neighbour, 0, mic=True, vector=True
    )
    return before, after


def barrier(element: str, calculator: Callable[[], Calculator], images: int, kind: type[NEB]) -> list[float]:
    """Relax both ends, then the band between them.

    Returns:
        Energies along the path, in eV above the first one.
    """
    before, after = end_points(element)
    band = [before, *(before.copy() for _ in range(images)), after]
    for image in band:
        image.calc = calculator()  # one each, as each remembers its own image's forces
    for end in (before, after):
        BFGS(end, logfile=None).run(fmax=FMAX)
    neb = kind(band, climb=True, method="improvedtangent")
    neb.interpolate(mic=True)
    if not FIRE(neb, logfile=None).run(fmax=FMAX, steps=300):
        raise SystemExit(f"the band has not converged to {FMAX} eV/Å in 300 steps")
    energies = [image.get_potential_energy() for image in band]
    return [energy - energies[0] for energy in energies]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mace-emt-small", help="catalogue name")
    parser.add_argument("--element", default="Cu", help="a metal that is fcc")
    parser.add_argument("--images", type=int, default=3, help="between the two ends; odd, so that one is in the middle")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    client = RootstockClient()
    path = barrier(options.element, lambda: client.calculator(options.model), options.images, ParallelNEB)
    for number, energy in enumerate(path):
        print(f"image {number}  {energy:.4f} eV", flush=True)
    reference = barrier(options.element, EMT, options.images, NEB)
    result = {
        "element": options.element,
        "barrier_ev": max(path),
        "reference_barrier_ev": max(reference),
        "reaction_energy_ev": path[-1],  # zero: both ends are the same crystal
    }
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
