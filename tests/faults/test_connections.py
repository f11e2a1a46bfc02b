"""Connections of every bad kind at a real daemon: what they hold is bounded and given back, and others work on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, open_descriptors
from rootstock_client import ipi
from rootstock_client.units import BOHR, HARTREE
from rootstockd.sessions.accounts import STAGED_BYTES

sys.path.append(str(Path(__file__).resolve().parent.parent / "fuzz"))
import live
import streams

MB = 2**20


@pytest.fixture(scope="module")
def daemon(older_kernel: bool, start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """EMT for those who behave, `noop` for those who don't."""
    return start_shared_daemon("--model", "emt", "--model", "noop")


@pytest.fixture
def good(daemon: RunningDaemon) -> Iterator[live.GoodSession]:
    """A session whose numbers must stay right, and that must get on, whatever the others do."""
    before = live.footprint(daemon.client())
    with live.GoodSession(daemon.socket) as session:
        wait_for(lambda: len(session.latencies) > 5)
        yield session
        steps = len(session.latencies)
        wait_for(lambda: len(session.latencies) > steps + 5 or session.errors)
    assert not session.errors, session.errors
    live.settled(daemon.client())
    try:
        wait_for(lambda: is_as_before(live.footprint(daemon.client()), before))
    except AssertionError as error:
        now, said = live.footprint(daemon.client()), daemon.log.read_text()[-3000:]
        raise AssertionError(f"something stays:\n{before} before\n{now} now\n{said}") from error
    assert "Traceback" not in daemon.log.read_text()


