"""What a daemon needs runs out: descriptors, disk, memory. It says so to whoever asks for more, and serves the rest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.build import bulk
from disks import fill, small_disk

from conftest import RunningDaemon, open_descriptors
from rootstock_client import RootstockClient, ipi
from rootstock_client.control import request
from rootstock_client.errors import LimitError, RootstockError
from rootstockd.host.descriptors import DESCRIPTORS_A_SESSION, share_descriptors
from rootstockd.host.handed_over import handed_over
from rootstockd.host.sockets import AddressError, listen, lock
from rootstockd.settings.config import Config, Device


class Served:
    """A daemon in a process of our own, started with whatever limits a test wants.

    Args:
        folder: where its sockets lie.
        log: where its output goes.
        limits: soft and hard limit for each resource.
        run: what its Python does.
        settings: more of its Config.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        limits: dict[int, int] | None = None,
        run: tuple[str, str] = ("-m", "rootstockd.serve"),
        **settings: Any,
    ) -> None:
        self.socket, self.log = folder / "d.sock", log
        config = Config(socket=self.socket, devices=(Device(name="cpu"),), models=("emt",), log_file=log, **settings)
        shell = "".join(f"ulimit {flag} {value}; " for flag, value in (limits or {}).items())
        command = ["/bin/bash", "-c", f'{shell}exec "$@"', "-", sys.executable, *run]
        with log.open("ab") as output, handed_over(config.model_dump_json()) as given:
            self.process = subprocess.Popen(command, stdin=given, stdout=output, stderr=output)
        wait_for(self.ready)

    def ready(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(RootstockError):
            return RootstockClient(self.socket).status()["state"] == "ready"
        return False

    def client(self) -> RootstockClient:
        return RootstockClient(self.socket)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(self.socket))
        sock.settimeout(30)
        return sock

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def serve(runtime_folder: Path) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def start(log: Path | None = None, limits: dict[int, int] | None = None, **settings: Any) -> Served:
            folder = Path(tempfile.mkdtemp(dir=runtime_folder))
            served = Served(folder, log or folder / "log", limits, **settings)
            stack.callback(served.end)
            return served

        yield start


