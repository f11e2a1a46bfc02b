"""ASE's EMT for i-PI's own driver (`i-pi-driver-py -m custom -P`): what `rootstockd attach` is compared with."""

from ase.calculators.emt import EMT
from ase.units import Bohr, Hartree
from ipi.pes._ase import ASEDriver

__DRIVER_NAME__ = "custom"
__DRIVER_CLASS__ = "EMTDriver"


class EMTDriver(ASEDriver):
    def check_parameters(self):
        super().check_parameters()
        self.ase_calculator = EMT()

    def compute_structure(self, cell, pos):
        """As i-PI's, but with ASE's units: its own have a Hartree and a Bohr of eight digits."""
        atoms = self.template_ase.copy()
        atoms.set_cell(cell.T * Bohr)
        atoms.positions[:] = pos * Bohr
        atoms.calc = self.ase_calculator
        virial = -atoms.get_volume() * atoms.get_stress(voigt=False) / Hartree
        return atoms.get_potential_energy() / Hartree, atoms.get_forces() * (Bohr / Hartree), virial, ""
