"""ASE's EMT for i-PI's own driver (`i-pi-driver-py -m custom -P`): what `rootstockd attach` is compared with."""

from ase.calculators.emt import EMT
from ipi.pes._ase import ASEDriver

__DRIVER_NAME__ = "custom"
__DRIVER_CLASS__ = "EMTDriver"


class EMTDriver(ASEDriver):
    def check_parameters(self):
        super().check_parameters()
        self.ase_calculator = EMT()
