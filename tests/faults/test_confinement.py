"""What a worker can't do any more, tried from inside real workers; SECURITY.md promises it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import confinement_probe
import liar
import pytest
from ase import Atoms
from ase.build import bulk

from conftest import RunningDaemon, wait_for
from rootstock_client import RootstockError
from rootstockd.host.handed_over import handed_over
from rootstockd.processes.folders import _remove
from rootstockd.settings.config import Config, Device
from rootstockd.worker import landlock, seccomp

HERE = Path(__file__).parent
GROUP = 61_998
"""Nobody's, that a daemon of root's is in as well."""
COLUMN = 0 if platform.machine() == "x86_64" else 1
PROMISED = """
ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd pidfd_send_signal kcmp tkill
migrate_pages
socket connect bind listen accept accept4
shmget shmat shmctl semget semctl semop semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink
chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat open_by_handle_at file_setattr
setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat
io_uring_setup io_uring_enter io_uring_register bpf perf_event_open userfaultfd fanotify_init modify_ldt
keyctl add_key request_key
mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr
setns unshare
kexec_load kexec_file_load init_module finit_module delete_module swapon swapoff reboot acct quotactl quotactl_fd syslog
settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm vhangup
"""
"""System calls that SECURITY.md says are refused, whatever they are given."""
NUMBERS = {name: seccomp._REFUSED.get(name, (None, None))[COLUMN] for name in PROMISED.split()}
REFUSED = [number for number in NUMBERS.values() if number is not None]
FIND_PROBE = {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
FORBIDDEN = ("EPERM", "EACCES", "EXDEV")
BY_LANDLOCK = {
    **dict.fromkeys(
        [f"file: {where}" for where in ("in home", "in /tmp", "in /dev/shm", "in another model's cache")], 1
    ),
    **dict.fromkeys([f"file: {how}" for how in ("over another", "renamed", "linked", "a link", "a folder")], 1),
    "file: opened by a child": 1,
    "file: emptied": 3,
    "daemon: memory": 1,
    "daemon: environment": 1,
    "daemon: descriptor": 1,
}
"""What a confined worker is kept from by Landlock alone, from which ABI on; the rest is seccomp's."""
NEWEST = 6
"""The latest ABI that has something for workers."""
needs_seccomp = pytest.mark.skipif(
    platform.machine() not in seccomp._AUDIT or "Seccomp:" not in Path("/proc/self/status").read_text(),
    reason="a kernel without seccomp",
)


def needs_landlock(version: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(landlock.abi() < version, reason=f"a kernel without Landlock's ABI {version}")


versions = pytest.mark.parametrize(
    "version", [pytest.param(version, marks=needs_landlock(version)) for version in range(NEWEST + 1)]
)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for it; what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)
    return found


def evaluate(daemon: RunningDaemon, model: str) -> float:
    atoms = bulk("Cu")
    atoms.calc = daemon.client().calculator(model)
    return float(atoms.get_potential_energy())


def environment(pid: int) -> dict[str, str]:
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(variable.split("=", 1) for variable in variables)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models of this test's own: one confined, one not, and one that numba compiles."""
    folder = tmp_path_factory.mktemp("confinement")
    victim = folder / "precious"
    victim.write_text("precious")
    with socket.socket(socket.AF_UNIX) as listening:
        address = f"\0rootstockd-test-{os.getpid()}"  # abstract: a path would be too long for pytest's folders
        listening.bind(address)
        listening.listen(100)
        options = f'options = {{ victim = "{victim}", theirs = {json.dumps(address)}, refused = %s }}'
        calculator = 'calculator = "confinement_probe:Probe"'
        (folder / "more.toml").write_text(
            f'[confined]\nfamily = "ase"\narguments = {{ {calculator}, {options % REFUSED} }}\n'
            f'[free]\nfamily = "ase"\nconfine = false\narguments = {{ {calculator}, {options % []} }}\n'
            '[compiled]\nfamily = "ase"\narguments = { calculator = "compiled:Compiled" }\n'
        )
        yield folder / "more.toml"


@pytest.fixture(scope="module")
def probed(
    start_shared_daemon: Callable[..., RunningDaemon], catalogue: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunningDaemon:
    with pytest.MonkeyPatch.context() as patch:
        (catalogue.parent / "compiled.py").write_text(COMPILED)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(catalogue.parent)]), prepend=os.pathsep)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with also_in(GROUP):
            return start_shared_daemon("--catalogue", str(catalogue), "--model", "confined")


