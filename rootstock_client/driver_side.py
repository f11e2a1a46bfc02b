"""The driver's role in the i-PI protocol, without I/O: what a client plays towards the daemon."""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass, field

from rootstock_client.errors import ProtocolError, RootstockError
from rootstock_client.ipi import (
    ERROR,
    FORCEREADY,
    HAVEDATA,
    HEADER_SIZE,
    INT,
    NEEDINIT,
    READY,
    STATUS,
    EngineMessage,
    Failure,
    ForceReady,
    Limits,
    Place,
    StatusReply,
    checked_count,
)
from rootstock_client.stream import Grammar, MessageReader, Skip

_HEAD = struct.Struct(f"<{HEADER_SIZE}s8si")
"""FORCEREADY for one structure up to its forces."""
_TAIL = struct.Struct("<72si")
"""And what is behind them: the virial, and how long the extras are."""


@dataclass
class DriverSide:
    """The driver's role: what a client plays towards the daemon.

    Send what the frame functions of `ipi` give, say with `expect` which answers it calls for, and take those with
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

    @property
    def unread(self) -> bool:
        """Bytes have come behind the last answer."""
        return self._reader.start != self._reader.end

    def next_message(self) -> EngineMessage | None:
        """The next answer, or None when more bytes must come first.

        Raises:
            ProtocolError: an answer that is none, or one that nobody asked for.
        """
        message: EngineMessage | None = self._whole() if self._reader.between else None
        if message is None and (message := self._reader.next_message()) is None:
            return None
        asked = self._expected.pop(0) if self._expected else None
        if asked is None or isinstance(message, StatusReply) != (asked == STATUS):
            raise ProtocolError(f"an answer of {type(message).__name__} to {asked.decode() if asked else 'nothing'}.")
        return message

    def _whole(self) -> ForceReady | None:
        """A FORCEREADY for one structure of which all has come: what the grammar says, in a fraction of the time."""
        reader, start = self._reader, self._reader.start
        if self.batch_size != 1 or reader.end - start < _HEAD.size:
            return None
        word, energy, natoms = _HEAD.unpack_from(reader.staging, start)
        forces = start + _HEAD.size
        tail = forces + 24 * natoms
        extras = tail + _TAIL.size
        if word != FORCEREADY or not 0 <= natoms <= self.limits.atoms or extras > reader.end:
            return None
        virial, size = _TAIL.unpack_from(reader.staging, tail)
        end = extras + size
        if not 0 <= size <= self.limits.extras or end > reader.end:
            return None
        try:
            self.place(natoms)[:] = reader.staging[forces:tail]
        except RootstockError:
            return None
        reader.start = end
        return ForceReady(natoms, energy, virial, [reader.staging[extras:end].tobytes()])

    def _grammar(self) -> Grammar[EngineMessage]:
        while True:
            word = bytes((yield HEADER_SIZE))
            if word in (NEEDINIT, READY, HAVEDATA):
                yield StatusReply(word)
            elif word == FORCEREADY:
                yield (yield from self._read_forceready())
            elif word == ERROR:
                (size,) = INT.unpack((yield 4))
                yield Failure(RootstockError.from_json(bytes((yield checked_count(size, self.limits.extras, "bytes")))))
            else:
                raise ProtocolError(f"an engine's message can't begin with {word!r}.")

    def _read_forceready(self) -> Generator[int | memoryview | Skip | EngineMessage, memoryview, ForceReady]:
        batch = self.batch_size
        head = yield 8 * batch + 4
        energies = bytes(head[: 8 * batch])
        (natoms,) = INT.unpack(head[8 * batch :])
        checked_count(natoms, self.limits.atoms // batch, "atoms")
        try:
            target = self.place(natoms)
        except RootstockError as error:
            raise ProtocolError(str(error)) from error
        yield target
        virials = bytes((yield 72 * batch))
        extras = []
        for _ in range(batch):
            (size,) = INT.unpack((yield 4))
            extras.append(bytes((yield checked_count(size, self.limits.extras, "bytes of extras"))))
        return ForceReady(natoms, energies, virials, extras)
