"""What HTTP clients may take of the daemon: so many connections, so large a body, and so long for one request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import TypeAlias

import h11
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rootstock_client.errors import AccessDeniedError
from rootstockd.host.peers import peer_of
from rootstockd.sessions.accounts import Accounts
from rootstockd.sessions.turns import Allowance

MAX_BODY = 64 * 1024
"""Bytes of a request's body."""
MAX_PIECES = 256
"""In which it may come at once: each takes 20 µs, and steps wait for all of them."""
MAX_CONNECTIONS = 16
"""Connections at a time; each takes a file descriptor from the sessions' reserve. Half are for those who administer the
daemon; any other user has a quarter at most."""
MAX_REFUSED = 4
"""Connections at a time whose clients are told why they are not let in; others may only find the end."""
MAX_HEAD = 16 * 1024
"""Bytes of a request's line and headers, and of headers behind a body."""
DEADLINE = 10.0
"""Seconds from a connection, or from the last answer on it, until the next one has been sent in full."""
LONGEST_WAIT = 0.8 * DEADLINE
"""Seconds that a request may wait for its turn, so that there are some left to answer it in."""

MAX_SCRAPERS = 8
"""Connections at a time to the port for metrics, likewise."""
PACE = 0.02
"""Seconds between two requests of a user, and between any two to the port for metrics: each keeps the loop from
steps."""
AT_FIRST = 1.0
"""Seconds' worth of them that those who administer the daemon may send at once."""

Reason: TypeAlias = tuple[int, str]
TOO_LARGE: Reason = (413, f"a request's body may have {MAX_BODY} bytes")
REFUSALS: dict[int | str, dict[str, object]] = {
    400: {"description": "The request can't be read."},
    403: {"description": "The caller may not do that."},
    409: {"description": "It can't be done as things are; the body says why."},
    413: {"description": "Its body is too large."},
    503: {"description": "Too many connections are open, or requests come too fast."},
}
"""What any request may be told, for the API's description."""
IN_PIECES = f"a request's body may come in {MAX_PIECES} chunks at once"
TOO_MANY = "too many connections are open already; try again"
TOO_FAST = "requests come faster than they are answered; try again later"


class _TooManyPiecesError(Exception):
    """A body comes in more than MAX_PIECES at once."""


class _Connection(h11.Connection):
    """What an HTTP client says, unless it says it in very many pieces.

    h11 holds a head against its limit only where the end is not there yet, so it is given no more than that at once.
    """

    _pieces = 0
    _ahead = b""
    """What h11 has not been given yet."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD - 1)  # with more than that it waits for no end

    def receive_data(self, data: bytes) -> None:
        self._pieces = 0
        self._ahead += data

    def next_event(self) -> type[h11.NEED_DATA | h11.PAUSED] | h11.Event:
        while (event := super().next_event()) is h11.NEED_DATA and self._ahead:
            room = MAX_HEAD - len(self.trailing_data[0])
            super().receive_data(self._ahead[:room])
            self._ahead = self._ahead[room:]
        if isinstance(event, h11.Data):
            self._pieces += 1
            if self._pieces > MAX_PIECES:
                raise _TooManyPiecesError
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP, with an end to connections that are too many or too slow.

    Args:
        config, state, app_state: uvicorn's.
    """

    _deadline: asyncio.TimerHandle | None = None
    refused = False
    """It was told so, and is about to be closed."""

    def __init__(self, config: uvicorn.Config, state: ServerState, app_state: dict[str, object]) -> None:
        super().__init__(config, state, app_state)
        self.conn = _Connection()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._too_many():
            self._refuse("503 Service Unavailable", json.dumps({"detail": TOO_MANY}).encode())
            transport.close()
        else:
            self._deadline = self.loop.call_later(DEADLINE, transport.abort)

    def _too_many(self) -> bool:
        return len(self.connections) > MAX_SCRAPERS

    def _refuse(self, status: str, body: bytes) -> None:
        """Say so, and listen to nothing: a socket closed on what the client says would lose it the answer."""
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.refused = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(1.0, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        try:
            super().data_received(data)
        except _TooManyPiecesError:
            self._refuse("413 Content Too Large", json.dumps({"detail": IN_PIECES}).encode())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = self.loop.call_later(DEADLINE, self.transport.abort)
        super().on_response_complete()


class ControlProtocol(BoundedProtocol):
    """The same on the control socket: its client has a uid, as the kernel tells it, for a host, and a pid for a port.

    Whether they may use the daemon is asked again for each request: a reload counts for those who are connected, too.

    Args:
        accounts: who may use and administer the daemon.
        config, state, app_state: uvicorn's.
    """

    uid = -1

    def __init__(
        self, accounts: Accounts, config: uvicorn.Config, state: ServerState, app_state: dict[str, object]
    ) -> None:
        super().__init__(config, state, app_state)
        self._accounts = accounts
        self._for_users, self.app = self.app, self._for_anybody

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._peer = peer_of(transport.get_extra_info("socket"))
        self.uid = self._peer.uid
        super().connection_made(transport)
        self.client = str(self.uid), self._peer.pid
        if not self.refused and (denial := self._denial()):
            self._refuse("403 Forbidden", denial)
            if sum(one.refused for one in self.connections if isinstance(one, ControlProtocol)) > MAX_REFUSED:
                transport.close()  # it may lose the answer; descriptors are others'

    async def _for_anybody(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, for whoever may use the daemon."""
        if denial := self._denial():
            response = Response(denial, 403, {"connection": "close"}, "application/json")
            await response(scope, receive, send)
        else:
            await self._for_users(scope, receive, send)

    def _denial(self) -> bytes:
        """What the client is told where they may not use the daemon; empty where they may."""
        try:
            self._accounts.check_may_use(self._peer)
        except AccessDeniedError as error:
            return error.to_json()
        return b""

    def _too_many(self) -> bool:
        """Whether there are; those who administer the daemon always have half of them, whatever others do."""
        there = [one for one in self.connections if isinstance(one, ControlProtocol) and not one.refused]
        if len(there) > MAX_CONNECTIONS:
            return True
        is_admin = self._accounts.is_admin
        others = [one.uid for one in there if not is_admin(one.uid)]
        return not is_admin(self.uid) and (
            len(others) > MAX_CONNECTIONS // 2 or others.count(self.uid) > MAX_CONNECTIONS // 4
        )


class Paced:
    """Lets requests in one after another, and not too fast.

    Args:
        app: the app.
        whose: what is left to those among whose requests one takes its turn.
    """

    def __init__(self, app: ASGIApp, whose: Callable[[Scope], Allowance]) -> None:
        self._app, self._whose = app, whose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            now, allowance = time.monotonic(), self._whose(scope)
            if (wait := allowance.wait(now)) > LONGEST_WAIT:  # it might be cut off; nor does who has gone wait on
                await json_response(503, TOO_FAST, {"connection": "close"})(scope, receive, send)
                return
            allowance.take(now, PACE)
            await asyncio.sleep(wait)
        await self._app(scope, receive, send)


class BoundedBody:
    """Reads a request's body, if it is small, before the app is asked.

    Args:
        app: the app.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                await json_response(*TOO_LARGE, {"connection": "close"})(scope, receive, send)
                return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, receive_body, send)


def json_response(status: int, detail: object, headers: dict[str, str] | None = None) -> Response:
    """An answer in ASCII, whatever characters are in it."""
    return Response(json.dumps({"detail": detail}), status, headers, "application/json")