@contextlib.contextmanager
def also_in(group: int) -> Iterator[None]:
    """What is started here is in one more group, where root says so."""
    groups = os.getgroups()
    if os.getuid() == 0:
        os.setgroups([*groups, group])
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.setgroups(groups)


def report(daemon: RunningDaemon, model: str) -> dict[str, Any]:
    with pytest.raises(RootstockError) as caught:
        evaluate(daemon, model)
    told = dict(json.loads(str(caught.value).split("REPORT", 1)[1].split("\n")[0].rstrip(".")))
    told["found"] = dict(zip(confinement_probe.attempts(Path(), ""), told["found"], strict=True))
    return told


def wrong(found: dict[str, str], version: int) -> dict[str, str]:
    """What did not end as it has to in a confined worker, on a kernel whose Landlock has this ABI."""

    def right(what: str, how: str) -> bool:
        if what.startswith("allowed"):
            return how == "done"
        if BY_LANDLOCK.get(what, 0) <= version:
            return how in FORBIDDEN
        return how == "done" or what.startswith("daemon")  # Yama and capabilities may forbid that, too

    return {what: how for what, how in found.items() if not right(what, how)}


@needs_seccomp
def test_what_a_model_can_not_do_and_what_it_can(probed: RunningDaemon, catalogue: Path) -> None:
    victim = catalogue.parent / "precious"
    victim.write_text("precious")
    told = report(probed, "confined")
    assert wrong(told["found"], landlock.abi()) == {}
    assert set(NUMBERS) - set(seccomp._REFUSED) == set()
    assert told["not refused"] == {}
    assert victim.read_text() == "precious" or landlock.abi() < BY_LANDLOCK["file: emptied"]
    assert probed.model("confined")["unconfined"] == _not_taken(landlock.abi())


def _not_taken(version: int) -> list[str]:
    """What is said of a kernel whose Landlock has this ABI."""
    if version == 0:
        return ["this kernel has no Landlock: workers can write wherever the daemon's user can"]
    emptying = "does not keep workers from emptying files of the daemon's user"
    return [f"Landlock of this kernel (ABI {version}) {emptying}"] if version < BY_LANDLOCK["file: emptied"] else []


UNDER_AN_OLDER_ONE = """
import json, sys
from pathlib import Path
from rootstockd.worker import landlock
from rootstockd.worker.confine import confine

version, victim, *folders = sys.argv[1:]
landlock.abi = lambda: int(version)
missing = confine(folders, gpu=False)
import confinement_probe as probe
attempts = probe.attempts(Path(victim), "nowhere")
print(json.dumps([missing, {what: probe.outcome(attempt) for what, attempt in attempts.items()}]))
"""


@needs_seccomp
@versions
def test_what_it_can_not_do_where_landlock_is_older(tmp_path: Path, version: int) -> None:
    """A newer kernel takes what an older one would be given. This process stands in for the daemon.

    Whatever Landlock there is, no signal, no priority and no limit reaches it: that is seccomp's.
    """
    folders = {name: tmp_path / name for name in ("home", "scratch", "caches/own", "files")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    victim = folders["files"] / "precious"
    victim.write_text("precious")
    writable = [folders["scratch"], folders["caches/own"]]
    environment = {
        **os.environ,
        "HOME": str(folders["home"]),
        "TMPDIR": str(folders["scratch"]),
        "NUMBA_CACHE_DIR": str(folders["caches/own"] / "numba"),
        **FIND_PROBE,
    }
    command = [sys.executable, "-c", UNDER_AN_OLDER_ONE, str(version), victim, *writable]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, start_new_session=True)
    assert done.returncode == 0, done.stderr
    missing, found = json.loads(done.stdout)
    assert missing == _not_taken(version)
    assert wrong(found, version) == {}


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        (1, (0x1FF2,)),
        (2, (0x3FF2,)),
        (3, (0x7FF2,)),
        (4, (0x7FF2, 0b11)),
        (5, (0xFFF2, 0b11)),
        (6, (0xFFF2, 0b11, 0b11)),
        (7, (0xFFF2, 0b11, 0b11)),
    ],
)
def test_a_kernel_is_told_of_nothing_that_its_landlock_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int, numbers: tuple[int, ...]
) -> None:
    """It would refuse all of it. What it is asked to take: rights of files (bits of landlock.h), TCP, scopes."""
    calls: dict[int, tuple[Any, ...]] = {}

    def call(number: int, *arguments: Any) -> int:
        calls[number] = arguments
        return os.open("/dev/null", os.O_RDONLY) if number == landlock._CREATE_RULESET else 0

    monkeypatch.setattr(landlock, "abi", lambda: version)
    monkeypatch.setattr(landlock, "_call", call)
    monkeypatch.setattr(landlock, "_allow", lambda ruleset, path, rights: calls.update({0: (path, rights)}))
    assert landlock.restrict([str(tmp_path)]) == "".join(_not_taken(version))
    attributes, size, flags = calls[landlock._CREATE_RULESET]
    assert struct.unpack(f"={len(numbers)}Q", attributes[: size.value]) == numbers
    assert flags == 0
    assert calls[0] == (str(tmp_path), numbers[0])
    assert landlock._RESTRICT_SELF in calls


