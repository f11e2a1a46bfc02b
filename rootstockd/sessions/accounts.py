"""Who may use the daemon, and how much of it each user has: names and numbers, no I/O on the path of a step.

A user is a uid, as the kernel tells it of a connection (SO_PEERCRED, SO_PEERGROUPS); nothing that a client says counts.
Names of the configuration are those of whoever has them when a connection comes (`Directory`).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from rootstock_client.errors import AccessDeniedError, DaemonFullError, LimitError, RootstockError, UserLimitError
from rootstockd.host.peers import Peer
from rootstockd.sessions.directory import ALL_NAMES, Directory
from rootstockd.sessions.turns import Turns
from rootstockd.settings.config import Config, Quota
from rootstockd.words import so_many

STAGED_BYTES = 128 * 2**20
"""Bytes of long INITs that have not come in full yet, for each user."""


class Coming(Protocol):
    """What an account needs of a model's supervisor."""

    @property
    def coming(self) -> bool:
        """It is being loaded, or about to be."""


class Holder(Protocol):
    """What it needs of a session whose evaluation it holds."""

    def let_in(self) -> None:
        """The evaluation goes to its model."""

    def evaluated(self, error: RootstockError | None) -> None:
        """It won't be done."""


@dataclass(slots=True)
class _Asked:
    """A model that a user asked for."""

    supervisor: Coming
    sessions: int = 0
    """Those that have it."""


class Account:
    """What one user has of the daemon now, and may have."""

    __slots__ = ("_held", "_models", "atoms", "name", "queued", "quota", "sessions", "staged", "turns", "uid")

    def __init__(self, uid: int, name: str, quota: Quota, turns: Turns) -> None:
        self.uid, self.name, self.quota, self.turns = uid, name, quota, turns
        self.sessions = self.atoms = self.staged = 0
        self.queued = 0
        """Evaluations that wait or run at their models."""
        self._models: dict[Hashable, _Asked] = {}
        self._held: dict[Holder, None] = {}
        """Whose evaluations are over the limit, in the order in which they came."""

    def stage(self, size: int) -> None:
        """An INIT of so many bytes is about to come; a single one may be as long as any.

        Raises:
            UserLimitError: too many bytes of others are under way.
        """
        if self.staged and self.staged + size > STAGED_BYTES:
            raise UserLimitError(
                f"an INIT of {size} bytes, with {self.staged} bytes of other INITs of {self.name} under way; "
                f"each user may have {STAGED_BYTES}.",
                "Try again in a moment.",
            )
        self.staged += size

    def enqueue(self, session: Holder) -> bool:
        """One more evaluation: whether it goes to its model now, or else is held until `let_in` has it go there.

        Raises:
            UserLimitError: the user may have none at all.
        """
        most = self.quota.queued
        if most is not None and (self._held or self.queued >= most):
            if most == 0:
                raise self._none_at_all()
            self._held[session] = None
            return False
        self.queued += 1
        return True

    def dequeue(self, session: Holder) -> bool:
        """An evaluation is over, or nobody wants it any more; whether to call `let_in` once nothing else is halfway."""
        if session in self._held:
            del self._held[session]
        else:
            self.queued -= 1
        return bool(self._held)

    def let_in(self) -> None:
        """Have evaluations go to their models that need not be held any more, first come first served."""
        most = self.quota.queued
        while self._held and (most is None or self.queued < most):
            session = next(iter(self._held))
            del self._held[session]
            self.queued += 1
            session.let_in()
        if most == 0:
            for session in list(self._held):
                session.evaluated(self._none_at_all())

    def holds(self, session: Holder) -> bool:
        """Whether the evaluation of a session is held."""
        return session in self._held

    @property
    def held(self) -> int:
        """Evaluations that are."""
        return len(self._held)

    def _none_at_all(self) -> UserLimitError:
        return UserLimitError(
            f"{self.name} may have no evaluations (limits.queued is 0).",
            "Ask whoever runs this daemon for a higher limit.",
        )

    @property
    def models(self) -> int:
        """Different models that sessions have, or that are being loaded though these have gone."""
        for key in [key for key, held in self._models.items() if not held.sessions and not held.supervisor.coming]:
            del self._models[key]
        return len(self._models)

    def check_models(self, key: Hashable, leaving: Hashable | None) -> None:
        """Whether a session may have a model, before anything is loaded for it.

        Args:
            key: which, with its dtype and options.
            leaving: what the session has until now, if anything.

        Raises:
            UserLimitError: it would be one model too many.
        """
        count, old = self.models, self._models.get(leaving)
        if key in self._models:
            return
        if old is not None and old.sessions == 1 and not old.supervisor.coming:
            count -= 1
        if count >= self.quota.models:
            raise UserLimitError(
                f"{self.name} has {so_many(count, 'model')} in use already, as many as one user may (limits.models); "
                "one with another dtype or dispersion counts as another.",
                "Close sessions of models that are no longer needed, or ask whoever runs this daemon for a higher "
                "limit.",
            )

    def ask(self, key: Hashable, supervisor: Coming) -> None:
        """A model is loaded for the user, if it is not there."""
        held = self._models.setdefault(key, _Asked(supervisor))
        held.supervisor = supervisor

    def join(self, key: Hashable) -> None:
        """A session has the model that it asked for."""
        self._models[key].sessions += 1

    def leave(self, key: Hashable) -> None:
        """A session of the user's has no system of this model any more."""
        self._models[key].sessions -= 1


