"""rootstockd's code is replaced on the disk while its daemon runs: whatever then needs a worker waits for a restart."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet

from conftest import RunningDaemon, rootstockd, wait_for
from plain_driver import PlainDriver
from rootstock_client.control import fetch
from rootstock_client.errors import RestartNeededError
from rootstock_client.runtime_dir import MET
from rootstockd.worker.version import PROTOCOL, SLOT_LAYOUT

TREE = Path(__file__).parent.parent.parent
VERSION = "rootstockd/worker/version.py"
OTHER_VERSIONS = rf"version {PROTOCOL + 1}\.{SLOT_LAYOUT} .* this daemon {PROTOCOL}\.{SLOT_LAYOUT}"
UPGRADED = "ERROR rootstockd.supervision.supervisor: rootstockd was upgraded"
"""What the log has of each worker that the daemon could not talk to."""
RETRY_AFTER = 0.5
"""Seconds until a broken model may be tried again, in place of the 10 that users have."""


class Upgradable(RunningDaemon):
    """A daemon of code that lies in a folder of its own."""

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    def _edit(self, file: str, old: str, new: str) -> None:
        path = self.tree / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def install(self) -> None:
        for package in ("rootstockd", "rootstock_client"):
            shutil.copytree(TREE / package, self.tree / package, ignore=shutil.ignore_patterns("__pycache__"))
        self._edit("rootstockd/supervision/supervisor.py", "RETRY_AFTER = 10.0", f"RETRY_AFTER = {RETRY_AFTER}")

    def upgrade(self) -> None:
        """Now daemons of this code talk with their workers in another way."""
        self._edit(VERSION, f"PROTOCOL = {PROTOCOL}", f"PROTOCOL = {PROTOCOL + 1}")

    def take_back(self) -> None:
        """As it was, with the file's time: Python compiles it again."""
        shutil.copy2(TREE / VERSION, self.tree / VERSION)

    def kill_worker(self) -> None:
        """It can't have another."""
        os.kill(self.model("emt")["pid"], signal.SIGKILL)
        wait_for(lambda: self.model("emt")["state"] == "failed")


@pytest.fixture
def upgradable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upgradable]:
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as folder:
        daemon = Upgradable(Path(folder), ("--model", "emt"))
        daemon.install()
        monkeypatch.setenv("PYTHONPATH", str(daemon.tree), prepend=os.pathsep)
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.stop()


class Dynamics(threading.Thread):
    """An MD run, which notes down its trajectory, until it is stopped or has so many steps."""

    def __init__(self, daemon: RunningDaemon, steps: int | None = None) -> None:
        super().__init__()
        self.trajectory: list[bytes] = []
        self.error: BaseException | None = None
        self.ending = threading.Event()
        self._daemon, self._steps = daemon, steps

    def run(self) -> None:
        try:
            with self._daemon.client() as client, client.calculator("emt", exact=True) as calculator:
                atoms = copper()
                atoms.calc = calculator
                dynamics = VelocityVerlet(atoms, 2 * units.fs)
                while not self.ending.is_set() and len(self.trajectory) != self._steps:
                    dynamics.run(1)
                    self.trajectory.append(atoms.positions.tobytes())
                    time.sleep(0.005)
        except BaseException as error:
            self.error = error

    def goes_on(self) -> None:
        """Until it has done more steps."""
        before = len(self.trajectory)
        wait_for(lambda: len(self.trajectory) > before + 5 or self.error)
        assert self.error is None

    def end(self) -> list[bytes]:
        self.ending.set()
        self.join()
        assert self.error is None
        return self.trajectory


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def energy_of(daemon: RunningDaemon, model: str = "emt", patience: float | None = None) -> float:
    atoms = copper()
    with daemon.client(patience) as client, client.calculator(model) as atoms.calc:
        return float(atoms.get_potential_energy())


@pytest.fixture
def expected() -> float:
    atoms = copper()
    atoms.calc = EMT()
    return float(atoms.get_potential_energy())


def test_dynamics_over_an_upgrade(upgradable: Upgradable) -> None:
    job = Dynamics(upgradable)
    job.start()
    job.goes_on()
    upgradable.upgrade()
    job.goes_on()  # what is loaded stays
    assert upgradable.run("restart").returncode == 0
    job.goes_on()
    trajectory = job.end()
    again = Dynamics(upgradable, len(trajectory))
    again.start()
    again.join()
    assert again.trajectory == trajectory


