"""The watch over leaks sees each kind, and nothing where there is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import RunningDaemon

LEAKING = r"""
import mmap, multiprocessing, os, pathlib, socket, subprocess, sys, threading, time
import numpy as np
import pytest
import leaks
from conftest import RunningDaemon
from rootstock_client import ipi
from rootstock_client.runtime_dir import control_socket

kept = []

def test_descriptor(tmp_path):
    kept.append(os.open(tmp_path, os.O_RDONLY))

def test_pipe():
    kept.append(os.pipe())

def test_socket():
    kept.append(socket.socket(socket.AF_UNIX))

def test_memfd():
    kept.append(os.memfd_create("slot"))

def test_mapping():
    fd = os.memfd_create("slot")
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096))
    os.close(fd)

def test_thread():
    threading.Thread(target=kept_waiting.wait, name="left over").start()

kept_waiting = threading.Event()

def test_process():
    kept.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))

def test_zombie():
    kept.append(subprocess.Popen(["true"]))

DAEMON = '''
import os, socket, sys, time
if pid := os.fork():
    print(pid)
else:
    os.closerange(0, 3)
    with socket.socket(socket.AF_UNIX) as sock:
        if sys.argv[1]:
            sock.bind(sys.argv[1])
            sock.listen()
        time.sleep(1000)
'''
daemons = []
others_test = leaks._others_test

def start_daemon(address=""):
    done = subprocess.run([sys.executable, "-c", DAEMON, address], check=True, capture_output=True)
    daemons.append(int(done.stdout))

def test_daemon():
    start_daemon()

def test_listener(tmp_path, monkeypatch):
    monkeypatch.delenv("TESTS_OF_ROOTSTOCKD_BY")
    path = tmp_path / "s"
    start_daemon(str(path))
    while not path.exists():
        time.sleep(0.01)

def shared_memory(name):
    return pathlib.Path("/dev/shm", f"rootstockd-leaks-{os.getpid()}-{name}")

def test_file_in_shared_memory():
    leaks._others_test = lambda: False
    shared_memory("ours").touch()

def test_file_in_shared_memory_that_may_be_of_others():
    leaks._others_test = lambda: True
    shared_memory("theirs").touch()

@pytest.fixture(scope="session")
def daemon():
    return RunningDaemon(pathlib.Path(os.environ["DAEMONS_FOLDER"]))

def ask(path, request):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.sendall(request)
    assert sock.recv(12)
    kept.append(sock)

def test_session(daemon):
    ask(daemon.socket, ipi.STATUS)

def test_control_connection(daemon):
    ask(control_socket(daemon.socket), b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")

def test_session_that_is_closed(daemon):
    ask(daemon.socket, ipi.STATUS)
    kept.pop().close()

@pytest.mark.may_leak("to see that it may")
def test_marked():
    kept.append(os.pipe())

@pytest.fixture(scope="session")
def service():
    ours, theirs = socket.socketpair()
    yield ours
    ours.close()
    theirs.close()

@pytest.fixture
def own():
    ours, theirs = socket.socketpair()
    yield ours
    ours.close()
    theirs.close()

def test_fixtures_give_back_or_may_keep(service, own):
    pass

def test_garbage():
    cycle = [open("/proc/self/maps")]
    cycle.append(cycle)

def test_slowly(tmp_path):
    threading.Thread(target=lambda: time.sleep(0.3)).start()
    with open("/dev/null") as null, open(tmp_path / "x", "w") as file:
        file.write(null.read())

def test_spawned_helpers_stay():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]
        pool.close()
        pool.join()

def test_another_run(monkeypatch):
    monkeypatch.setenv("TESTS_OF_ROOTSTOCKD_BY", "/another")
    start_daemon()
    assert others_test()

PARENT = '''
import os, subprocess, sys, time
if not os.fork():
    ours = {**os.environ, "TESTS_OF_ROOTSTOCKD_BY": sys.argv[1]}
    subprocess.Popen(["sleep", "0.4"], env=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(os.getpid(), flush=True)
    os.closerange(0, 3)
    time.sleep(1000)
'''

def test_ended_but_not_reaped(monkeypatch):
    monkeypatch.setenv("TESTS_OF_ROOTSTOCKD_BY", "/another")
    done = subprocess.run([sys.executable, "-c", PARENT, leaks.OURS], check=True, capture_output=True)
    daemons.append(int(done.stdout))

def test_end():  # or pytest itself would wait for what was left
    kept_waiting.set()
    shared_memory("ours").unlink()
    shared_memory("theirs").unlink()
    for pid in daemons:
        os.kill(pid, 9)
    for thing in kept:
        if isinstance(thing, subprocess.Popen):
            thing.stdin and thing.stdin.close()
            thing.wait()
"""
SEEN = {
    "test_descriptor": "descriptor of /",
    "test_pipe": "descriptor of pipe:",
    "test_socket": "descriptor of socket:",
    "test_memfd": "descriptor of /memfd:slot",
    "test_mapping": "mapping of /memfd:slot",
    "test_thread": "thread 'left over'",
    "test_process": "process ",
    "test_zombie": "zombie",
    "test_daemon": ", which was left",
    "test_listener": "socket that listens, at /",
    "test_file_in_shared_memory": "file /dev/shm/rootstockd-leaks-",
    "test_session": "a connection in process ",
    "test_control_connection": "a connection in process ",
}


def run_with_the_watch(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the tests in a folder as the tests of rootstockd are run."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "leaks", "-rA", "--strict-markers", str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "ROOTSTOCKD_LEAK_GRACE": "0.5", **variables},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def report(start_shared_daemon: Callable[..., RunningDaemon], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of tests that leak."""
    folder, daemon = tmp_path_factory.mktemp("leaking"), start_shared_daemon("--model", "emt")
    (folder / "test_leaking.py").write_text(LEAKING)
    done = run_with_the_watch(folder, DAEMONS_FOLDER=str(daemon.folder))
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", SEEN)
def test_it_sees(report: str, name: str) -> None:
    assert f"ERROR test_leaking.py::{name} - Failed: this test leaks" in report, report
    section = report.partition(f"ERROR at teardown of {name} ")[2].partition("___\n")[2].partition("\n___")[0]
    assert SEEN[name] in section, report


def test_it_sees_nothing_else(report: str) -> None:
    assert report.count("ERROR at teardown of ") == len(SEEN), report


def test_a_run_that_is_interrupted_ends_with_its_summary(tmp_path: Path) -> None:
    tests = "def test_first(): pass\n\ndef test_second(tmp_path): raise KeyboardInterrupt\n"
    (tmp_path / "test_interrupted.py").write_text(tests)
    done = run_with_the_watch(tmp_path)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "AttributeError" not in done.stdout + done.stderr
