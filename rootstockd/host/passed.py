"""Descriptors that whoever connects may send along (SCM_RIGHTS).

Who lets one go that was sent to it and is the last to have it closes a file of somebody else's, and that may take as
long as they like: TCP with SO_LINGER, a file of a FUSE. Linux does so within whatever system call let it go, be it a
plain `recv`. Since Linux 6.16 a socket can refuse them, and whoever sends one is told so (EPERM).

On a stream that was handed over its giver can set, at any time, what else the kernel puts beside the data: who has sent
it (SO_PASSCRED, SO_PASSSEC, and SO_PASSPIDFD since Linux 6.5, which makes a descriptor each time), how much more there
is (SO_INQ, since 6.17). That says nothing about whoever sends, and is to have no effect.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence

_SO_PASSRIGHTS = 83
_SCM_PIDFD = 4
_CREDENTIALS, _LABEL, _INT = 12, 4096, 4  # a label of a security module has a page at most
MOST = sum(map(socket.CMSG_SPACE, (_CREDENTIALS, _LABEL, 253 * _INT, _INT, _INT)))
"""Room for all that a message can bring, SCM_MAX_FD of them, and for what the kernel puts beside: it lets those go for
which there is none."""
_AT_ONCE, _PIECE = struct.pack("ii", 0, 0), 65_536
_RETRY = 1.0
"""Seconds until the next try where no thread could be started."""


def refuse(sock: socket.socket, *, allow: bool = False) -> None:
    """Have a Unix socket, and those who connect to it from now on, take no descriptors; or take them again."""
    with contextlib.suppress(OSError):  # an older kernel, or no Unix socket
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, int(allow))


def are_refused(sock: socket.socket) -> bool:
    """Whether none can come."""
    if sock.family != socket.AF_UNIX:
        return True
    try:
        return not sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)
    except OSError:
        return False


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """Those that a message brought, which are the caller's to close; those that the kernel made for it are closed."""
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind in (socket.SCM_RIGHTS, _SCM_PIDFD):
            numbers = array.array("i", data[: len(data) - len(data) % _INT])
            if kind == socket.SCM_RIGHTS:
                found += numbers
                continue
            for number in numbers:
                with contextlib.suppress(OSError):  # it is negative where none could be made
                    os.close(number)
    return found


def close_aside(
    what: Sequence[int | socket.socket], then: Callable[[], object] = lambda: None, *, unread: bool = False
) -> None:
    """Close what may take its time to close, in a thread; not for long, but for files of a FUSE.

    Args:
        what: descriptors, which somebody else has sent, and sockets.
        then: called by the loop when that is done.
        unread: the sockets are connections of our own, and nobody reads any more what has come over them. Descriptors
            are somebody else's, and their streams may have no end.
    """
    loop = asyncio.get_running_loop()

    def run() -> None:
        for one in what:
            if isinstance(one, socket.socket):
                _close(one, unread=unread)
        _let_go([one for one in what if isinstance(one, int)])
        with contextlib.suppress(RuntimeError):  # the daemon has ended meanwhile
            loop.call_soon_threadsafe(then)

    try:
        threading.Thread(target=run, name="close", daemon=True).start()
    except RuntimeError:  # there are as many as there may be
        loop.call_later(_RETRY, functools.partial(close_aside, what, then, unread=unread))


def _let_go(descriptors: list[int]) -> None:
    """Close somebody else's, all at once: while one takes its time, as what lies in a socket may, none is open here."""
    if not descriptors:
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # it is no socket
            sock = socket.socket(fileno=descriptor)
            _end_at_once(sock)
            sock.detach()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # none is left for this, and they are closed one by one
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            socket.send_fds(ends[1], [b"x"], descriptors)  # to the one that is closed last
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _end_at_once(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)


def _close(sock: socket.socket, *, unread: bool) -> None:
    """Close one that does not linger, and all that came over it and was not read."""
    _end_at_once(sock)
    with contextlib.suppress(OSError):
        if unread:
            sock.shutdown(socket.SHUT_RD)  # no more comes
        while unread:
            data, ancillary, _, _ = sock.recvmsg(_PIECE, MOST, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
            _let_go(descriptors_in(ancillary))
            unread = bool(data)
    with contextlib.suppress(OSError):
        sock.close()
