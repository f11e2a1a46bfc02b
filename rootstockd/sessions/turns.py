"""Whose turn it is for what is no step, so that no user keeps the event loop from everybody else's."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

SHARE = 0.01
"""Of the loop's time, that each user's turns may take in the long run: of no use to anybody, as no step comes of it."""
AT_FIRST = 0.5
"""Seconds of it that they may take before: 2,000 jobs that start at once."""


class Allowance:
    """How much of the time something may take: what is put by in quiet times, and no more than that at once.

    Args:
        at_first: seconds that may be taken before anything has to be waited for.
    """

    __slots__ = ("_at_first", "_paid")

    def __init__(self, at_first: float = 0.0) -> None:
        self._at_first = at_first
        self._paid = 0.0
        """When all that was taken will have been made good."""

    def wait(self, now: float) -> float:
        """Seconds until more may be taken, by a clock that says `now`."""
        return max(0.0, self._paid - self._at_first - now)

    def take(self, now: float, seconds: float) -> None:
        """Make so many seconds good from now on."""
        self._paid = max(self._paid, now) + seconds

    def give_back(self, seconds: float) -> None:
        """So many need not be made good."""
        self._paid -= seconds


class Taker(Protocol):
    """What waits for its turn."""

    def take_turn(self) -> None:
        """Do a little, and ask again if there is more; nothing is raised."""


class Turns:
    """One user's turns: first come first served, one at a time, between which the loop looks after all others.

    They are paced by how long they take, once they have taken long.
    """

    def __init__(self) -> None:
        self._waiting: dict[Taker, None] = {}
        self._cost: dict[Taker, float] = {}
        """Seconds that the last turn of each took, of those that are there and have yet to earn it."""
        self._allowance = Allowance(AT_FIRST / SHARE)
        self._next: asyncio.Handle | None = None

    def ask(self, taker: Taker) -> None:
        """Have a turn, as soon as it comes."""
        self._waiting[taker] = None
        if self._next is None:
            self._schedule()

    def waits(self, taker: Taker) -> bool:
        """Whether it has asked, and yet to have its turn."""
        return taker in self._waiting

    def earned(self, taker: Taker) -> None:
        """A step came of its last turn, which does not count, then."""
        self._allowance.give_back(self._cost.pop(taker, 0.0) / SHARE)
        if self._next is not None:
            self._next.cancel()
            self._schedule()

    def leave(self, taker: Taker) -> None:
        """It is gone."""
        self._waiting.pop(taker, None)
        self._cost.pop(taker, None)

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        wait = self._allowance.wait(time.perf_counter())
        self._next = loop.call_later(wait, self._take) if wait else loop.call_soon(self._take)

    def _take(self) -> None:
        self._next = None
        if not self._waiting:
            return
        taker = next(iter(self._waiting))
        del self._waiting[taker]
        began = time.perf_counter()
        try:
            taker.take_turn()
        finally:
            cost = self._cost[taker] = time.perf_counter() - began
            self._allowance.take(began, cost / SHARE)
            if self._waiting and self._next is None:
                self._schedule()
