"""`dashboard`: what a daemon is doing, live in a browser."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket as sockets
from pathlib import Path

import click

from rootstock_client.errors import RootstockError
from rootstockd.cli.clients import Refused, socket_in_use, socket_option
from rootstockd.cli.common import fetch_status
from rootstockd.dashboard.feed import Feed
from rootstockd.dashboard.server import Page, page_server
from rootstockd.users import user_name

LOOPBACK = "127.0.0.1"
PATIENCE = 3.0
"""Seconds that the daemon has to answer; whoever ends the command may have to wait for as long."""


@click.command()
@socket_option
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port of the page; 0, the default, takes any free one."
)
def dashboard(socket: Path | None, port: int) -> None:
    """Watch the daemon in a browser, with plots.

    Prints the address of a page that shows what `rootstockd top` would show you, and serves it until Ctrl-C. The port
    is open on this machine alone; a browser elsewhere comes to it through SSH.
    """
    ask = functools.partial(fetch_status, socket_in_use(socket), timeout=PATIENCE)
    try:
        status = ask()
    except RootstockError as error:
        raise Refused(error) from error
    try:
        listening = sockets.create_server((LOOPBACK, port))
    except OSError as error:
        raise Refused(
            f"can't listen on port {port}: {os.strerror(error.errno or 0)}. Choose another with --port; without "
            "it, any free port is taken."
        ) from error
    with listening:
        listening.setblocking(False)  # noqa: FBT003 - the socket module has no other way
        page, port = Page(Feed(ask, status)), listening.getsockname()[1]
        click.echo(
            f"http://{LOOPBACK}:{port}/?token={page.token}\n\n"
            "A browser elsewhere reaches it through\n"
            f"    ssh -N -L {port}:{LOOPBACK}:{port} {user_name(os.getuid())}@{sockets.gethostname()}\n"
            "Ctrl-C ends it."
        )
        asyncio.run(_serve(page, listening))


async def _serve(page: Page, listening: sockets.socket) -> None:
    """Until Ctrl-C, or whatever else ends programs."""
    server = page_server(page, listening)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # anybody can send what is no HTTP; it is refused

    def stop() -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:  # as `nohup` has it
            continue
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await server.run_until_stopped()
