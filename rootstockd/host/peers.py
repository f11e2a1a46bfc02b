"""Who is at the other end of a Unix socket, as the kernel says."""

from __future__ import annotations

import select
import socket
import struct
from typing import NamedTuple

from rootstock_client.sockets import credentials_of

_SO_PEERGROUPS = 59
_MOST_GROUPS = 65_536
"""NGROUPS_MAX of Linux."""


class Peer(NamedTuple):
    """Who is at the other end of a Unix socket."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(sock: socket.socket) -> Peer:
    """Whoever connected, as the kernel saw them when they did."""
    pid, uid, gid = credentials_of(sock)
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * 64)
    except OSError:  # more of them than that
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    return Peer(pid, uid, frozenset(struct.unpack(f"{len(groups) // 4}I", groups)) | {gid})


def hung_up(fd: int) -> bool:
    """Whether nobody is at the other end of a socket any more, whatever of what they said is yet to be read."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
