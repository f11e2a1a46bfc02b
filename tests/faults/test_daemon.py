"""Daemons that are killed, restarted and stopped under jobs: no job fails, and no number differs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS

from conftest import RunningDaemon, wait_for
from plain_driver import PlainDriver
from rootstock_client import ipi
from rootstock_client.control import request
from rootstock_client.errors import (
    DrainingError,
    NotAnsweringError,
)


def copper(size: int = 1, seed: int = 1) -> Atoms:
    atoms = bulk("Cu", cubic=True) * (size, 1, 1)
    atoms.rattle(0.05, seed=seed)
    return atoms


# --- what may happen to a daemon


def killed(daemon: RunningDaemon) -> None:
    process = psutil.Process(daemon.pid)
    workers = process.children()
    process.kill()
    _, alive = psutil.wait_procs([process, *workers], timeout=5)
    assert not alive, "a killed daemon leaves workers"
    daemon.start()


def restarted(daemon: RunningDaemon) -> None:
    done = daemon.run("restart")
    assert done.returncode == 0, done.stderr


def terminated(daemon: RunningDaemon) -> None:
    process = psutil.Process(daemon.pid)
    process.terminate()
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running()
    daemon.start()


FATES = [killed, restarted, terminated]


# --- jobs


class Job:
    """MD from a seed, in a thread, until it is told to end; what it went through can be compared, bit by bit."""

    def __init__(self, atoms: Atoms, seed: int) -> None:
        self.atoms = atoms
        self.seed = seed
        self.path: list[bytes] = []
        self.error: BaseException | None = None
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(None,))

    def _run(self, steps: int | None) -> None:
        try:
            rng = np.random.default_rng(self.seed)
            masses = self.atoms.get_masses()[:, None]
            self.atoms.set_momenta(rng.standard_normal((len(masses), 3)) * np.sqrt(masses * 600 * units.kB))
            if self.seed % 2:
                dynamics = VelocityVerlet(self.atoms, 2 * units.fs)
            else:
                heat = {"temperature_K": 600, "friction": 0.02, "fixcm": False}
                dynamics = Langevin(self.atoms, 2 * units.fs, rng=rng, **heat)
            while not self._enough.is_set() if steps is None else len(self.path) < steps:
                dynamics.run(1)
                energy = self.atoms.get_potential_energy()
                self.path.append(self.atoms.positions.tobytes() + np.float64(energy).tobytes())
                if steps is None:
                    time.sleep(0.02)  # what is done here will be done again to compare
        except BaseException as error:
            self.error = error

    def start(self) -> Job:
        self._thread.start()
        return self

    def goes_on(self, steps: int = 3) -> None:
        """Until it has done some more steps."""
        goal = len(self.path) + steps
        wait_for(lambda: self.error or len(self.path) >= goal, timeout=90)
        assert self.error is None, self.error

    def end(self) -> None:
        self._enough.set()
        self._thread.join()

    def undisturbed(self, atoms: Atoms) -> list[bytes]:
        """The same without anything happening."""
        again = Job(atoms, self.seed)
        again._run(len(self.path))
        assert again.error is None, again.error
        return again.path


@pytest.fixture
def end_jobs() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.end()
    jobs.clear()


@pytest.mark.parametrize(("fate", "queued"), [*((fate, "") for fate in FATES), (restarted, "1")])
def test_no_trajectory_differs(
    start_daemon, fate: Callable[[RunningDaemon], None], queued: str, end_jobs: list[Job], monkeypatch
) -> None:
    """Nor where each user may have one evaluation at a time."""
    if queued:
        monkeypatch.setenv("ROOTSTOCKD_LIMITS__QUEUED", queued)
    own_daemon = start_daemon("--model", "emt")

    def atoms(seed: int) -> Atoms:
        made = copper(1 + seed % 3, seed)
        made.calc = own_daemon.client().calculator("emt", exact=True)
        return made

    end_jobs.extend(Job(atoms(seed), seed).start() for seed in range(4))
    for job in end_jobs:
        job.goes_on()
    fate(own_daemon)
    for job in end_jobs:
        job.goes_on()
        job.end()
        assert job.error is None
        assert job.path == job.undisturbed(atoms(job.seed)), "the trajectory differs"


def test_no_trajectory_of_exact_mace_differs(start_daemon, end_jobs: list[Job]) -> None:
    daemon = start_daemon("--model", "mace-emt-small")

    def atoms(seed: int) -> Atoms:
        made = copper(1, seed)
        made.calc = daemon.client().calculator("mace-emt-small", exact=True)
        return made

    end_jobs.extend(Job(atoms(seed), seed).start() for seed in range(2))
    for fate in (restarted, killed):
        for job in end_jobs:
            job.goes_on()
        fate(daemon)
    for job in end_jobs:
        job.goes_on()
        job.end()
        assert job.path == job.undisturbed(atoms(job.seed)), "the trajectory differs"
    daemon.stop()


def relaxed(calculator) -> Atoms:
    atoms = copper(2)
    atoms.rattle(0.1, seed=3)
    atoms.calc = calculator
    optimizer = BFGS(atoms, logfile=None)
    assert optimizer.run(fmax=1e-6, steps=200)
    return atoms


def test_a_relaxation(own_daemon: RunningDaemon) -> None:
    """Several times over, so that a restart falls into it."""
    before = relaxed(own_daemon.client().calculator("emt", exact=True))
    calculator = own_daemon.client().calculator("emt", exact=True)
    over = threading.Event()
    stirring = threading.Thread(target=lambda: (restarted(own_daemon), killed(own_daemon), over.set()))
    stirring.start()
    runs = 0
    while not over.is_set() or runs < 3:
        atoms = relaxed(calculator)
        np.testing.assert_array_equal(atoms.positions, before.positions)
        assert atoms.get_potential_energy() == before.get_potential_energy()
        calculator.reset()
        runs += 1
    stirring.join()


def test_an_elastic_band_with_one_calculator_for_all_images(own_daemon: RunningDaemon) -> None:
    def band(calculator) -> NEB:
        first, last = copper(2), copper(2)
        last.positions[0] += 0.4
        images = [first, *(first.copy() for _ in range(3)), last]
        neb = NEB(images, allow_shared_calculator=True, method="improvedtangent")
        neb.interpolate()
        for image in images:
            image.calc = calculator
        return neb

    def relax(neb: NEB, calm: Callable[[], object] = lambda: None) -> np.ndarray:
        optimizer = BFGS(neb, logfile=None)
        for step, _ in enumerate(optimizer.irun(fmax=0.0, steps=12)):
            if step in (4, 8):
                calm()
        return np.array([image.positions for image in neb.images])

    expected = relax(band(own_daemon.client().calculator("emt", exact=True)))
    found = relax(band(own_daemon.client().calculator("emt", exact=True)), lambda: killed(own_daemon))
    np.testing.assert_array_equal(found, expected)


def test_threads_that_share_a_calculator_wait_together(own_daemon: RunningDaemon) -> None:
    shared = own_daemon.client().calculator("emt")
    structures = [copper(1, seed) for seed in range(6)]
    expected = []
    for atoms in structures:
        atoms.calc = EMT()
        expected.append(atoms.get_forces())
        atoms.calc = shared
    shared.get_forces(structures[0])
    own_daemon.run("stop", "--force")
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=number: found.update({n: structures[n].get_forces()})) for number in range(6)
    ]
    for thread in threads:
        thread.start()
    own_daemon.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        np.testing.assert_allclose(found[number], expected[number], atol=1e-9)


FORKING = """
import os, signal, sys
import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT
from rootstock_client import RootstockClient

