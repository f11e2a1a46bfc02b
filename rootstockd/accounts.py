"""Who may use the daemon, and how much of it each user has: names and numbers, no I/O on the way of a step.

A user is a uid, as the kernel tells it of a connection (SO_PEERCRED, SO_PEERGROUPS); nothing that a client says counts.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import socket
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rootstock_client.errors import AccessDeniedError, DaemonFullError, LimitError
from rootstockd.config import Config, Quota

log = logging.getLogger(__name__)

_UCRED = struct.Struct("3i")
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
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * 64)
    except OSError:  # more of them than that
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    return Peer(pid, uid, frozenset(struct.unpack(f"{len(groups) // 4}i", groups)) | {gid})


def user_name(uid: int) -> str:
    """Login name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Account:
    """What one user has of the daemon now, and may have."""

    __slots__ = ("atoms", "name", "queued", "quota", "sessions", "uid")

    def __init__(self, uid: int, quota: Quota) -> None:
        self.uid, self.quota = uid, quota
        self.name = user_name(uid)
        self.sessions = self.atoms = self.queued = 0

    def enqueue(self) -> None:
        """One more evaluation waits or runs.

        Raises:
            LimitError: the user has as many as they may.
        """
        if self.quota.queued is not None and self.queued >= self.quota.queued:
            raise LimitError(
                f"{self.name} has {self.queued} evaluations waiting already; the limit for one user is "
                f"{self.quota.queued}.",
                "Run fewer jobs at once.",
            )
        self.queued += 1


class Accounts:
    """All users' accounts.

    Args:
        config: who may do what, and the limits.
    """

    def __init__(self, config: Config) -> None:
        self._accounts: dict[int, Account] = {}
        self._sessions = self._atoms = 0
        self.apply(config)

    def apply(self, config: Config) -> None:
        """Take over new rules. Sessions that are there stay; the rules are for what comes."""
        self._config, access = config, config.access
        self._admins = {0, os.getuid(), *_numbers(access.admins, _uid, "user")}
        self._users = {*_numbers(access.users, _uid, "user")}
        self._groups = {*_numbers(access.groups, _gid, "group")}
        by_uid = {uid: name for name in config.users for uid in _numbers([name], _uid, "user")}
        self._quotas = {uid: config.quota(name) for uid, name in by_uid.items()}
        for account in self._accounts.values():
            account.quota = self._quotas.get(account.uid, config.limits)

    def is_admin(self, uid: int) -> bool:
        """Whether a user may stop and reload the daemon, and see what others do."""
        return uid in self._admins

    def may_use(self, peer: Peer) -> bool:
        """Whether a user may have structures evaluated."""
        if not self._config.access.restricted or peer.uid in self._admins:
            return True
        return peer.uid in self._users or not self._groups.isdisjoint(peer.groups)

    def open_session(self, peer: Peer) -> Account:
        """Count a session in.

        Raises:
            AccessDeniedError: this user may not use the daemon.
            DaemonFullError: there are too many sessions, of this user or in all.
        """
        if not self.may_use(peer):
            raise AccessDeniedError(
                f"{user_name(peer.uid)} may not use this daemon.",
                "Ask whoever runs it to add you to access.users or access.groups of its configuration.",
            )
        if self._sessions >= self._config.max_sessions:
            raise DaemonFullError(
                f"this daemon has its {self._config.max_sessions} sessions already.", "Try again when one has ended."
            )
        account = self._accounts.get(peer.uid)
        if account is None:
            account = Account(peer.uid, self._quotas.get(peer.uid, self._config.limits))
        if account.sessions >= account.quota.sessions:
            raise DaemonFullError(
                f"{account.name} has {account.sessions} sessions already, as many as one user may.",
                "Try again when one of them has ended.",
            )
        self._accounts[peer.uid] = account
        account.sessions += 1
        self._sessions += 1
        return account

    def close_session(self, account: Account) -> None:
        """Count a session out."""
        self._sessions -= 1
        account.sessions -= 1
        if not account.sessions:
            del self._accounts[account.uid]

    def take(self, account: Account, atoms: int) -> None:
        """Count in the atoms of a system, before memory is taken for it.

        Raises:
            LimitError: they are too many, for this user or in all.
        """
        if account.atoms + atoms > account.quota.atoms:
            raise LimitError(
                f"{atoms} atoms more: {account.name} has {account.atoms} in all sessions, and may have "
                f"{account.quota.atoms}.",
                "Close sessions that are no longer needed, or use smaller structures.",
            )
        if self._atoms + atoms > self._config.total_atoms:
            raise LimitError(
                f"{atoms} atoms more: this daemon has {self._atoms} in all sessions, and takes "
                f"{self._config.total_atoms}.",
                "Try again when others have ended.",
            )
        account.atoms += atoms
        self._atoms += atoms

    def give_back(self, account: Account, atoms: int) -> None:
        """Count the atoms of a system out."""
        account.atoms -= atoms
        self._atoms -= atoms


def _uid(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return grp.getgrnam(name).gr_gid


def _numbers(names: Iterable[str], look_up: Callable[[str], int], what: str) -> Iterable[int]:
    """The ids of those names that there are: one who has left is no reason not to start."""
    for name in names:
        try:
            yield look_up(name)
        except KeyError:
            log.warning("configuration: there is no %s %r on this machine", what, name)
