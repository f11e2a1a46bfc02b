"""Every test gives back what it took: descriptors, processes, threads and shared memory of the test process.

An autouse fixture compares before and after. It is set up after the fixtures of a session, module or class, which may
keep what they have, and before the test's own, which may not. What a shared daemon holds is compared as well: when a
test is over, nothing in the daemon or its workers is left of it.

`@pytest.mark.may_leak("why")` lets a test keep what it takes. Some things need no mark: threads that Python did not
make (torch's, numba's), descriptors of devices and of installed files, and what multiprocessing and tqdm keep for the
whole process once they were used: helpers, a thread, semaphores.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

GRACE = float(os.environ.get("ROOTSTOCKD_LEAK_GRACE", "5"))
"""Seconds in which processes may still end and a daemon may still notice that a connection is closed."""
INSTALLED = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix)})
TQDM = "tqdm_monitor"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "may_leak(why): the test may keep descriptors, processes, threads or memory")


def _helpers_of_multiprocessing() -> tuple[set[int], set[int]]:
    """Process ids and descriptors that multiprocessing keeps once it was used."""
    pids, fds = set(), set()
    for name, process, descriptors in (
        ("resource_tracker", "_pid", ("_fd",)),
        ("forkserver", "_forkserver_pid", ("_forkserver_alive_fd",)),
    ):
        module: Any = sys.modules.get(f"multiprocessing.{name}")
        helper = getattr(module, f"_{name}", None)
        pids.add(getattr(helper, process, None))
        fds.update(getattr(helper, descriptor, None) for descriptor in descriptors)
    return pids - {None}, fds - {None}


def _descriptors(kept: set[int]) -> Iterator[str]:
    """What each descriptor of this process is open on."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = str(Path(f"/proc/self/fd/{entry}").readlink())
        except FileNotFoundError:  # that of the listing itself
            continue
        device = target.startswith("/dev/") and not target.startswith("/dev/shm/")
        if not (device or target.startswith(INSTALLED) or int(entry) in kept):
            yield f"descriptor of {target}"


def _segments() -> Iterator[str]:
    """Mappings of shared memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:" in line or ("/dev/shm/" in line and "/dev/shm/sem." not in line):
            yield f"mapping of {line.split(maxsplit=5)[-1]} (inode {line.split()[4]})"


def held(daemon: Any = None) -> Counter[str]:
    """What this process has now, and what `daemon` has for sessions, each by what it is."""
    helpers, kept = _helpers_of_multiprocessing()
    found = Counter([*_descriptors(kept), *_segments()])
    found.update(f"thread {thread.name!r} ({thread.ident})" for thread in threading.enumerate() if thread.name != TQDM)
    for process in psutil.Process().children(recursive=True):
        if process.pid not in helpers:
            ended = ", zombie" if process.status() == psutil.STATUS_ZOMBIE else ""  # running or sleeping is no matter
            found[f"process {process.pid} ({process.name()}{ended})"] += 1
    if daemon is not None:
        lines = Path("/proc/net/unix").read_text().splitlines()
        # not by the socket's own name: the kernel tells the one that it was bound to, before it was opened to others
        bound = {line.split()[6] for line in lines if f" {daemon.folder}/" in line}
        for pid in daemon.processes():
            found.update(_of_sessions(pid, bound))
    return found


def _of_sessions(pid: int, bound: set[str]) -> Iterator[str]:
    """Slots and accepted connections among a daemon's or a worker's descriptors.

    Args:
        pid: its process id.
        bound: inodes of sockets that have a name in the daemon's folder, as all have that were accepted from one.
    """
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = str(Path(f"/proc/{pid}/fd/{entry}").readlink())
        except FileNotFoundError:
            continue
        if target.startswith("/memfd:"):
            yield f"a slot in process {pid} of the shared daemon"
        elif target.startswith("socket:") and target[8:-1] in bound:
            yield f"a connection in process {pid} of the shared daemon"


def what_stays(before: Counter[str], daemon: Any = None, grace: float = GRACE) -> list[str]:
    """What is held now and was not before, after a while for it to go."""
    deadline = time.monotonic() + grace
    while more := held(daemon) - before:
        if time.monotonic() > deadline:
            return sorted(more)
        gc.collect()
        time.sleep(0.05)
    return []


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that keeps what it took fails."""
    daemon = request.getfixturevalue("daemon") if "daemon" in request.fixturenames else None
    before = held(daemon)
    yield
    if request.node.funcargs is None:  # it ends for Ctrl-C, and has its summary to print
        return
    request.node.funcargs.clear()  # pytest itself still has what fixtures gave
    if request.node.stash.get(_failed, False) or request.node.get_closest_marker("may_leak") is not None:
        return  # what failed is held by its traceback
    if leaked := what_stays(before, daemon):
        pytest.fail("this test leaks:\n  " + "\n  ".join(leaked), pytrace=False)
