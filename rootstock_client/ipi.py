"""The i-PI wire protocol without I/O: messages, and the state machine of each role.

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

import enum
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from rootstock_client.errors import ProtocolError, RootstockError
from rootstock_client.stream import Grammar, MessageReader, Skip

FloatArray: TypeAlias = npt.NDArray[np.float64]

HEADER_SIZE = 12
_INT = struct.Struct("<i")
_TWO_INTS = struct.Struct("<ii")
_CELL_PAIR = 2 * 9 * 8


def header(word: str) -> bytes:
    """A message's header: the word, padded with blanks to 12 bytes."""
    return word.encode("ascii").ljust(HEADER_SIZE)


STATUS, INIT, POSDATA, GETFORCE, EXIT = map(header, ("STATUS", "INIT", "POSDATA", "GETFORCE", "EXIT"))
NEEDINIT, READY, HAVEDATA, FORCEREADY, ERROR = map(header, ("NEEDINIT", "READY", "HAVEDATA", "FORCEREADY", "ERROR"))


@dataclass(frozen=True)
class Limits:
    """The most that one message may declare; more is refused before memory is taken for it."""

    atoms: int = 1_000_000
    """Atoms in one POSDATA, over all structures of its batch."""
    init: int = 16 * 2**20
    """Bytes of an INIT text."""
    extras: int = 256 * 2**20
    """Bytes of one extras text, and of one ERROR body."""


# --- messages ---------------------------------------------------------------------------------------------------------


class Status(NamedTuple):
    """STATUS."""


class Init(NamedTuple):
    """INIT: i-PI's bead index, and a text whose meaning is the engine's business."""

    bead: int
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


class ForceReady(NamedTuple):
    """FORCEREADY: energies (B,) in Hartree, virials (B, 3, 3) in Hartree; forces already lie where `place` said."""

    energies: FloatArray
    natoms: int
    virials: FloatArray
    extras: list[bytes]


class Failure(NamedTuple):
    """ERROR."""

    error: RootstockError


DriverMessage: TypeAlias = Status | Init | PosData | GetForce | Exit
EngineMessage: TypeAlias = StatusReply | ForceReady | Failure
Place: TypeAlias = Callable[[int], memoryview]
"""Given an atom count, where to put 3 x 8 x natoms x B bytes. Raises a RootstockError to have them thrown away."""


def _count(value: int, limit: int, what: str) -> int:
    if not 0 <= value <= limit:
        raise ProtocolError(f"a message declares {value} {what}; the limit is {limit}")
    return value


