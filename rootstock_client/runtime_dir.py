"""Where daemons put their sockets, and how one is found.

A daemon listens on two Unix sockets that lie side by side: `NAME.sock` for sessions (the i-PI protocol) and
`NAME.control` for everything else (HTTP). They are looked for in this order:

1. the argument (`RootstockClient("/path/to.sock")`, `rootstockd --socket`);
2. the environment variable ROOTSTOCKD_SOCKET;
3. the Slurm job's, `/tmp/rootstockd-UID-job-ID/`, inside a job;
4. the user's own runtime directory, `$XDG_RUNTIME_DIR/rootstockd/`, or `/tmp/rootstockd-UID/` where the login
   session has none;
5. the system's, `/run/rootstockd/`.

A folder is only believed when its owner is the user (3, 4) or root or the folder's daemon (5) and nobody else may
write to it: otherwise anybody could stand in for the daemon.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket as socketlib
import stat
import time
from pathlib import Path

from rootstock_client.errors import DaemonNotFoundError

SOCKET_VARIABLE = "ROOTSTOCKD_SOCKET"
SOCKET_NAME = "rootstockd.sock"
SYSTEM_DIR = Path("/run/rootstockd")
JOB_VARIABLE = "SLURM_JOB_ID"
MAX_SOCKET_PATH = 107
"""Bytes that a Unix socket's address can hold (sun_path, with its final zero)."""
_PAUSE = 0.05
"""Seconds between looks at a queue that is full."""

MET: set[Path] = set()
"""Addresses at which a daemon has answered this process, or one that it was forked from. It is waited for."""


def user_runtime_dir() -> Path:
    """The user's own folder for sockets; not necessarily there yet."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isabs(base):
        return Path(base) / "rootstockd"
    return Path(f"/tmp/rootstockd-{os.getuid()}")  # noqa: S108 - its owner and mode are checked before use


def job_runtime_dir() -> Path | None:
    """The folder for sockets of the Slurm job that this process is part of; None outside of jobs.

    It lies in /tmp, which each node has for itself: one path for all nodes of a job, and on each the node's own daemon.
    Nothing lies between it and /tmp that another user could have made.
    """
    job = os.environ.get(JOB_VARIABLE, "")
    return Path(f"/tmp/rootstockd-{os.getuid()}-job-{job}") if job.isdecimal() else None  # noqa: S108 - as above


def control_socket(session_socket: Path) -> Path:
    """The control socket that belongs to a session socket."""
    return session_socket.with_suffix(".control")


def share_file(session_socket: Path) -> Path:
    """The file by which those who share a daemon agree; see `rootstock_client.node_daemon`."""
    return session_socket.with_suffix(".shared")


def is_private(folder: Path, *owners: int) -> bool:
    """Whether `folder` is a real directory that one of `owners` (uids) has and that nobody else may write to."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid in owners and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def is_own_note(fd: int, note: re.Pattern[bytes]) -> bool:
    """Whether an open file is a regular one of this user, and has nothing in it but a note of this form.

    Args:
        fd: its descriptor.
        note: what a file of ours may have in it, in up to 31 bytes.
    """
    info = os.fstat(fd)
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid() and bool(note.fullmatch(os.pread(fd, 32, 0)))


def too_long(path: Path) -> str:
    """What is said of a path that no Unix socket can have; empty of others."""
    fits = len(os.fsencode(path)) <= MAX_SOCKET_PATH
    return "" if fits else f"the socket path {path} is too long; Unix sockets allow {MAX_SOCKET_PATH} bytes."


def probe(address: str | os.PathLike[str], timeout: float = 1.0) -> socketlib.socket:
    """Connect to a Unix socket, to see whether somebody listens: a daemon that was killed leaves its socket behind.

    Args:
        address: a path, or an abstract address.
        timeout: seconds to wait while its queue is full. To connect would wait for ever at a daemon that is suspended.

    Raises:
        ConnectionRefusedError: nobody listens.
        BlockingIOError: somebody does, and takes no connections.
        OSError: it can't be told.
    """
    deadline = time.monotonic() + timeout
    sock = socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM)
    try:
        sock.setblocking(False)  # noqa: FBT003 - the socket module has no other way
        while True:
            try:
                sock.connect(os.fspath(address))
            except BlockingIOError:  # at once, with any timeout of the socket's
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def answers(path: Path, timeout: float = 1.0) -> bool:
    """Whether somebody listens, and takes connections; as `probe`."""
    try:
        probe(path, timeout).close()
    except OSError:
        return False
    return True


def named_path(path: str | os.PathLike[str]) -> Path:
    """A path that somebody has named, absolute. `~` is a home, which shells leave alone in `--socket=~/...`."""
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 - it leaves alone whom there is no user for


def find_socket(socket: str | os.PathLike[str] | None = None) -> Path:
    """The session socket to use, by the order that this module's documentation gives.

    An address that was given outright (argument or environment) is taken, whether or not a daemon is there; the
    folders are searched, and one where a daemon answers goes first. Where there is no socket now, it is that of the
    daemon that this process had.

    Raises:
        DaemonNotFoundError: no socket was found, or a control socket was given.
    """
    named = socket if socket is not None else os.environ.get(SOCKET_VARIABLE) or None
    if named is not None:
        path = named_path(named)
        if path == control_socket(path):  # no daemon takes such an address
            raise DaemonNotFoundError(
                f"{path} is a daemon's control socket.",
                f"Name that of its sessions, such as {path.with_suffix('.sock')}.",
            )
        return path
    job = job_runtime_dir()
    own = [user_runtime_dir()] if job is None else [job, user_runtime_dir()]
    found = [
        folder / SOCKET_NAME for folder in own if is_private(folder, os.getuid()) and (folder / SOCKET_NAME).is_socket()
    ]
    system = SYSTEM_DIR / SOCKET_NAME
    with contextlib.suppress(OSError):  # a folder that we may not even look into has nothing for us
        if system.is_socket() and is_private(SYSTEM_DIR, 0, system.lstat().st_uid):
            found.append(system)
    if found:
        if len(found) == 1:
            return found[0]
        return next(filter(answers, found), found[0])
    if away := [path for path in (*(folder / SOCKET_NAME for folder in own), system) if path in MET]:
        return away[0]
    raise DaemonNotFoundError(
        f"no rootstockd found: no socket in {', '.join(map(str, own))} or {SYSTEM_DIR}, and {SOCKET_VARIABLE} is not "
        "set.",
        START_HINT,
    )


START_HINT = f"Start one with `rootstockd start`; if it runs elsewhere, set {SOCKET_VARIABLE} to its socket."
