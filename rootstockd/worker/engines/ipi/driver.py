"""The driver's side of i-PI's protocol towards one program, blocking, in atomic units.

The order is i-PI's own: STATUS, INIT where the program asks for it, then POSDATA and GETFORCE in one write. Nothing
that a program says is taken for a number before it is one: i-PI takes NaN, and asks again after too few forces.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Tuple

import numpy as np

from rootstockd.worker.engines import Array

_HEADER = 12
_INIT = b"INIT        " + struct.pack("<ii", 0, 1) + b" "
"""Of bead 0; i-PI's own text is one blank."""
_GETFORCE, _STATUS, _EXIT = b"GETFORCE    ", b"STATUS      ", b"EXIT        "
_MOST_EXTRAS = 64 * 2**20


Answer = Tuple[float, Array, Array]
"""The energy in Hartree; forces, (natoms, 3), Hartree/Bohr; -dE/dstrain, (3, 3), Hartree. All finite."""


class EndedError(Exception):
    """The program has closed its connection, or is gone."""


class NonsenseError(Exception):
    """The program said what makes no sense; its text says what, after the program's name."""


class Driver:
    """One connection to a program.

    Args:
        connection: to the program.
        gone: a descriptor that becomes readable when the program has ended.
    """

    def __init__(self, connection: socket.socket, gone: int) -> None:
        self._connection, self._gone = connection, gone
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(gone, select.POLLIN)

    def evaluate(self, cell: Array, positions: Array) -> Answer:
        """Have one structure evaluated; waits for as long as that takes.

        Args:
            cell: (3, 3), Bohr, rows are lattice vectors; not singular.
            positions: (natoms, 3), Bohr.

        Raises:
            EndedError: the program has ended.
            NonsenseError: it gave something else.
        """
        natoms = len(positions)
        self._check_silence()
        if (status := self._status()) == "NEEDINIT":
            self._send(_INIT)
            status = self._status()
        if status != "READY":
            raise NonsenseError(f"said {status!r} where READY was due")
        self._check_silence()
        self._send(
            b"POSDATA     "
            + np.ascontiguousarray(cell.T, "<f8").tobytes()
            + np.ascontiguousarray(np.linalg.inv(cell).T, "<f8").tobytes()
            + struct.pack("<i", natoms)
            + np.ascontiguousarray(positions, "<f8").tobytes()
            + _GETFORCE
        )
        header = self._header()
        if header != "FORCEREADY":
            raise NonsenseError(f"said {header!r} where FORCEREADY was due")
        energy, count = struct.unpack("<di", self._receive(12))
        if count != natoms:
            raise NonsenseError(f"gave forces of {count} atoms for a structure of {natoms}")
        numbers = np.frombuffer(self._receive(8 * (3 * natoms + 9)), "<f8").astype(np.float64)
        (extras,) = struct.unpack("<i", self._receive(4))
        if not 0 <= extras <= _MOST_EXTRAS:
            raise NonsenseError(f"announced {extras} bytes of extras")
        self._receive(extras)  # nobody asked for what is in there, but what is unread is in the way of what follows
        forces, virial = numbers[: 3 * natoms].reshape(natoms, 3), symmetric(numbers[3 * natoms :].reshape(3, 3))
        wrong = [
            name
            for name, value in (("energy", energy), ("forces", forces), ("virial", virial))
            if not np.isfinite(value).all()
        ]
        if wrong:
            raise NonsenseError(f"gave NaN or infinite numbers for {' and '.join(wrong)}")
        return energy, forces, virial

    def say_exit(self) -> None:
        """Ask it to end.

        Raises:
            EndedError: it has ended.
        """
        self._send(_EXIT)

    def _check_silence(self) -> None:
        """Whether nothing lies unread: it would be taken for what is asked next.

        Raises:
            EndedError: the program has ended.
            NonsenseError: it has said more than it was asked.
        """
        try:
            unread = self._connection.recv(_HEADER, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise EndedError from error
        if not unread:
            raise EndedError
        raise NonsenseError(f"said {unread!r}, which nobody had asked for")

    def _status(self) -> str:
        self._send(_STATUS)
        return self._header()

    def _header(self) -> str:
        return self._receive(_HEADER).decode("ascii", "backslashreplace").rstrip()

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise EndedError from error

    def _receive(self, size: int) -> bytes:
        """So many bytes."""
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            ready = {descriptor for descriptor, _ in self._poll.poll()}
            if self._connection.fileno() not in ready:  # something that it left behind may hold the connection open
                raise EndedError
            try:
                count = self._connection.recv_into(view[got:])
            except OSError as error:
                raise EndedError from error
            if not count:
                raise EndedError
            got += count
        return bytes(data)


def symmetric(virial: Array) -> Array:
    """A virial of which a program may have filled in one half alone: LAMMPS does, as i-PI reads no more."""
    upper, lower = np.triu(virial, 1), np.tril(virial, -1)
    if lower.any() and upper.any():
        return virial.T  # as i-PI sends it
    whole: Array = virial + (upper + lower).T
    return whole
