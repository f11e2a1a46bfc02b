"""What a daemon says, written without waiting for whoever reads it: its event loop has others to serve.

A terminal may be paused (Ctrl-S), and who reads a pipe or a socket, such as a container's log driver, may be stopped.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)

_OF_A_TERMINAL = re.compile(rb"[^\0-\x1f]{1,128}|.", re.DOTALL)
"""Pieces that a terminal takes at once if it takes any: pseudoterminals have room for multiples of 256 bytes, and text
goes there apart from each of the characters that they make others of."""


class Output(io.RawIOBase):
    """A stream that writes what there is room for, and drops the rest.

    Others have the same pipe or terminal, and O_NONBLOCK would be theirs, too; so it is asked before each piece.

    Args:
        fd: what to write to; it stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.dropped = 0
        """Lines, wholly or in part, since whoever reads this has set it to 0."""
        self._cut, self._last = False, b"\n"
        """Whether something of the last that was to be written is missing; the last byte that was."""

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, given: ReadableBuffer, /) -> int:
        """All of it, as far as its caller need know."""
        data = bytes(given)
        begin = b"\n" if self._cut and self._last != b"\n" else b""
        whole = begin + data
        written = self._put(whole)
        self._cut = written < len(whole)
        self._last = whole[:written][-1:] or self._last
        self.dropped += data.count(b"\n", max(written - len(begin), 0))
        return len(data)

    def _put(self, data: bytes) -> int:
        """How many bytes of it could be written."""
        written = 0
        with contextlib.suppress(OSError):  # a full disk, say
            regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            for piece in [data] if regular else self._pieces(data):
                if not regular and poll.poll(0) != [(self._fd, select.POLLOUT)]:  # no room, or nobody there any more
                    break
                written += (size := os.write(self._fd, piece))
                if size < len(piece):
                    break
        return written

    def _pieces(self, data: bytes) -> list[bytes]:
        """Each is written at once where there is room for anything."""
        if self.isatty():
            return _OF_A_TERMINAL.findall(data)
        return [data[begin : begin + select.PIPE_BUF] for begin in range(0, len(data), select.PIPE_BUF)]


def _open_anew(fd: int) -> None:
    """Have a pipe or terminal opened again for this process alone, which then never waits for it.

    What Python and libraries say of a crash goes there as well, and would keep the process from ending. A socket, as
    the journal's is, can't be opened again; there systemd's watchdog ends what does not end.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return
    with contextlib.suppress(OSError):  # somebody else's, as after `su`
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.dup2(own, fd)
        os.close(own)


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10's takes none
    """Logs to standard error without ever waiting for it; when there is room again it says how many lines are missing.

    All else that is written to `sys.stderr` goes the same way from then on: warnings, and traces of what nobody caught.
    """

    def __init__(self) -> None:
        _open_anew(sys.stderr.fileno())
        self._output = Output(sys.stderr.fileno())
        sys.stderr = io.TextIOWrapper(self._output, sys.stderr.encoding, "backslashreplace", write_through=True)
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        if lost := self._output.dropped:
            self._output.dropped = 0
            words = "%d lines were dropped: there was no room for them"
            super().emit(log.makeRecord(log.name, logging.WARNING, "", 0, words, (lost,), None))
            if self._output.dropped:
                self._output.dropped = lost
        super().emit(record)
