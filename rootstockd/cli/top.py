"""`top`: what a daemon is doing, live in a terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import click
from rich.live import Live

from rootstock_client.errors import RootstockError
from rootstockd.cli.clients import Refused, socket_in_use, socket_option
from rootstockd.cli.common import console, fetch_status, watched
from rootstockd.cli.frame import frame
from rootstockd.cli.tables import SORTS, View
from rootstockd.control.schema import DaemonStatus
from rootstockd.monitoring.history import History

KEYS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "s", "\x1b[D": "left", "\x1b[5~": "page up", "\x1b[6~": "page down"}
"""What terminals send for keys that are no characters."""
PAGE = 10
"""Sessions that Page Up and Page Down scroll by."""


@click.command()
@socket_option
@click.option(
    "-d",
    "--delay",
    type=click.FloatRange(min=0.1, max=3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
def top(socket: Path | None, delay: float) -> None:
    """Watch the daemon: devices, models, users and sessions.

    q quits, ? helps. Without a terminal, it looks twice and prints what it saw.
    """
    address = socket_in_use(socket)
    history = History()
    try:
        status = fetch_status(address)
        history.add(status, time.time())
        if watched() and not console.is_dumb_terminal and sys.stdin.isatty():
            Screen(address, delay, status, history).run()
            return
        time.sleep(delay)
        status = fetch_status(address)
    except RootstockError as error:
        raise Refused(error) from error
    history.add(status, time.time())
    console.print(frame(status, history, View(console.width, ascii_only=console.options.ascii_only)))


class Screen:
    """A terminal that shows a daemon until somebody has seen enough.

    Args:
        address: the daemon's session socket.
        delay: seconds between two looks.
        status: what it said already.
        history: what there was until then.
    """

    def __init__(self, address: Path, delay: float, status: DaemonStatus, history: History) -> None:
        self._address, self._delay = address, delay
        self._status, self._history = status, history
        self._view = View(console.width, console.height, console.options.ascii_only)
        self._said: SimpleQueue[DaemonStatus | RootstockError] = SimpleQueue()
        self._over = threading.Event()
        self._bell, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Show it, until q or Ctrl-C."""
        looking = threading.Thread(target=self._look, daemon=True)  # one that hangs keeps nobody from leaving
        with keys(sys.stdin.fileno()), Live(console=console, screen=True, auto_refresh=False) as live:
            signal.signal(signal.SIGWINCH, lambda *_: self._ring())
            looking.start()
            with contextlib.suppress(KeyboardInterrupt):
                while not self._over.is_set():
                    self._draw(live)
                    self._wait()
        self._over.set()

    def _look(self) -> None:
        """Ask the daemon again and again, in a thread of its own."""
        while not self._over.wait(self._delay):
            try:
                self._said.put(fetch_status(self._address))
            except RootstockError as error:
                self._said.put(error)
            self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            os.write(self._wake, b"!")

    def _wait(self) -> None:
        """For a key, a status, or another size of the terminal."""
        ready, _, _ = select.select([sys.stdin, self._bell], [], [])
        if self._bell in ready:
            os.read(self._bell, 4096)
        while not self._said.empty():
            self._take(self._said.get())
        if sys.stdin in ready:
            self._press(os.read(sys.stdin.fileno(), 64).decode(errors="replace"))

    def _take(self, said: DaemonStatus | RootstockError) -> None:
        if isinstance(said, RootstockError):
            self._view.trouble = f"waiting for the daemon: {said.message}"
            return
        self._view.trouble = ""
        if not self._view.paused:
            self._history.add(said, time.time())
            self._status = said

    def _press(self, typed: str) -> None:
        if not typed:  # the terminal has gone
            self._over.set()
        view = self._view
        for key in [KEYS[typed]] if typed in KEYS else typed:
            if key in ("q", "\x04"):
                self._over.set()
            elif key in ("s", "\t", "left"):
                view.sort = SORTS[(SORTS.index(view.sort) + (-1 if key == "left" else 1)) % len(SORTS)]
            elif key == "r":
                view.reverse = not view.reverse
            elif key in ("p", " "):
                view.paused = not view.paused
            elif key in ("?", "h"):
                view.help = not view.help
            step = {"up": -1, "down": 1, "page up": -PAGE, "page down": PAGE}.get(key, 0)
            view.scroll = max(0, min(view.scroll + step, len(self._status.sessions) - 1))

    def _draw(self, live: Live) -> None:
        self._view.width, self._view.height = console.width, console.height
        live.update(frame(self._status, self._history, self._view), refresh=True)


@contextlib.contextmanager
def keys(fd: int) -> Iterator[None]:
    """Have keys at once and unseen; Ctrl-Z, which would leave the screen as it is, is none."""
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        now = termios.tcgetattr(fd)
        now[6][termios.VSUSP] = b"\0"
        termios.tcsetattr(fd, termios.TCSANOW, now)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
