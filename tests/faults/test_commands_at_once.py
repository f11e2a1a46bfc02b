"""Commands and signals that cross each other: one wins, the other says so, and no daemon is lost or doubled."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.build import bulk

from conftest import RunningDaemon, wait_for
from rootstockd.host.handed_over import handed_over
from rootstockd.settings.config import Config, Device


def copper(size: int) -> Atoms:
    atoms = bulk("Cu", cubic=True) * (size, size, size)
    atoms.rattle(0.05, seed=1)
    return atoms


class Step:
    """A step under way, for which a daemon that stops waits: its worker is stopped until it may go on."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self._worker = daemon.model("emt")["pid"]
        os.kill(self._worker, signal.SIGSTOP)

    def go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._worker, signal.SIGCONT)


@contextlib.contextmanager
def long_step(daemon: RunningDaemon) -> Iterator[tuple[Step, Future[Any]]]:
    """A step that lasts until it may go on."""
    atoms, step = copper(2), Step(daemon)
    with daemon.client().calculator("emt") as atoms.calc, ThreadPoolExecutor(1) as pool:
        future = pool.submit(atoms.get_forces)
        try:
            wait_for(lambda: [session["state"] for session in daemon.client().status()["sessions"]] == ["busy"])
            yield step, future
        finally:
            step.go_on()
        future.result()


