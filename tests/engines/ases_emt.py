"""A plugin of pytest: where ASE's own tests say EMT, they get a daemon's."""

from __future__ import annotations

from typing import Any

import ase.calculators.emt

from rootstock_client.calculator import RootstockCalculator


class EMT(RootstockCalculator):
    """As ASE's, which takes options that a daemon's does not have."""

    def __init__(self, **_options: Any) -> None:
        super().__init__("emt")  # at ROOTSTOCKD_SOCKET


ase.calculators.emt.EMT = EMT