def test_dynamics_over_an_upgrade_after_which_a_worker_was_killed(
    upgradable: Upgradable, caplog: pytest.LogCaptureFixture
) -> None:
    """The job waits for the restart, and says for what; meanwhile no worker is started again, and little is asked."""
    caplog.set_level(logging.WARNING, "rootstock_client")
    job = Dynamics(upgradable)
    job.start()
    job.goes_on()
    upgradable.upgrade()
    upgradable.kill_worker()
    time.sleep(6 * RETRY_AFTER)
    assert job.error is None
    stopped = len(job.trajectory)
    error = upgradable.model("emt")["error"]
    assert upgradable.log.read_text().count(UPGRADED) == 1
    told = re.search(rb'_errors_total.code="restart-needed". (\d+)', fetch(upgradable.socket, "GET", "/metrics"))
    assert told is not None and 1 < int(told[1]) < 30
    (record,) = caplog.records
    assert "`rootstockd restart`" in record.message and "this job waits up to 60 s" in record.message
    assert "rootstockd was upgraded while its daemon runs" in error and "`rootstockd restart`" in error
    assert "> rootstockd restart" in upgradable.run("doctor").stdout
    assert len(job.trajectory) == stopped
    assert upgradable.run("restart").returncode == 0
    job.goes_on()
    trajectory = job.end()
    assert "is back" in caplog.records[-1].message
    again = Dynamics(upgradable, len(trajectory))
    again.start()
    again.join()
    assert again.trajectory == trajectory


def test_what_is_not_loaded_yet_waits_for_the_restart(upgradable: Upgradable, expected: float) -> None:
    """Also for a job that has met no daemon before, as for one that is stopping; one without patience is told so."""
    upgradable.upgrade()
    assert energy_of(upgradable) == pytest.approx(expected, abs=1e-9)
    done = upgradable.run("load", "lj")
    assert done.returncode == 1 and "`rootstockd restart`" in done.stderr
    with pytest.raises(RestartNeededError, match=rf"{OTHER_VERSIONS}(.|\n)*rootstockd restart"):
        energy_of(upgradable, "lj", patience=0)
    MET.discard(upgradable.socket)
    energies: list[float] = []
    job = threading.Thread(target=lambda: energies.append(energy_of(upgradable, "lj")))
    job.start()
    time.sleep(1)
    assert job.is_alive()
    assert upgradable.run("restart").returncode == 0
    job.join()
    assert energies == [energy_of(upgradable, "lj")]


def test_an_upgrade_that_was_taken_back(upgradable: Upgradable, expected: float) -> None:
    """`load` has the model tried again by the daemon of now, for which jobs have waited."""
    assert energy_of(upgradable) == pytest.approx(expected, abs=1e-9)
    upgradable.upgrade()
    upgradable.kill_worker()
    energies: list[float] = []
    job = threading.Thread(target=lambda: energies.append(energy_of(upgradable)))
    job.start()
    upgradable.take_back()
    time.sleep(2 * RETRY_AFTER)
    assert job.is_alive()
    assert upgradable.run("load", "emt").returncode == 0
    job.join()
    assert energies == [pytest.approx(expected, abs=1e-9)]


class Listening(PlainDriver):
    """A driver that listens, also when it has lost a connection, as i-PI does."""

    def __init__(self, door: socket.socket, atoms: Atoms) -> None:
        self.atoms = atoms
        self.sock, _ = door.accept()
        self.sock.settimeout(60)
        assert self.status() == "NEEDINIT"
        self.init(b" ")


def test_a_driver_that_listens_notices_nothing(upgradable: Upgradable, expected: float) -> None:
    atoms = copper()
    structure, address = upgradable.folder / "init.xyz", upgradable.folder / "driver"
    atoms.write(structure)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(address))
        door.listen()
        door.settimeout(60)
        code: list[int] = []
        command = ("attach", address, "--socket", upgradable.socket, "--model", "emt", "--structure", structure)
        attach = threading.Thread(target=lambda: code.append(rootstockd(*command).returncode))
        attach.start()
        with Listening(door, atoms) as driver:
            driver.positions()
            assert driver.forces()[0] == pytest.approx(expected, abs=1e-9)
            upgradable.upgrade()
            upgradable.kill_worker()
            driver.positions()
            assert upgradable.run("restart").returncode == 0
            assert driver.forces()[0] == pytest.approx(expected, abs=1e-9)
            driver.send(b"EXIT        ")
            attach.join()
    assert code == [0]


def test_a_driver_of_ones_own_is_told_that_a_restart_is_needed(upgradable: Upgradable, expected: float) -> None:
    atoms = copper()
    with PlainDriver(upgradable, atoms) as driver:
        driver.positions()
        assert driver.forces()[0] == pytest.approx(expected, abs=1e-9)
        upgradable.upgrade()
        upgradable.kill_worker()
        driver.send(b"STATUS      ")
        driver.positions()
        driver.send(b"GETFORCE    ")
        assert driver.receive(12) == b"READY       "
        assert driver.error()["code"] == "restart-needed"