@contextlib.contextmanager
def restarting(daemon: RunningDaemon) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """`rootstockd restart` under way, with the daemon draining."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(daemon.run, "restart")
        wait_for(lambda: daemon.client().status()["state"] == "draining")
        yield future


def daemons(running: RunningDaemon) -> list[int]:
    """Process ids of all daemons, without their workers."""
    found = []
    for pid in running.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [pid] if "rootstockd.serve" in psutil.Process(pid).cmdline() else []
    return found


def test_two_restarts(own_daemon: RunningDaemon, caplog: pytest.LogCaptureFixture) -> None:
    before = own_daemon.pid
    with long_step(own_daemon) as (step, forces), restarting(own_daemon) as first:
        second = own_daemon.run("restart")
        assert second.returncode == 1 and "the daemon is being restarted already" in second.stderr
        step.go_on()
        assert first.result().returncode == 0, first.result().stderr
        forces.result()
    (pid,) = daemons(own_daemon)
    assert pid == own_daemon.pid != before
    assert "is away" not in caplog.text  # the second did not cut short what the first one's daemon waited for


def test_a_stop_during_a_restart_calls_it_off(own_daemon: RunningDaemon) -> None:
    with long_step(own_daemon) as (step, forces), restarting(own_daemon) as restart, ThreadPoolExecutor(1) as pool:
        stop = pool.submit(own_daemon.run, "stop")
        time.sleep(2)  # it asks, and then waits for what is under way, as the restart does
        step.go_on()
        assert stop.result().returncode == 0
        assert restart.result().returncode == 1
        assert "the daemon was stopped while it was being restarted, and stays so" in restart.result().stderr
        assert np.isfinite(forces.result()).all()
    assert own_daemon.processes() == []
    assert not own_daemon.socket.exists()


@pytest.mark.parametrize("how", [(), ("--force",)])
def test_a_stop_between_the_two_daemons_of_a_restart(own_daemon: RunningDaemon, how: tuple[str, ...]) -> None:
    old = own_daemon.pid
    with long_step(own_daemon) as (step, forces), restarting(own_daemon) as restart, ThreadPoolExecutor(1) as pool:
        wait_for(lambda: len(daemons(own_daemon)) == 2)
        (new,) = set(daemons(own_daemon)) - {old}
        os.kill(new, signal.SIGSTOP)
        step.go_on()
        wait_for(lambda: old not in daemons(own_daemon))
        stop = pool.submit(own_daemon.run, "stop", *how)
        time.sleep(4)  # it finds nobody
        os.kill(new, signal.SIGCONT)
        assert stop.result().returncode == 0, stop.result().stderr
        assert restart.result().returncode == 1
        own_daemon.start()  # for the step
        forces.result()
    own_daemon.stop()


@contextlib.contextmanager
def between_two_daemons(daemon: RunningDaemon) -> Iterator[tuple[int, Future[subprocess.CompletedProcess[str]]]]:
    """A restart whose first daemon is gone, and whose second one is stopped by a signal."""
    old = daemon.pid
    with long_step(daemon) as (step, forces), restarting(daemon) as restart:
        wait_for(lambda: len(daemons(daemon)) == 2)
        (new,) = set(daemons(daemon)) - {old}
        os.kill(new, signal.SIGSTOP)
        step.go_on()
        wait_for(lambda: old not in daemons(daemon))
        forces.result()
        try:
            yield new, restart
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(new, signal.SIGCONT)


def test_a_stop_waits_for_a_restart_that_takes_long_between_its_two_daemons(own_daemon: RunningDaemon) -> None:
    with between_two_daemons(own_daemon) as (new, restart), ThreadPoolExecutor(2) as pool:
        stops = [pool.submit(own_daemon.run, "stop") for _ in range(2)]
        time.sleep(5)
        assert not any(stop.done() for stop in stops)
        os.kill(new, signal.SIGCONT)
        assert [stop.result().returncode for stop in stops] == [0, 0], [stop.result() for stop in stops]
        assert restart.result().returncode == 1
        assert "stays so" in restart.result().stderr
    assert own_daemon.processes() == []
    assert {path.suffix for path in own_daemon.folder.iterdir()} <= {""}


def test_a_forced_stop_kills_what_a_restart_has_begun_to_start(own_daemon: RunningDaemon) -> None:
    with between_two_daemons(own_daemon) as (_, restart):
        done = own_daemon.run("stop", "--force")
        assert done.returncode == 0 and "stopped" in done.stdout, done
        assert restart.result().returncode == 1
    assert own_daemon.processes() == []
    assert not [path.name for path in own_daemon.folder.iterdir() if path.name.startswith(".rsd")]
    assert own_daemon.run("stop").returncode == 1  # nothing is taken for a restart now


def test_a_restart_between_the_two_daemons_of_another(own_daemon: RunningDaemon) -> None:
    with between_two_daemons(own_daemon) as (new, restart):
        second = own_daemon.run("restart")
        assert second.returncode == 1 and "the daemon is being restarted already" in second.stderr, second
        os.kill(new, signal.SIGCONT)
        assert restart.result().returncode == 0, restart.result().stderr
    assert daemons(own_daemon) == [own_daemon.pid] == [new]
    own_daemon.stop()


def test_a_forced_stop_during_a_restart_of_a_daemon_that_hangs(own_daemon: RunningDaemon) -> None:
    pid = own_daemon.pid
    worker = own_daemon.model("emt")["pid"]
    os.kill(worker, signal.SIGSTOP)
    atoms = copper(1)
    atoms.calc = own_daemon.client(patience=0).calculator("emt")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(atoms.get_forces)
        wait_for(lambda: [session["state"] for session in own_daemon.client().status()["sessions"]] == ["busy"])
        with restarting(own_daemon) as restart:
            os.kill(pid, signal.SIGSTOP)
            assert own_daemon.run("stop", "--force").returncode == 0
            assert restart.result().returncode == 1
            assert "stays so" in restart.result().stderr
    assert own_daemon.processes() == []


ENDED = """
import os, subprocess, sys

launch = subprocess.Popen.__init__

def launch_and_end(process, command, **options):
    ours = "rootstockd.serve" in command
    if ours and os.environ["WHEN"] == "before":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    launch(process, command, **options)
    if ours and os.environ["WHEN"] == "after":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

if "restart" in sys.orig_argv:
    subprocess.Popen.__init__ = launch_and_end