def copper(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def session(served: Served, seed: int = 0) -> Atoms:
    """A structure with a session of its own, once evaluated."""
    atoms = copper(seed)
    atoms.calc = served.client().calculator("emt")
    atoms.get_forces()
    return atoms


def again(atoms: Atoms) -> None:
    """The same step gives the same."""
    before = atoms.get_forces()
    atoms.calc.results.clear()
    np.testing.assert_array_equal(atoms.get_forces(), before)


def told(sock: socket.socket) -> str:
    """What a session is told that is turned away."""
    data = sock.recv(4096)
    assert data.startswith(ipi.ERROR)
    fields = json.loads(data[16:])
    assert fields["code"] in ("full", "limit")
    return fields["message"]


# --- numbers

MANY_BEFORE = """
import itertools, runpy
import rootstockd.sessions.system
rootstockd.sessions.system._numbers = itertools.count(2**31 - 3)
runpy.run_module("rootstockd.serve", run_name="__main__")
"""
"""A daemon that has had two thousand million INITs already."""


def test_slots_have_numbers_that_messages_have_room_for(serve) -> None:
    """However many there were; and none that another has."""
    served = serve(run=("-c", MANY_BEFORE))
    kept = [session(served, seed) for seed in range(6)]
    for atoms in kept:
        again(atoms)
    assert served.log.read_text().count("Traceback") == 0


# --- descriptors


@pytest.mark.parametrize(("limit", "sessions"), [(20, 1), (100, 3), (1024, 292), (1_000_000, 312_472)])
def test_descriptors_for_sessions(limit: int, sessions: int) -> None:
    allowed, lingering = share_descriptors(limit)
    assert allowed == sessions
    assert lingering >= 4


def test_few_descriptors(serve) -> None:
    """Sessions are refused before descriptors run out; those that are there go on, and others come when they end."""
    served = serve(limits={"-n": 100})
    allowed, _ = share_descriptors(100)
    few = f"there is room for {allowed} sessions at a time, all that its limit of 100 open files (ulimit -n) allows"
    for _ in range(2):
        assert few in served.client().status()["warnings"]
        request(served.socket, "POST", "/v1/reload")  # that changes nothing of it
    atoms = [session(served, seed) for seed in range(allowed)]
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            sock = stack.enter_context(served.connect())
            assert f"its {allowed} sessions already, all that its limit of 100 open files (ulimit -n) allows" in told(
                sock
            )
            assert len(served.client().status()["sessions"]) == allowed
        for one in atoms:
            again(one)
        assert open_descriptors(served.process.pid) < 100
    os.kill(served.client().status()["models"][0]["pid"], 9)  # a new worker can be started all the same
    for one in atoms:
        again(one)
    atoms[0].calc.close()
    wait_for(lambda: len(served.client().status()["sessions"]) == allowed - 1)
    again(session(served, 100))


def test_a_burst_of_connections(serve) -> None:
    """All that come in one turn of the loop are counted at once: none of them takes the last descriptor."""
    served = serve(limits={"-n": 112})
    allowed, _ = share_descriptors(112)
    atoms = session(served)
    os.kill(served.process.pid, signal.SIGSTOP)  # they wait at the door, and are taken together
    with contextlib.ExitStack() as stack:
        burst = [stack.enter_context(served.connect()) for _ in range(200)]
        os.kill(served.process.pid, signal.SIGCONT)
        for sock in burst[allowed - 1 :]:
            assert "sessions already" in told(sock)
        assert open_descriptors(served.process.pid) < 112
        for sock in burst[: allowed - 1]:
            sock.sendall(ipi.STATUS)
            assert sock.recv(12) == ipi.NEEDINIT
        again(atoms)
    assert "can't take a connection" not in served.log.read_text()
    wait_for(lambda: len(served.client().status()["sessions"]) == 1)
    again(session(served, 1))


def limit(served: Served, what: int, soft: int) -> None:
    """Change a limit of a daemon that runs."""
    process = psutil.Process(served.process.pid)
    process.rlimit(what, (soft, process.rlimit(what)[1]))


def test_no_descriptor_at_all(serve) -> None:
    """A connection that can't be taken waits, and costs nothing meanwhile; it is served when there is room."""
    served = serve()
    atoms = session(served)
    pid = served.process.pid
    wait_for(lambda: open_descriptors(pid) < 30)
    before = psutil.Process(pid).rlimit(resource.RLIMIT_NOFILE)[0]
    limit(served, resource.RLIMIT_NOFILE, 4)
    with served.connect() as sock:
        sock.sendall(ipi.STATUS)
        start = psutil.Process(pid).cpu_times()
        time.sleep(1)
        spent = psutil.Process(pid).cpu_times()
        assert spent.user + spent.system - start.user - start.system < 0.5
        again(atoms)
        limit(served, resource.RLIMIT_NOFILE, before)
        assert sock.recv(12) == ipi.NEEDINIT
    again(session(served, 1))


# --- memory


def test_no_memory_for_a_slot(serve) -> None:
    """A system that finds no memory is refused; smaller ones, and those that are there, go on."""
    served = serve()
    atoms = session(served)
    text = json.dumps({"rootstock": 1, "model": "emt", "numbers": [29] * 1_000_000, "pbc": [False] * 3}).encode()
    vms = psutil.Process(served.process.pid).memory_info().vms
    limit(served, resource.RLIMIT_AS, vms + 60 * 2**20)  # the INIT fits, its slot of 78 MB does not
    with served.connect() as sock:
        sock.sendall(ipi.init_frame(text) + ipi.GETFORCE)
        assert "no room for another system: Cannot allocate memory" in told(sock)
        again(atoms)
        again(session(served, 1))
        limit(served, resource.RLIMIT_AS, resource.RLIM_INFINITY)
        sock.sendall(ipi.init_frame(text) + ipi.STATUS)  # the same session, when there is memory again
        assert sock.recv(12) == ipi.READY


def test_atoms_of_all_sessions_together(serve) -> None:
    served = serve(total_atoms=10)
    first, second = session(served), session(served, 1)
    third = copper(2)
    third.calc = served.client().calculator("emt")
    with pytest.raises(
        LimitError, match=r"of 4 atoms; this daemon takes 10 atoms in all .* \(total_atoms\), and has 8 already"
    ):
        third.get_forces()
    small = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]])
    small.calc = served.client().calculator("emt")
    small.get_forces()
    again(first)
    small.calc.close()
    second.calc.close()
    wait_for(lambda: len(served.client().status()["sessions"]) == 2)
    third.get_forces()
    first.positions += 0.1
    first.symbols[0] = "Al"  # a new INIT of the same session takes the place of its old one
    first.get_forces()


