"""Sockets: how a connection to a daemon begins, how a blocking one is read, and how a driver's stream ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from rootstock_client.errors import AccessDeniedError, DaemonNotFoundError, LimitError
from rootstock_client.runtime_dir import SOCKET_VARIABLE, START_HINT, too_long

if TYPE_CHECKING:  # the command line and control.py come without numpy
    from collections.abc import Sequence

    from rootstock_client.ipi import FloatArray

_UCRED = struct.Struct("iII")
LINGER = 2.0
"""Seconds that a stream we end is still read: a socket closed on unread bytes is a reset."""


class _Socket(socket.socket):
    """A socket that is closed with its owner, without a word, in whatever order the garbage collector takes the two."""

    _io_refs = 0  # a signal may come before the constructor has set it

    def __del__(self) -> None:
        self.close()


_sockets: weakref.WeakSet[_Socket] = weakref.WeakSet()
"""Of this process."""


def _forked() -> None:
    """Leave the parent's connections to the parent: it alone reads what comes, and they end when it closes them.

    A child that was forked inside a step, by a signal's handler, finds its own copy lost and repeats the step.
    """
    for sock in list(_sockets):
        sock.close()
    _sockets.clear()


os.register_at_fork(after_in_child=_forked)


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """Connect to a Unix socket of a daemon.

    Args:
        path: the socket.
        timeout: seconds that this and each later operation on the socket may take.

    Raises:
        DaemonNotFoundError: nobody answers there, or nobody could.
        TimeoutError: somebody is there and accepts no connections.
        AccessDeniedError: the socket is not open to this user.
        LimitError: this process may have no more files open, or the machine has no room for a socket.
    """
    if problem := too_long(path):
        raise DaemonNotFoundError(problem, "Name it by a shorter path, such as through a symbolic link to its folder.")
    try:
        sock = _Socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise LimitError(f"there can be no further session: {(error.strerror or str(error)).lower()}.") from error
        raise LimitError(
            "this process has as many files open as it may (`ulimit -n`), so there can be no further session.",
            "Have structures share a calculator, or close() those that are done with.",
        ) from error
    _sockets.add(sock)
    try:
        sock.settimeout(timeout)
        establish(sock, os.fspath(path))
    except PermissionError as error:
        sock.close()
        raise AccessDeniedError(
            f"the socket {path} is not open to you.",
            "Use a daemon of your own, or ask whoever runs this one to add you to its access.socket_group.",
        ) from error
    except OSError as error:
        sock.close()
        if error.errno is None and timeout is None:  # a signal's handler has raised it
            raise
        if isinstance(error, (TimeoutError, BlockingIOError)):  # with a timeout a full queue is EAGAIN, at once
            raise TimeoutError(f"{path} accepts no connections") from error
        if isinstance(error, ConnectionRefusedError) and path.exists() and not path.is_socket():
            raise DaemonNotFoundError(  # from None: it is not waited for as a daemon is that died
                f"{path} is no socket.",
                f"Name the one that `rootstockd start` says, or set {SOCKET_VARIABLE} to it.",
            ) from None
        raise DaemonNotFoundError(
            f"no rootstockd answers at {path}: {(error.strerror or str(error)).lower()}.", START_HINT
        ) from error
    except BaseException:
        sock.close()
        raise
    return sock


def establish(sock: socket.socket, where: str) -> None:
    """Connect to a Unix socket until it is so.

    Python says so as well where a signal has interrupted the wait for a full queue.

    Raises:
        OSError: it can't be.
    """
    while True:
        sock.connect(where)
        try:
            sock.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        else:
            return


def credentials_of(sock: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end of a Unix socket, as the kernel saw them when it was connected."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def receive(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return data


def send_parts(sock: socket.socket, parts: Sequence[bytes | FloatArray], size: int) -> None:
    """Send all parts, of so many bytes together, in one system call where the socket takes them."""
    if (sent := sock.sendmsg(parts)) < size:
        sock.sendall(memoryview(b"".join(parts))[sent:])


def dismiss(stream: socket.socket) -> None:
    """End a stream so that its driver finds an end of file, whatever it is just saying."""
    with contextlib.suppress(OSError), stream:
        stream.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0:
            stream.settimeout(left)
            if not stream.recv(65536):
                break
