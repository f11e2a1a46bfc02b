"""An ASE calculator that tries what a malicious model would, and says how far it got. It runs inside a worker."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ase.calculators.calculator import Calculator

libc = ctypes.CDLL(None, use_errno=True)
DAEMON = os.getppid()
PTRACE_ATTACH, PTRACE_DETACH, CLONE_NEWUSER, SIGCHLD, TIOCSTI = 16, 17, 0x10000000, 17, 0x5412
FS_IOC_SETFLAGS = 0x40086602
BTRFS_IOC_SUBVOL_CREATE, BTRFS_IOC_SNAP_CREATE_V2 = 0x5000940E, 0x50009417
# system calls that Python has no function for
CLONE, TRUNCATE, X32_GETPID = {"x86_64": (56, 76, 0x40000027), "aarch64": (220, 45, 0)}[platform.machine()]
TGKILL, QUEUE, QUEUE_TO_THREAD, SET_SCHEDULING, SET_IO_PRIORITY = {
    "x86_64": (234, 129, 297, 314, 251),
    "aarch64": (131, 138, 240, 274, 30),
}[platform.machine()]
FIOASYNC, FIOSETOWN, SIOCSPGRP = 0x5452, 0x8901, 0x8902
F_SETSIG, F_SETOWN_EX, F_OWNER_PID = 10, 15, 1
OF_A_QUEUE = struct.pack("iii", 0, 0, -1).ljust(128, b"\0")
"""A siginfo_t of no signal, as `sigqueue` makes it: another code is refused to whoever sends it to others."""
NICE = struct.pack("=IIQiIQQQ", 48, 0, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, 0, 0, 0)
"""A sched_attr that says what is so anyway."""


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def call(number: int, *arguments: object) -> int:
    return checked(libc.syscall(number, *arguments))


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def attach() -> None:
    checked(libc.ptrace(PTRACE_ATTACH, DAEMON, None, None))
    os.waitpid(DAEMON, 0x40000000)  # __WALL
    libc.ptrace(PTRACE_DETACH, DAEMON, None, None)


def new_user_namespace() -> None:
    if (child := call(CLONE, CLONE_NEWUSER | SIGCHLD, None, None, None, None)) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def on_a_socket(what: Callable[..., object], command: int, argument: object) -> None:
    with socket.socketpair()[0] as end:
        what(end, command, argument)


def change_flags(path: Path) -> None:
    with path.open("rb") as file:
        fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", 0))


def of_a_folder(path: Path, command: int) -> None:
    on_folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(on_folder, command, bytearray(4096))
    finally:
        os.close(on_folder)


def on(path: Path, command: int, argument: int) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(file, command, argument)
    finally:
        os.close(file)


def type_into_terminal() -> None:
    fcntl.ioctl(0, TIOCSTI, b"x")


def of_another(attempt: Callable[[int], object]) -> None:
    """Try it on a process with no more capabilities than this one: from those of root Linux keeps it anyway."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        attempt(child)
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def in_a_child(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise PermissionError(errno.EPERM, "") if "PermissionError" in done.stderr else RuntimeError(done.stderr)


def in_a_thread(attempt: Callable[[], object]) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(outcome(attempt)))
    thread.start()
    thread.join()
    if found != ["done"]:
        raise OSError(getattr(errno, found[0]), "")