# --- disk


def make_noise(served: Served) -> None:
    """Lines for the log: a session that is closed, and a worker that is lost."""
    with served.connect() as sock:
        sock.sendall(b"GIVEFORCE   ")
        assert sock.recv(1) == b""
    os.kill(served.client().status()["models"][0]["pid"], 9)


def test_a_log_that_takes_nothing(serve, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.symlink_to("/dev/full")
    served = serve(log)
    atoms = session(served)
    for _ in range(3):
        make_noise(served)
        again(atoms)
    again(session(served, 1))
    status = served.client().status()
    assert status["models"][0]["restarts"] == 3


def test_the_descriptors_of_a_session_are_as_many_as_are_counted(own_daemon: RunningDaemon) -> None:
    before = open_descriptors(own_daemon.pid)
    atoms = copper()
    with own_daemon.client().calculator("emt") as atoms.calc:
        atoms.get_forces()
        wait_for(lambda: open_descriptors(own_daemon.pid) - before == DESCRIPTORS_A_SESSION)


@pytest.fixture
def full_of_files(runtime_folder: Path) -> Iterator[tuple[Path, Callable[[], Path]]]:
    """A folder on a file system that has room for few files, and what takes all of it, and returns one of them."""
    place = Path(tempfile.mkdtemp(dir=runtime_folder))
    with small_disk(place, "1m,nr_inodes=40,mode=0700") as mounted:

        def take_all() -> Path:
            with contextlib.suppress(OSError):
                for number in range(100):
                    (mounted / f"filler-{number}").touch()
            assert not (mounted / "filler-99").exists()
            return mounted / "filler-0"

        yield mounted, take_all


@pytest.fixture
def there(full_of_files: tuple[Path, Callable[[], Path]], tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon whose sockets lie there, and its log elsewhere."""
    daemon = RunningDaemon(full_of_files[0] / "run", ("--model", "emt"))
    daemon.log = tmp_path / "log"
    try:
        yield daemon.start()
    finally:
        daemon.stop()


def test_a_disk_that_is_full_for_a_while(serve, tmp_path: Path) -> None:
    with small_disk(tmp_path, "64k") as mounted:
        log = mounted / "log"
        served = serve(log)
        atoms = session(served)
        filler = mounted / "filler"
        fill(filler)
        with contextlib.suppress(OSError), log.open("ab", buffering=0) as file:
            while True:
                file.write(b"x")
        size = log.stat().st_size
        make_noise(served)
        again(atoms)
        again(session(served, 1))
        assert log.stat().st_size == size
        filler.unlink()
        make_noise(served)
        wait_for(lambda: "is closed" in log.read_text()[size:])
        again(atoms)
        served.end()


def test_an_address_on_a_full_disk(tmp_path: Path) -> None:
    """Or a restart would end the daemon that there is, and bring none."""
    with small_disk(tmp_path, "64k") as mounted:
        fill(mounted / "filler")
        with lock(path := mounted / "r.lock"), listen(mounted / "r.sock", 0o600):
            assert path.read_bytes() == b""
            with pytest.raises(AddressError, match=r"already runs .*\(pid unknown\)"), lock(path):
                pass


def test_a_restart_without_room_for_another_socket(full_of_files, there: RunningDaemon) -> None:
    """The daemon goes on, and nothing is left of what could not take its place; nor does its job notice."""
    _, take_all = full_of_files
    atoms = copper()
    atoms.calc = there.client(patience=0).calculator("emt")
    atoms.get_forces()
    pid, files, logged = there.pid, sorted(there.folder.iterdir()), there.log.read_text()
    last = take_all()
    done = there.run("restart")
    assert done.returncode == 1 and f"can't listen on {there.socket}: No space left on device." in done.stderr
    assert "the old one goes on" in done.stderr
    assert (there.pid, sorted(there.folder.iterdir()), there.log.read_text()) == (pid, files, logged)
    again(atoms)
    last.unlink()
    atoms.calc = there.client().calculator("emt")
    again(atoms)
    assert there.run("restart").returncode == 0 and there.pid != pid
    again(atoms)


def test_room_that_a_restart_has_found_stays_its_own(full_of_files, there: RunningDaemon) -> None:
    """Others may take all else while the old daemon drains."""
    _, take_all = full_of_files
    atoms = copper()
    atoms.calc = there.client().calculator("emt")
    again(atoms)
    atoms.calc.results.clear()
    pid, worker = there.pid, there.model("emt")["pid"]
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        step = pool.submit(atoms.get_forces)
        wait_for(lambda: [session["state"] for session in there.client().status()["sessions"]] == ["busy"])
        restart = pool.submit(there.run, "restart")
        wait_for(lambda: there.client().status()["state"] == "draining")
        take_all()
        os.kill(worker, signal.SIGCONT)
        step.result(60)
        assert restart.result(60).returncode == 0, restart.result().stderr
    assert there.pid != pid
    assert sorted(path.suffix for path in there.folder.iterdir()) == [".control", ".lock", ".sock"]
    again(atoms)


def test_a_restart_without_room_for_its_log(full_of_files, start_daemon) -> None:
    """The old one was moved away, and the new file can't be."""
    mounted, take_all = full_of_files
    daemon = start_daemon("--model", "emt", "--log-file", str(mounted / "log"))
    atoms = copper()
    atoms.calc = daemon.client(patience=0).calculator("emt")
    atoms.get_forces()
    pid, rotated = daemon.pid, (mounted / "log").rename(mounted / "log.1")
    last = take_all()
    done = daemon.run("restart")
    assert done.returncode == 1 and f"can't write the log {mounted}/log: No space left on device." in done.stderr
    assert "the old one goes on" in done.stderr and daemon.pid == pid
    assert "asked to stop" not in rotated.read_text()
    again(atoms)
    last.unlink()
    assert daemon.run("restart").returncode == 0 and daemon.pid != pid


def test_a_worker_that_dies_while_there_is_no_room_for_the_next(serve, tmp_path: Path, monkeypatch) -> None:
    """Its job waits and is told why, until there is some again."""
    with small_disk(tmp_path, "1m") as mounted:
        monkeypatch.setenv("TMPDIR", str(mounted))
        served = serve(tmp_path / "log")
        atoms = session(served)
        fill(filler := mounted / "filler")
        again(atoms)
        os.kill(served.client().status()["models"][0]["pid"], 9)
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(again, atoms)
            wait_for(lambda: served.client().status()["models"][0]["restarts"] > 6)
            said = served.client().status()["models"][0]
            assert f"No space left on device in {mounted}" in said["loading"]["text"]
            assert not step.done()
            filler.unlink()
            step.result(60)
        served.end()


@pytest.mark.parametrize(("what", "words"), [("gone", "No such file"), ("read-only", "Read-only file system")])
def test_a_worker_that_dies_while_there_is_no_place_for_the_next(
    serve, tmp_path: Path, monkeypatch, what: str, words: str
) -> None:
    """A TMPDIR that was a script's or a Slurm job's, say: that is no verdict on the model, and its job waits."""
    with small_disk(tmp_path, "1m") if what == "read-only" else contextlib.nullcontext(tmp_path / "own") as place:
        place.mkdir(exist_ok=True)
        monkeypatch.setenv("TMPDIR", str(place))
        served = serve(tmp_path / "log")
        atoms = session(served)

        def remount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)

        if what == "gone":
            shutil.rmtree(place)
        else:
            remount("ro")
        again(atoms)
        os.kill(served.client().status()["models"][0]["pid"], 9)
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(again, atoms)
            wait_for(lambda: step.done() or served.client().status()["models"][0]["restarts"] > 6)
            assert not step.done()
            said = served.client().status()["models"][0]["loading"]["text"]
            where = f"{words}[^:]* in {place} [(]the daemon's TMPDIR[)]"
            (told,) = request(served.socket, "GET", "/v1/loading?model=emt")  # as the job asks that waits
            for text in (said, told["text"], served.log.read_text()):
                assert re.search(where, text), text
            if what == "gone":
                place.mkdir()
            else:
                remount("rw")
            step.result(60)
        served.end()
