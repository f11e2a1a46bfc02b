"""Which sessions are there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rootstockd.sessions.session import Session


class SessionRegistry:
    """The sessions of a daemon, and the connections that stay only until they have been told why they may not.

    To go over it is to go over those that are there at that moment: they may end meanwhile.
    """

    def __init__(self) -> None:
        self.max_turned_away = 0
        """Connections that may stay to be told so, at a time: each takes a descriptor."""
        self._open: set[Session] = set()
        self._turned_away: set[Session] = set()
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._open))

    def __len__(self) -> int:
        return len(self._open)

    def add(self, session: Session) -> None:
        """A connection came, and is let in."""
        self._open.add(session)
        self._all_gone.clear()

    def turn_away(self, session: Session) -> bool:
        """A connection came that is not let in; whether it may stay until it has been told why."""
        if len(self._turned_away) >= self.max_turned_away:
            return False
        self._turned_away.add(session)
        return True

    def discard(self, session: Session) -> None:
        """A session has gone."""
        self._open.discard(session)
        self._turned_away.discard(session)
        if not self._open:
            self._all_gone.set()

    async def all_gone(self) -> None:
        """Until none is there."""
        await self._all_gone.wait()
