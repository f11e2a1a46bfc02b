"""Descriptors that whoever connects may send along (SCM_RIGHTS).

Who lets one go that was sent to it and is the last to have it closes a file of somebody else's, and that may take as
long as they like: TCP with SO_LINGER, a file of a FUSE. Linux does so within whatever system call let it go, be it a
plain `recv`. Since Linux 6.16 a socket can refuse them, and whoever sends one is told so (EPERM).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence

_SO_PASSRIGHTS = 83
_INT = 4
MOST = socket.CMSG_SPACE(253 * _INT)
"""Room for all that a message can bring, SCM_MAX_FD of them: the kernel lets those go for which there is none."""
_PIECE = 65_536
_RETRY = 1.0
"""Seconds until the next try where no thread could be started."""


def refuse(sock: socket.socket) -> None:
    """Have a Unix socket, and those who connect to it from now on, take no descriptors."""
    with contextlib.suppress(OSError):  # an older kernel, or no Unix socket
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def are_refused(sock: socket.socket) -> bool:
    """Whether none can come."""
    if sock.family != socket.AF_UNIX:
        return True
    try:
        return not sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)
    except OSError:
        return False


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that a message brought, which are the caller's to close."""
    found: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found += array.array("i", data[: len(data) - len(data) % _INT])
    return found


def close_aside(what: Sequence[int | socket.socket], then: Callable[[], object] = lambda: None) -> None:
    """Close what may take its time to close, in a thread; not for long, but for files of a FUSE.

    Args:
        what: descriptors, which somebody else has sent, and connections of our own, which nobody reads any more.
        then: called by the loop when that is done.
    """
    loop = asyncio.get_running_loop()

    def run() -> None:
        for one in what:
            if isinstance(one, socket.socket):
                _close(one)
        _let_go([one for one in what if isinstance(one, int)])
        with contextlib.suppress(RuntimeError):  # the daemon has ended meanwhile
            loop.call_soon_threadsafe(then)

    try:
        threading.Thread(target=run, name="close", daemon=True).start()
    except RuntimeError:  # there are as many as there may be
        loop.call_later(_RETRY, close_aside, what, then)


def _let_go(descriptors: list[int]) -> None:
    """Close somebody else's, all at once: while one takes its time, none is open here.

    Nothing else is done to them: whoever has a copy of a socket may hold up all but that.
    """
    if not descriptors:
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # none is left for this, and they are closed one by one
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            socket.send_fds(ends[1], [b"x"], descriptors)  # to the one that is closed last
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _close(sock: socket.socket) -> None:
    """Close one, and all that came over it and was not read."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)  # no more comes
        while True:
            data, ancillary, _, _ = sock.recvmsg(_PIECE, MOST, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
            _let_go(descriptors_in(ancillary))
            if not data:
                break
    with contextlib.suppress(OSError):
        sock.close()
