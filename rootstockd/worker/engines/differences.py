"""How far two computations of the same structure are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rootstockd.worker.engines import Result

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
"""How far a backend's forces may differ from the reference's where a session does not say: eV/Å, and by this part of
the largest force where that is over 1 eV/Å. What float64 allows is rounding."""


@dataclass(frozen=True)
class Difference:
    """How far two backends are apart on one structure."""

    force: float
    """Largest component, eV/Å."""
    energy: float
    """eV an atom."""
    virial: float
    """Largest component, eV an atom; 0 where it was not asked for."""
    scale: float
    """The largest force component of the reference, but at least 1: what `within` is relative to."""

    def within(self, tolerance: float) -> bool:
        """Whether all of it is tolerable; a NaN never is."""
        return all(value <= tolerance * self.scale for value in (self.force, self.energy, self.virial))

    def __str__(self) -> str:
        return f"{self.force:.1e} eV/Å, {self.energy:.1e} eV an atom, virial {self.virial:.1e} eV an atom"


def compare(result: Result, reference: Result) -> Difference:
    """How far `result` is from `reference`."""
    natoms = len(reference.forces)
    virial = 0.0
    if reference.virial is not None and result.virial is not None:
        virial = float(np.abs(result.virial - reference.virial).max()) / natoms
    return Difference(
        force=float(np.abs(result.forces - reference.forces).max()),
        energy=abs(result.energy - reference.energy) / natoms,
        virial=virial,
        scale=max(1.0, float(np.abs(reference.forces).max())),
    )