atoms = bulk("Cu", cubic=True)
atoms.calc = RootstockClient(sys.argv[1]).calculator("emt")
atoms.get_forces()
print("ready", flush=True)
sys.stdin.readline()  # the daemon is gone now
child = os.fork()  # both wait for the next one
for step in range(5):
    atoms.rattle(0.01, seed=1000 * (child == 0) + step)
    reference = atoms.copy()
    reference.calc = EMT()
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-9)
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_job_that_forks_while_there_is_no_daemon(own_daemon: RunningDaemon) -> None:
    command = [sys.executable, "-c", FORKING, str(own_daemon.socket)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdin is not None
        assert job.stdout.readline() == "ready\n"
        own_daemon.stop()
        job.stdin.write("\n")
        job.stdin.flush()
        time.sleep(0.3)
        own_daemon.start()
        assert job.wait(60) == 0


def test_a_job_that_starts_during_a_restart(own_daemon: RunningDaemon) -> None:
    """The old daemon drains behind an evaluation; it tells the job so, and the new one does its step."""
    worker = own_daemon.model("emt")["pid"]
    os.kill(worker, signal.SIGSTOP)
    long = copper()
    long.calc = own_daemon.client().calculator("emt")
    threads = [threading.Thread(target=long.get_forces)]
    threads[0].start()
    wait_for(lambda: any(session["state"] == "busy" for session in own_daemon.client().status()["sessions"]))
    old = own_daemon.pid
    threads.append(threading.Thread(target=restarted, args=(own_daemon,)))
    threads[1].start()
    wait_for(lambda: own_daemon.client().status()["state"] == "draining")
    atoms = copper()
    atoms.calc = own_daemon.client(patience=0).calculator("emt")
    with pytest.raises(DrainingError):
        atoms.get_forces()
    os.kill(worker, signal.SIGCONT)
    atoms.calc = own_daemon.client().calculator("emt")
    forces = atoms.get_forces()
    for thread in threads:
        thread.join()
    assert own_daemon.pid != old
    atoms.calc = EMT()
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-9)