def attempts(victim: Path, theirs: str) -> dict[str, Callable[[], object]]:
    """Everything to try. `victim` is a file of the daemon's user, `theirs` a socket that somebody listens on."""
    beside = victim.parent
    group, nice = os.getpgid(DAEMON), os.getpriority(os.PRIO_PROCESS, 0)
    cache = Path(os.environ.get("NUMBA_CACHE_DIR", "/tmp/nowhere/numba")).parent

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(theirs)

    def datagram() -> None:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        one.close(), other.close()

    def pair() -> None:
        one, other = socket.socketpair()
        one.close(), other.close()

    def write(path: Path) -> None:
        path.write_text("x")
        path.unlink()

    return {
        "network: tcp": lambda: socket.socket(socket.AF_INET).close(),
        "network: udp": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close(),
        "network: netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "network: the daemon's socket": connect,
        "network: a pair for datagrams": datagram,
        "network: in a thread": lambda: in_a_thread(lambda: socket.socket().close()),
        "network: in a child": lambda: in_a_child("import socket; socket.socket()"),
        "file: in home": lambda: write(Path.home() / "rootstockd-probe"),
        "file: in /tmp": lambda: write(Path("/tmp/rootstockd-probe")),
        "file: in /dev/shm": lambda: write(Path("/dev/shm/rootstockd-probe")),
        "file: in another model's cache": lambda: write(cache.parent / "rootstockd-probe"),
        "file: over another": lambda: victim.write_text("x"),
        "file: renamed": lambda: victim.rename(beside / "renamed").rename(victim),
        "file: linked": lambda: (os.link(victim, beside / "linked"), (beside / "linked").unlink()),
        "file: a link": lambda: ((beside / "link").symlink_to(victim), (beside / "link").unlink()),
        "file: a folder": lambda: ((beside / "folder").mkdir(), (beside / "folder").rmdir()),
        "file: emptied": lambda: call(TRUNCATE, os.fsencode(victim), ctypes.c_long(0)),
        "file: its mode": lambda: victim.chmod(0o666),
        "file: a lease": lambda: on(victim, fcntl.F_SETLEASE, fcntl.F_WRLCK),
        "file: word of changes": lambda: on(victim.parent, fcntl.F_NOTIFY, fcntl.DN_MODIFY),
        "file: its flags": lambda: change_flags(victim),
        # where the file system is another it says ENOTTY, if it is asked
        "file: a subvolume of Btrfs": lambda: of_a_folder(beside, BTRFS_IOC_SUBVOL_CREATE),
        "file: a snapshot of one": lambda: of_a_folder(beside, BTRFS_IOC_SNAP_CREATE_V2),
        "file: opened by a child": lambda: in_a_child(f"open({os.fspath(victim)!r}, 'a')"),
        "daemon: ptrace": attach,
        "daemon: memory": lambda: Path(f"/proc/{DAEMON}/mem").open("rb").close(),
        "daemon: environment": lambda: Path(f"/proc/{DAEMON}/environ").read_bytes(),
        "daemon: descriptor": lambda: Path(f"/proc/{DAEMON}/fd/0").readlink(),
        "daemon: signal": lambda: os.kill(DAEMON, 0),
        "daemon: signal to its group": lambda: os.kill(-group, 0),
        "daemon: signal to a thread": lambda: call(TGKILL, DAEMON, DAEMON, 0),
        "daemon: signal with a value": lambda: call(QUEUE, DAEMON, 0, OF_A_QUEUE),
        "daemon: signal with a value to a thread": lambda: call(QUEUE_TO_THREAD, DAEMON, DAEMON, 0, OF_A_QUEUE),
        "daemon: signal of a descriptor": lambda: on_a_socket(fcntl.fcntl, fcntl.F_SETOWN, DAEMON),
        "daemon: signal of a descriptor to a process": lambda: on_a_socket(
            fcntl.fcntl, F_SETOWN_EX, struct.pack("ii", F_OWNER_PID, DAEMON)
        ),
        "daemon: signal of a descriptor by ioctl": lambda: on_a_socket(
            fcntl.ioctl, FIOSETOWN, struct.pack("i", DAEMON)
        ),
        "daemon: signal of a socket": lambda: on_a_socket(fcntl.ioctl, SIOCSPGRP, struct.pack("i", DAEMON)),
        "daemon: signal of one's choice": lambda: on_a_socket(fcntl.fcntl, F_SETSIG, signal.SIGKILL),
        "daemon: signal when something comes": lambda: on_a_socket(fcntl.fcntl, fcntl.F_SETFL, os.O_ASYNC),
        "daemon: signal when something comes, by ioctl": lambda: on_a_socket(
            fcntl.ioctl, FIOASYNC, struct.pack("i", 1)
        ),
        "another: limits": lambda: of_another(lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE)),
        "another: priority": lambda: of_another(lambda pid: os.setpriority(os.PRIO_PROCESS, pid, nice)),
        "another: priority of a group": lambda: os.setpriority(os.PRIO_PGRP, 0, nice),
        "another: priority of its files": lambda: of_another(lambda pid: call(SET_IO_PRIORITY, 1, pid, 0)),
        "another: scheduling": lambda: of_another(
            lambda pid: os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
        ),
        "another: scheduling by its parameters": lambda: of_another(
            lambda pid: os.sched_setparam(pid, os.sched_param(0))
        ),
        "another: scheduling by its attributes": lambda: of_another(lambda pid: call(SET_SCHEDULING, pid, NICE, 0)),
        "daemon: outlive it": lambda: checked(libc.prctl(1, 9, 0, 0, 0)),
        "terminal: typing": type_into_terminal,
        "namespace: user": new_user_namespace,
        "right: the x32 ABI": lambda: call(X32_GETPID) if X32_GETPID else call(101),
        "allowed: scratch": lambda: write(Path(os.environ.get("TMPDIR", "/tmp")) / "rootstockd-probe"),
        "allowed: cache": lambda: not cache.exists() or write(cache / "x"),
        "allowed: /dev/null": lambda: Path("/dev/null").write_text("x"),
        "allowed: reading": victim.read_text,
        "allowed: a pair of sockets": pair,
        "allowed: a signal to itself": lambda: os.kill(os.getpid(), 0),
        "allowed: a signal to its thread": lambda: call(TGKILL, os.getpid(), threading.get_native_id(), 0),
        "allowed: flags of a descriptor": lambda: on_a_socket(fcntl.fcntl, fcntl.F_SETFL, os.O_NONBLOCK),
        "allowed: its own scheduling": lambda: call(SET_SCHEDULING, 0, NICE, 0),
        "allowed: its own priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
        "allowed: a thread": lambda: in_a_thread(os.getpid),
        "allowed: a program": lambda: in_a_child("import math"),
        "allowed: memory": lambda: mmap.mmap(-1, 4096).close(),
    }


class Probe(Calculator):
    """Raises what it found as JSON.

    Args:
        victim, theirs: see `attempts`.
        refused: numbers of system calls that must fail with EPERM whatever they are given.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, victim: str, theirs: str, refused: list[int]) -> None:
        super().__init__()
        self.victim, self.theirs, self.refused = Path(victim), theirs, refused

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        found = [outcome(attempt) for attempt in attempts(self.victim, self.theirs).values()]  # errors can't be long
        calls = {
            number: outcome(lambda number=number: call(number, *[ctypes.c_long(-1)] * 6)) for number in self.refused
        }
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        state = {
            key: status[key].strip()
            for key in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapBnd", "CapAmb", "Groups")
        }
        state["core"] = resource.getrlimit(resource.RLIMIT_CORE)
        not_refused = {number: how for number, how in calls.items() if how != "EPERM"}
        raise RuntimeError("REPORT" + json.dumps({"found": found, "not refused": not_refused, "state": state}))