BY_ITSELF = """
import ctypes, fcntl, json, os, socket, sys
from pathlib import Path
from rootstockd.worker import landlock
from confinement_probe import outcome

version, own, others, port, address = sys.argv[1:]
own, others = Path(own), Path(others)
for name in ("a", "b"):
    (own / name).mkdir()

def connect(family, address):
    with socket.socket(family) as sock:
        sock.connect(address)

def bind():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))

attempts = {
    "to write": lambda: (others / "file").write_text("x"),
    "to make a folder": lambda: (others / "folder").mkdir(),
    "to remove": lambda: (others / "remove").unlink(),
    "to empty": lambda: os.truncate(others / "file", 0),
    "a file from one of its folders to another": lambda: (own / "a/file").rename(own / "b/file"),
    "to bind": bind,
    "to connect": lambda: connect(socket.AF_INET, ("127.0.0.1", int(port))),
    "a device's ioctl": lambda: fcntl.ioctl(zero, 0x5401, bytes(64)),
    "an abstract socket": lambda: connect(socket.AF_UNIX, chr(0) + address),
    "a signal": lambda: os.kill(os.getppid(), 0),
}
landlock.abi = lambda: int(version)
assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0
landlock.restrict([str(own)])
zero = os.open("/dev/zero", os.O_RDONLY)
(own / "a/file").write_text("x")
print(json.dumps({what: outcome(attempt) for what, attempt in attempts.items()}))
"""


@versions
def test_what_each_landlock_forbids_by_itself(tmp_path: Path, version: int) -> None:
    own, others, address = tmp_path / "own", tmp_path / "others", f"rootstockd-test-alone-{os.getpid()}"
    own.mkdir(), others.mkdir()
    for name in ("file", "remove"):
        (others / name).write_text("x")
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        abstract.bind("\0" + address)
        abstract.listen()
        arguments = [str(version), own, others, str(tcp.getsockname()[1]), address]
        command = [sys.executable, "-c", BY_ITSELF, *arguments]
        environment = {**os.environ, **FIND_PROBE}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    since = {
        "to write": 1,
        "to make a folder": 1,
        "to remove": 1,
        "to empty": 3,
        "to bind": 4,
        "to connect": 4,
        "a device's ioctl": 5,
        "an abstract socket": 6,
        "a signal": 6,
    }
    expected = {what for what, first in since.items() if version >= first}
    if version == 1:  # which can't allow it
        expected.add("a file from one of its folders to another")
    found = json.loads(done.stdout)
    assert {what for what, how in found.items() if how in FORBIDDEN} == expected
    assert {how for what, how in found.items() if what not in expected} <= {"done", "ENOTTY"}


def test_what_a_model_is_made_of_is_for_no_other_user_to_read(probed: RunningDaemon) -> None:
    """Arguments of a process are; this one's model has a path of the operator's in its options."""
    worker = Path(f"/proc/{probed.model('confined')['pid']}")
    assert b"__main__.py" in (worker / "cmdline").read_bytes()
    assert b"precious" not in (worker / "cmdline").read_bytes()
    assert (worker / "fd/0").readlink() == Path("/dev/null")