FICKLE = """
from pathlib import Path
from ase.calculators.emt import EMT

class Fickle(EMT):
    def __init__(self):
        super().__init__()
        if Path(__file__).with_name("broken").exists():
            raise OSError("not just now")
"""


def test_a_restart_while_its_model_is_broken(start_daemon, tmp_path: Path, end_jobs: list[Job], monkeypatch) -> None:
    """Whoever restarts is told; jobs with other models go on, and those with this one as soon as it is mended."""
    (tmp_path / "of_moods.py").write_text(FICKLE)
    (tmp_path / "more.toml").write_text('[fickle]\nfamily = "ase"\narguments = { calculator = "of_moods:Fickle" }\n')
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    daemon = start_daemon("--catalogue", str(tmp_path / "more.toml"), "--model", "fickle")
    atoms, other = copper(), copper()
    atoms.calc, other.calc = daemon.client().calculator("fickle"), daemon.client().calculator("emt")
    before, old = atoms.get_forces(), daemon.pid
    job = Job(other, 1).start()
    end_jobs.append(job)
    job.goes_on()
    (tmp_path / "broken").touch()
    done = daemon.run("restart")
    assert done.returncode == 1 and "none of the models to be loaded at the start could be" in done.stderr, done.stderr
    assert "not just now" in done.stdout
    assert daemon.pid != old
    job.goes_on()
    (tmp_path / "broken").unlink()
    assert daemon.run("load", "fickle").returncode == 0
    atoms.calc.results.clear()
    np.testing.assert_array_equal(atoms.get_forces(), before)


# --- the daemon's own end


def test_signals_once_and_twice(own_daemon: RunningDaemon) -> None:
    """SIGTERM lets the evaluation end; a second one does not, and its job goes on with the next daemon."""
    long = bulk("Cu", cubic=True) * 14
    long.calc = own_daemon.client().calculator("emt")
    outcome: list[float] = []
    thread = threading.Thread(target=lambda: outcome.append(long.get_potential_energy()))
    thread.start()
    wait_for(lambda: any(session["state"] == "busy" for session in own_daemon.client().status()["sessions"]))
    process = psutil.Process(own_daemon.pid)
    process.terminate()
    wait_for(lambda: own_daemon.client().status()["state"] == "draining")
    process.send_signal(signal.SIGUSR1)  # what Slurm may send to all processes of a job
    request(own_daemon.socket, "POST", "/v1/stop", {})  # as a script does whose batch system has sent SIGTERM
    time.sleep(0.1)
    assert own_daemon.client().status()["state"] == "draining"
    assert not outcome
    process.terminate()
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running()
    assert not outcome, "the evaluation was waited for"
    own_daemon.start()
    thread.join()
    reference = long.copy()
    reference.calc = EMT()
    assert outcome[0] == pytest.approx(reference.get_potential_energy(), abs=1e-6)


def test_a_stop_where_a_file_is_in_the_place_of_the_folder(own_daemon: RunningDaemon) -> None:
    """It ends well, and says what it could not remove."""
    process = psutil.Process(own_daemon.pid)
    away = own_daemon.folder.rename(own_daemon.folder.with_name("away"))
    own_daemon.folder.touch()
    try:
        process.terminate()
        psutil.wait_procs([process], timeout=20)
        assert not process.is_running()
    finally:
        own_daemon.folder.unlink()
        away.rename(own_daemon.folder)
    lines = own_daemon.log.read_text().splitlines()
    assert lines[-1].endswith("INFO rootstockd.daemon: stopped")
    assert sum("can't remove" in line and line.endswith(": Not a directory") for line in lines) == 3
    assert not any("Traceback" in line for line in lines)


def test_a_daemon_that_nobody_finds_any_more(own_daemon: RunningDaemon) -> None:
    """As when a logout takes /run/user/UID along: its jobs go on, and it ends with them."""
    lost = psutil.Process(own_daemon.pid)
    workers = lost.children()
    atoms = copper()
    with own_daemon.client().calculator("emt") as atoms.calc:
        atoms.get_forces()
        for path in own_daemon.socket.parent.iterdir():
            if path.suffix in {".sock", ".control", ".lock"}:
                path.unlink()
        wait_for(lambda: "it ends with the last of its sessions, of which there are 1\n" in own_daemon.log.read_text())
        atoms.rattle(0.01)
        atoms.get_forces()
        own_daemon.start()  # another, beside it
        assert own_daemon.pid != lost.pid
    lost.wait(20)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    atoms.rattle(0.01)
    assert atoms.get_forces().any()  # of the other


