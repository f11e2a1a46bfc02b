"""How long a job waits for a daemon, what it says meanwhile, and that nothing broken ever becomes a number."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, stopped, wait_for
from rootstock_client import RootstockClient, connection, ipi, loading, patience
from rootstock_client.errors import (
    ConnectionLostError,
    DaemonFullError,
    DaemonNotFoundError,
    UnknownModelError,
    UserLimitError,
)
from rootstock_client.loading import LONG, TIMEOUT
from rootstock_client.patience import Outage, patience_in_seconds
from rootstock_client.sockets import connect


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def test_patience_that_runs_out(own_daemon: RunningDaemon, caplog: pytest.LogCaptureFixture) -> None:
    atoms = copper()
    atoms.calc = own_daemon.client(patience=0.5).calculator("emt")
    before = atoms.get_forces()
    own_daemon.stop()
    atoms.calc.reset()
    with caplog.at_level(logging.WARNING, "rootstock_client"), pytest.raises(DaemonNotFoundError) as caught:
        atoms.get_forces()
    assert "This job has waited 0.5 s" in caught.value.message
    assert "rootstockd start" in caught.value.hint and "ROOTSTOCKD_PATIENCE" in caught.value.hint
    (record,) = caplog.records  # once, however many tries there were
    assert "waits up to 0.5 s" in record.message and str(own_daemon.socket) in record.message
    own_daemon.start()
    np.testing.assert_array_equal(atoms.get_forces(), before)


def test_it_says_so_when_the_daemon_is_away_and_when_it_is_back(
    own_daemon: RunningDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    atoms = copper()
    atoms.calc = own_daemon.client().calculator("emt")
    atoms.get_forces()
    own_daemon.stop()
    starting = threading.Timer(0.3, own_daemon.start)
    starting.start()
    atoms.calc.reset()
    with caplog.at_level(logging.WARNING, "rootstock_client"):
        atoms.get_forces()
    starting.join()
    away, back = (record.message for record in caplog.records)
    assert "is away" in away
    assert "is back" in back


@contextlib.contextmanager
def a_limit_of_its_own() -> Iterator[None]:
    """What many a job has, for when its timer rings."""

    def too_long(_number: int, _frame: object) -> None:
        raise TimeoutError("this step takes too long")

    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_a_limit_of_the_jobs_own_ends_the_step(own_daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many a job has a handler of SIGALRM that raises TimeoutError, which is what a socket might raise, too."""

    atoms = copper()
    atoms.calc = own_daemon.client().calculator("emt")
    before = atoms.get_forces()
    with stopped(own_daemon.model("emt")["pid"]), a_limit_of_its_own():
        for reset in (atoms.calc.reset, atoms.calc.close):  # with a session that is there, and with a new one
            reset()
            atoms.rattle(0.01)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(TimeoutError, match="this step takes too long"):
                atoms.get_forces()
    atoms = copper()
    atoms.calc = own_daemon.client().calculator("emt")
    np.testing.assert_array_equal(atoms.get_forces(), before)


def test_a_limit_of_the_jobs_own_ends_the_step_also_while_it_asks_why_it_waits(own_daemon: RunningDaemon) -> None:
    """After LONG it asks a daemon that does not answer, whose silence is no such thing."""

    atoms = copper()
    atoms.calc = own_daemon.client().calculator("emt")
    before = atoms.get_forces()
    with stopped(own_daemon.pid), a_limit_of_its_own():
        atoms.rattle(0.01)
        signal.setitimer(signal.ITIMER_REAL, LONG + TIMEOUT / 2)
        with pytest.raises(TimeoutError, match="this step takes too long"):
            atoms.get_forces()
    again = copper()
    again.calc = atoms.calc
    np.testing.assert_array_equal(again.get_forces(), before)


