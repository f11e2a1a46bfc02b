"""An ASE calculator that tries what a malicious model would, and says how far it got. It runs inside a worker."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
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
CLONE, TRUNCATE, X32_GETPID = {"x86_64": (56, 76, 0x40000027), "aarch64": (220, 45, 0)}[platform.machine()]


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


def own_signals() -> None:
    with socket.socketpair()[0] as end:
        fcntl.fcntl(end, fcntl.F_SETOWN, DAEMON)


def change_flags(path: Path) -> None:
    with path.open("rb") as file:
        fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", 0))


def on(path: Path, command: int, argument: int) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(file, command, argument)
    finally:
        os.close(file)


def type_into_terminal() -> None:
    fcntl.ioctl(0, TIOCSTI, b"x")


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
        "file: opened by a child": lambda: in_a_child(f"open({os.fspath(victim)!r}, 'a')"),
        "daemon: ptrace": attach,
        "daemon: memory": lambda: Path(f"/proc/{DAEMON}/mem").open("rb").close(),
        "daemon: environment": lambda: Path(f"/proc/{DAEMON}/environ").read_bytes(),
        "daemon: descriptor": lambda: Path(f"/proc/{DAEMON}/fd/0").readlink(),
        "daemon: signal": lambda: os.kill(DAEMON, 0),
        "daemon: signal to its group": lambda: os.kill(0, 0),
        "daemon: signal through a descriptor": own_signals,
        "daemon: limits": lambda: resource.prlimit(DAEMON, resource.RLIMIT_NOFILE),
        "daemon: priority": lambda: os.setpriority(os.PRIO_PROCESS, DAEMON, os.getpriority(os.PRIO_PROCESS, DAEMON)),
        "daemon: scheduling": lambda: os.sched_setscheduler(DAEMON, os.SCHED_OTHER, os.sched_param(0)),
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
        found = {what: outcome(attempt) for what, attempt in attempts(self.victim, self.theirs).items()}
        calls = {
            number: outcome(lambda number=number: call(number, *[ctypes.c_long(-1)] * 6)) for number in self.refused
        }
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        state = {key: status[key].strip() for key in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapBnd", "CapAmb")}
        state["core"] = resource.getrlimit(resource.RLIMIT_CORE)
        not_refused = {number: how for number, how in calls.items() if how != "EPERM"}
        raise RuntimeError("REPORT" + json.dumps({"found": found, "not refused": not_refused, "state": state}))
