"""The HTTP servers: for the control API on the control socket, and for metrics alone on a port."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp, Scope

from rootstockd.control.api import make_app
from rootstockd.control.limits import BoundedBody, BoundedProtocol, ControlProtocol, Paced
from rootstockd.control.metrics import make_metrics_app
from rootstockd.sessions.door import Door

if TYPE_CHECKING:
    from rootstockd.daemon import Daemon


class Server(uvicorn.Server):
    """uvicorn on the daemon's own loop, with a door that outlasts whatever happens at it; signals stay the daemon's.

    Args:
        app: what answers.
        sock: a listening socket that does not block; closed with the server.
        make_protocol: makes the protocol for a connection, of uvicorn's settings and state.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket, make_protocol: Callable[..., BoundedProtocol]) -> None:
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
        self._sock, self._make_protocol = sock, make_protocol

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set."""
        await self.serve(sockets=[])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the door."""
        await super().startup(sockets)
        self._door = Door(
            self._sock, lambda _connection: self._make_protocol(self.config, self.server_state, self.lifespan.state)
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close it, and end what is under way."""
        self._door.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield


def control_server(daemon: Daemon, sock: socket.socket) -> Server:
    """The server on a daemon's control socket."""

    def whose(scope: Scope) -> int | None:
        uid = int(scope["client"][0])
        return None if daemon.accounts.is_admin(uid) else uid

    app = Paced(BoundedBody(make_app(daemon)), whose)
    return Server(app, sock, functools.partial(ControlProtocol, daemon.accounts))


def metrics_server(daemon: Daemon, sock: socket.socket) -> Server:
    """The server on the port where a daemon has its metrics."""
    return Server(Paced(make_metrics_app(daemon), lambda _: 0), sock, BoundedProtocol)  # the app reads no bodies