def test_signals_while_no_connections_are_accepted(runtime_folder: Path) -> None:
    """Python takes a connect that was interrupted for one that was made."""
    path = runtime_folder / "full.sock"
    with socket.socket(socket.AF_UNIX) as door, socket.socket(socket.AF_UNIX) as first:
        door.bind(str(path))
        door.listen(0)
        first.connect(str(path))  # the queue is full
        handler = signal.signal(signal.SIGALRM, lambda *_: None)
        accepted: list[socket.socket] = []
        accepting = threading.Timer(0.5, lambda: accepted.append(door.accept()[0]))
        accepting.start()
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try:
            with connect(path) as sock:
                accepting.join()
                assert sock.getpeername() == str(path)
                sock.sendall(b"there")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        accepted.append(door.accept()[0])
        assert accepted[1].recv(5) == b"there"
        for end in accepted:
            end.close()
    path.unlink()


def test_a_daemon_that_hangs(
    own_daemon: RunningDaemon, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job says once that it gets no answer, and that it goes on."""
    monkeypatch.setattr(connection, "SILENCE", struct.pack("ll", 0, 200_000))
    monkeypatch.setattr(loading, "TIMEOUT", 0.2)
    atoms = copper()
    atoms.calc = own_daemon.client().calculator("emt")
    atoms.get_forces()
    os.kill(pid := own_daemon.pid, signal.SIGSTOP)
    going_on = threading.Timer(2.0, os.kill, (pid, signal.SIGCONT))
    going_on.start()
    atoms.rattle(0.05, seed=2)
    with caplog.at_level(logging.WARNING, "rootstock_client"):
        atoms.get_forces()
    silent, again = (record.message for record in caplog.records)
    assert "has not answered for" in silent and "`rootstockd status`" in silent and "waits" in silent
    assert "answers again; this job waited" in again


def test_a_first_connection_to_nothing_fails_at_once(runtime_folder: Path) -> None:
    atoms = copper()
    atoms.calc = RootstockClient(runtime_folder / "nobody.sock").calculator("emt")
    start = time.monotonic()
    with pytest.raises(DaemonNotFoundError, match="no such file"):
        atoms.get_forces()
    assert time.monotonic() - start < 3  # not its 60 s


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/dev/null", "/dev/null is no socket.\nName the one"),
        ("/tmp", "/tmp is no socket.\nName the one"),
        (f"/{107 * 'x'}", f"the socket path /{107 * 'x'} is too long; Unix sockets allow 107 bytes.\nName it by a sho"),
        (
            "/run/a.control",
            "/run/a.control is a daemon's control socket.\nName that of its sessions, such as /run/a.sock",
        ),
    ],
    ids=["device", "folder", "long", "control"],
)
def test_an_address_that_is_none_is_called_so_at_once(address: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(DaemonNotFoundError) as caught:
        RootstockClient(address).calculator("emt").get_forces(copper())
    assert str(caught.value).startswith(words)
    assert time.monotonic() - start < 3


def test_a_first_connection_where_a_daemon_died_waits_a_little(own_daemon: RunningDaemon, monkeypatch) -> None:
    assert patience.STALE == 5.0  # s, as the README says
    process = psutil.Process(own_daemon.pid)
    process.kill()
    wait_for(lambda: not process.is_running())
    atoms = copper()
    for stale, given in ((0.2, None), (60.0, 0.2)):  # the latter, as a start may take long here
        monkeypatch.setattr(patience, "STALE", stale)
        atoms.calc = own_daemon.client(patience=given).calculator("emt")
        with pytest.raises(DaemonNotFoundError, match=r"has waited 0\.2 s"):
            atoms.get_forces()
    atoms.calc = own_daemon.client().calculator("emt")
    starting = threading.Thread(target=own_daemon.start)
    starting.start()
    atoms.get_forces()
    starting.join()


def test_a_first_connection_waits_as_it_has_said_also_if_the_socket_goes_meanwhile(
    runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not told then of a setting that would not make it wait longer."""
    path = runtime_folder / "stale.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    monkeypatch.setattr(patience, "STALE", 1.0)
    atoms = copper()
    atoms.calc = RootstockClient(path).calculator("emt")
    removing = threading.Timer(0.1, path.unlink)
    removing.start()
    with pytest.raises(DaemonNotFoundError, match=r"no such file.* has waited 1 s") as caught:
        atoms.get_forces()
    assert "How long jobs wait" not in caught.value.hint
    removing.join()


def test_a_process_that_has_met_a_daemon_has_patience_for_new_calculators(own_daemon: RunningDaemon) -> None:
    atoms = copper()
    with own_daemon.client().calculator("emt") as atoms.calc:
        before = atoms.get_forces()
    own_daemon.stop()
    atoms.calc = own_daemon.client().calculator("emt")
    start = time.monotonic()
    starting = threading.Timer(1.0, own_daemon.start)
    starting.start()
    np.testing.assert_array_equal(atoms.get_forces(), before)
    assert time.monotonic() - start > 1.0
    starting.join()
    atoms.calc.close()


def test_a_limit_of_ones_own_is_told_at_once(start_daemon, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[limits]\nsessions = 1\n")
    daemon = start_daemon("--config", str(tmp_path / "config.toml"))
    atoms, second = copper(), copper()
    atoms.calc, second.calc = (daemon.client().calculator("emt") for _ in range(2))
    atoms.get_forces()
    start = time.monotonic()
    with pytest.raises(UserLimitError, match="has 1 session already, as many as one user may"):
        second.get_forces()
    assert time.monotonic() - start < 30  # of its 60 s
    atoms.calc.close()
    wait_for(lambda: not daemon.client().status()["sessions"])
    second.get_forces()
    second.calc.close()


def test_a_daemon_without_the_model_is_not_waited_for(start_daemon, tmp_path: Path) -> None:
    catalogue = tmp_path / "more.toml"
    catalogue.write_text('[mine]\nfamily = "ase"\narguments = { calculator = "ase.calculators.emt:EMT" }\n')
    daemon = start_daemon("--catalogue", str(catalogue))
    atoms = copper()
    atoms.calc = daemon.client().calculator("mine")
    atoms.get_forces()
    daemon.stop()
    daemon.options = ()
    daemon.start()
    atoms.calc.reset()
    with pytest.raises(UnknownModelError, match="mine") as caught:
        atoms.get_forces()
    assert "has waited" not in caught.value.message
    daemon.stop()


def test_an_interrupt_ends_the_waiting(own_daemon: RunningDaemon) -> None:
    code = (
        "import signal, sys; from ase.build import bulk; from rootstock_client import RootstockClient\n"
        "atoms = bulk('Cu', cubic=True); atoms.calc = RootstockClient(sys.argv[1]).calculator('emt')\n"
        "atoms.get_forces(); print('ready', flush=True); sys.stdin.readline(); atoms.calc.reset()\n"
        "try:\n    atoms.get_forces()\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        "sys.stdin.readline(); print(atoms.get_potential_energy(), flush=True)"
    )
    command = [sys.executable, "-c", code, str(own_daemon.socket)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as job:
        assert job.stdout is not None and job.stdin is not None and job.stderr is not None
        assert job.stdout.readline() == "ready\n"
        own_daemon.stop()
        job.stdin.write("\n")
        job.stdin.flush()
        assert "is away" in job.stderr.readline()  # users without logging see it, too
        job.send_signal(signal.SIGINT)
        assert job.stdout.readline() == "interrupted\n"
        own_daemon.start()
        job.stdin.write("\n")
        job.stdin.flush()
        atoms = bulk("Cu", cubic=True)
        atoms.calc = EMT()
        assert float(job.stdout.readline()) == pytest.approx(atoms.get_potential_energy(), abs=1e-9)


@pytest.mark.parametrize(("given", "seconds"), [(None, 60), (0, 0), (1.5, 1.5), (float("inf"), float("inf"))])
def test_how_much_patience(given: float | None, seconds: float) -> None:
    assert patience_in_seconds(given) == seconds


@pytest.mark.parametrize("given", ["soon", "-1", "nan"])
def test_a_patience_that_is_none(given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROOTSTOCKD_PATIENCE", given)
    with pytest.raises(ValueError, match="ROOTSTOCKD_PATIENCE is"):
        RootstockClient(tmp_path / "x.sock")


def test_what_is_said_at_the_end_is_how_long_the_step_took(caplog: pytest.LogCaptureFixture) -> None:
    begin = time.monotonic()
    outage = Outage(Path("/x"))
    outage.wait(ConnectionLostError("gone"), 0.01)
    time.sleep(0.5)  # a daemon is there, and loads the model
    outage.over()
    words = caplog.records[-1].message
    assert 0.5 <= float(words.split("waited ")[1].split()[0]) <= time.monotonic() - begin + 0.01
    assert words.endswith("s for it.")


def test_many_jobs_do_not_come_back_in_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    state = random.getstate()
    outages = [Outage(Path("/x")) for _ in range(100)]
    for outage in outages:
        for _ in range(30):
            outage.wait(ConnectionLostError("gone"), 300)
    first, last = pauses[::30], pauses[29::30]
    assert max(first) <= 0.015 and max(last) <= 1.5
    assert len(set(last)) > 50 and max(last) > 2 * min(last)
    assert random.getstate() == state


def test_a_full_daemon_is_waited_for_by_jobs_that_had_a_session(runtime_folder: Path) -> None:
    """Played by hand: it comes back and has all its sessions for a while."""
    path = runtime_folder / "full.sock"
    answer = ipi.FORCEREADY + np.float64(1.0).tobytes() + ipi.INT.pack(1) + bytes(24 + 72) + ipi.INT.pack(0)
    full = ipi.error_frame(DaemonFullError("this daemon has its 5 sessions already."))
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()

        def serve() -> None:
            for says in (full, answer, full, full, answer):
                with door.accept()[0] as sock:
                    sock.sendall(says)
                    sock.recv(65536)

        daemon = threading.Thread(target=serve)
        daemon.start()
        atoms = Atoms("Cu")
        atoms.calc = RootstockClient(path).calculator("emt")
        with pytest.raises(DaemonFullError):
            atoms.get_forces()  # one that never had one is told so
        for _ in range(2):
            atoms.calc.reset()
            assert np.array_equal(atoms.get_forces(), np.zeros((1, 3)))
        daemon.join()
    path.unlink()


@pytest.mark.parametrize("part", [1, 12, 20, 30, 60, 100, 130])
def test_half_an_answer_is_never_a_number(runtime_folder: Path, part: int) -> None:
    path = runtime_folder / "half.sock"
    wrong = ipi.FORCEREADY + np.float64(9.0).tobytes() + ipi.INT.pack(1) + b"\x11" * 96 + ipi.INT.pack(100) + b"x" * 100
    right = ipi.FORCEREADY + np.float64(1.0).tobytes() + ipi.INT.pack(1) + bytes(96) + ipi.INT.pack(0)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()

        def serve() -> None:
            for says in (wrong[:part], right):
                with door.accept()[0] as sock:
                    sock.recv(65536)
                    sock.sendall(says)

        daemon = threading.Thread(target=serve)
        daemon.start()
        atoms = Atoms("Cu")
        atoms.calc = RootstockClient(path).calculator("emt")
        assert np.array_equal(atoms.get_forces(), np.zeros((1, 3)))
        daemon.join()
    path.unlink()


def test_signals_anywhere_in_a_step(daemon: RunningDaemon) -> None:
    """A handler that raises: the step is lost, the next is right."""

    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    previous = signal.signal(signal.SIGALRM, ring)
    rng = np.random.default_rng(1)
    interrupted = 0
    try:
        for seed in range(150):
            atoms.rattle(0.02, seed=seed)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 4e-3))
                atoms.get_forces()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                interrupted += 1
            if seed % 3 == 0:
                reference = atoms.copy()
                reference.calc = EMT()
                np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 10
