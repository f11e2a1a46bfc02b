"""Descriptors that are sent along to where none are wanted: they do not stay, and their end holds nobody up.

On this machine's kernel, and as on one before Linux 6.16, which can't refuse them.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, wait_for
from rootstock_client import ipi
from rootstock_client.runtime_dir import control_socket

sys.path.append(str(Path(__file__).resolve().parent.parent / "fuzz"))
import live

LINGERS = 5
"""Seconds that it takes to close a stream of `lingering`."""


@pytest.fixture(scope="module")
def daemon(older_kernel: bool, start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    return start_shared_daemon("--model", "emt")


@pytest.fixture(autouse=True)
def nothing_stays(daemon: RunningDaemon) -> Iterator[None]:
    pid = daemon.client().status()["pid"]
    control = control_socket(daemon.socket)
    before = live.descriptors(pid, control)
    yield
    wait_for(lambda: live.descriptors(pid, control) <= before, timeout=4 * LINGERS)
    assert not daemon.client().status()["sessions"]
    assert "Traceback" not in daemon.log.read_text()


def step(daemon: RunningDaemon) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    reference = atoms.copy()
    reference.calc = EMT()
    with daemon.client().calculator("emt") as atoms.calc:
        np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-9)


@contextlib.contextmanager
def lingering() -> Iterator[socket.socket]:
    """A stream whose last copy takes long to close: there is more to send, and nobody takes it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.socket() as stream:
            stream.connect(listener.getsockname())
            with listener.accept()[0]:
                stream.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        stream.send(bytes(65536))
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGERS))
                yield stream
                with contextlib.suppress(OSError):  # it is still ours
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture
def write() -> Iterator[int]:
    """The end of a pipe to send along, of which nobody may have a copy in the end."""
    read, write = os.pipe()
    try:
        yield write
        os.close(write)
        assert select.select([read], [], [], 4 * LINGERS)[0], "the daemon has kept it"
        assert os.read(read, 1) == b""
    finally:
        os.close(read)


@contextlib.contextmanager
def stopped(daemon: RunningDaemon) -> Iterator[None]:
    """Whatever is sent meanwhile is closed here before the daemon sees it, which then is the last to have it."""
    pid = daemon.client().status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(4 * LINGERS)
        sock.connect(str(path))
        yield sock


def send(sock: socket.socket, data: bytes, descriptors: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def init(**more: object) -> bytes:
    fields = {"rootstock": 1, "model": "emt", "numbers": [29] * 4, "pbc": [True] * 3, **more}
    return ipi.init_frame(json.dumps(fields).encode())


def gone(sock: socket.socket) -> bool:
    """Whether the other side says no more."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(65536):
            pass
    return True


@pytest.mark.parametrize("first", [b"", init()])
def test_to_a_session(daemon: RunningDaemon, older_kernel: bool, write: int, first: bytes) -> None:
    with lingering() as stream, connected(daemon.socket) as sock:
        sock.sendall(first)
        with stopped(daemon):
            if older_kernel:
                send(sock, ipi.STATUS, [stream.fileno(), *[write] * 50])
                stream.close()
            else:
                with pytest.raises(PermissionError):
                    send(sock, ipi.STATUS, [stream.fileno(), *[write] * 50])
        begun = time.monotonic()
        step(daemon)
        assert time.monotonic() < begun + LINGERS - 1
        if older_kernel:
            assert gone(sock)


def test_to_the_control_socket(daemon: RunningDaemon, older_kernel: bool, write: int) -> None:
    with lingering() as stream, connected(control_socket(daemon.socket)) as sock:
        request = b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n"
        with stopped(daemon):
            if older_kernel:
                send(sock, request, [stream.fileno(), write])
                stream.close()
            else:
                with pytest.raises(PermissionError):
                    send(sock, request, [stream.fileno(), write])
        begun = time.monotonic()
        step(daemon)
        assert daemon.client().status()["state"] == "ready"
        assert time.monotonic() < begun + LINGERS - 1


@pytest.mark.parametrize("how", ["beside it", "behind it", "and goes", "in its place", "no stream in its place"])
def test_to_a_session_that_waits_for_a_drivers_stream(daemon: RunningDaemon, write: int, how: str) -> None:
    with lingering() as stream, connected(daemon.socket) as sock:
        driver, ours = socket.socketpair()
        sock.sendall(init(attach=True) + ipi.STATUS)
        assert sock.recv(12) == ipi.READY
        surplus = [stream.fileno(), write]
        brought = {
            "beside it": [driver.fileno(), *surplus],
            "in its place": surplus[:1],
            "no stream in its place": [write],
        }
        with stopped(daemon):
            send(sock, ipi.ATTACH, brought.get(how, [driver.fileno()]))
            if how in ("behind it", "and goes"):
                send(sock, ipi.STATUS, surplus)
            stream.close()
            driver.close()
            if how == "and goes":
                sock.close()
        begun = time.monotonic()
        step(daemon)
        assert time.monotonic() < begun + LINGERS - 1
        if how == "beside it":
            assert b"more came with the descriptor than ATTACH" in sock.recv(4096)
        ours.close()


def test_along_a_drivers_stream(daemon: RunningDaemon, write: int) -> None:
    """Whoever handed it over can have it take descriptors again, so nothing is said of it to the kernel."""
    with lingering() as stream, connected(daemon.socket) as sock:
        driver, ours = socket.socketpair()
        sock.sendall(init(attach=True) + ipi.STATUS)
        assert sock.recv(12) == ipi.READY
        send(sock, ipi.ATTACH, [driver.fileno()])
        driver.close()
        ours.sendall(ipi.STATUS)
        assert ours.recv(12) == ipi.READY
        with stopped(daemon):
            send(ours, ipi.STATUS, [stream.fileno(), write])
            stream.close()
        begun = time.monotonic()
        step(daemon)
        assert time.monotonic() < begun + LINGERS - 1
        assert gone(ours)
        ours.close()