@needs_seccomp
def test_no_rights_are_left(probed: RunningDaemon) -> None:
    state = report(probed, "confined")["state"]
    assert state["NoNewPrivs"] == "1"
    assert state["Seccomp"] == "2"
    assert state["core"] in ([0, 0], [1, 1])  # neither a file nor, with 1, a program gets one
    for key in ("CapEff", "CapPrm", "CapBnd"):
        assert int(state[key], 16) & ~(1 << 2) == 0 or (key == "CapBnd" and os.getuid() != 0)
    assert int(state["CapAmb"], 16) == 0
    if os.getuid() == 0:
        assert str(GROUP) in Path(f"/proc/{probed.pid}/status").read_text().partition("Groups:")[2].split("\n")[0]
        assert state["Groups"] == ""


ON_A_GPU = """
import errno, json, os, socket, sys, threading
from rootstockd.worker.confine import confine

def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def listen(address):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
        one.bind(address)
        one.listen()
        if address.startswith("\\0"):
            print("listens", file=sys.stderr)
        one.accept()

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

def rename():
    write(f"/proc/self/task/{threading.get_native_id()}/comm", "cuda-EvtHandlr")

def in_a_thread(attempt):
    found = []
    thread = threading.Thread(target=lambda: found.append(outcome(attempt)))
    thread.start()
    thread.join()
    return found[0]

missing = confine([sys.argv[1]], gpu=True)
with open("/proc/self/comm") as file:
    before = file.read()
found = {
    "listen": outcome(lambda: listen("\\0cuda-uvmfd-1-1")),
    "listen where others see it": outcome(lambda: listen(sys.argv[2] + "/socket")),
    "rename": outcome(rename),
    "rename a thread": in_a_thread(rename),
    "the parent's name": outcome(lambda: write(f"/proc/{os.getppid()}/comm", "x")),
    "for the kernel to kill others first": outcome(lambda: write("/proc/self/oom_score_adj", "-1000")),
    "network": outcome(lambda: socket.socket(socket.AF_INET)),
}
print(json.dumps([missing, found]))
"""


@needs_seccomp
@needs_landlock(BY_LANDLOCK["file: emptied"])
def test_what_cuda_needs_is_left_and_no_more(tmp_path: Path) -> None:
    """On a GPU; tried without one: it listens to nobody, and names its threads."""
    scratch, elsewhere = tmp_path / "scratch", tmp_path / "elsewhere"
    for folder in (scratch, elsewhere):
        folder.mkdir()
    command = [sys.executable, "-c", ON_A_GPU, str(scratch), str(elsewhere)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing, found = json.loads(done.stdout)
    assert missing == []
    assert done.stderr == "listens\n"
    assert found == {
        "listen": "EPERM",  # not listening, but taking a connection
        "listen where others see it": "EACCES",
        "rename": "done",
        "rename a thread": "done",
        "the parent's name": "EACCES",
        "for the kernel to kill others first": "EACCES",
        "network": "EPERM",
    }


FOLDER_OF_MPS = """
import os, sys
from rootstockd.worker.confine import confine

missing = confine([], gpu=True)
try:
    open(sys.argv[1] + "/probe", "w").close()
    print("written", missing)
except OSError as error:
    print(type(error).__name__, missing)
"""


def mps(pipes: Path, there: Path, **options: Any) -> str:
    """What a worker on a GPU can do `there`, where the folder of MPS is `pipes`."""
    command = [sys.executable, "-c", FOLDER_OF_MPS, str(there)]
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(pipes)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, **options)
    return done.stdout.strip()


@needs_landlock(BY_LANDLOCK["file: emptied"])
def test_the_folder_of_mps_is_opened_only_if_nobody_else_made_it(tmp_path: Path) -> None:
    folder, link, loop = tmp_path / "folder", tmp_path / "link", tmp_path / "loop"
    folder.mkdir()
    link.symlink_to(folder)
    loop.symlink_to(loop)
    assert mps(folder, folder) == "written []"
    assert mps(link, folder) == "PermissionError []"
    assert mps(loop, folder) == "PermissionError []"
    assert mps(tmp_path / "nowhere", folder) == "PermissionError []"
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
        folder.chmod(0o777)
        assert mps(folder, folder) == "PermissionError []"


@needs_seccomp
def test_a_model_that_needs_more_may_have_it(probed: RunningDaemon) -> None:
    """`confine = false` in the catalogue. Also: what the test above tries does work where nothing forbids it."""
    told = report(probed, "free")
    forbidden = {
        what
        for what, how in told["found"].items()
        if how in ("EPERM", "EACCES")
        and what.partition(":")[0] in ("network", "file", "daemon", "another")
        and what not in ("daemon: ptrace", "daemon: memory")  # Yama may forbid them to everybody
    }
    assert forbidden == set()
    assert told["state"]["NoNewPrivs"] == told["state"]["Seccomp"] == "0"
    assert "confine = false" in probed.model("free")["unconfined"][0]
    assert "free: not wholly confined" in probed.run("status").stdout


