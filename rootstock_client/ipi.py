"""The i-PI wire protocol without I/O: messages and frames; `engine_side` and `driver_side` have the two roles.

Bytes go in, messages come out, and nothing here knows a socket, so the daemon, the client and the tests all use the
same code. The *driver* moves the atoms (i-PI calls it the server); the *engine* answers with forces (i-PI's client).

Everything on the wire is little-endian, float64 and int32, in atomic units; a header is 12 bytes of ASCII, padded
with blanks; a cell is sent as the transpose of ASE's (lattice vectors as columns), as i-PI and ASE's SocketIOCalculator
do. A virial is -dE/dstrain = -volume x stress, 3x3.

=========== =============================================================== ==========================================
from driver  body                                                            engine's answer
=========== =============================================================== ==========================================
STATUS      -                                                               NEEDINIT, READY or HAVEDATA
INIT        int32 bead, int32 n, n bytes                                    -
POSDATA     cell 9, inverse cell 9, int32 natoms, positions 3 natoms        -
            batch_size B: natoms, B x (cell, inverse), positions 3 natoms B
GETFORCE    -                                                               FORCEREADY B energies, int32 natoms,
                                                                            forces 3 natoms B, virials 9 B,
                                                                            B x (int32 n, n bytes of extras)
                                                                            or ERROR int32 n, n bytes of JSON
EXIT        -                                                               the connection is closed
=========== =============================================================== ==========================================

Every STATUS and every GETFORCE has exactly one answer, and nothing else has any: a driver may pipeline as it likes.
A STATUS or GETFORCE behind a POSDATA is answered when the result is there.

Source: i-PI 3.3.1, ``ipi/interfaces/sockets.py``; ERROR is rootstockd's own and only sent to drivers that announced
themselves in INIT.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from rootstock_client.errors import ProtocolError, RootstockError

FloatArray: TypeAlias = npt.NDArray[np.float64]

PROTOCOL_VERSION = 1
"""Of what client and daemon say to each other beyond i-PI, which a client says in INIT (docs/protocol.md)."""
HEADER_SIZE = 12
INT = struct.Struct("<i")
TWO_INTS = struct.Struct("<ii")
CELL_PAIR = 2 * 9 * 8


def header(word: str) -> bytes:
    """A message's header: the word, padded with blanks to 12 bytes."""
    return word.encode("ascii").ljust(HEADER_SIZE)


STATUS, INIT, POSDATA, GETFORCE, EXIT = map(header, ("STATUS", "INIT", "POSDATA", "GETFORCE", "EXIT"))
NEEDINIT, READY, HAVEDATA, FORCEREADY, ERROR = map(header, ("NEEDINIT", "READY", "HAVEDATA", "FORCEREADY", "ERROR"))
FINGERPRINT_DIGITS = 16
"""Hexadecimal ones, of a fingerprint: nobody has so many models that two of them are the same by chance."""


@dataclass(frozen=True)
class Limits:
    """The most that one message may declare; more is refused before memory is taken for it."""

    atoms: int = 1_000_000
    """Atoms in one POSDATA, over all structures of its batch."""
    init: int = 16 * 2**20
    """Bytes of an INIT text."""
    extras: int = 256 * 2**20
    """Bytes of one extras text, and of one ERROR body."""


ANY_NUMBER = Limits(atoms=2**31 - 1)
"""Of atoms: how many may be is for the daemon to say, and how many are right for whoever sent them."""


# --- messages ---------------------------------------------------------------------------------------------------------


class Status(NamedTuple):
    """STATUS."""


class Init(NamedTuple):
    """INIT: a text whose meaning is the engine's business. Of which bead it is, in i-PI's count, nobody asks."""

    text: bytes


class PosData(NamedTuple):
    """POSDATA: the B cells and inverses as they came (see `read_cells`). The positions already lie where `place` said.

    `error` says why `place` had no room for them; they were read and thrown away.
    """

    natoms: int
    cells: bytes
    error: RootstockError | None


class GetForce(NamedTuple):
    """GETFORCE."""


class Exit(NamedTuple):
    """EXIT."""


class StatusReply(NamedTuple):
    """NEEDINIT, READY or HAVEDATA, as its 12-byte header."""

    state: bytes


class ForceReady:
    """FORCEREADY. The forces already lie where `place` said; the rest is read when it is looked at.

    Args:
        natoms: atoms of each of the B structures.
        energies: as they came.
        virials: as they came.
        extras: B texts.
    """

    __slots__ = ("extras", "natoms", "packed_energies", "packed_virials")
    __match_args__ = ("energies", "natoms", "virials", "extras")

    def __init__(self, natoms: int, energies: bytes, virials: bytes, extras: list[bytes]) -> None:
        self.natoms, self.extras = natoms, extras
        self.packed_energies, self.packed_virials = energies, virials

    @property
    def energies(self) -> FloatArray:
        """(B,), Hartree."""
        return np.frombuffer(self.packed_energies, "<f8")

    @property
    def virials(self) -> FloatArray:
        """(B, 3, 3), Hartree."""
        return _matrices(self.packed_virials, len(self.packed_virials) // 72, 9)


class Failure(NamedTuple):
    """ERROR."""

    error: RootstockError


DriverMessage: TypeAlias = Status | Init | PosData | GetForce | Exit
EngineMessage: TypeAlias = StatusReply | ForceReady | Failure
Place: TypeAlias = Callable[[int], memoryview]
"""Given an atom count, where to put 3 x 8 x natoms x B bytes. Raises a RootstockError to have them thrown away."""


def checked_count(value: int, limit: int, what: str) -> int:
    """A size that a message declares, refused before memory is taken for it."""
    if not 0 <= value <= limit:
        raise ProtocolError(f"a message declares {value} {what}; the limit is {limit}.")
    return value


def read_cells(cells: bytes) -> FloatArray:
    """The cells of a POSDATA, (B, 3, 3) in Bohr, rows are lattice vectors."""
    return _matrices(cells, len(cells) // CELL_PAIR, 18)


def _matrices(data: bytes | memoryview, count: int, stride: int) -> FloatArray:
    """`count` 3x3 matrices that lie `stride` doubles apart, transposed from the wire's order; a copy."""
    flat = np.frombuffer(data, "<f8").reshape(count, stride)[:, :9]
    return flat.reshape(count, 3, 3).transpose(0, 2, 1).copy()


# --- frames -----------------------------------------------------------------------------------------------------------


def init_frame(text: bytes) -> bytes:
    """An INIT message, of bead 0."""
    return INIT + TWO_INTS.pack(0, len(text)) + text


def posdata_head(cell: FloatArray, inverse: FloatArray, natoms: int) -> bytes:
    """A POSDATA message up to its positions, for one structure.

    Args:
        cell: (3, 3), Bohr, rows are lattice vectors.
        inverse: (3, 3), its inverse.
        natoms: how many positions follow.
    """
    return POSDATA + cell.T.tobytes() + inverse.T.tobytes() + INT.pack(natoms)


def error_frame(error: RootstockError) -> bytes:
    """An ERROR message."""
    body = error.to_json()
    return ERROR + INT.pack(len(body)) + body