def test_a_driver_fetches_its_last_result(own_daemon: RunningDaemon) -> None:
    """What it sent before the daemon began to stop is answered, though it asks late."""
    text = b'{"rootstock": 1, "model": "emt", "numbers": [29, 29], "pbc": [false, false, false]}'
    positions = np.array([[0.0, 0, 0], [0, 0, 4.5]])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(own_daemon.socket))
        sock.sendall(ipi.init_frame(text) + ipi.STATUS)
        assert sock.recv(12, socket.MSG_WAITALL) == ipi.READY
        sock.sendall(ipi.posdata_head(np.eye(3), np.eye(3), 2) + positions.tobytes() + ipi.STATUS)
        assert sock.recv(12, socket.MSG_WAITALL) == ipi.HAVEDATA
        os.kill(own_daemon.pid, signal.SIGTERM)
        wait_for(lambda: own_daemon.client().status()["state"] == "draining")
        time.sleep(0.3)
        sock.sendall(ipi.GETFORCE)
        assert sock.recv(12, socket.MSG_WAITALL) == ipi.FORCEREADY


def test_drivers_whose_evaluations_are_held_get_their_results(start_daemon, monkeypatch) -> None:
    """By a limit of evaluations at a time; a daemon that stops lets one after another go on until they are done."""
    monkeypatch.setenv("ROOTSTOCKD_LIMITS__QUEUED", "1")
    daemon = start_daemon("--model", "emt")
    worker = daemon.model("emt")["pid"]
    os.kill(worker, signal.SIGSTOP)
    drivers = [PlainDriver(daemon, copper(seed=seed)) for seed in range(4)]
    for driver in drivers:
        driver.positions()
    wait_for(lambda: [session["state"] for session in daemon.client().status()["sessions"]] == ["busy"] * 4)
    model = daemon.model("emt")
    assert (model["waiting"], model["batch_under_way"]) == (0, 4)
    drivers.pop().sock.close()
    os.kill(daemon.pid, signal.SIGTERM)
    wait_for(lambda: daemon.client().status()["state"] == "draining")
    os.kill(worker, signal.SIGCONT)
    for driver in drivers:
        energy, forces, _, _ = driver.forces()
        driver.atoms.calc = EMT()
        assert energy == pytest.approx(driver.atoms.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(forces, driver.atoms.get_forces(), rtol=0, atol=1e-9)
        driver.sock.close()


def test_a_driver_that_never_fetches_does_not_keep_the_daemon(own_daemon: RunningDaemon) -> None:
    text = b'{"rootstock": 1, "model": "emt", "numbers": [29], "pbc": [false, false, false]}'
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(own_daemon.socket))
        sock.sendall(ipi.init_frame(text) + ipi.posdata_head(np.eye(3), np.eye(3), 1) + bytes(24) + ipi.STATUS)
        assert sock.recv(12, socket.MSG_WAITALL) == ipi.HAVEDATA
        assert own_daemon.run("stop", timeout=30).returncode == 0


SLOW = """
import time
from ase.calculators.emt import EMT

class Slow(EMT):
    def __init__(self):
        super().__init__()
        time.sleep(60)
"""


def test_a_model_that_is_loading_is_not_waited_for(start_daemon, tmp_path: Path, monkeypatch) -> None:
    """The job that wants it is told, and asks the next daemon."""
    (tmp_path / "slow_to_load.py").write_text(SLOW)
    (tmp_path / "more.toml").write_text('[slow]\nfamily = "ase"\narguments = { calculator = "slow_to_load:Slow" }\n')
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    daemon = start_daemon("--catalogue", str(tmp_path / "more.toml"))
    atoms = copper()
    atoms.calc = daemon.client(patience=0).calculator("slow")
    outcome: list[BaseException] = []

    def step() -> None:
        try:
            atoms.get_forces()
        except DrainingError as error:
            outcome.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    wait_for(lambda: any(session["state"] == "busy" for session in daemon.client().status()["sessions"]))
    assert daemon.run("stop", timeout=30).returncode == 0
    thread.join()
    assert outcome


def test_a_daemon_that_hangs(own_daemon: RunningDaemon) -> None:
    """Its commands say so instead of hanging, too; `stop --force` ends it all the same."""
    process = psutil.Process(own_daemon.pid)
    workers = process.children()
    process.suspend()
    try:
        with pytest.raises(NotAnsweringError, match="does not answer"):
            own_daemon.client().status()
        done = own_daemon.run("stop")
        assert done.returncode != 0
        assert "does not answer" in done.stderr and "stop --force" in done.stderr
        assert process.is_running()
        assert own_daemon.run("stop", "--force").returncode == 0
        _, alive = psutil.wait_procs([process, *workers], timeout=5)
        assert not alive
    finally:
        if process.is_running():
            process.resume()
    own_daemon.start()
