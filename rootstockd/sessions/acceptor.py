"""Takes connections from a listening socket, and goes on whatever happens at it.

The loop's own server closes itself for good when `accept` fails, and takes nobody in any more when a protocol could
not be made. Here either costs the one connection, and where the machine has run out of something, a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from rootstock_client import ipi
from rootstock_client.errors import LimitError, RootstockError
from rootstockd.host import passed
from rootstockd.host.log_rate import LogRate
from rootstockd.sessions.transport import GuardedTransport
from rootstockd.sessions.turns import Allowance

log = logging.getLogger(__name__)
log.addFilter(LogRate(log))

PACE = 0.001
"""Seconds between two connections in the long run: each keeps the loop from steps, and who it is of is known late."""
AT_FIRST = 1.0
"""Seconds' worth of them that may come at once: 1,000 jobs that start together."""
MOST_WAITING = 16
"""Connections that wait until it is known whose they are; `descriptors.py` has room for so many at two sockets."""
PAUSE = 0.2
"""Seconds until the next try when the machine had nothing left for a connection."""


class Acceptor:
    """Takes connections until it is closed.

    Attributes:
        taken: how many all of this process have taken so far.

    Args:
        sock: a listening socket that does not block; closed with this.
        make_protocol: makes the protocol for a connection, as soon as it is taken, so that all of a burst are counted;
            raises the RootstockError to tell it where there is no room even to let a protocol say so.
        look_up: what is to be waited for before that, if anything. As many as `MOST_WAITING` connections wait so,
            then no others are taken until one need not any more.
    """

    taken: ClassVar[int] = 0

    def __init__(
        self,
        sock: socket.socket,
        make_protocol: Callable[[socket.socket], asyncio.BaseProtocol],
        look_up: Callable[[socket.socket], asyncio.Future[None] | None] = lambda _: None,
    ) -> None:
        self._sock, self._make_protocol, self._look_up = sock, make_protocol, look_up
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._complained = False
        self._allowance = Allowance(AT_FIRST)
        self._waiting = 0
        self._crowded = False
        """As many wait as may."""
        self._loop.add_reader(sock, self._on_connection)

    def close(self) -> None:
        """Take no more connections; those that wait are refused by the kernel."""
        if self._pause is not None:
            self._pause.cancel()
        self._crowded = False
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _on_connection(self) -> None:
        """Take one; others have their turn before the next."""
        now = self._loop.time()
        if wait := self._allowance.wait(now):
            self._rest(wait)
            return
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # the connection still waits: to come again at once would be to spin
            if not self._complained:
                log.warning("can't take a connection: %s; trying again every %g s", error.strerror, PAUSE)
            self._complained = True
            self._rest(PAUSE)
            return
        Acceptor.taken += 1
        self._allowance.take(now, PACE)
        self._complained = False
        try:
            known = self._look_up(connection)
        except Exception as error:
            self._fail(connection, error)
            return
        if known is None:
            self._take(connection)
            return
        self._go_on(self._take_later(known, connection))
        self._waiting += 1
        if self._waiting >= MOST_WAITING:
            self._crowded = True
            self._loop.remove_reader(self._sock)

    def _rest(self, seconds: float) -> None:
        """Whoever comes meanwhile waits in the socket's queue."""
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(seconds, self._loop.add_reader, self._sock, self._on_connection)

    async def _take_later(self, known: asyncio.Future[None], connection: socket.socket) -> None:
        try:
            await known
        except asyncio.CancelledError:
            connection.close()
            raise
        self._waiting -= 1
        if self._crowded:
            self._crowded = False
            self._loop.add_reader(self._sock, self._on_connection)
        self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        try:
            protocol = self._make_protocol(connection)
        except RootstockError as error:
            turn_away(connection, error)
        except Exception as error:
            self._fail(connection, error)
        else:
            self._go_on(self._let_in(protocol, connection))

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := self._loop.create_task(work))
        task.add_done_callback(self._tasks.discard)

    async def _let_in(self, protocol: asyncio.BaseProtocol, connection: socket.socket) -> None:
        try:
            if passed.are_refused(connection):
                await self._loop.connect_accepted_socket(lambda: protocol, connection)
            else:
                connection.setblocking(False)  # noqa: FBT003 - the socket module has no other way
                protocol.connection_made(transport := GuardedTransport(connection, protocol))
                transport.resume_reading()
        except Exception as error:
            protocol.connection_lost(error)
            self._fail(connection, error)

    def _fail(self, connection: socket.socket, error: Exception) -> None:
        """`accept` has failed: there is no memory, say; the next may fare better."""
        log.warning("a connection is closed: %s", error or type(error).__name__, extra={"about": "failed connections"})
        turn_away(connection, LimitError("the daemon has no memory for another session.", "Try again later."))


def turn_away(connection: socket.socket, error: RootstockError) -> None:
    """Say why and close, without waiting for anybody."""
    with contextlib.suppress(OSError):
        connection.setblocking(False)  # noqa: FBT003 - the socket module has no other way
        connection.send(ipi.error_frame(error))
    if passed.are_refused(connection):
        connection.close()
    else:
        passed.close_aside([connection])
