"""Sessions that say without end what costs a daemon time: all others' steps go on, and so do status and stop."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from conftest import RunningDaemon, wait_for
from rootstock_client import ipi
from rootstock_client.runtime_dir import control_socket
from rootstockd.sessions.acceptor import AT_FIRST

sys.path.append(str(Path(__file__).resolve().parent.parent / "fuzz"))
import live

SESSIONS = 20
CROWD = 300
IDLE = 0.1
"""Of a CPU, at most, that the daemon takes where floods are kept to their share and there is one good session."""
SECONDS = 3.0
STEPS = 30
"""In that time at least. A good session does some 200 a second alone, and some 50 where others work on the machine."""
FLOOD = """
import socket, sys, threading
path, sessions = sys.argv[1:]
first, again, asks = (bytes.fromhex(sys.stdin.readline()) for _ in range(3))

def connected():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock

def send(sock):
    while True:
        try:
            sock.sendall(first)
            while True:
                sock.sendall(again)
        except OSError:
            sock = connected()

def read(sock):
    while sock.recv(65536):
        pass

def come_and_go():
    while True:
        with connected() as sock:
            sock.sendall(first)

def ask():
    sock = connected()
    while True:
        sock.sendall(asks)
        data = b""
        while b"\\r\\n\\r\\n" not in data:
            data += sock.recv(65536)
        head, _, body = data.partition(b"\\r\\n\\r\\n")
        (size,) = (int(line.split(b":")[1]) for line in head.split(b"\\r\\n") if line.startswith(b"content-length"))
        while len(body) < size:
            body += sock.recv(65536)

for _ in range(int(sessions)):
    if asks:
        what = [ask]
    elif not again:
        what = [come_and_go]
    else:
        sock = connected()
        what = [lambda sock=sock: send(sock), lambda sock=sock: read(sock)]
    for one in what:
        threading.Thread(target=one, daemon=True).start()
print(flush=True)
sys.stdin.read()
"""
"""In a process of its own, as fast as it can; until its input ends."""


def init(model: str = "noop", natoms: int = 1, **more: object) -> bytes:
    system = {"rootstock": 1, "model": model, "numbers": [29] * natoms, "pbc": [False] * 3, **more}
    return ipi.init_frame(json.dumps(system).encode())


def init_in_batches(model: str) -> bytes:
    system = {"rootstock": 1, "model": model, "numbers": [29], "pbc": [False] * 3, "batch_size": 1024}
    return ipi.init_frame(json.dumps(system).encode())


def posdata(natoms: int, cell: float = 1.0) -> bytes:
    return ipi.posdata_head(cell * np.eye(3), np.eye(3), natoms) + bytes(24 * natoms)


FLOODS = {
    "INIT of no model": (b"", init("nope") * 200),
    "INIT": (b"", init() * 200),
    "long INIT": (b"", init(natoms=50_000)),
    "STATUS": (b"", ipi.STATUS * 2000),
    "structures of no system": (init("nope"), posdata(0) * 400),
    "structures of another size": (init(), posdata(2) * 300),
    "cells that are none": (init(), (posdata(1, np.nan) + ipi.GETFORCE) * 200),
    "connections": (b"", b""),
    "connections with INIT": (init(), b""),
    "what nobody reads any more": (b"nonsense    ", bytes(1 << 20)),
}
ENDLESS = {
    "a structure without end": (
        init_in_batches("nope") + b"POSDATA     " + struct.pack("<i", 2**31 - 1) + bytes(1024 * 144),
        bytes(1 << 20),
    ),
    "an INIT in crumbs": (b"INIT        " + struct.pack("<ii", 0, 300_000), b" "),
}
"""Of a single message."""


@pytest.fixture(scope="module")
def daemon(older_kernel: bool, start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """EMT for those who behave, `noop` for those who don't."""
    return start_shared_daemon("--model", "emt", "--model", "noop")


@contextlib.contextmanager
def flood(path: Path, sessions: int, *, first: bytes = b"", again: bytes = b"", asks: bytes = b"") -> Iterator[None]:
    command = [sys.executable, "-c", FLOOD, str(path), str(sessions)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"".join(text.hex().encode() + b"\n" for text in (first, again, asks)))
        process.stdin.flush()
        assert process.stdout.readline()
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


def check_beside(daemon: RunningDaemon, path: Path, sessions: int, **what: bytes) -> None:
    """Another session's steps, right as ever, and status go on beside a flood; and afterwards nothing stays."""
    before = live.footprint(daemon.client())
    with live.GoodSession(daemon.socket) as good:
        with flood(path, sessions, **what):
            time.sleep(0.5)
            steps = len(good.latencies)
            time.sleep(SECONDS)
            steps = len(good.latencies) - steps
            assert daemon.client().status()["state"] == "ready"
        assert not good.errors, good.errors
    assert steps >= STEPS
    live.settled(daemon.client())
    assert live.footprint(daemon.client())["restarts"] == before["restarts"]


@pytest.mark.parametrize("what", FLOODS)
def test_beside_sessions_that_talk_without_end(daemon: RunningDaemon, what: str) -> None:
    first, again = FLOODS[what]
    check_beside(daemon, daemon.socket, SESSIONS if again else 4, first=first, again=again)
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("what", ENDLESS)
def test_bytes_of_a_message_without_end_are_read_at_a_pace(daemon: RunningDaemon, what: str) -> None:
    first, again = ENDLESS[what]
    process = psutil.Process(daemon.client().status()["pid"])

    def share() -> float:
        began, used = time.monotonic(), sum(process.cpu_times()[:2])
        time.sleep(1)
        return (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)

    with live.GoodSession(daemon.socket) as good, flood(daemon.socket, CROWD, first=first, again=again):
        wait_for(lambda: share() < IDLE, timeout=90)
        steps = len(good.latencies)
        time.sleep(SECONDS)
        assert len(good.latencies) - steps >= STEPS
    assert not good.errors, good.errors
    live.settled(daemon.client())


def test_a_storm_of_connections_is_taken_at_a_pace(daemon: RunningDaemon) -> None:
    """The first 1,000 at once if the machine can, all others one after another: the last is not before all others."""
    time.sleep(AT_FIRST)  # what earlier tests took is made good
    count, began = 2_500, time.monotonic()
    for _ in range(count):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.socket))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        sock.settimeout(30)
        sock.sendall(ipi.STATUS)
        assert sock.recv(12) == ipi.NEEDINIT
    assert time.monotonic() - began >= (count - 1_000) / 1_000


@pytest.mark.parametrize("what", ["/v1/status", "/v1/models", "/metrics"])
def test_beside_requests_without_end(daemon: RunningDaemon, what: str) -> None:
    asks = f"GET {what} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    check_beside(daemon, control_socket(daemon.socket), 4, asks=asks)
