"""The engine's role in the i-PI protocol, without I/O: the daemon's towards jobs, and `attach`'s towards its driver."""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

from rootstock_client.errors import LimitError, ProtocolError, RootstockError
from rootstock_client.ipi import (
    CELL_PAIR,
    EXIT,
    GETFORCE,
    HAVEDATA,
    HEADER_SIZE,
    INIT,
    INT,
    NEEDINIT,
    POSDATA,
    READY,
    STATUS,
    TWO_INTS,
    DriverMessage,
    Exit,
    GetForce,
    Init,
    Limits,
    Place,
    PosData,
    Status,
    checked_count,
    error_frame,
)
from rootstock_client.stream import STAGING_SIZE, Grammar, MessageReader, Skip

_POSDATA_HEAD = struct.Struct(f"<{HEADER_SIZE}s{CELL_PAIR}si")
"""POSDATA for one structure up to its positions."""
_BEGIN = 16
"""Bytes behind POSDATA that are looked at before the rest is waited for."""


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


class Dropped(NamedTuple):
    """Nothing is to be done: a POSDATA was read that fits no system. Many of them take their time all the same."""


class Close(NamedTuple):
    """End the connection; `error` is None when the driver said EXIT."""

    error: RootstockError | None


Event: TypeAlias = Send | Init | Evaluate | SendResult | Dropped | Close


class _State(enum.Enum):
    NEEDINIT = enum.auto()
    """Nothing is known of the system yet, or its INIT was refused."""
    READY = enum.auto()
    BUSY = enum.auto()
    """An evaluation is under way, or an INIT has no answer yet; what the driver says meanwhile waits."""
    HAVEDATA = enum.auto()
    """A result, or a failure, waits for its GETFORCE."""
    CLOSED = enum.auto()


_NEEDINIT, _READY, _BUSY, _HAVEDATA, _CLOSED = _State
_SEND_RESULT = SendResult()
_DROPPED = Dropped()


