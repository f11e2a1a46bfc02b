"""What serves HTTP, on the daemon's loop or a command's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

from rootstockd.control.limits import BoundedProtocol
from rootstockd.sessions.acceptor import Acceptor


class Server(uvicorn.Server):
    """uvicorn on the daemon's own loop, whose acceptor outlasts whatever happens to it; signals stay the daemon's.

    Args:
        app: what answers.
        sock: a listening socket that does not block; closed with the server.
        make_protocol: makes the protocol for a connection, of uvicorn's settings and state.
        look_up: what is to be waited for before that; see `Acceptor`.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        make_protocol: Callable[..., BoundedProtocol],
        look_up: Callable[[socket.socket], asyncio.Future[None] | None] = lambda _: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            proxy_headers=False,  # they would change who asks
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
        )
        config.timeout_graceful_shutdown = 1  # a request that never ends must not keep the daemon from ending
        super().__init__(config)
        self._sock, self._make_protocol, self._look_up = sock, make_protocol, look_up

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set."""
        await self.serve(sockets=[])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections from now on."""
        await super().startup(sockets)
        self._acceptor = Acceptor(
            self._sock,
            lambda _connection: self._make_protocol(self.config, self.server_state, self.lifespan.state),
            self._look_up,
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close it, and end what is under way."""
        self._acceptor.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield
