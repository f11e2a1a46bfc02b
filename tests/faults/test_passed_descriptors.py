"""Descriptors that are sent along to where none are wanted: they do not stay, and their end holds nobody up.

On this machine's kernel, and as on one before Linux 6.16, which can't refuse them.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import select
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

from conftest import RunningDaemon, stopped, wait_for
from rootstock_client import ipi
from rootstock_client.runtime_dir import control_socket

sys.path.append(str(Path(__file__).resolve().parent.parent / "fuzz"))
import live

LINGERS = 5
"""Seconds that it takes to close a stream of `lingering`."""
MOST = 253
"""Descriptors that a message can bring."""


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
    wait_for(lambda: not daemon.client().status()["sessions"], timeout=4 * LINGERS)
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
        with stopped(daemon.pid):  # what is sent is closed here before the daemon sees it: it is the last to have it
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
        with stopped(daemon.pid):
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


@contextlib.contextmanager
def no_descriptor_left(daemon: RunningDaemon) -> Iterator[None]:
    pid = daemon.client().status()["pid"]
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_descriptors_of_which_none_could_be_taken(daemon: RunningDaemon, older_kernel: bool, write: int) -> None:
    """Whoever sends them loses the connection all the same."""
    if not older_kernel:
        pytest.skip("the kernel refuses them")
    with connected(daemon.socket) as sock:
        sock.sendall(ipi.STATUS)
        assert sock.recv(12) == ipi.NEEDINIT
        with no_descriptor_left(daemon):
            send(sock, ipi.STATUS, [write])
            assert gone(sock)


def test_while_one_is_being_closed_others_are_not_open(daemon: RunningDaemon, older_kernel: bool, write: int) -> None:
    """As many as a message can bring, one of which takes its time, in a socket that lies in another."""
    if not older_kernel:
        pytest.skip("the kernel refuses them")
    pid = daemon.client().status()["pid"]
    control = control_socket(daemon.socket)
    with lingering() as stream, connected(daemon.socket) as sock:
        sock.sendall(ipi.STATUS)
        assert sock.recv(12) == ipi.NEEDINIT
        before = live.descriptors(pid, control)
        with stopped(daemon.pid):
            full, filler = socket.socketpair()
            send(filler, b"x", [stream.fileno()])
            stream.close()
            send(sock, ipi.STATUS, [full.fileno(), *[write] * (MOST - 1)])
            filler.close()
            full.close()
        begun = time.monotonic()
        step(daemon)
        assert time.monotonic() < begun + LINGERS - 1
        assert gone(sock)
        wait_for(lambda: live.descriptors(pid, control) <= before, timeout=4 * LINGERS)


def test_what_lies_in_a_stream_that_is_sent_along(daemon: RunningDaemon, older_kernel: bool) -> None:
    """It is not read before the stream is closed, as it may have no end."""
    one, other = socket.socketpair()
    with one, other, connected(daemon.socket) as sock:
        one.settimeout(4 * LINGERS)
        other.sendall(b"kept")
        if older_kernel:
            send(sock, ipi.STATUS, [one.fileno()])
            assert gone(sock)
            wait_for(lambda: not daemon.client().status()["sessions"])
        else:
            with pytest.raises(PermissionError):
                send(sock, ipi.STATUS, [one.fileno()])
        assert one.recv(12) == b"kept"