def test_a_worker_has_no_terminal(probed: RunningDaemon) -> None:
    """In the daemon's session it would have the daemon's: reading that stops all of its group, the daemon as well."""
    pid = probed.model("confined")["pid"]
    assert os.getsid(pid) == os.getpgid(pid) == pid


def test_the_worker_of_a_daemon_with_many_sessions_has_its_own_descriptors_only(
    start_daemon: Callable[..., RunningDaemon],
) -> None:
    """Its end of one socket, nothing to read, a pipe for what it prints, and its own peak of memory to forget."""
    daemon = start_daemon("--model", "emt")
    atoms = [bulk("Cu") for _ in range(30)]
    for each in atoms:
        each.calc = daemon.client().calculator("emt")
        each.get_potential_energy()
    until(lambda: len(daemon.client().status()["sessions"]) == len(atoms))
    evaluate(daemon, "lj")  # a worker that is started among them
    process = Path(f"/proc/{daemon.model('lj')['pid']}")
    files = [str(link.readlink()) for link in (process / "fd").iterdir()]
    sockets = [file for file in files if file.startswith("socket:")]
    slots = [file for file in files if "rootstockd-slot" in file]
    assert len(sockets) == 1
    assert len(slots) <= 2  # of its own session, if that is not over yet; mmap keeps another
    (pipe,) = {file for file in files if file.startswith("pipe:")}
    assert set(files) - set(sockets) - set(slots) == {"/dev/null", pipe, str(process / "clear_refs")}


# --- folders


def test_scratch_is_private_and_goes_with_the_worker(start_daemon: Callable[..., RunningDaemon]) -> None:
    daemon = start_daemon("--model", "emt")
    pid = daemon.model("emt")["pid"]
    scratch = Path(environment(pid)["TMPDIR"])
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    (scratch / "left").write_text("behind")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not scratch.exists())
    evaluate(daemon, "emt")
    second = Path(environment(daemon.model("emt")["pid"])["TMPDIR"])
    assert second.exists()
    daemon.stop()
    assert not second.exists()


def test_scratch_of_a_daemon_that_was_killed_is_removed_by_the_next(start_daemon: Callable[..., RunningDaemon]) -> None:
    living, dead = start_daemon("--model", "emt"), start_daemon("--model", "emt")
    kept, left = (Path(environment(daemon.model("emt")["pid"])["TMPDIR"]) for daemon in (living, dead))
    os.kill(dead.client().status()["pid"], signal.SIGKILL)
    until(lambda: _is_free(dead))
    assert left.exists()
    dead.start()
    assert not left.exists()
    assert kept.exists()