def is_as_before(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """No descriptor more; no mapping more, but for the allocator's."""
    return now["restarts"] == before["restarts"] and all(
        now[f"{what} descriptors"] <= before[f"{what} descriptors"]
        and now[f"{what} maps"] <= before[f"{what} maps"] + 20
        for what in ("daemon", "emt", "noop")
    )


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def connect(daemon: RunningDaemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.fspath(daemon.socket))  # without a timeout, which would not wait for room in the queue
    sock.settimeout(30)
    return sock


def system(natoms: int, model: str = "noop") -> bytes:
    fields = {"rootstock": 1, "model": model, "numbers": [29] * natoms, "pbc": [False] * 3}
    return ipi.init_frame(json.dumps(fields).encode())


def posdata(natoms: int) -> bytes:
    positions = np.arange(3.0 * natoms).reshape(-1, 3) * 3
    return ipi.posdata_head(np.eye(3), np.eye(3), natoms) + positions.tobytes()


def drain(sock: socket.socket) -> bytes:
    """All that is said until the end."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 20):
            data += piece
    return data


def send_until_stuck(sock: socket.socket, data: bytes, most: int) -> int:
    """Send again and again until the other side has not read for a while."""
    sock.settimeout(0.1)
    sent = 0
    with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
        while sent < most:
            sent += sock.send(data)
    return sent


@pytest.fixture
def many() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def memory(daemon: RunningDaemon) -> int:
    return psutil.Process(daemon.client().status()["pid"]).memory_info().rss


def own_memory(pid: int) -> int:
    """A process's own, and its part of what it shares: slots count, and what Linux has not given it yet does not."""
    return psutil.Process(pid).memory_full_info().pss


NATOMS = 5000
HALVES = {
    "nothing": b"",
    "half a header": b"INI",
    "half an INIT": system(NATOMS)[:-1],
    "INIT": system(NATOMS),
    "half a POSDATA's head": system(NATOMS) + posdata(NATOMS)[:100],
    "half a POSDATA": system(NATOMS) + posdata(NATOMS)[:-1],
    "half a GETFORCE": system(NATOMS) + posdata(NATOMS) + ipi.GETFORCE[:-1],
    "a result that is not read": system(NATOMS) + posdata(NATOMS) + ipi.GETFORCE,
}


def test_sixty_four_that_stop_in_the_middle(daemon: RunningDaemon, good, many) -> None:
    """Half-open and half-sent: each has its staging buffer and its slot, and no more."""
    before = memory(daemon)
    for number in range(64):
        half = list(HALVES.values())[number % len(HALVES)]
        many.enter_context(sock := connect(daemon))
        sock.sendall(half)
    wait_for(lambda: len(daemon.client().status()["sessions"]) == 65)
    steps = len(good.latencies)
    wait_for(lambda: len(good.latencies) > steps + 50 or good.errors)
    slot = 90 * NATOMS
    assert memory(daemon) < before + 64 * (64 * 1024 + slot) + 16 * MB


def test_sixty_four_slow_writers(daemon: RunningDaemon, good, many) -> None:
    """A whole session each, a few bytes at a time; all get their results in the end."""
    stream = system(20) + posdata(20) + ipi.GETFORCE + ipi.EXIT
    before = memory(daemon)
    socks = [many.enter_context(connect(daemon)) for _ in range(64)]
    for start in range(0, len(stream), 37):
        for sock in socks:
            sock.sendall(stream[start : start + 37])
        assert memory(daemon) < before + 64 * 64 * 1024 + 4 * MB
    for sock in socks:
        assert drain(sock).startswith(ipi.FORCEREADY)


def test_sixty_four_that_pipeline_and_do_not_read(daemon: RunningDaemon, good, many) -> None:
    """They are not read from either, and nothing is evaluated for nobody."""
    before = memory(daemon)
    step = posdata(300) + ipi.GETFORCE
    for _ in range(64):
        many.enter_context(sock := connect(daemon))
        sock.sendall(system(300))
        assert send_until_stuck(sock, step * 20, 64 * MB) < 8 * MB
    assert memory(daemon) < before + 32 * MB
    steps = len(good.latencies)
    wait_for(lambda: len(good.latencies) > steps + 50 or good.errors)
    evaluations = daemon.model("noop")["evaluations"]
    time.sleep(0.3)
    assert daemon.model("noop")["evaluations"] == evaluations


SLOW = 16
"""Of each kind; 64 in all."""
ANNOUNCED, MANY = 4 * MB, 100_000
"""Bytes of an INIT, and atoms of a structure, that come in crumbs: 64 and 144 MB of memory if they all came."""
CRUMB = 40


def sixty_four_slow(daemon: RunningDaemon, many: contextlib.ExitStack) -> Iterator[None]:
    """Who writes crumbs of a step, of a long INIT and of a large structure, and who reads crumbs; a turn of each."""
    large = system(MANY)
    streams = [(b"", system(20) + posdata(20)), (b"", long_init(ANNOUNCED)), (large, posdata(MANY))]
    writers = [(many.enter_context(connect(daemon)), *stream) for stream in streams for _ in range(SLOW)]
    readers = [many.enter_context(connect(daemon)) for _ in range(SLOW)]
    for sock, first, _ in writers:
        sock.sendall(first)
    for sock in readers:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(system(NATOMS) + posdata(NATOMS) + ipi.GETFORCE + posdata(NATOMS) + ipi.GETFORCE)
    wait_for(lambda: len(daemon.client().status()["sessions"]) == 65)
    for start in range(0, 10 * CRUMB, CRUMB):
        for sock, _, slowly in writers:
            sock.sendall(slowly[start : start + CRUMB])
        for sock in readers:
            assert sock.recv(CRUMB)
        yield


def test_sixty_four_that_announce_much_and_say_or_take_little(daemon: RunningDaemon, good, many) -> None:
    """What is announced takes no memory, what came does, and it is given back when they have gone: at once."""
    pid, after = daemon.pid, []
    for _ in range(10):
        before = own_memory(pid)
        most = max(own_memory(pid) for _ in sixty_four_slow(daemon, many))
        assert most < before + 48 * MB
        many.close()
        live.settled(daemon.client(), 1)
        after.append(own_memory(pid))
    # what grows once is not a leak, what grows on is: as many such structures as come in a round take 14 MB
    assert after[-1] < after[0] + 40 * MB


def test_a_slow_reader_gets_all_of_it(daemon: RunningDaemon, good) -> None:
    with connect(daemon) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(system(NATOMS) + posdata(NATOMS) + ipi.GETFORCE + posdata(NATOMS) + ipi.GETFORCE + ipi.EXIT)
        data = b""
        while piece := sock.recv(3000):
            data += piece
    reply = 12 + 8 + 4 + 24 * NATOMS + 72 + 4
    reply += int.from_bytes(data[reply - 4 : reply], "little")  # extras
    assert len(data) == 2 * reply
    assert data[:12] == data[reply : reply + 12] == ipi.FORCEREADY


def test_a_slow_reader_that_runs_ahead_gets_each_result(daemon: RunningDaemon, good) -> None:
    """In full, though all are sent from the same memory and not taken at once: two structures in turn, by EMT."""
    atoms = bulk("Cu", cubic=True) * 5
    atoms.pbc = False
    steps, right = [], []
    for seed in (1, 2):
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        right.append(atoms.get_forces() * BOHR / HARTREE)
        head = ipi.posdata_head(np.eye(3), np.eye(3), len(atoms))
        steps.append(head + (atoms.positions / BOHR).tobytes() + ipi.GETFORCE)
    buffer = int(Path("/proc/sys/net/core/wmem_default").read_text())
    count = buffer // (24 * len(atoms)) + 10
    with connect(daemon) as sock, ThreadPoolExecutor(1) as pool:
        sock.settimeout(120)
        stream = system(len(atoms), "emt") + b"".join(steps[number % 2] for number in range(count)) + ipi.EXIT
        sending = pool.submit(sock.sendall, stream)
        wait_for(lambda: unread_here(sock) > buffer / 4 and no_more_comes(sock))
        answers = memoryview(drain(sock))
        sending.result()
    for number in range(count):
        end = 24 + 24 * len(atoms)
        assert answers[:12] == ipi.FORCEREADY
        forces = np.frombuffer(answers[24:end]).reshape(-1, 3)
        np.testing.assert_allclose(forces, right[number % 2], rtol=0, atol=1e-9, err_msg=f"result {number}")
        end += 72
        answers = answers[end + 4 + int.from_bytes(answers[end : end + 4], "little") :]
    assert not answers


def unread_here(sock: socket.socket) -> int:
    """Bytes that have come and were not read yet."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), "little")


def no_more_comes(sock: socket.socket) -> bool:
    """For as long as some steps take."""
    before = unread_here(sock)
    time.sleep(0.5)
    return unread_here(sock) == before


def unread(sock: socket.socket) -> int:
    """Bytes that were sent and that the other side has not read yet."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), "little")


def long_init(size: int) -> bytes:
    return ipi.INIT + (0).to_bytes(4, "little") + size.to_bytes(4, "little") + b"{" + b" " * (size - 2)


def test_unfinished_inits_are_bounded_together(daemon: RunningDaemon, good, many) -> None:
    """A user's long INITs under way have one budget; one beyond it is told so, and one behind them is served."""
    size = 4 * MB
    before = memory(daemon)
    allowed = STAGED_BYTES // size
    refused = 0
    for _ in range(allowed + 8):
        many.enter_context(sock := connect(daemon))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(long_init(size))
        sock.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            answer = sock.recv(4096)
            assert answer.startswith(ipi.ERROR)
            assert json.loads(answer[16:])["code"] == "user-limit"
            refused += 1
    assert refused == 8
    assert memory(daemon) < before + STAGED_BYTES + 32 * MB
    with connect(daemon) as sock:  # a short one is not concerned
        sock.sendall(system(10) + posdata(10) + ipi.GETFORCE)
        assert sock.recv(12) == ipi.FORCEREADY
    many.close()
    live.settled(daemon.client(), 1)
    assert memory(daemon) < before + 32 * MB
    with connect(daemon) as sock:  # and there is room again
        sock.sendall(long_init(size) + b"}" + ipi.STATUS)
        assert sock.recv(12) == ipi.NEEDINIT


def test_a_long_init_that_came_in_full_is_not_kept(daemon: RunningDaemon, good, many) -> None:
    """Nor the memory that it was staged in, while its session sits idle."""
    before = memory(daemon)
    for _ in range(40):
        many.enter_context(sock := connect(daemon))
        sock.sendall(long_init(4 * MB) + b"}")
        wait_for(lambda: unread(sock) == 0)
    wait_for(lambda: memory(daemon) < before + 40 * MB, timeout=20)


def test_a_long_init_is_refused_before_it_is_taken_apart(own_daemon: RunningDaemon) -> None:
    """A million keys, wishes or lists: no second goes into saying no, in which others would wait.

    With a daemon of its own, as some tenths may, which are a good part of what a user has for that.
    """
    with live.GoodSession(own_daemon.socket) as good:
        for parts in (
            '"x": 0, "want": [' + ",".join(["1"] * 1_500_000) + "]",
            ",".join(f'"{number}": 0' for number in range(300_000)),
            '"head": [' + ",".join(["[]"] * 1_000_000) + "]",
        ):
            before = memory(own_daemon)
            with connect(own_daemon) as sock:
                sock.sendall(ipi.init_frame(f"{{{parts}}}".encode()) + ipi.GETFORCE)
                assert b"invalid-init" in sock.recv(4096)
            assert memory(own_daemon) < before + 64 * MB
        steps = len(good.latencies)
        wait_for(lambda: len(good.latencies) > steps + 5)
    assert not good.errors, good.errors


PHASES = [
    b"",
    b"INIT   ",
    system(50)[:-20],
    system(50),
    system(50) + posdata(50)[:300],
    system(50) + posdata(50),
    system(50) + posdata(50) + ipi.GETFORCE,
    (system(50) + posdata(50) + ipi.GETFORCE) * 3,
    system(50, "emt") + posdata(50) + ipi.GETFORCE,
    ipi.EXIT,
    b"garbage, more of it",
    system(50) + b"garbage, more of it",
]


def connect_and_die(daemon: RunningDaemon, times: int) -> None:
    rng = random.Random(times)
    for number in range(times):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.fspath(daemon.socket))
            sock.settimeout(30)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(PHASES[number % len(PHASES)])
            if streams.chance(rng, 10):  # some live long enough for their evaluation to begin
                time.sleep(0.001)


