"""Whose turn it is for what is no step, so that no user keeps the event loop from everybody else's."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

SHARE = 0.01
"""Of the loop's time, that each user's turns may take in the long run: of no use to anybody, as no step comes of it."""
AT_FIRST = 1.0
"""Seconds of it that they may take before: 5,000 jobs that start at once."""


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
    """One user's turns: one at a time, between which the loop looks after all others.

    Who had none yet goes first, and else who came first. They are paced by how long they take, once they have taken
    long.
    """

    def __init__(self) -> None:
        self._new: dict[Taker, tuple[float, bool]] = {}
        self._waiting: dict[Taker, tuple[float, bool]] = {}
        """Those who had none, and all others, with what each owes, and whether that is of the same step."""
        self._cost: dict[Taker, float] = {}
        """Seconds that the last turn of each took, of those that are there and have yet to earn it."""
        self._allowance = Allowance(AT_FIRST / SHARE)
        self._next: asyncio.Handle | None = None

    def ask(self, taker: Taker, owed: float = 0.0, *, goes_on: bool = False) -> None:
        """Have a turn, as soon as it comes; the one that it waits for already, if it does.

        Args:
            taker: whose.
            owed: seconds of the loop's time that it has had already.
            goes_on: it is for the same step as its last one, which counts as one with it.
        """
        if self.waits(taker):
            return
        (self._waiting if taker in self._cost else self._new)[taker] = owed, goes_on
        if self._next is None:
            self._schedule()

    def waits(self, taker: Taker) -> bool:
        """Whether a session has asked, and yet to have its turn."""
        return taker in self._waiting or taker in self._new

    def earned(self, taker: Taker) -> None:
        """A step came of its last turn, which does not count, then."""
        self._allowance.give_back(self._cost.pop(taker, 0.0) / SHARE)
        if self._next is not None:
            self._schedule()

    def leave(self, taker: Taker) -> None:
        """A session is gone."""
        for kept in (self._new, self._waiting, self._cost):
            kept.pop(taker, None)

    def _schedule(self) -> None:
        if self._next is not None:
            self._next.cancel()
        loop = asyncio.get_running_loop()
        wait = self._allowance.wait(time.perf_counter())
        self._next = loop.call_later(wait, self._take) if wait else loop.call_soon(self._take)

    def _take(self) -> None:
        self._next = None
        if not (waiting := self._new or self._waiting):
            return
        taker = next(iter(waiting))
        owed, goes_on = waiting.pop(taker)
        before = self._cost.get(taker, 0.0) if goes_on else 0.0
        began, used = time.perf_counter(), time.thread_time()
        try:
            taker.take_turn()
        finally:
            cost = owed + time.thread_time() - used  # that others keep the machine from us is no fault of the taker
            self._cost[taker] = before + cost
            self._allowance.take(began, cost / SHARE)
            if self._new or self._waiting:
                self._schedule()  # also where the taker has asked again: now it is known what this turn took
