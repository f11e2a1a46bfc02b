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
MOST = 253
"""Descriptors that a message can bring."""
BESIDE = {"SO_PASSCRED": 16, "SO_PASSSEC": 34, "SO_PASSPIDFD": 76, "SO_INQ": 84}
"""What has the kernel put more beside the data than who sends has said."""


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


def handed_over(daemon: RunningDaemon, line: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A driver's stream that the daemon has, and a copy of the daemon's end of it."""
    driver, ours = socket.socketpair()
    ours.settimeout(4 * LINGERS)
    line.sendall(init(attach=True) + ipi.STATUS)
    assert line.recv(12) == ipi.READY
    send(line, ipi.ATTACH, [driver.fileno()])
    return driver, ours


def ask(stream: socket.socket) -> bytes:
    stream.sendall(ipi.STATUS)
    return stream.recv(12)


def switch_on(stream: socket.socket, *options: str) -> None:
    for name in options:
        try:
            stream.setsockopt(socket.SOL_SOCKET, BESIDE[name], 1)
        except OSError as error:
            pytest.skip(f"this kernel has no {name} for Unix sockets: {error.strerror}")


def test_along_a_drivers_stream(daemon: RunningDaemon, write: int) -> None:
    """Whoever handed it over can have it take descriptors again, so nothing is said of it to the kernel."""
    with lingering() as stream, connected(daemon.socket) as sock:
        driver, ours = handed_over(daemon, sock)
        driver.close()
        assert ask(ours) == ipi.READY
        with stopped(daemon):
            send(ours, ipi.STATUS, [stream.fileno(), write])
            stream.close()
        begun = time.monotonic()
        step(daemon)
        assert time.monotonic() < begun + LINGERS - 1
        assert gone(ours)
        ours.close()


@pytest.mark.parametrize("option", BESIDE)
def test_what_the_kernel_puts_beside_a_drivers_words(daemon: RunningDaemon, option: str) -> None:
    """Whoever handed the stream over asks for it at any time; it has no effect, and nothing of it stays."""
    pid = daemon.client().status()["pid"]
    control = control_socket(daemon.socket)
    with connected(daemon.socket) as sock:
        driver, ours = handed_over(daemon, sock)
        with driver, ours:
            assert ask(ours) == ipi.READY
            switch_on(driver, option)
            assert ask(ours) == ipi.READY
            before = live.descriptors(pid, control)
            for _ in range(50):
                assert ask(ours) == ipi.READY
            assert live.descriptors(pid, control) <= before


@contextlib.contextmanager
def no_descriptor_left(daemon: RunningDaemon) -> Iterator[None]:
    pid = daemon.client().status()["pid"]
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_a_process_of_a_drivers_words_for_which_no_descriptor_is_left(daemon: RunningDaemon) -> None:
    """The kernel puts the number of an error in its place."""
    with connected(daemon.socket) as sock:
        driver, ours = handed_over(daemon, sock)
        with driver, ours:
            assert ask(ours) == ipi.READY
            switch_on(driver, "SO_PASSPIDFD")
            with no_descriptor_left(daemon):
                assert ask(ours) == ipi.READY
                assert ask(ours) == ipi.READY
            assert ask(ours) == ipi.READY


def test_descriptors_of_which_none_could_be_taken(daemon: RunningDaemon, write: int) -> None:
    """Whoever sends them loses the connection all the same."""
    with connected(daemon.socket) as sock:
        driver, ours = handed_over(daemon, sock)
        driver.close()
        with ours:
            assert ask(ours) == ipi.READY
            with no_descriptor_left(daemon):
                send(ours, ipi.STATUS, [write])
                assert gone(ours)


@pytest.mark.parametrize("options", [["SO_PASSCRED"], ["SO_PASSCRED", "SO_PASSSEC", "SO_PASSPIDFD", "SO_INQ"]])
def test_there_is_room_for_all_of_a_message(daemon: RunningDaemon, write: int, options: list[str]) -> None:
    """The kernel would close at once what there is none for."""
    with lingering() as stream, connected(daemon.socket) as sock:
        driver, ours = handed_over(daemon, sock)
        with ours:
            assert ask(ours) == ipi.READY
            switch_on(driver, *options)
            driver.close()
            with stopped(daemon):
                send(ours, ipi.STATUS, [*[write] * (MOST - 1), stream.fileno()])
                stream.close()
            begun = time.monotonic()
            step(daemon)
            assert time.monotonic() < begun + LINGERS - 1
            assert gone(ours)


def test_while_one_is_being_closed_others_are_not_open(daemon: RunningDaemon, write: int) -> None:
    """What lies in a socket can't be told not to linger."""
    pid = daemon.client().status()["pid"]
    control = control_socket(daemon.socket)
    with lingering() as stream, connected(daemon.socket) as sock:
        driver, ours = handed_over(daemon, sock)
        driver.close()
        with ours:
            assert ask(ours) == ipi.READY
            before = live.descriptors(pid, control)
            with stopped(daemon):
                full, filler = socket.socketpair()
                send(filler, b"x", [stream.fileno()])
                stream.close()
                send(ours, ipi.STATUS, [full.fileno(), *[write] * (MOST - 1)])
                filler.close()
                full.close()
            begun = time.monotonic()
            assert gone(ours)
            wait_for(lambda: live.descriptors(pid, control) <= before, timeout=4 * LINGERS)
            assert time.monotonic() < begun + LINGERS - 1


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
