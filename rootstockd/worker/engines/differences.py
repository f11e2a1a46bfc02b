"""How far two computations of the same structure are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rootstockd.worker.engines import Result

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
"""How far a backend's forces may differ from the reference's where a session does not say: eV/Å, and by this part of
the largest force where that is over 1 eV/Å, up to LARGEST_FORCE. What float64 allows is rounding."""
LARGEST_FORCE = 100.0
"""eV/Å; of larger forces no more is tolerated than of these: between atoms nearly on one spot it would be anything."""
_LARGE_ENERGY = 100.0
"""eV; an atom's own energy may be thousands, and rounding is a part of it: above this a part is what is tolerated."""


@dataclass(frozen=True)
class Difference:
    """How far two backends are apart on one structure."""

    force: float
    """Largest component, eV/Å."""
    energy: float
    """eV an atom."""
    virial: float
    """Largest component, eV an atom; 0 where it was not asked for."""
    energies: float
    """Largest of an atom, eV, and of 100 eV where its own is larger; 0 where they were not asked for."""
    largest: float
    """The largest force component of the reference, eV/Å; what `within` is relative to, from 1 to LARGEST_FORCE."""

    def within(self, tolerance: float) -> bool:
        """Whether all of it is tolerable; a NaN never is."""
        tolerable = tolerance * min(max(1.0, self.largest), LARGEST_FORCE)
        return all(value <= tolerable for value in (self.force, self.energy, self.virial, self.energies))

    @property
    def may_be_rounding(self) -> bool:
        """Whether forces are so large that what is not tolerable need be no mistake."""
        return self.largest > LARGEST_FORCE

    def __str__(self) -> str:
        return (
            f"{self.force:.1e} eV/Å, {self.energy:.1e} eV an atom, virial {self.virial:.1e} eV an atom, an atom's "
            f"energy {self.energies:.1e} eV"
        )


def compare(result: Result, reference: Result) -> Difference:
    """How far `result` is from `reference`."""
    natoms = len(reference.forces)
    virial = energies = 0.0
    if reference.virial is not None and result.virial is not None:
        virial = float(np.abs(result.virial - reference.virial).max()) / natoms
    if reference.energies is not None and result.energies is not None:
        parts = np.maximum(1.0, np.abs(reference.energies) / _LARGE_ENERGY)
        energies = float((np.abs(result.energies - reference.energies) / parts).max())
    return Difference(
        force=float(np.abs(result.forces - reference.forces).max()),
        energy=abs(result.energy - reference.energy) / natoms,
        virial=virial,
        energies=energies,
        largest=float(np.abs(reference.forces).max()),
    )
