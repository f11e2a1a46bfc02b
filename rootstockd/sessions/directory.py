"""Who has which name, as the machine's directories of users (passwd, SSSD, LDAP) have it now.

They may take long to answer, or never do: each is asked in a thread, for which a new connection waits a moment and
nothing else waits at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import math
import pwd
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rootstockd.host.log_rate import LogRate
from rootstockd.host.threads import in_thread, within

log = logging.getLogger(__name__)
log.addFilter(LogRate(log))

FRESH = 5.0
"""Seconds for which what was found of a user holds for further connections of theirs."""
PATIENCE = 2.0
"""Seconds that a new connection waits for an answer; then what was known before counts."""
GRACE = 60.0
"""Seconds for which a user or a group that no directory knows any more counts as before: it may be starting again."""
MOST = 32
"""Users that are looked up at a time; of others what was known before counts."""
ALL_NAMES = 5.0
"""Seconds that a start or a reload waits for all names of the configuration; steps wait with it."""


class _User(NamedTuple):
    login: str
    names: tuple[str, ...]
    """The login name, and others of the configuration that mean this user."""
    since: float
    """When that was found, by the monotonic clock."""


class _Found(NamedTuple):
    login: str | None
    names: tuple[str, ...]
    gids: dict[str, int]


class Directory:
    """What is known of users and groups."""

    def __init__(self) -> None:
        self._users: dict[int, _User] = {}
        self._gids: dict[str, tuple[int, float]] = {}
        """Each with when that was found."""
        self._aliases: dict[int, tuple[str, ...]] = {}
        """Names of the configuration, by whose they were when it was read."""
        self._groups: tuple[str, ...] = ()
        self._under_way: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def take_over(self, users: Iterable[str], groups: Iterable[str]) -> tuple[set[str], set[str]] | None:
        """Have other names looked for, of users and of groups.

        Returns:
            Those that there are not; None if that can't be found out within `ALL_NAMES`.
        """
        users, groups = set(users), tuple(groups)
        found = within(ALL_NAMES, lambda: (_numbers(_uid, users), _numbers(_gid, groups)))
        self._groups = groups
        if found is None:
            return None
        uids, gids = found
        aliases: dict[int, tuple[str, ...]] = {}
        for name, uid in uids.items():
            aliases[uid] = (*aliases.get(uid, ()), name)
        now = time.monotonic()
        self._gids = {name: (gid, now) for name, gid in gids.items()}
        others = {uid: _User(user.login, (), -math.inf) for uid, user in self._users.items()}
        self._users = {**others, **{uid: _User(names[0], names, now) for uid, names in aliases.items()}}
        self._aliases = aliases
        return users - uids.keys(), set(groups) - gids.keys()

    def look_up(self, uid: int) -> asyncio.Future[None] | None:
        """Have it known who somebody is who has just connected.

        Returns:
            What to wait for; None where what is known holds, or nothing better is to be had.
        """
        if (answer := self._under_way.get(uid)) is not None:
            return None if answer.done() else answer
        known = self._users.get(uid)
        if (known and time.monotonic() - known.since < FRESH) or len(self._under_way) >= MOST:
            return None
        loop = asyncio.get_running_loop()
        self._under_way[uid] = answer = loop.create_future()
        self._tasks.add(task := loop.create_task(self._ask(uid)))
        task.add_done_callback(self._tasks.discard)
        loop.call_later(PATIENCE, self._give_up, uid, answer)
        return answer

    async def _ask(self, uid: int) -> None:
        groups, found = self._groups, None
        try:
            found = await in_thread(_find, uid, self._aliases.get(uid, ()), groups)
        except Exception:
            log.exception("uid %d can't be looked up", uid)
        self._learn(uid, groups, found)

    def _learn(self, uid: int, groups: tuple[str, ...], found: _Found | None) -> None:
        now, known = time.monotonic(), self._users.get(uid)
        # an answer to what was asked before a reload is none
        if found and groups is self._groups and (found.login is not None or known is None or now - known.since > GRACE):
            self._users[uid] = _User(found.login or str(uid), found.names, now)
            still = {name: group for name, group in self._gids.items() if now - group[1] <= GRACE}
            self._gids = {**still, **{name: (gid, now) for name, gid in found.gids.items()}}
        answer = self._under_way.pop(uid)
        if not answer.done():
            answer.set_result(None)

    def _give_up(self, uid: int, answer: asyncio.Future[None]) -> None:
        if not answer.done():
            log.warning(
                "no answer within %g s of this machine's directory of users to who uid %d is: %s",
                *(PATIENCE, uid, "what it said before counts" if uid in self._users else "no list has them"),
                extra={"about": "users who can't be looked up"},
            )
            answer.set_result(None)

    def names_of(self, uid: int) -> tuple[str, ...]:
        """The names by which a configuration may mean a user, the login name first."""
        return self._users[uid].names if uid in self._users else ()

    def knows(self, uid: int) -> bool:
        """Whether there was ever an answer."""
        return uid in self._users

    def login_of(self, uid: int) -> str:
        """Login name, or the number where there is none."""
        return self._users[uid].login if uid in self._users else str(uid)

    def gids_of(self, groups: Iterable[str]) -> set[int]:
        """The numbers of those groups that there are."""
        return {self._gids[name][0] for name in groups if name in self._gids}


def _find(uid: int, aliases: Iterable[str], groups: Iterable[str]) -> _Found:
    """What there is of a user; a name that leads to another uid is another user's, whoever says that it is theirs."""
    try:
        login = pwd.getpwuid(uid).pw_name
    except KeyError:
        login = None
    names = _numbers(_uid, dict.fromkeys([*(() if login is None else (login,)), *aliases]))
    return _Found(login, tuple(name for name, whose in names.items() if whose == uid), _numbers(_gid, groups))


def _numbers(look_up: Callable[[str], int], names: Iterable[str]) -> dict[str, int]:
    """The ids of those names that there are."""
    found = {}
    for name in names:
        with contextlib.suppress(KeyError):
            found[name] = look_up(name)
    return found


def _uid(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return grp.getgrnam(name).gr_gid
