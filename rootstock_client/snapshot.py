"""What an evaluation depends on, kept to tell at the next call whether it still holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ase import Atoms

from rootstock_client import ipi
from rootstock_client.errors import InvalidStructureError
from rootstock_client.units import BOHR


class Snapshot:
    """A structure as it is now, in bytes, which compare fast. Made at each call of ASE's: a microsecond or two.

    Args:
        atoms: the structure.

    Raises:
        InvalidStructureError: it has no atoms, or a charge or spin that is no number.
    """

    __slots__ = ("cell", "charge", "natoms", "numbers", "pbc", "positions", "spin")

    def __init__(self, atoms: Atoms) -> None:
        arrays, info = atoms.arrays, atoms.info
        positions = np.asarray(arrays["positions"], np.float64)
        self.natoms = len(positions)
        if self.natoms == 0:
            raise InvalidStructureError("a structure of zero atoms.", "There is nothing to evaluate.")
        self.positions: bytes = positions.tobytes()
        self.numbers: bytes = np.asarray(arrays["numbers"], np.int64).tobytes()
        self.cell: bytes = atoms.cell.array.tobytes()
        self.pbc: bytes = atoms.pbc.tobytes()
        self.charge, self.spin = _number("charge", info), _number("spin", info)

    def changes(self, before: Snapshot) -> list[str]:
        """What is different from `before`, in ASE's words."""
        changes = []
        if self.positions != before.positions:
            changes.append("positions")
        if self.numbers != before.numbers:
            changes.append("numbers")
        if self.cell != before.cell:
            changes.append("cell")
        if self.pbc != before.pbc:
            changes.append("pbc")
        if self.charge != before.charge or self.spin != before.spin:
            changes.append("info")
        return changes

    def atoms(self) -> Atoms:
        """The structure again."""
        info = {key: value for key, value in (("charge", self.charge), ("spin", self.spin)) if value is not None}
        return Atoms(
            numbers=np.frombuffer(self.numbers, np.int64),
            positions=np.frombuffer(self.positions).reshape(-1, 3),
            cell=np.frombuffer(self.cell).reshape(3, 3),
            pbc=np.frombuffer(self.pbc, dtype=bool),
            info=info,
        )


class Box:
    """What follows from cell, boundary conditions and atom count alone, and so is kept while they stay.

    Args:
        snapshot: the structure whose cell it is.
    """

    __slots__ = ("_cell", "_natoms", "_pbc", "has_stress", "head", "left_handed", "volume")

    def __init__(self, snapshot: Snapshot) -> None:
        self._cell, self._pbc, self._natoms = snapshot.cell, snapshot.pbc, snapshot.natoms
        cell = np.frombuffer(snapshot.cell).reshape(3, 3)
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = cell.tolist()  # np.cross takes longer than all the rest here
        triple = (ay * bz - az * by) * cx + (az * bx - ax * bz) * cy + (ax * by - ay * bx) * cz
        self.volume = abs(triple)
        """Å³."""
        self.left_handed = triple < 0
        self.has_stress = self.volume > 0 and any(snapshot.pbc)
        """There is something periodic, and a volume to divide the virial by."""
        in_bohr = cell / BOHR
        self.head = ipi.posdata_head(in_bohr, _inverse(in_bohr), self._natoms)
        """The POSDATA message up to its positions."""

    def fits(self, snapshot: Snapshot) -> bool:
        """Whether it is still the same."""
        return snapshot.cell == self._cell and snapshot.pbc == self._pbc and snapshot.natoms == self._natoms


def _inverse(cell: ipi.FloatArray) -> ipi.FloatArray:
    """The inverse, which the protocol wants and nobody needs; zeros where there is none."""
    try:
        return np.linalg.inv(cell).astype(np.float64)
    except np.linalg.LinAlgError:
        return np.zeros((3, 3))


def _number(key: str, info: dict[str, Any]) -> float | None:
    if (value := info.get(key)) is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidStructureError(f"atoms.info[{key!r}] is {value!r}.", "A finite number is needed there, or None.")
    return number
