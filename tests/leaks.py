"""Every test gives back what it took: descriptors, processes, threads and shared memory of the test process.

An autouse fixture compares before and after. It is set up after the fixtures of a session, module or class, which may
keep what they have, and before the test's own, which may not. What a shared daemon holds is compared as well: when a
test is over, nothing in the daemon or its workers is left of it. So is what is outside of this process: daemons that
were started, sockets on which somebody listens in this run's folders, and, where no other tests run, files in /dev/shm.

`@pytest.mark.may_leak("why")` lets a test keep what it takes. Some things need no mark: threads that Python did not
make (torch's, numba's), descriptors of devices and of installed files, and what multiprocessing and tqdm keep for the
whole process once they were used: helpers, a thread, semaphores; and what is left in /dev/shm of programs with MPICH or
faketime that are killed.
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
RUN = "TESTS_OF_ROOTSTOCKD_BY"
"""A variable of all processes that were started from here, whoever their parents are by now; longer in tests that tests
run."""
OURS = os.environ[RUN] = f"{os.environ.get(RUN, '')}/{os.getpid()}-{time.time_ns()}"
FOLDER = "TEST_OF_ROOTSTOCKD"
"""conftest's, of a daemon and its workers; the same when a daemon is restarted."""
SHOWN = 60
"""Characters of a command line."""
LISTED = 6
"""Of what a test leaks; more of it hides the test's name where only the end of a run is seen."""
KEPT_SEGMENTS = ("sem.", "mpich_shm_", "faketime_")


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


def _variables(pid: str) -> dict[str, str]:
    """What a process was started with; nothing where it has ended or may not be looked at."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(variable.split("=", 1) for variable in text.split("\0") if "=" in variable)


def _command(pid: str) -> str:
    """What a process runs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    return " ".join(words).strip()[:SHOWN]


def _has_ended(pid: str) -> bool:
    """Also where whoever has taken it in does not wait for it: that is no matter of a test's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


def _is_ours(variables: dict[str, str]) -> bool:
    return f"{variables.get(RUN, '')}/".startswith(f"{OURS}/")


class Started:
    """Processes that were started from here, and are not below this one any more: daemons."""

    def __init__(self) -> None:
        self._seen: dict[str, str | None] = {}
        """What each process is called, None if it is no such one. To look at all of them each time would take long."""

    def names(self) -> Iterator[str]:
        """What each is called."""
        there = set(filter(str.isdigit, os.listdir("/proc")))
        self._seen = {pid: name for pid, name in self._seen.items() if pid in there}
        for pid in there - self._seen.keys():
            self._seen[pid] = self._name(pid)
        return (name for pid, name in self._seen.items() if name is not None and not _has_ended(pid))

    def _name(self, pid: str) -> str | None:
        variables = _variables(pid)
        if not _is_ours(variables):
            return None
        try:
            parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()[1]
        except OSError:
            return None
        if parent == str(os.getpid()) or _is_ours(_variables(parent)):
            return None
        if FOLDER in variables:
            return f"daemon of {variables[FOLDER]}"
        return f"process {pid} ({_command(pid)}), which was left"


_started = Started()


def _outside(folders: tuple[str, ...]) -> Iterator[str]:
    """What is in no process of ours, or in a daemon: itself, sockets that listen in these folders, shared memory."""
    yield from _started.names()
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines() if folders else ():
        fields = line.split(maxsplit=7)
        if fields[3] == "00010000" and fields[7:] and fields[7].startswith(folders):
            yield f"socket that listens, at {fields[7]}"
    yield from (f"file /dev/shm/{name}" for name in os.listdir("/dev/shm") if not name.startswith(KEPT_SEGMENTS))


def _others_test() -> bool:
    """Whether other tests run on this machine: nothing says whose a file in /dev/shm is."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return True
    for variables in map(_variables, filter(str.isdigit, os.listdir("/proc"))):
        run = variables.get(RUN, "" if FOLDER in variables else OURS)
        if not run or not (f"{run}/".startswith(f"{OURS}/") or f"{OURS}/".startswith(f"{run}/")):
            return True
    return False


def held(daemon: Any = None, folders: tuple[str, ...] = ()) -> Counter[str]:
    """What this process has now, what was started by it, and what `daemon` has for sessions, each by what it is.

    Args:
        daemon: one that tests share, if there is.
        folders: in which nobody but this run has sockets.
    """
    helpers, kept = _helpers_of_multiprocessing()
    found = Counter([*_descriptors(kept), *_segments()])
    found.update(_outside(folders))
    found.update(f"thread {thread.name!r} ({thread.ident})" for thread in threading.enumerate() if thread.name != TQDM)
    for process in psutil.Process().children(recursive=True):
        if process.pid not in helpers:
            ended = ", zombie" if process.status() == psutil.STATUS_ZOMBIE else ""  # running or sleeping is no matter
            found[f"process {process.pid} ({process.name()}{ended})"] += 1
    if daemon is not None:
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
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


def what_stays(
    before: Counter[str], daemon: Any = None, folders: tuple[str, ...] = (), grace: float = GRACE
) -> list[str]:
    """What is held now and was not before, after a while for it to go."""
    deadline = time.monotonic() + grace
    while more := held(daemon, folders) - before:
        if time.monotonic() > deadline:
            return sorted(what for what in more if not (what.startswith("file /dev/shm/") and _others_test()))
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
    folders = (f"{request.config._tmp_path_factory.getbasetemp()}/",)  # type: ignore[attr-defined]
    if "runtime_folder" in request.fixturenames:
        folders += (f"{request.getfixturevalue('runtime_folder')}/",)
    before = held(daemon, folders)
    yield
    if request.node.funcargs is None:  # it ends for Ctrl-C, and has its summary to print
        return
    request.node.funcargs.clear()  # pytest itself still has what fixtures gave
    if request.node.stash.get(_failed, False) or request.node.get_closest_marker("may_leak") is not None:
        return  # what failed is held by its traceback
    if leaked := what_stays(before, daemon, folders):
        more = [f"and {len(leaked) - LISTED} more"] if len(leaked) > LISTED else []
        pytest.fail("this test leaks:\n  " + "\n  ".join(leaked[:LISTED] + more), pytrace=False)
