"""What an evaluation depends on, kept to tell at the next call whether it still holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from ase import Atoms

from rootstock_client import ipi
from rootstock_client.errors import InvalidStructureError
from rootstock_client.units import BOHR

Array = npt.NDArray[Any]

LARGE = 1 << 22
"""Bytes of an array from which on numpy asks for huge pages. `bytes` come in small ones, which above 32 MiB are new
from the kernel each time: that takes 13 ns an atom, the copy itself 2."""


class LargeArray:
    """What an array's `bytes` are, where there are many of them: a copy, and equal to others to the bit.

    Args:
        array: the array.
    """

    __slots__ = ("values",)
    __hash__ = None  # type: ignore[assignment]  # as it is no dictionary's key

    def __init__(self, array: Array) -> None:
        self.values = np.array(array, order="C")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LargeArray) and np.array_equal(
            self.values.view(np.uint64), other.values.view(np.uint64)
        )


def _kept(array: Array) -> bytes | LargeArray:
    """The content of an array of 64-bit numbers, to be compared with another's."""
    return array.tobytes() if array.nbytes < LARGE else LargeArray(array)


def _numbers_in(kept: bytes | LargeArray, dtype: type) -> Array:
    """What `_kept` was given, as one row."""
    return kept.values.reshape(-1) if isinstance(kept, LargeArray) else np.frombuffer(kept, dtype)


class Snapshot:
    """A structure as it is now, in bytes, which compare fast. Made at each call of ASE's: a microsecond or two.

    Args:
        atoms: the structure.

    Raises:
        InvalidStructureError: it has no atoms, or a charge or spin that is no number.
    """

    __slots__ = ("_positions", "cell", "charge", "natoms", "numbers", "pbc", "spin")

    def __init__(self, atoms: Atoms) -> None:
        arrays, info = atoms.arrays, atoms.info
        positions = np.asarray(arrays["positions"], np.float64)
        self.natoms = len(positions)
        if self.natoms == 0:
            raise InvalidStructureError("a structure of zero atoms.", "There is nothing to evaluate.")
        self._positions = _kept(positions)
        self.numbers = _kept(np.asarray(arrays["numbers"], np.int64))
        self.cell: bytes = atoms.cell.array.tobytes()
        self.pbc: bytes = atoms.pbc.tobytes()
        self.charge = _number("charge", info)
        self.spin = _number("spin", info) or None  # some write 0, which is no multiplicity, for nothing said

    def changes(self, before: Snapshot) -> list[str]:
        """What is different from `before`, in ASE's words."""
        changes = []
        if self._positions != before._positions:
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

    @property
    def positions(self) -> ipi.FloatArray:
        """(natoms, 3), Å; not to be changed."""
        return _numbers_in(self._positions, np.float64).reshape(-1, 3)

    @property
    def atomic_numbers(self) -> Array:
        """(natoms,); not to be changed."""
        return _numbers_in(self.numbers, np.int64)

    def atoms(self) -> Atoms:
        """The structure again."""
        info = {key: value for key, value in (("charge", self.charge), ("spin", self.spin)) if value is not None}
        return Atoms(
            numbers=self.atomic_numbers,
            positions=self.positions,
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
        """Whether the cell is still the same."""
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
        number = float(value.item() if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidStructureError(f"atoms.info[{key!r}] is {value!r}.", "A finite number is needed there, or None.")
    return number
