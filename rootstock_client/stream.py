"""Bytes in, messages out: the buffer under both sides of the protocol.

A grammar is a generator that says what it needs next and hands out messages as it has them. It yields

- an int: it is sent a memoryview of that many contiguous bytes, good until its next yield;
- a memoryview: that memory is filled with the bytes that follow, straight from the socket where they are many;
- a Skip: that many bytes are thrown away;
- anything else: a message for the reader's owner.

So a stream means the same wherever it is cut, and large arrays are received where they are wanted, without a copy.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Generic, NamedTuple, TypeAlias, TypeVar, cast

STAGING_SIZE = 64 * 1024
"""One read takes this much at most into the staging buffer; a step of 2,700 atoms fits in whole."""


class Skip(NamedTuple):
    """Throw this many bytes away."""

    size: int


Message = TypeVar("Message")
Grammar: TypeAlias = Generator["int | memoryview | Skip | Message", memoryview, None]

_NOTHING = memoryview(b"")
_waste = memoryview(bytearray(STAGING_SIZE))
"""What comes for a reader that is closed goes here."""


class MessageReader(Generic[Message]):
    """Runs a grammar over a stream.

    Write into `get_buffer()`, say how much with `received()`, take messages with `next_message()` until it gives None.

    While `between` says that the grammar has seen nothing of the next message, its owner may take it out of
    `staging[start:end]` by itself, if it is all there, and move `start` behind it: that is several times as fast.
    """

    __slots__ = ("_answer", "_direct", "_filled", "_grammar", "_need", "_started", "between", "end", "staging", "start")

    def __init__(self, grammar: Grammar[Message]) -> None:
        self._grammar = grammar
        self.staging = memoryview(bytearray(STAGING_SIZE))
        self.start = self.end = 0
        self.between = True
        self._need: int | memoryview | Skip | None = None
        self._filled = 0
        self._direct = False
        self._answer = _NOTHING
        self._started = False

    @property
    def full(self) -> bool:
        """The staging buffer has no room: messages must be taken before more bytes can be received."""
        return self.end - self.start == len(self.staging) and not self._starved

    @property
    def filling(self) -> bool:
        """What comes next goes into memory that the grammar has named."""
        return isinstance(self._need, memoryview)

    @property
    def _starved(self) -> bool:
        """The grammar waits for more contiguous bytes than the staging buffer holds so far."""
        return isinstance(self._need, int) and self._need > self.end - self.start

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes of the stream go; empty only when `full`."""
        del sizehint  # asyncio's idea of a good size
        if self.between and self.start == self.end and len(self.staging) == STAGING_SIZE:
            self.start = self.end = 0
            return self.staging
        need = self._need
        if isinstance(need, memoryview) and self.start == self.end and self._filled < len(need):
            self._direct = True
            return need[self._filled :]
        self._make_room()
        return self.staging[self.end :]

    def received(self, size: int) -> None:
        """`size` bytes were written into the buffer that `get_buffer` gave last."""
        if self._direct:
            self._direct = False
            self._filled += size
        else:
            self.end += size

    def next_message(self) -> Message | None:
        """The next message, or None when more bytes must come first.

        Raises:
            Whatever the grammar raises; it is over then.
        """
        if self.between:
            if self.start == self.end:
                return None
            self.between = False
        while True:
            if self._need is None:
                need = self._advance()
                if not isinstance(need, (int, memoryview, Skip)):
                    self.between = True
                    if len(self.staging) > STAGING_SIZE and self.start == self.end:
                        self._shrink()  # now: an owner that says nothing more must not keep it
                    return need
                self._need, self._filled = need, 0
            if not self._satisfy():
                return None
            self._need = None

    def close(self) -> None:
        """Give back all memory: what was staged, and what was to be filled. What `get_buffer` gives then is lost."""
        self._grammar.close()
        self._need, self._answer, self._direct = None, _NOTHING, False
        self.staging, self.start, self.end = _waste, 0, 0

    def _advance(self) -> int | memoryview | Skip | Message:
        if not self._started:
            self._started = True
            return next(self._grammar)
        answer, self._answer = self._answer, _NOTHING
        return self._grammar.send(answer)

    def _satisfy(self) -> bool:
        """Give the grammar what it needs from the staging buffer, if that is all there."""
        need, have = self._need, self.end - self.start
        if isinstance(need, int):
            if have < need:
                return False
            self._answer = self.staging[self.start : self.start + need].toreadonly()
            self.start += need
            return True
        total = need.size if isinstance(need, Skip) else len(cast(memoryview, need))
        take = min(have, total - self._filled)
        if isinstance(need, memoryview):
            need[self._filled : self._filled + take] = self.staging[self.start : self.start + take]
        self.start += take
        self._filled += take
        return self._filled == total

    def _make_room(self) -> None:
        """Bring what is staged to the front; grow, by doubling, as bytes of a long item arrive, and never past it."""
        have = self.end - self.start
        if have == 0:
            self.start = self.end = 0
            if len(self.staging) > STAGING_SIZE and not (isinstance(self._need, int) and self._need > STAGING_SIZE):
                self._shrink()
            return
        if self.end < len(self.staging):
            return
        staging = self.staging
        if have == len(staging) and self._starved:
            staging = memoryview(bytearray(min(2 * len(staging), cast(int, self._need))))
        staging[:have] = self.staging[self.start : self.end]
        self.staging, self.start, self.end = staging, 0, have

    def _shrink(self) -> None:
        self.staging, self.start, self.end = memoryview(bytearray(STAGING_SIZE)), 0, 0