def _is_free(daemon: RunningDaemon) -> bool:
    with daemon.socket.with_suffix(".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_scratch_with_folders_that_a_model_has_shut_is_removed(tmp_path: Path) -> None:
    scratch, elsewhere = tmp_path / "scratch", tmp_path / "elsewhere"
    for folder in (scratch, elsewhere):
        folder.mkdir()
        if os.getuid() == 0:
            os.chown(folder, 65534, 65534)
    for folder in tmp_path.parents:
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    tmp_path.chmod(0o777)
    child = os.fork()  # root may do all
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            elsewhere.chmod(0)
            (scratch / "one").mkdir()
            (scratch / "link").symlink_to(elsewhere)
            (scratch / "one" / "file").write_text("x")
            (scratch / "one" / "two").mkdir(0)
            (scratch / "one").chmod(0)
            _remove(scratch)
        finally:
            os._exit(not scratch.exists())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0


def test_scratch_that_can_not_be_removed_holds_nobody_up(start_daemon: Callable[..., RunningDaemon]) -> None:
    """A thousand folders in each other are more than Python's recursion goes through."""
    daemon = start_daemon("--model", "emt")
    pid = daemon.model("emt")["pid"]
    scratch = Path(environment(pid)["TMPDIR"])
    folder = os.open(scratch, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    os.kill(pid, signal.SIGKILL)
    assert evaluate(daemon, "emt") < 1
    if scratch.exists():  # Python 3.13 goes through without recursion
        assert f"could not remove {scratch}" in daemon.log.read_text()
        subprocess.run(["rm", "-rf", scratch], check=True)


COMPILED = """
import numba
import numpy as np
from ase.calculators.calculator import Calculator


@numba.njit(cache=True)
def compiled(x):
    return x + 1


class Compiled(Calculator):
    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        compiled(1.0)
        hits = sum(compiled.stats.cache_hits.values())
        self.results = {"energy": float(hits), "forces": np.zeros((len(atoms), 3))}
"""


def test_what_was_compiled_is_there_for_the_models_next_worker_alone(probed: RunningDaemon) -> None:
    pytest.importorskip("numba")
    assert evaluate(probed, "compiled") == 0
    pid = probed.model("compiled")["pid"]
    os.kill(pid, signal.SIGKILL)
    assert evaluate(probed, "compiled") == 1
    folders = {
        Path(environment(probed.model(name)["pid"])["NUMBA_CACHE_DIR"]).parent for name in ("compiled", "confined")
    }
    assert len(folders) == 2
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("left", ["nothing", "zeros", "zeros within", "a half", "garbage", "garbage within", "a pipe"])
def test_what_a_power_loss_leaves_of_compiled_code_is_compiled_anew(
    probed: RunningDaemon, left: str, suffix: str
) -> None:
    pytest.importorskip("numba")
    evaluate(probed, "compiled")
    pid = probed.model("compiled")["pid"]
    cache = Path(environment(pid)["NUMBA_CACHE_DIR"])
    (file,) = cache.glob(f"*/*.{suffix}")
    whole = file.read_bytes()
    garbage = bytes(range(255, 200, -1))
    if left == "a pipe":  # by the model itself, say
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes(
            {
                "nothing": b"",
                "zeros": bytes(len(whole)),
                "zeros within": whole[:1024] + bytes(512) + whole[1536:],
                "a half": whole[: len(whole) // 2],
                "garbage": (garbage * len(whole))[: len(whole)],
                "garbage within": whole[:20] + garbage + whole[20 + len(garbage) :],
            }[left]
        )
    os.kill(pid, signal.SIGKILL)
    assert evaluate(probed, "compiled") == 0
    assert f"{cache} had 1 broken files, which were removed" in probed.log.read_text()
    os.kill(probed.model("compiled")["pid"], signal.SIGKILL)
    assert evaluate(probed, "compiled") == 1, "once"


def test_a_cache_that_others_may_write_to_is_not_used(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = tmp_path / "rootstockd" / "compiled"
    compiled.mkdir(parents=True)
    compiled.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    daemon = start_daemon("--model", "emt")
    variables = environment(daemon.model("emt")["pid"])
    assert variables["NUMBA_CACHE_DIR"].startswith(variables["TMPDIR"])
    why = f"{compiled}: it belongs to somebody else, or others may write to it; mend that, or have XDG_CACHE_HOME name"
    assert why in daemon.log.read_text()
    assert why in daemon.model("emt")["note"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_cache_without_room_is_told_of(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MACE compiles for many seconds; and once there is room it is kept, and nothing more is said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k,mode=700", "tmpfs", str(tmp_path)]
    assert subprocess.run(mount, check=False).returncode == 0
    try:
        daemon = start_daemon("--model", "mace-emt-small")
        model = daemon.model("mace-emt-small")
        cache = Path(environment(model["pid"])["NUMBA_CACHE_DIR"])
        why = (
            "its compiled code can't be kept, so each worker compiles it again: "
            f"{cache.parent}: 0.2 MB are free where 34 MB have to be; "
        )
        assert why in model["note"]
        assert f"model mace-emt-small: {why}" in daemon.log.read_text()
        assert why in " ".join(daemon.run("status").stdout.split())
        assert not list(cache.rglob("*.nbi"))
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path)], check=True)
        os.kill(model["pid"], signal.SIGKILL)
        wait_for(lambda: daemon.model("mace-emt-small")["restarts"] == 1, 120)
        wait_for(lambda: daemon.model("mace-emt-small")["state"] == "ready", 120)
        assert "compiled" not in (daemon.model("mace-emt-small")["note"] or "")
        assert list(cache.rglob("*.nbi"))
        daemon.stop()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


# --- where it can't be had


def refuse(*numbers: int) -> None:
    """From here on these system calls fail for this process and its children, as on a kernel that has them not."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [struct.pack("=HBBI", 0x20, 0, 0, 0)]
    for number in numbers:
        steps += [struct.pack("=HBBI", 0x15, 0, 1, number), struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | 38)]  # ENOSYS
    program = b"".join([*steps, struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)])
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(seccomp._Program(len(program) // 8, program)), 0, 0) == 0


@needs_seccomp
def test_without_landlock_it_goes_on_and_says_so_once(runtime_folder: Path) -> None:
    folder = runtime_folder / "no-landlock"
    folder.mkdir(mode=0o700)
    daemon = RunningDaemon(folder)
    arguments = ["--device", "cpu", "--log-file", daemon.log, "--model", "emt", "--model", "lj"]
    started = daemon.run("start", *arguments, preexec_fn=lambda: refuse(444))
    try:
        assert started.returncode == 0, started.stderr
        assert daemon.model("lj")["unconfined"] == [landlock.NONE]
        assert daemon.log.read_text().count(landlock.NONE) == 1
        assert f"emt, lj: not wholly confined: {landlock.NONE}" in daemon.run("status").stdout
        status = Path(f"/proc/{daemon.model('emt')['pid']}/status").read_text()
        assert re.search(r"^Seccomp_filters:\s+2$", status, re.MULTILINE)
        assert evaluate(daemon, "emt") < 1
    finally:
        daemon.stop()


def test_the_configuration_can_turn_it_off(runtime_folder: Path) -> None:
    folder = runtime_folder / "free"
    folder.mkdir(mode=0o700)
    daemon = RunningDaemon(folder)
    config = Config(socket=daemon.socket, devices=(Device(name="cpu"),), models=("emt",), confine=False)
    with daemon.log.open("wb") as log, handed_over(config.model_dump_json()) as settings:
        command = [sys.executable, "-m", "rootstockd.serve"]
        process = subprocess.Popen(command, stdin=settings, stdout=log, stderr=log)
    try:
        until(lambda: "ready on /" in daemon.log.read_text())
        assert "confine = false" in daemon.model("emt")["unconfined"][0]
        scratch = Path(environment(daemon.model("emt")["pid"])["TMPDIR"])  # of its own all the same
        assert scratch.name.startswith("rootstockd-worker-")
    finally:
        daemon.stop()
        process.wait(60)
    assert not scratch.exists()


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_the_numbers_are_the_kernels(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"there is no {header}")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
    kernel = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    ours = {name: numbers[column] for name, numbers in {**seccomp._REFUSED, "clone3": seccomp._CLONE3}.items()}
    younger = {name for name, number in ours.items() if (number or 0) > max(kernel.values())}
    assert {name: number for name, number in ours.items() if name not in younger and kernel.get(name) != number} == {}


# --- what a worker says


@pytest.fixture(scope="module")
def lying(start_shared_daemon: Callable[..., RunningDaemon], tmp_path_factory: pytest.TempPathFactory) -> RunningDaemon:
    folder = tmp_path_factory.mktemp("liar")
    (folder / "more.toml").write_text('[liar]\nfamily = "ase"\narguments = { calculator = "liar:Liar" }\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        return start_shared_daemon("--catalogue", str(folder / "more.toml"), "--model", "liar", "--model", "emt")


@pytest.mark.parametrize("lie", liar.LIES, ids=lambda lie: repr(lie[:12]))
def test_a_worker_that_lies_to_the_daemon(lying: RunningDaemon, lie: bytes) -> None:
    """Its own sessions get what it says, or an error; the daemon and other models go on, and so does this one."""
    pid = lying.client().status()["pid"]
    restarts = lying.model("liar")["restarts"]
    atoms = Atoms([liar.LIES.index(lie) + 1], [[0, 0, 0]])
    atoms.calc = lying.client().calculator("liar")
    with contextlib.suppress(RootstockError):
        atoms.get_forces()
    assert evaluate(lying, "emt") < 1
    honest = Atoms([118], [[0, 0, 0]])
    honest.calc = lying.client().calculator("liar")
    until(lambda: lying.model("liar")["state"] == "ready")
    assert honest.get_potential_energy() == pytest.approx(1.0)
    assert lying.client().status()["pid"] == pid
    nonsense = lie != b"O"  # that alone can be so
    assert (lying.model("liar")["restarts"] > restarts) is nonsense
