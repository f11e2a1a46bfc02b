"""How a driver's stream is read: as its bytes come while steps come of them, and else in turns with others' streams.

What a read takes can't be seen from here as long as the loop does it: one of a thousand bytes that were sent one by one
takes a thousand times as long as one of a thousand at once. So it is guessed, until that is too much for no step; from
then on the session reads in its turns, which are timed, until a step comes or there is nothing more to read.
"""

from __future__ import annotations

import asyncio
import os

from rootstockd.sessions.transport import GuardedTransport

READ, BYTE = 30e-6, 0.2e-9
"""Seconds that a read is guessed to take of the loop's time, with waking whoever writes, and a byte of it."""
CRUMB = 4096
"""Bytes of positions that are well worth a read: a step will come of them."""
AT_ONCE = 500e-6
"""Seconds of reading without a step before others have their turn; of a session that is closed no more is read."""


class Intake:
    """One session's reading."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.in_turns = False
        """It is read when it has a turn, and at no other time."""
        self.paused = False
        """Nothing is read until `go_on`."""
        self._spent = 0.0
        """What was guessed since the last step."""

    def begin(self, transport: asyncio.Transport) -> None:
        """Read from this one, from now on as bytes come."""
        self.transport = transport
        self.in_turns = self.paused = False

    def pause(self) -> None:
        """What more the driver says waits where it was written."""
        if not self.paused:
            self.paused = True
            self.transport.pause_reading()

    def go_on(self) -> None:
        """Read again as bytes come, or else in turns."""
        if self.paused and not self.in_turns:
            self.paused = False
            self.transport.resume_reading()

    def as_they_come(self) -> None:
        """Read in turns no more."""
        self.in_turns = False
        self.go_on()

    def step_came(self) -> None:
        """Of what was read; all of it was for that."""
        self._spent = 0.0
        self.in_turns = False

    def came(self, nbytes: int, *, placing: bool) -> float | None:
        """Bytes were read, and no step came of them.

        Args:
            nbytes: how many.
            placing: they are positions.

        Returns:
            Seconds of the loop's time that are owed, where it is time for a turn: nothing is read until then. None
            where bytes are read as they come.
        """
        if placing and nbytes >= CRUMB:
            if self.in_turns:
                self.as_they_come()
            return None
        if self.in_turns:
            return 0.0
        self._spent += READ + BYTE * nbytes
        if self._spent <= AT_ONCE:
            return None
        owed, self._spent = self._spent, 0.0
        self.in_turns = True
        self.pause()
        return owed

    def read(self, buffer: memoryview) -> int:
        """Read what is there, once; how many bytes, or 0 where the loop is to see to it again.

        Those of a guarded transport have gone to its protocol already.
        """
        if isinstance(self.transport, GuardedTransport):
            if self.transport.read_now():
                return 0
        else:
            try:
                if nbytes := os.readv(self.transport.get_extra_info("socket").fileno(), [buffer]):
                    return nbytes
            except OSError:  # nothing is there, or it has ended, as the loop will see
                pass
        self.as_they_come()
        return 0
