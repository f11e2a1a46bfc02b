"""The server behind the page: to whom it answers, and what.

The port is open to every user and every program of the machine, and a browser sends to it what any site tells it to.
Whoever shows the token gets a cookie for it. A browser sends that to all ports of a host, so that another user's server
could collect it: it is for a path that nobody else knows. Nor does anyone know its name: another of the same name, from
another port, would stand in front of it.
"""

from __future__ import annotations

import secrets
import socket
from importlib import resources

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from rootstockd.control.limits import BoundedProtocol
from rootstockd.control.server import Server
from rootstockd.dashboard.feed import Feed

HOSTS = ["127.0.0.1", "localhost"]
"""What the host is called, here and at the other end of a tunnel, with whatever port. A site of somebody else whose
name leads to this machine is none of them."""
MOST_CONNECTIONS = 32
"""At a time; a browser opens six."""
END = 10
"""Seconds that the server waits for answers under way when it ends; a look at the daemon takes less."""
FILES = {
    "index.html": "text/html",
    "dashboard.css": "text/css",
    "dashboard.js": "text/javascript",
    "plot.js": "text/javascript",
    "quantities.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
"""What lies in `page/`, and what it is."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer."""


class Page:
    """The page, for those who have the token: an ASGI app.

    Args:
        feed: what it shows.
    """

    def __init__(self, feed: Feed) -> None:
        self.token = secrets.token_urlsafe(24)
        self._folder = f"/{secrets.token_urlsafe(12)}/"
        self._cookie = f"rootstockd-{secrets.token_urlsafe(12)}"
        self._feed = feed
        files = resources.files(__package__) / "page"
        self._files = {name: (files / name).read_bytes() for name in FILES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            response = await self._answer(Request(scope))
            response.headers.update(HEADERS)
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if request.method != "GET":
            return PlainTextResponse("There is nothing here but pages to read.\n", 405, {"Allow": "GET"})
        path: str = request.scope["path"]
        if path == "/" and self._is_token(request.query_params.get("token", "")):
            # not a redirect: a browser that came by another site's link would follow it without the cookie
            response = PlainTextResponse("One moment.\n", headers={"Refresh": f"0; url={self._folder}"})
            response.set_cookie(self._cookie, self.token, path=self._folder, httponly=True, samesite="strict")
            return response
        if not self._is_token(request.cookies.get(self._cookie, "")):
            return PlainTextResponse("Open the address that `rootstockd dashboard` prints, with its token.\n", 403)
        name = "index.html" if path == self._folder else path.removeprefix(self._folder)
        if name == "look":
            return await self._look(request)
        if name not in self._files:
            return PlainTextResponse("There is no such page.\n", 404)
        return Response(self._files[name], media_type=FILES[name])

    async def _look(self, request: Request) -> Response:
        try:
            after = float(request.query_params.get("after", "0"))
        except ValueError:
            return PlainTextResponse("`after` is the time of a look.\n", 400)
        return JSONResponse(await self._feed.look(after))

    def _is_token(self, said: str) -> bool:
        return secrets.compare_digest(said.encode(), self.token.encode())


class _Protocol(BoundedProtocol):
    def _too_many(self) -> bool:
        return len(self.connections) > MOST_CONNECTIONS


def page_server(page: Page, sock: socket.socket) -> Server:
    """The server of a page on a listening socket."""
    app = TrustedHostMiddleware(page, HOSTS, www_redirect=False)
    server = Server(app, sock, _Protocol)
    server.config.timeout_graceful_shutdown = END
    return server