class Accounts:
    """All users' accounts.

    Args:
        config: who may do what, and the limits.
    """

    def __init__(self, config: Config) -> None:
        self._accounts: dict[int, Account] = {}
        """Of those who have sessions, or models that are being loaded, when their latest session ended."""
        self._directory = Directory()
        self._turns: defaultdict[int, Turns] = defaultdict(Turns)
        """Also of users without sessions: who comes and goes has no more of them."""
        self._sessions = self._atoms = 0
        self._evaluations: Counter[str] = Counter()
        """Of sessions that have ended, by user."""
        self._allowed: tuple[int, str] | None = None
        self.closed = False
        """Its sockets could not be closed to others, of whom it has no list any more: none is let in."""
        self.warnings: list[str] = []
        """Of the configuration: names that this machine does not know, who may have left or never have been."""
        self.apply(config)

    def apply(self, config: Config) -> None:
        """Take over new rules, or none where this fails. Sessions that are there stay; they are for what comes."""
        access = config.access
        lists = {"access.admins": access.admins, "access.users": access.users, "users": tuple(config.users)}
        unknown = self._directory.take_over([name for names in lists.values() for name in names], access.groups)
        self._config, self._ours = config, {0, os.getuid()}
        if unknown is None:
            self.warnings = [f"users and groups can't be looked up: no answer of this machine within {ALL_NAMES:g} s"]
        else:
            users, groups = unknown
            self.warnings = [
                f"{setting}: there is no user {name!r} on this machine"
                for setting, names in lists.items()
                for name in names
                if name in users
            ]
            self.warnings += [
                f"access.groups: there is no group {name!r} on this machine" for name in access.groups if name in groups
            ]
        for account in self._accounts.values():
            account.quota = self._quota(account.uid)

    def look_up(self, uid: int) -> asyncio.Future[None] | None:
        """Have it known who somebody is who has just connected; what to wait for, or None."""
        return self._directory.look_up(uid)

    def name_of(self, uid: int) -> str:
        """A user's login name, or the number where none is known."""
        return self._directory.login_of(uid)

    def _quota(self, uid: int) -> Quota:
        own = [name for name in self._directory.names_of(uid) if name in self._config.users]
        return self._config.quota(own[0]) if own else self._config.limits

    def let_in(self) -> None:
        """Have evaluations go to their models that new rules hold no more."""
        for account in self.active:
            account.let_in()

    def is_admin(self, uid: int) -> bool:
        """Whether a user may stop and reload the daemon, and see what others do."""
        return uid in self._ours or self._is_on(self._config.access.admins, uid)

    def check_may_use(self, peer: Peer) -> None:
        """Whether a user may have structures evaluated.

        Raises:
            AccessDeniedError: they may not.
        """
        access = self._config.access
        if not (access.restricted or self.closed) or self.is_admin(peer.uid) or self._is_on(access.users, peer.uid):
            return
        if not self._directory.gids_of(access.groups).isdisjoint(peer.groups):
            return
        if not self._directory.knows(peer.uid):
            raise AccessDeniedError(
                f"the daemon can't find out who uid {peer.uid} is: this machine's directory of users does not answer.",
                "Try again later. `getent passwd` asks it (SSSD, LDAP) as well.",
            )
        raise AccessDeniedError(
            f"{self.name_of(peer.uid)} may not use this daemon.",
            "Ask whoever runs it to add you to access.users or access.groups of its configuration.",
        )

    def _is_on(self, names: Iterable[str], uid: int) -> bool:
        """Whether a list has a user."""
        theirs = self._directory.names_of(uid)
        return any(name in theirs for name in names)

    def open_session(self, peer: Peer) -> Account:
        """Count a session in.

        Raises:
            AccessDeniedError: this user may not use the daemon.
            DaemonFullError, UserLimitError: there are too many sessions, in all or of this user.
        """
        self.check_may_use(peer)
        self.check_room()
        account = self._accounts.get(peer.uid)
        name, quota = self.name_of(peer.uid), self._quota(peer.uid)
        if account is None:
            account = Account(peer.uid, name, quota, self._turns[peer.uid])
        account.name, account.quota = name, quota
        if account.sessions >= account.quota.sessions:
            raise UserLimitError(
                f"{account.name} has {so_many(account.sessions, 'session')} already, as many as one user may "
                "(limits.sessions).",
                "Try again when one of them has ended, or ask whoever runs this daemon for a higher limit.",
            )
        self._accounts[peer.uid] = account
        account.sessions += 1
        self._sessions += 1
        return account

    def allow_sessions(self, count: int, why: str) -> None:
        """Let there be no more sessions than this, whatever the configuration says."""
        self._allowed = count, why

    def check_room(self) -> None:
        """Whether there may be one more session.

        Raises:
            DaemonFullError: there are as many as there may be.
        """
        most, why = self._config.max_sessions, ""
        if self._allowed is not None and self._allowed[0] < most:
            most, why = self._allowed[0], f", {self._allowed[1]}"
        if self._sessions >= most:
            raise DaemonFullError(
                f"this daemon has its {so_many(most, 'session')} already{why}.", "Try again when one has ended."
            )

    def close_session(self, account: Account, evaluations: int) -> None:
        """Count a session out, which had so many evaluations done."""
        self._evaluations[account.name] += evaluations
        self._sessions -= 1
        account.sessions -= 1
        if not account.sessions and not account.models:
            del self._accounts[account.uid]

    @property
    def active(self) -> list[Account]:
        """Of those who have sessions."""
        return [account for account in self._accounts.values() if account.sessions]

    def evaluations(self, sessions: Iterable[tuple[str, int]]) -> dict[str, int]:
        """How many were done for each user since the daemon began, by login name.

        Args:
            sessions: those that are open, each with its user's name and its evaluations.
        """
        counted = self._evaluations.copy()
        for user, evaluations in sessions:
            counted[user] += evaluations
        return counted

    def take(self, account: Account, atoms: int) -> None:
        """Count in the atoms of a system, before memory is taken for it.

        Raises:
            UserLimitError: they are too many beside those that this user has already.
            LimitError: they are too many in themselves, or beside those of all users.
        """
        most = account.quota.atoms
        rule = f"{account.name} may have {so_many(most, 'atom')} in all sessions together (limits.atoms)"
        if atoms > most:
            raise LimitError(
                f"a system of {so_many(atoms, 'atom')}; {rule}.",
                "Use a smaller structure, or ask whoever runs this daemon for a higher limit.",
            )
        if account.atoms + atoms > most:
            raise UserLimitError(
                f"a system of {so_many(atoms, 'atom')}; {rule}, and has {account.atoms} already.",
                "Close sessions that are no longer needed, or use smaller structures.",
            )
        if self._atoms + atoms > self._config.total_atoms:
            raise LimitError(
                f"a system of {so_many(atoms, 'atom')}; this daemon takes "
                f"{so_many(self._config.total_atoms, 'atom')} in all sessions together (total_atoms), and has "
                f"{self._atoms} already.",
                "Try again when others have ended.",
            )
        account.atoms += atoms
        self._atoms += atoms

    def give_back(self, account: Account, atoms: int) -> None:
        """Count the atoms of a system out."""
        account.atoms -= atoms
        self._atoms -= atoms
