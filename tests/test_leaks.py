"""The watch over leaks sees each kind, and nothing where there is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEAKING = """
import mmap, multiprocessing, os, socket, subprocess, sys, threading, time
import numpy as np
import pytest

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

def test_end():  # or pytest itself would wait for what was left
    kept_waiting.set()
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
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of tests that leak."""
    folder = tmp_path_factory.mktemp("leaking")
    (folder / "test_leaking.py").write_text(LEAKING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "leaks", "-rA", "--strict-markers", str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "ROOTSTOCKD_LEAK_GRACE": "0.5"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", SEEN)
def test_it_sees(report: str, name: str) -> None:
    assert f"ERROR test_leaking.py::{name} - Failed: this test leaks" in report, report
    section = report.partition(f"ERROR at teardown of {name} ")[2].partition("___\n")[2].partition("\n___")[0]
    assert SEEN[name] in section, report


def test_it_sees_nothing_else(report: str) -> None:
    assert report.count("Failed: this test leaks") == len(SEEN), report
