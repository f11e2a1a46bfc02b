"""What systemd and the daemon say to each other: sockets that it holds, readiness, the watchdog, its journal.

The protocol is a handful of environment variables and datagrams (sd_notify(3), sd_listen_fds(3)), so nothing is needed
for it but the standard library. Where systemd did not start this process, all of it does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from rootstock_client import ipi
from rootstockd.host.log_file import LogFormatter
from rootstockd.sessions.acceptor import Acceptor
from rootstockd.words import so_many

if TYPE_CHECKING:
    from rootstockd.daemon import Daemon

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two words to systemd, unless its watchdog wants them sooner."""
BEATS_A_WATCHDOG = 3
PATIENCE = 4
"""Beats that systemd shall wait for the next word while a daemon loads or drains."""
FIRST_DESCRIPTOR = 3
_FULL = {errno.EAGAIN, errno.ENOTCONN}
"""A socket's queue has no place, as uvloop and as asyncio's own loop tell it."""
_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
"""The daemon has nothing left to be a client with: that says nothing of how it serves others."""


class Manager:
    """The systemd that started this process, if one did.

    It takes what systemd says out of the environment, because workers inherit that.

    Args:
        environment: the environment.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", None)
        me = str(os.getpid())
        for_us = environment.pop("WATCHDOG_PID", me) == me
        limit = environment.pop("WATCHDOG_USEC", "")
        self.watchdog = int(limit) / 1e6 if for_us and limit.isdigit() else None
        """Seconds after which systemd ends a daemon that it hears nothing from."""
        for_us = environment.pop("LISTEN_PID", "") == me
        count, names = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_FDNAMES", "")
        self.sockets: dict[str, socket.socket] = {}
        """Those that systemd listens on for us, by the names that its units give them."""
        if for_us and count.isdigit():
            for fd, name in zip(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)), names.split(":"), strict=False):
                os.set_inheritable(fd, False)  # noqa: FBT003 - os has no other way
                self.sockets[name] = socket.socket(fileno=fd)

    @property
    def watches(self) -> bool:
        """Whether systemd wants to know how this process is."""
        return self._address is not None

    def notify(self, *lines: str) -> None:
        """Tell it something."""
        if self._address is None or not lines:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # noqa: FBT003 - the socket module has no other way
            sock.sendto("\n".join(lines).encode(), address)

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """While the daemon reads its configuration again."""
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self.notify("READY=1")

    async def attend(self, daemon: Daemon) -> None:
        """Say how the daemon is, from its own event loop and for as long as it takes clients.

        Loading and draining have limits of their own (`load_timeout`, `drain_timeout`), so systemd is asked for time.
        """
        if self._address is None:
            return
        interval = min(BEAT, self.watchdog / BEATS_A_WATCHDOG) if self.watchdog else BEAT
        taken = -1
        while True:
            lines = [f"STATUS={describe(daemon)}"]
            if daemon.state != "ready":
                lines.append(f"EXTEND_TIMEOUT_USEC={round(PATIENCE * interval * 1e6)}")
            if self.watchdog and await serves(daemon, self.watchdog / BEATS_A_WATCHDOG, taken):
                lines.append("WATCHDOG=1")
            taken = Acceptor.taken
            self.notify(*lines)
            await asyncio.sleep(interval)


def describe(daemon: Daemon) -> str:
    """What `systemctl status` shows of a daemon."""
    if daemon.state == "starting":
        return f"loading {', '.join(daemon.config.models)}" if daemon.config.models else "starting"
    return f"{daemon.state}, {so_many(len(daemon.sessions), 'session')}"


async def serves(daemon: Daemon, limit: float, taken: int) -> bool:
    """Whether the daemon answers on both sockets, asked through the kernel as clients ask.

    Args:
        daemon: the daemon, whose loop this runs in.
        limit: seconds that it has.
        taken: how many connections it had taken when this was last asked.
    """
    questions = [(daemon.config.control, b"GET / HTTP/1.1\r\nHost: rootstockd\r\nConnection: close\r\n\r\n")]
    if daemon.state != "draining":
        questions.append((daemon.config.socket, ipi.STATUS))
    try:
        await asyncio.wait_for(_answers(questions), limit)
    except OSError as error:  # a TimeoutError, too
        if error.errno in _SHORT:
            return True
        if error.errno in _FULL and Acceptor.taken > taken:  # a storm fills the queue as fast as it is emptied
            return True
        what = error.strerror or f"no answer within {limit:g} s"
    except asyncio.TimeoutError:  # Python 3.10's is none
        what = f"no answer within {limit:g} s"
    else:
        return True
    log.error("on the daemon's own sockets: %s; systemd is not told that all is well", what)
    return False


async def _answers(questions: list[tuple[Path, bytes]]) -> None:
    """Until somebody has said anything at all to each; that there are too many clients is an answer, too."""
    for path, question in questions:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(question)
            if not await reader.read(1):
                raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
        finally:
            writer.close()


class JournalFormatter(LogFormatter):
    """Lines for the journal, which knows the time itself and takes `<N>` for a line's importance."""

    _LEVELS = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._LEVELS if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


def in_journal() -> bool:
    """Whether standard error is the journal's, and not merely that of a process above us."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    info = os.fstat(2)
    return (device, inode) == (str(info.st_dev), str(info.st_ino))