"""
"""Has `rootstockd restart` end by a signal just before or after it has launched a daemon."""


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("before", signal.SIGKILL),
        ("before", signal.SIGINT),
        *(("after", number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)),
    ],
)
def test_a_restart_that_ends_early_leaves_a_daemon(
    own_daemon: RunningDaemon, tmp_path: Path, when: str, number: signal.Signals
) -> None:
    """The old one, which nobody has told to stop yet, or the new one, which has done so by itself."""
    (tmp_path / "sitecustomize.py").write_text(ENDED)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    atoms, old = copper(1), own_daemon.pid
    atoms.calc = own_daemon.client().calculator("emt")
    before = atoms.get_forces()
    done = own_daemon.run("restart", env={"PYTHONPATH": path, "WHEN": when, "SIGNAL": str(int(number))})
    assert done.returncode != 0
    if when == "after":
        wait_for(lambda: old not in daemons(own_daemon), timeout=60)
    atoms.calc.results.clear()
    np.testing.assert_array_equal(atoms.get_forces(), before)
    assert (own_daemon.pid == old) == (when == "before")
    assert daemons(own_daemon) == [own_daemon.pid]


def test_starts_at_the_same_moment(own_daemon: RunningDaemon) -> None:
    """One wins, and whoever has lost is told so; nothing is left of those that lost."""
    own_daemon.stop()
    own_daemon.log.unlink()
    with ThreadPoolExecutor(3) as pool:
        start = ("start", "--device", "cpu", "--log-file", own_daemon.log)
        done = list(pool.map(lambda _: own_daemon.run(*start), range(3)))
    assert sorted(each.returncode for each in done) == [0, 1, 1], done
    lost = [each.stderr for each in done if each.returncode]
    assert all(f"a daemon already runs at {own_daemon.socket}" in words for words in lost), lost
    assert daemons(own_daemon) == own_daemon.processes() == [own_daemon.pid]
    assert sorted(path.suffix for path in own_daemon.folder.iterdir()) == ["", ".control", ".lock", ".sock"]


def test_restarts_at_the_same_moment(own_daemon: RunningDaemon) -> None:
    old = own_daemon.pid
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: own_daemon.run("restart"), range(4)))
    assert 0 in [each.returncode for each in done], done
    (pid,) = daemons(own_daemon)
    assert pid == own_daemon.pid != old
    assert sorted(path.suffix for path in own_daemon.folder.iterdir()) == ["", ".control", ".lock", ".sock"]


def test_a_restart_while_it_stops(own_daemon: RunningDaemon) -> None:
    with long_step(own_daemon) as (step, _), ThreadPoolExecutor(1) as pool:
        stop = pool.submit(own_daemon.run, "stop")
        wait_for(lambda: own_daemon.client().status()["state"] == "draining")
        there, logged = sorted(own_daemon.folder.iterdir()), own_daemon.log.read_text()
        restart = own_daemon.run("restart")
        assert restart.returncode == 1 and "the daemon is stopping already" in restart.stderr
        assert sorted(own_daemon.folder.iterdir()) == there  # nothing of the one that could not begin
        assert "Error" not in own_daemon.log.read_text().removeprefix(logged)
        step.go_on()
        assert stop.result().returncode == 0
    assert own_daemon.processes() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_first_moments(runtime_folder: Path, number: int) -> None:
    """As soon as anything is taken, it is given back; SIGHUP costs nothing."""
    folder = runtime_folder / f"early-{number}"
    config = Config(socket=folder / "d.sock", devices=(Device(name="cpu"),))
    folder.mkdir(mode=0o700)
    with (folder / "log").open("wb") as log, handed_over(config.model_dump_json()) as settings:
        process = subprocess.Popen([sys.executable, "-m", "rootstockd.serve"], stdin=settings, stderr=log)
    while not config.lock.exists():
        assert process.poll() is None
    process.send_signal(number)
    if number == signal.SIGHUP:
        wait_for(lambda: "ready on" in (folder / "log").read_text())
        time.sleep(0.1)
        process.terminate()
    assert process.wait(30) == 0, (folder / "log").read_text()
    assert [path.name for path in folder.iterdir()] == ["log"]
