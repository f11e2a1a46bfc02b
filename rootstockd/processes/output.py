"""What workers print: read from a pipe and written into the daemon's log, line by line and not without end.

A worker has no file of the daemon's in its hands, which it could empty or fill. Each line says whose it is, so that no
model can write what looks like the daemon's own words.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time

log = logging.getLogger(__name__)

BURST = 192 * 1024
"""Bytes that a model's workers may have logged at once..."""
A_SECOND = 1024
"""...and then each second: 85 MiB a day at most."""
RESERVE = 48 * 1024
"""Of the burst, for what workers say as they end."""
LINE_COST = 256
"""What a line counts beside its own bytes: it takes time, too."""
LONGEST = 2_000
"""Bytes of a line; the rest of it is dropped."""
LAST_WORDS, LAST_LINES = 16 * 1024, 100
"""Bytes and lines that are kept of a worker that says too much, to be logged if it ends: a traceback, say."""
PAUSE = 0.01
"""Seconds until the next look: a worker that prints without end waits for the daemon, not the other way round."""
_CHUNK, _DROPPED_CHUNK = 4 * 1024, 64 * 1024
_LAST_READS = 32
"""Looks at the pipe of a worker that has ended; what it started may still write to it."""
_UNSEEN = re.compile(r"[^\t -~\xa0-\U0010ffff]|[\u2028-\u202e\u2066-\u2069]")
"""What does not belong into a log: terminals obey it, or show another line or order than there is."""


class Ration:
    """How much the workers of a model may have logged, one after another."""

    def __init__(self) -> None:
        self._left, self._since = float(BURST), time.monotonic()

    def left(self) -> float:
        """Bytes, as of now."""
        now = time.monotonic()
        self._left = min(float(BURST), self._left + A_SECOND * (now - self._since))
        self._since = now
        return self._left

    def take(self, size: int, reserve: int) -> bool:
        """Have so many bytes, if at least `reserve` are left then."""
        enough = self.left() - size >= reserve
        if enough:
            self._left -= size
        return enough


class WorkerOutput:
    """The pipe that is a worker's standard output and error, from its start to its end.

    Args:
        model: the worker's model.
        ration: how much may be logged.
    """

    def __init__(self, model: str, ration: Ration) -> None:
        self._model, self._ration = model, ration
        self._whose = ""
        self._rest = b""
        """A line that has not come to its end; while lines are dropped, the latest of them as well."""
        self._dropped: int | None = None
        """How many lines, since they are."""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._fd, self.theirs = os.pipe()
        os.set_blocking(self._fd, False)

    def follow(self, pid: int) -> None:
        """Read what the worker of this process id prints."""
        self._whose = f"worker {self._model} {pid}"
        self._listen()

    def close_theirs(self) -> None:
        """The worker has its end, or will not be."""
        os.close(self.theirs)

    def finish(self) -> None:
        """The worker has gone: log its last words, and hear no more."""
        for _ in range(_LAST_READS):
            if not self._take():
                break
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        *lines, rest = self._rest.split(b"\n")
        if rest:
            lines.append(rest)
        lines = lines[-LAST_LINES:]
        if self._dropped is not None:
            self._say_dropped(max(self._dropped - len(lines), 0))
        if unsaid := [line for line in lines if not self._say(line, reserve=0)]:
            self._say_dropped(len(unsaid))

    def _listen(self) -> None:
        self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._take():
            self._timer = self._loop.call_later(PAUSE, self._listen)

    def _take(self) -> bool:
        """Read once; whether there may be more."""
        try:
            data = os.read(self._fd, _CHUNK if self._dropped is None else _DROPPED_CHUNK)
        except BlockingIOError:
            return False
        if self._dropped is None:
            self._log(data)
        else:
            self._drop(data)
        return bool(data)

    def _log(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        begin = rest.rstrip(b"\r").rfind(b"\r") + 1  # a progress bar says itself again and again
        self._rest = rest[begin : begin + LONGEST + 1]
        for number, line in enumerate(lines):
            if not self._say(line, RESERVE):
                self._dropped = 0
                log.warning("%s prints too much: lines of it are dropped until it is quieter", self._whose)
                self._drop(b"\n".join([*lines[number:], b""]))
                return

    def _drop(self, data: bytes) -> None:
        assert self._dropped is not None
        self._dropped += data.count(b"\n")
        self._rest = (self._rest + data)[-LAST_WORDS:]
        if self._ration.left() > (BURST + RESERVE) / 2:
            self._say_dropped(self._dropped)
            self._dropped = None
            self._rest = self._rest.rpartition(b"\n")[2]

    def _say_dropped(self, lines: int) -> None:
        log.warning("%s: %d lines of it were dropped", self._whose, lines)

    def _say(self, line: bytes, reserve: int) -> bool:
        """Log a line, if the ration allows it."""
        shown = line.rstrip(b"\r").rpartition(b"\r")[2]
        if not self._ration.take(LINE_COST + min(len(shown), LONGEST), reserve):
            return False
        text = _UNSEEN.sub("\ufffd", shown[:LONGEST].decode("utf-8", "replace"))
        more = " [...]" if len(shown) > LONGEST else ""
        log.handle(log.makeRecord(self._whose, logging.INFO, "", 0, "%s%s", (text, more), None))
        return True
