"""What a session's structures have in common, and the slot by which they reach a worker."""

from __future__ import annotations

import itertools
from typing import Any

from rootstock_client import ipi
from rootstock_client.errors import InvalidStructureError
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.sessions.accounts import Account, Accounts
from rootstockd.sessions.cells import check_cells
from rootstockd.sessions.init_request import InitRequest
from rootstockd.worker.engines import ModelSpec
from rootstockd.worker.slots import Slot

_MOST = 2**31 - 1
"""The largest number of a slot that the messages to workers have room for."""
_numbers = itertools.count()
_in_use: set[int] = set()


class System:
    """The system that a session's latest INIT has described, counted in its user's account until it is closed.

    Its slot is filled as cells and positions come.

    Args:
        request: what INIT asks for.
        spec: of its model.
        account: its user's.
        accounts: all users'.
        session: the session's number, for the log.

    Raises:
        LimitError: it has too many atoms.
        OSError, MemoryError: there is no room for a slot.
    """

    def __init__(
        self, request: InitRequest, spec: ModelSpec, account: Account, accounts: Accounts, session: int
    ) -> None:
        self.request = request
        self.atoms = len(request.numbers) * request.batch_size
        """In all structures of a message."""
        self._account, self._accounts = account, accounts
        accounts.take(account, self.atoms)
        try:
            self.slot = Slot.create(len(request.numbers), request.batch_size)
            try:
                self.slot.numbers[:] = request.numbers
            except MemoryError:
                self.slot.close()
                raise
        except (OSError, MemoryError):
            accounts.give_back(account, self.atoms)
            raise
        numbers = (count % _MOST + 1 for count in _numbers)
        self.number = next(number for number in numbers if number not in _in_use)
        """Unique for each that is there, and used again when no message about the last one can be under way."""
        _in_use.add(self.number)
        self.settings: dict[str, Any] = {
            "pbc": request.pbc,
            "charge": request.charge,
            "spin": request.spin,
            "head": request.head,
            "exact": request.exact,
            "tolerance": request.tolerance,
            "session": session,
            "stress": request.stress,
            "energies": request.energies,
        }
        """What a worker is told of it."""
        self.key = WorkerKey(spec.name, spec.dtype, request.options)
        """What makes its model, with all replicas, one for the account."""
        account.join(self.key)
        self._checked_cells = b""

    def place(self, natoms: int) -> memoryview:
        """Where the positions of so many atoms go.

        Raises:
            InvalidStructureError: it has another number of atoms.
        """
        if natoms != self.slot.natoms:
            raise InvalidStructureError(
                f"POSDATA has {natoms} atoms, INIT announced {self.slot.natoms}.",
                "Send a new INIT when atoms come or go.",
            )
        return self.slot.positions_bytes

    def take_cells(self, cells: bytes) -> None:
        """Take over the cells of the structures whose positions are in the slot.

        If they are the same as before nothing is looked at, so of a cluster the density of the first structure alone.

        Raises:
            InvalidStructureError: they can't be evaluated.
        """
        if cells != self._checked_cells:
            arrays = ipi.read_cells(cells)
            check_cells(arrays, self.request.pbc, self.slot.positions)
            self.slot.cells[:] = arrays
            self._checked_cells = cells

    def close(self) -> None:
        """Give back the slot, and what the account counts."""
        self._accounts.give_back(self._account, self.atoms)
        self._account.leave(self.key)
        _in_use.discard(self.number)
        self.slot.close()
        del self.slot, self.request  # their memory goes now, not when the garbage collector next runs
