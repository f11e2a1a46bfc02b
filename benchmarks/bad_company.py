"""One session's steps while 64 others do what they should not: send half a message, read nothing, talk without end."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import Child, Daemon, Results, Settings, contestants, percentile, ratio
from benchmarks.load import messages
from benchmarks.scale import LOAD
from rootstock_client import ipi

NATOMS = 64
MANY = 64
DRIP = 0.1
"""Seconds from one byte of a slow writer to the next."""
ALONE = "alone"


def half_sent(sock: socket.socket) -> None:
    """An INIT, and half of a step."""
    init, request, _ = messages(NATOMS, "noop")
    sock.sendall(init + request[: len(request) // 2])


def slow_reader(sock: socket.socket) -> None:
    """Steps without end, none of whose results is read."""
    init, request, _ = messages(NATOMS, "noop")
    sock.settimeout(0.05)
    with contextlib.suppress(TimeoutError):
        sock.sendall(init)
        for _ in range(1_000):
            sock.sendall(request)


def slow_writer(sock: socket.socket) -> None:
    """A long INIT, half of which comes a byte at a time."""
    text = ipi.init_frame(b" " * 200_000)
    sock.sendall(text[:100_000])

    def drip() -> None:
        with contextlib.suppress(OSError):
            for place in range(100_000, len(text)):
                sock.sendall(text[place : place + 1])
                time.sleep(DRIP)

    threading.Thread(target=drip, daemon=True).start()


def silent(_sock: socket.socket) -> None:
    """Not a word."""


def flood(text: bytes) -> Callable[[socket.socket], None]:
    """The same again and again, as fast as it is read; what is answered is read, too."""

    def begin(sock: socket.socket) -> None:
        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock.sendall(text)

        def read() -> None:
            with contextlib.suppress(OSError):
                while sock.recv(65_536):
                    pass

        for one in (send, read):
            threading.Thread(target=one, daemon=True).start()

    return begin


def inits(model: str) -> bytes:
    """As many INITs as fit the daemon's staging buffer."""
    system = {"rootstock": 1, "model": model, "numbers": [29], "pbc": [False] * 3}
    return ipi.init_frame(json.dumps(system).encode()) * 600


COMPANY = {
    "64 half-sent messages": half_sent,
    "64 slow readers": slow_reader,
    "64 slow writers": slow_writer,
    "64 silent ones": silent,
    "64 that INIT a model without end": flood(inits("noop")),
    "64 that INIT what is no model": flood(inits("no-such-model")),
    "64 that ask STATUS without end": flood(ipi.STATUS * 5_000),
}


@contextlib.contextmanager
def company(path: Path, kind: str) -> Iterator[None]:
    """So many bad sessions."""
    with ExitStack() as stack:
        for _ in range(MANY if kind != ALONE else 0):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))
            stack.callback(_hang_up, sock)
            COMPANY[kind](sock)
        yield


def _hang_up(sock: socket.socket) -> None:
    """Also where threads are at it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    rounds, seconds = (4, 0.5) if settings.quick else (20, 2.0)
    results.parameters = {"atoms": NATOMS, "rounds": rounds, "seconds": seconds, "model": "noop"}
    latencies: dict[str, list[float]] = {kind: [] for kind in (ALONE, *COMPANY)}
    tails: dict[str, list[float]] = {kind: [] for kind in latencies}
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(settings, "--model", "noop"))
        good = Child(settings, "good", script=LOAD, socket=daemon.socket, model="noop")
        stack.enter_context(contestants([good]))
        good.ask(do="connect", idle=0, active=1, natoms=NATOMS)
        for _, kind in itertools.product(range(rounds), latencies):
            with company(daemon.socket, kind):
                good.ask(do="run", seconds=0.1)
                found = good.ask(do="run", seconds=seconds)["latencies"]
            latencies[kind] += found
            tails[kind].append(percentile(found, 0.99))
    for kind, values in latencies.items():
        results.add(kind, "step", "µs", [1e6 * value for value in values])
        results.add(kind, "step, 99th percentile of each round", "µs", [1e6 * value for value in tails[kind]])
    quiet = results.find(ALONE, "step, 99th percentile of each round")
    for kind in COMPANY:
        worse = ratio(results.find(kind, "step, 99th percentile of each round"), quiet)
        results.goal(f"99th percentile of a step beside {kind} over that alone", worse, 1.1)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    figure, (left, right) = plots.figure("A good session in bad company, noop, 64 atoms", panels=2)
    plots.bars(left, results, "step", "")
    plots.label(left, "step, median and quartiles / µs", "")
    plots.bars(right, results, "step, 99th percentile of each round", "")
    plots.label(right, "its 99th percentile / µs", "")
    plots.save(figure, path)