class EngineSide:
    """The engine's role.

    The owner writes bytes into `get_buffer()`, says how many with `received()`, and takes events with `next_event()`
    until that returns None. It answers Init with `accept` or `refuse`, and Evaluate with `finish` or `fail`, each when
    it likes, and then asks for events again. A ProtocolError ends the stream.

    Args:
        place: where to put the positions of `natoms` atoms.
        limits: the most that one message may declare.
        reserve: asked before an INIT of so many bytes is staged, where that takes more than the reader has anyway; a
            RootstockError of its ends the stream.
    """

    def __init__(
        self, place: Place, limits: Limits | None = None, reserve: Callable[[int], None] = lambda _size: None
    ) -> None:
        self._place, self._reserve = place, reserve
        self._limits = limits or Limits()
        self._reader: MessageReader[DriverMessage] = MessageReader(self._grammar())
        self._state = _NEEDINIT
        self._error: RootstockError | None = None
        self._evaluate = Evaluate(b"")
        self.batch_size = 1
        self.announced = False
        """The driver announced itself as one of rootstockd's own: it understands ERROR."""
        self.get_buffer = self._reader.get_buffer
        self.received = self._reader.received

    @property
    def busy(self) -> bool:
        """Whether an evaluation is under way, or an INIT has no answer yet."""
        return self._state is _BUSY

    @property
    def unfetched(self) -> bool:
        """Whether there is a result that the driver has not asked for yet."""
        return self._state is _HAVEDATA

    @property
    def full(self) -> bool:
        """Whether there is no room for more bytes until events are taken: stop reading."""
        return self._reader.full

    @property
    def placing(self) -> bool:
        """Positions that will be evaluated have come in part."""
        return self._reader.filling

    def accept(self, batch_size: int = 1, *, announced: bool = False) -> None:
        """The INIT just handed out is good.

        Args:
            batch_size: structures in each POSDATA from now on.
            announced: the driver understands ERROR frames.
        """
        self.batch_size, self.announced, self._error = batch_size, announced, None
        self._state = _READY

    def refuse(self, error: RootstockError, batch_size: int = 1, *, announced: bool = False) -> None:
        """The INIT just handed out is no good: every GETFORCE is answered with `error` until a better one comes.

        A driver that runs ahead sends POSDATA all the same, in the layout of its `batch_size`.
        """
        self.batch_size, self.announced, self._error = batch_size, announced, error
        self._state = _NEEDINIT

    def finish(self) -> None:
        """The evaluation is done and its result can be sent."""
        if self._state is _BUSY:
            self._state = _HAVEDATA

    def fail(self, error: RootstockError) -> None:
        """The evaluation came to nothing."""
        if self._state is _BUSY:
            self._state, self._error = _HAVEDATA, error

    def close(self) -> None:
        """Nothing more is read, and nothing is kept: reader and errors' tracebacks hold on to their owner's memory."""
        self._state, self._error = _CLOSED, None
        self._reader.close()

    def next_event(self) -> Event | None:
        """The next thing for the owner to do, or None when more bytes, or the evaluation's end, must come first.

        Raises:
            ProtocolError: what came is not the protocol; the connection can only be closed.
            LimitError: an INIT is longer than any may be; likewise.
            RootstockError: `reserve` refused; likewise.
        """
        # while BUSY nothing is read on: what comes next may be positions, for the place that the worker looks at
        reader = self._reader
        while self._state is not _BUSY and self._state is not _CLOSED:
            if self._error is not None:
                if not self.announced:
                    self._state = _CLOSED  # a stock driver knows no errors, only a closed connection
                    return Close(self._error)
            elif reader.between:
                if reader.start == reader.end:
                    return None
                if (event := self._whole()) is not None:
                    return event
            try:
                message = reader.next_message()
                event = None if message is None else self._react(message)
            except RootstockError:
                self._state = _CLOSED
                raise
            if message is None or event is not None:
                return event
        return None

    def _whole(self) -> Event | None:
        """The next event if it is the plainest there is and all of it has come, as a driver's steps have.

        The grammar would say the same, in several times as long; whatever is in any way special is left to it.
        """
        reader = self._reader
        start, end = reader.start, reader.end
        if self._state is _HAVEDATA and end - start >= HEADER_SIZE:
            if reader.staging[start : start + HEADER_SIZE] == GETFORCE:
                reader.start = start + HEADER_SIZE
                self._state = _READY
                return _SEND_RESULT
        elif self._state is _READY and self.batch_size == 1 and end - start >= _POSDATA_HEAD.size:
            word, cells, natoms = _POSDATA_HEAD.unpack_from(reader.staging, start)
            first = start + _POSDATA_HEAD.size
            behind = first + 24 * natoms
            if word != POSDATA or not 0 <= natoms <= self._limits.atoms or behind > end:
                return None
            try:
                self._place(natoms)[:] = reader.staging[first:behind]
            except RootstockError:
                return None
            reader.start = behind
            self._state = _BUSY
            if cells != self._evaluate.cells:
                self._evaluate = Evaluate(cells)
            return self._evaluate
        return None

    def _react(self, message: DriverMessage) -> Event:
        match message:
            case Status():
                return Send({_NEEDINIT: NEEDINIT, _READY: READY}.get(self._state, HAVEDATA))
            case Init():
                self._state = _BUSY
                return message
            case PosData():
                return self._posdata(message)
            case GetForce():
                return self._getforce()
            case Exit():
                self._state = _CLOSED
                return Close(None)

    def _posdata(self, message: PosData) -> Event:
        if self._state is _NEEDINIT:
            if self._error is None:
                raise ProtocolError("POSDATA before INIT: the engine does not know the species yet.")
            return _DROPPED  # the INIT was refused: GETFORCE will say why
        self._error = message.error
        if message.error is not None:
            self._state = _HAVEDATA
            return _DROPPED
        self._state = _BUSY
        return Evaluate(message.cells)

    def _getforce(self) -> Event:
        error = self._error
        if self._state is _NEEDINIT and error is not None:
            return Send(error_frame(error))
        if self._state is not _HAVEDATA:
            raise ProtocolError("GETFORCE without POSDATA: there is no result to send.")
        self._state, self._error = _READY, None
        return _SEND_RESULT if error is None else Send(error_frame(error))

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
                _bead, size = TWO_INTS.unpack((yield TWO_INTS.size))
                if size > limits.init:
                    raise LimitError(
                        f"an INIT of {size} bytes; this daemon takes {limits.init}, "
                        f"for systems of up to {limits.atoms} atoms.",
                        "Use a smaller structure, or have whoever runs the daemon raise `max_atoms`.",
                    )
                if checked_count(size, limits.init, "bytes of INIT") > STAGING_SIZE:
                    self._reserve(size)
                yield Init(bytes((yield size)))  # no name for the text: the generator would keep it
            elif word == EXIT:
                yield Exit()
            else:
                raise ProtocolError(f"a driver's message can't begin with {word!r}.")

    def _read_posdata(self) -> Generator[int | memoryview | Skip | DriverMessage, memoryview, PosData]:
        batch = self.batch_size
        if batch == 1:
            begin = bytes((yield _BEGIN))
            _check_mode(begin)
            rest = yield CELL_PAIR + 4 - _BEGIN
            cells = begin + bytes(rest[:-4])
            (natoms,) = INT.unpack(rest[-4:])
        else:
            begin = bytes((yield _BEGIN))
            _check_mode(begin)
            (natoms,) = INT.unpack(begin[:4])
            cells = begin[4:] + bytes((yield batch * CELL_PAIR + 4 - _BEGIN))
        size = 24 * natoms * batch
        if self._state is _NEEDINIT and natoms >= 0:  # refused, for instance as too large: GETFORCE will say so
            yield Skip(size)
            return PosData(natoms, cells, self._error)
        checked_count(
            natoms, self._limits.atoms // batch, "atoms" if batch == 1 else f"atoms in each of {batch} structures"
        )
        try:
            target = self._place(natoms)
        except RootstockError as error:
            yield Skip(size)
            return PosData(natoms, cells, error)
        yield target
        return PosData(natoms, cells, None)


def _check_mode(begin: bytes) -> None:
    """Refuse i-PI's ``mode="shm"``: it sends the number of atoms, and for each array a name's length and the name.

    Its segments are the user's, and `rootstock_client.shared_memory` is for these.
    """
    if begin.endswith(b"ipi_shm_"):
        raise ProtocolError(
            'the driver speaks i-PI\'s mode="shm".', 'Give --shm to attach, or set mode="unix" in its <ffsocket>.'
        )
