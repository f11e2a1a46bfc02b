"""The ASE calculator whose numbers come from a daemon."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from rootstock_client import ipi
from rootstock_client.connection import Connection
from rootstock_client.errors import InvalidStructureError, UnsupportedError
from rootstock_client.units import BOHR, HARTREE

PROTOCOL_VERSION = 1
_ON_REQUEST = frozenset({"stress", "energies"})
"""What costs extra, and is computed only for those who ask."""


class RootstockCalculator(Calculator):  # type: ignore[misc]  # ASE is not typed
    """An ASE calculator that sends structures to a daemon. Made by `RootstockClient.calculator`.

    Energies are in eV, forces in eV/Å, stress in eV/Å³ (Voigt order xx, yy, zz, yz, xz, xy; ASE's sign), per-atom
    energies in eV. Stress is there for systems that are periodic along at least one lattice vector and have a cell
    volume. Charge and spin are taken from `atoms.info["charge"]` and `atoms.info["spin"]`.

    Stress and per-atom energies are computed when they are asked for, and from then on along with each new structure
    as long as each of them is asked for it, so that a relaxation with variable cell costs one evaluation a step.

    It may be pickled, copied and used after a fork (each copy opens a session of its own), and shared by threads.

    Args:
        socket: the daemon's session socket.
        model: catalogue name.
        dtype: what the model computes in; the catalogue's choice if None.
        head: which of the model's heads.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "energies", "stress"]

    def __init__(
        self, socket: str | os.PathLike[str], model: str, *, dtype: str | None = None, head: str | None = None
    ) -> None:
        super().__init__(model=model, dtype=dtype, head=head)
        self._connect(Path(socket))

    def _connect(self, socket: Path) -> None:
        self._connection = Connection(socket)
        self._lock = threading.RLock()
        self._asked: set[str] = set()
        self._asked_before: set[str] = set()
        self._system: tuple[Any, ...] = ()
        self._init = b""

    # --- what ASE calls

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last evaluation; charge and spin count, other `info` does not."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if not changes and _electrons(atoms) != _electrons(self.atoms):
            changes.append("info")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:  # noqa: FBT001,FBT002
        """A property, evaluated if need be; see ASE.

        Raises:
            PropertyNotImplementedError: the model does not have it, or the system has no stress.
            RootstockError: the evaluation failed; the message says why.
        """
        with self._lock:
            if atoms is not None and self.check_state(atoms):
                self._asked_before, self._asked = self._asked, set()
            result = super().get_property(name, atoms, allow_calculation)
            self._asked.add(name)
            return result

    def get_spin_polarized(self) -> bool:
        """Potentials have no spin density. (Without this, ASE gives each instance a method of its own: a cycle.)"""
        return False

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate `atoms` and fill `results`."""
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if len(atoms) == 0:
            raise InvalidStructureError("a structure of zero atoms.", "There is nothing to evaluate.")
        asked = set(properties or ())
        has_stress = bool(atoms.pbc.any()) and atoms.cell.rank == 3  # noqa: PLR2004
        if "stress" in asked and not has_stress:
            raise PropertyNotImplementedError("stress needs a periodic system with a volume: set cell and pbc")
        wanted = (asked | self._asked | self._asked_before) & _ON_REQUEST
        if not has_stress:
            wanted.discard("stress")
        try:
            self.results = self._evaluate(atoms, frozenset(wanted))
        except UnsupportedError as error:
            raise PropertyNotImplementedError(str(error)) from error

    # --- the exchange

    def _evaluate(self, atoms: Atoms, wanted: frozenset[str]) -> dict[str, Any]:
        cell = atoms.cell.array / BOHR
        head = ipi.posdata_head(cell, _inverse(cell), len(atoms))
        positions = np.ascontiguousarray(atoms.positions, dtype=np.float64) / BOHR
        forces = np.empty_like(positions)
        answer = self._connection.evaluate(self._describe(atoms, wanted), head, positions, forces)
        energy = float(answer.energies[0]) * HARTREE
        forces *= HARTREE / BOHR
        results = {"energy": energy, "free_energy": energy, "forces": forces}
        if "stress" in wanted:
            results["stress"] = full_3x3_to_voigt_6_stress(answer.virials[0] * (-HARTREE / atoms.get_volume()))
        if "energies" in wanted:
            results["energies"] = np.array(json.loads(answer.extras[0])["energies"]) * HARTREE
        return results

    def _describe(self, atoms: Atoms, wanted: frozenset[str]) -> bytes:
        """The INIT text; made anew only when something in it has changed."""
        a, b, c = atoms.cell.array
        left_handed = bool(np.cross(a, b) @ c < 0)
        electrons = _electrons(atoms)
        system = (atoms.numbers.tobytes(), atoms.pbc.tobytes(), left_handed, electrons, wanted)
        if system != self._system:
            fields = {
                "rootstock": PROTOCOL_VERSION,
                "numbers": atoms.numbers.tolist(),
                "pbc": atoms.pbc.tolist(),
                "charge": electrons[0],
                "spin": electrons[1],
                "want": ["energy", "forces", *sorted(wanted)],
                **self.parameters,
            }
            self._init = json.dumps(fields).encode()
            self._system = system
        return self._init

    # --- its life

    def close(self) -> None:
        """Close the session. The next evaluation opens a new one."""
        self._connection.close()

    def __enter__(self) -> RootstockCalculator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_connection", "_lock", "_asked", "_asked_before", "_system", "_init")
        state = {key: value for key, value in self.__dict__.items() if key not in hidden}
        return {**state, "_socket": self._connection.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        socket = state.pop("_socket")
        self.__dict__.update(state)
        self._connect(socket)


def _inverse(cell: ipi.FloatArray) -> ipi.FloatArray:
    """The inverse, which the protocol wants and nobody needs; zeros where there is none."""
    try:
        return np.linalg.inv(cell).astype(np.float64)
    except np.linalg.LinAlgError:
        return np.zeros((3, 3))


def _electrons(atoms: Atoms) -> tuple[float | None, float | None]:
    """Total charge (e) and spin multiplicity, as far as `atoms.info` says."""

    def number(key: str) -> float | None:
        value = atoms.info.get(key)
        return None if value is None else float(value)

    return number("charge"), number("spin")