def read_cells(cells: bytes) -> FloatArray:
    """The cells of a POSDATA, (B, 3, 3) in Bohr, rows are lattice vectors."""
    return _matrices(cells, len(cells) // _CELL_PAIR, 18)


def _matrices(data: bytes | memoryview, count: int, stride: int) -> FloatArray:
    """`count` 3x3 matrices that lie `stride` doubles apart, transposed from the wire's order; a copy."""
    flat = np.frombuffer(data, "<f8").reshape(count, stride)[:, :9]
    return flat.reshape(count, 3, 3).transpose(0, 2, 1).copy()


# --- the engine's side ------------------------------------------------------------------------------------------------


class Send(NamedTuple):
    """Send these bytes to the driver."""

    data: bytes


class Evaluate(NamedTuple):
    """Evaluate the structures whose positions have just been placed; then call `finish` or `fail`.

    `cells` are as they came: compared with the last, they need not be read (`read_cells`) at each step.
    """

    cells: bytes


class SendResult(NamedTuple):
    """The driver asked for the result: send FORCEREADY with it."""


class Close(NamedTuple):
    """End the connection; `error` is None when the driver said EXIT."""

    error: RootstockError | None


Event: TypeAlias = Send | Init | Evaluate | SendResult | Close


class _State(enum.Enum):
    NEEDINIT = enum.auto()
    """Nothing is known of the system yet, or its INIT was refused."""
    READY = enum.auto()
    BUSY = enum.auto()
    """An evaluation is under way; what the driver says meanwhile waits."""
    HAVEDATA = enum.auto()
    """A result, or a failure, waits for its GETFORCE."""
    CLOSED = enum.auto()


class EngineSide:
    """The engine's role: what the daemon plays towards every driver.

    The owner writes bytes into `get_buffer()`, says how many with `received()`, and takes events with `next_event()`
    until that returns None. It answers Init with `accept` or `refuse`, and Evaluate with `finish` or `fail`, and then
    asks for events again. A ProtocolError ends the stream.

    Args:
        place: where to put the positions of `natoms` atoms.
        limits: the most that one message may declare.
    """

    def __init__(self, place: Place, limits: Limits | None = None) -> None:
        self._place = place
        self._limits = limits or Limits()
        self._reader: MessageReader[DriverMessage] = MessageReader(self._grammar())
        self._state = _State.NEEDINIT
        self._error: RootstockError | None = None
        self.batch_size = 1
        self.announced = False
        """The driver announced itself as one of rootstockd's own: it understands ERROR."""
        self.get_buffer = self._reader.get_buffer
        self.received = self._reader.received

    @property
    def busy(self) -> bool:
        """An evaluation is under way."""
        return self._state is _State.BUSY

    @property
    def full(self) -> bool:
        """There is no room for more bytes until events are taken: stop reading."""
        return self._reader.full

    def accept(self, batch_size: int = 1, *, announced: bool = False, await_init: bool = False) -> None:
        """The INIT just handed out is good.

        Args:
            batch_size: structures in each POSDATA from now on.
            announced: the driver understands ERROR frames.
            await_init: the system was given in advance; the driver that follows still has its own INIT to say.
        """
        self.batch_size, self.announced, self._error = batch_size, announced, None
        self._state = _State.NEEDINIT if await_init else _State.READY

    def refuse(self, error: RootstockError, batch_size: int = 1, *, announced: bool = False) -> None:
        """The INIT just handed out is no good: every GETFORCE is answered with `error` until a better one comes.

        A driver that runs ahead sends POSDATA all the same, in the layout of its `batch_size`.
        """
        self.batch_size, self.announced, self._error = batch_size, announced, error
        self._state = _State.NEEDINIT

    def finish(self) -> None:
        """The evaluation is done and its result can be sent."""
        if self._state is _State.BUSY:
            self._state = _State.HAVEDATA

    def fail(self, error: RootstockError) -> None:
        """The evaluation came to nothing."""
        if self._state is _State.BUSY:
            self._state, self._error = _State.HAVEDATA, error

    def close(self) -> None:
        """Nothing more is read, and nothing is kept: the reader holds on to its owner's memory."""
        self._state = _State.CLOSED
        self._reader.close()

    def next_event(self) -> Event | None:
        """The next thing for the owner to do, or None when more bytes, or the evaluation's end, must come first.

        Raises:
            ProtocolError: what came is not the protocol; the connection can only be closed.
        """
        # while BUSY nothing is read on: what comes next may be positions, for the place that the worker looks at
        while self._state not in (_State.BUSY, _State.CLOSED):
            if self._error is not None and not self.announced:
                self._state = _State.CLOSED  # a stock driver knows no errors, only a closed connection
                return Close(self._error)
            try:
                message = self._reader.next_message()
                event = None if message is None else self._react(message)
            except ProtocolError:
                self._state = _State.CLOSED
                raise
            if message is None or event is not None:
                return event
        return None

    def _react(self, message: DriverMessage) -> Event | None:
        match message:
            case Status():
                return Send({_State.NEEDINIT: NEEDINIT, _State.READY: READY}.get(self._state, HAVEDATA))
            case Init():
                return message
            case PosData():
                return self._posdata(message)
            case GetForce():
                return self._getforce()
            case Exit():
                self._state = _State.CLOSED
                return Close(None)

    def _posdata(self, message: PosData) -> Event | None:
        if self._state is _State.NEEDINIT:
            if self._error is None:
                raise ProtocolError("POSDATA before INIT: the engine does not know the species yet")
            return None  # the INIT was refused: GETFORCE will say why
        self._error = message.error
        if message.error is not None:
            self._state = _State.HAVEDATA
            return None
        self._state = _State.BUSY
        return Evaluate(message.cells)

    def _getforce(self) -> Event:
        error = self._error
        if self._state is _State.NEEDINIT and error is not None:
            return Send(error_frame(error))
        if self._state is not _State.HAVEDATA:
            raise ProtocolError("GETFORCE without POSDATA: there is no result to send")
        self._state, self._error = _State.READY, None
        return SendResult() if error is None else Send(error_frame(error))

    def _grammar(self) -> Grammar[DriverMessage]:
        limits = self._limits
        while True:
            word = bytes((yield HEADER_SIZE))
            if word == POSDATA:
                yield (yield from self._read_posdata())
            elif word == GETFORCE:
                yield GetForce()
            elif word == STATUS:
                yield Status()
            elif word == INIT:
                bead, size = _TWO_INTS.unpack((yield _TWO_INTS.size))
                text = bytes((yield _count(size, limits.init, "bytes of INIT")))
                yield Init(bead, text)
            elif word == EXIT:
                yield Exit()
            else:
                raise ProtocolError(f"a driver's message can't begin with {word!r}")

    def _read_posdata(self) -> Generator[int | memoryview | Skip | DriverMessage, memoryview, PosData]:
        batch = self.batch_size
        if batch == 1:
            head = yield _CELL_PAIR + 4
            cells = bytes(head[:_CELL_PAIR])
            (natoms,) = _INT.unpack(head[_CELL_PAIR:])
        else:
            (natoms,) = _INT.unpack((yield 4))
            cells = bytes((yield batch * _CELL_PAIR))
        size = 24 * natoms * batch
        if self._state is _State.NEEDINIT and natoms >= 0:  # refused, for instance as too large: GETFORCE will say so
            yield Skip(size)
            return PosData(natoms, cells, self._error)
        _count(natoms, self._limits.atoms // batch, "atoms" if batch == 1 else f"atoms in each of {batch} structures")
        try:
            target = self._place(natoms)
        except RootstockError as error:
            yield Skip(size)
            return PosData(natoms, cells, error)
        yield target
        return PosData(natoms, cells, None)


def error_frame(error: RootstockError) -> bytes:
    """An ERROR message."""
    body = error.to_json()
    return ERROR + _INT.pack(len(body)) + body


# --- the driver's side ------------------------------------------------------------------------------------------------


def init_frame(text: bytes, bead: int = 0) -> bytes:
    """An INIT message."""
    return INIT + _TWO_INTS.pack(bead, len(text)) + text


def posdata_head(cell: FloatArray, inverse: FloatArray, natoms: int) -> bytes:
    """A POSDATA message up to its positions, for one structure.

    Args:
        cell: (3, 3), Bohr, rows are lattice vectors.
        inverse: (3, 3), its inverse.
        natoms: how many positions follow.
    """
    return POSDATA + cell.T.tobytes() + inverse.T.tobytes() + _INT.pack(natoms)


def posdata_batch_head(cells: FloatArray, inverses: FloatArray, natoms: int) -> bytes:
    """The same for a batch: cells and inverses are (B, 3, 3)."""
    pairs = np.stack([cells, inverses], axis=1).transpose(0, 1, 3, 2)
    return POSDATA + _INT.pack(natoms) + pairs.tobytes()


@dataclass
class DriverSide:
    """The driver's role: what a client plays towards the daemon.

    Send what the frame functions above give, say with `expect` which answers it calls for, and take those with
    `next_message`, as with EngineSide.

    Args:
        place: where to put the forces of `natoms` atoms.
    """

    place: Place
    batch_size: int = 1
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._reader: MessageReader[EngineMessage] = MessageReader(self._grammar())
        self._expected: list[bytes] = []
        self.get_buffer = self._reader.get_buffer
        self.received = self._reader.received

    def expect(self, request: bytes) -> None:
        """A STATUS or a GETFORCE has been sent."""
        self._expected.append(request)

    def next_message(self) -> EngineMessage | None:
        """The next answer, or None when more bytes must come first.

        Raises:
            ProtocolError: an answer that is none, or one that nobody asked for.
        """
        message = self._reader.next_message()
        if message is None:
            return None
        asked = self._expected.pop(0) if self._expected else None
        if asked is None or isinstance(message, StatusReply) != (asked == STATUS):
            raise ProtocolError(f"an answer of {type(message).__name__} to {asked.decode() if asked else 'nothing'}")
        return message

    def _grammar(self) -> Grammar[EngineMessage]:
        while True:
            word = bytes((yield HEADER_SIZE))
            if word in (NEEDINIT, READY, HAVEDATA):
                yield StatusReply(word)
            elif word == FORCEREADY:
                yield (yield from self._read_forceready())
            elif word == ERROR:
                (size,) = _INT.unpack((yield 4))
                yield Failure(RootstockError.from_json(bytes((yield _count(size, self.limits.extras, "bytes")))))
            else:
                raise ProtocolError(f"an engine's message can't begin with {word!r}")

    def _read_forceready(self) -> Generator[int | memoryview | Skip | EngineMessage, memoryview, ForceReady]:
        batch = self.batch_size
        head = yield 8 * batch + 4
        energies = np.frombuffer(head[: 8 * batch], "<f8").copy()
        (natoms,) = _INT.unpack(head[8 * batch :])
        _count(natoms, self.limits.atoms // batch, "atoms")
        try:
            target = self.place(natoms)
        except RootstockError as error:
            raise ProtocolError(str(error)) from error
        yield target
        virials = _matrices((yield 72 * batch), batch, 9)
        extras = []
        for _ in range(batch):
            (size,) = _INT.unpack((yield 4))
            extras.append(bytes((yield _count(size, self.limits.extras, "bytes of extras"))))
        return ForceReady(energies, natoms, virials, extras)