def test_ten_thousand_that_connect_and_die(daemon: RunningDaemon, good) -> None:
    """In every phase of a session; what was grown once is not a leak, what grows on is."""
    client = daemon.client()
    connect_and_die(daemon, 5_000)  # until the allocator has all that it takes
    live.settled(client, 1)
    before = live.footprint(client)
    connect_and_die(daemon, 10_000)
    live.settled(client, 1)
    wait_for(lambda: not any(model["waiting"] for model in client.status()["models"]))
    wait_for(lambda: is_as_before(live.footprint(client), before))
    after = live.footprint(client)
    for what in ("daemon", "emt", "noop"):
        assert after[f"{what} memory / MB"] < before[f"{what} memory / MB"] + 8


def slots_of(pid: int) -> int:
    """How many slots a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("rootstockd-slot")


@pytest.mark.parametrize("queued", [False, True])
def test_the_slot_of_a_driver_that_went_is_freed(daemon: RunningDaemon, queued: bool) -> None:
    """While its evaluation runs, and while it waits behind another's."""
    live.settled(daemon.client())
    pids = [daemon.client().status()["pid"], daemon.model("emt")["pid"]]
    before = [(open_descriptors(pid), slots_of(pid)) for pid in pids]
    long = system(2000, "emt") + posdata(2000)  # far apart, but EMT takes a while over so many
    with connect(daemon) as first, connect(daemon) as second:
        first.sendall(long)
        wait_for(lambda: "busy" in [session["state"] for session in daemon.client().status()["sessions"]])
        if queued:
            second.sendall(long + ipi.GETFORCE)
            wait_for(lambda: slots_of(pids[0]) == before[0][1] + 2)
            second.close()
            wait_for(lambda: slots_of(pids[0]) == before[0][1] + 1)
    wait_for(lambda: not daemon.model("emt")["waiting"])
    with connect(daemon) as sock:  # the worker looks at its messages when it next has something to do
        sock.sendall(system(2, "emt") + posdata(2) + ipi.GETFORCE)
        assert sock.recv(12) == ipi.FORCEREADY
    for pid, (descriptors, slots) in zip(pids, before, strict=True):
        wait_for(lambda: slots_of(pid) == slots and open_descriptors(pid) <= descriptors)  # noqa: B023
    assert daemon.model("emt")["restarts"] == 0


