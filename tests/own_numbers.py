"""Lattice constants of cubic crystals, and forces; run as a program, with a family's own calculator in its own
environment."""

import json
import sys

import numpy as np
from ase.build import bulk

CRYSTALS = {"Cu": ("fcc", 3.6), "Si": ("diamond", 5.45), "NaCl": ("rocksalt", 5.65)}
"""Structure, and where to look, in Å."""
STRAINS = (-0.02, -0.01, 0.0, 0.01, 0.02)
STEPS = 3
"""Structures of which there are forces."""


def lattice_constant(calculator, name):
    """Of a crystal, in Å: the minimum of a cubic polynomial through energies, as a function of the cell's length."""
    structure, guess = CRYSTALS[name]
    lengths = [guess * (1 + strain) for strain in STRAINS]
    energies = []
    for length in lengths:
        atoms = bulk(name, structure, a=length)
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
    polynomial = np.polynomial.Polynomial.fit(lengths, energies, 3)
    minima = [x.real for x in polynomial.deriv().roots() if abs(x.imag) < 1e-9 and polynomial.deriv(2)(x.real) > 0]
    return minima[0]


def copper(step):
    """Structures with forces that are not small."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=step)
    return atoms


def forces(calculator):
    """Of all of these, (STEPS, atoms, 3), eV/Å."""
    return [calculator.get_forces(copper(step)).tolist() for step in range(STEPS)]


def own_calculator(family, weights):
    """What the family's documents tell people to use."""
    if family == "mace":
        from mace.calculators import MACECalculator

        return MACECalculator(model_paths=weights, device="cpu", default_dtype="float64")
    if family == "sevennet":
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator("7net-0", device="cpu")
    from chgnet.model.dynamics import CHGNetCalculator

    return CHGNetCalculator(use_device="cpu")


if __name__ == "__main__":
    family, weights, *names = sys.argv[1:]
    calculator = own_calculator(family, weights)
    constants = {name: lattice_constant(calculator, name) for name in names}
    print(json.dumps({"constants": constants, "forces": forces(calculator)}))