def test_urgent_bytes(daemon: RunningDaemon, good) -> None:
    """MSG_OOB, where the kernel has it, puts a byte into the stream or beside it; the daemon goes on either way."""
    with connect(daemon) as sock:
        sock.sendall(ipi.STATUS)
        assert sock.recv(12) == ipi.NEEDINIT
        for _ in range(3):
            with contextlib.suppress(OSError):
                sock.send(b"!", socket.MSG_OOB)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(ipi.STATUS * 3)
    with connect(daemon) as sock:
        sock.sendall(ipi.STATUS)
        assert sock.recv(12) == ipi.NEEDINIT


def test_half_closed_connections(daemon: RunningDaemon, good) -> None:
    """The end of a driver's stream ends its session; a driver that will not listen loses it when it is spoken to."""
    with connect(daemon) as sock:
        sock.sendall(system(5))
        sock.shutdown(socket.SHUT_WR)
        assert drain(sock) == b""
    with connect(daemon) as sock:
        sock.sendall(system(5) + ipi.STATUS)
        assert sock.recv(12) == ipi.READY
        sock.shutdown(socket.SHUT_RD)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(ipi.STATUS)
        live.settled(daemon.client(), 1)


def test_streams_by_chance(daemon: RunningDaemon, good) -> None:
    """A short run of `python tests/fuzz` against a daemon."""
    rng = random.Random(3)
    seeds = [streams.driver_stream(rng) for _ in range(20)]
    for stream, cuts in live.inputs(rng, seeds, 600):
        live.throw(daemon.socket, stream, cuts, wait=streams.chance(rng, 30))
