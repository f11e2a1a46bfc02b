"""Turns at what is no step: one at a time, and paced for whoever takes much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from rootstockd.sessions import turns as under_test
from rootstockd.sessions.turns import SHARE, Turns

AT_FIRST = 0.25


@pytest.fixture(autouse=True)
def little_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "AT_FIRST", AT_FIRST)


class Taker:
    """Takes turns that last so many seconds, as long as it may."""

    def __init__(self, turns: Turns, seconds: float, *, earned: bool = False) -> None:
        self.turns, self._seconds, self._earned = turns, seconds, earned
        self.taken: list[float] = []

    def ask(self) -> None:
        self.turns.ask(self)

    def take_turn(self) -> None:
        began = time.thread_time()
        while time.thread_time() < began + self._seconds:
            pass
        self.taken.append(time.perf_counter())
        self.ask()
        if self._earned:
            asyncio.get_running_loop().call_soon(self.turns.earned, self)


def run(seconds: float, begin: Callable[[], object]) -> None:
    async def live() -> None:
        begin()
        await asyncio.sleep(seconds)

    asyncio.run(live())


def test_between_two_turns_others_have_theirs() -> None:
    """Another user's, as often; and one user's are first come first served."""
    ours, theirs = Turns(), Turns()
    a, b, c = Taker(ours, 0.001), Taker(ours, 0.001), Taker(theirs, 0.001)
    run(0.2, lambda: (a.ask(), b.ask(), c.ask()))
    both = [(time, "ab"[taker is b]) for taker in (a, b) for time in taker.taken]
    assert "".join(name for _, name in sorted(both)) in "ab" * len(both)
    assert abs(len(c.taken) - len(both)) <= 2


def test_whoever_takes_much_waits_and_whoever_is_new_does_not() -> None:
    ours, theirs = Turns(), Turns()
    greedy, late = Taker(ours, 0.02), Taker(theirs, 0.02)

    def begin() -> None:
        greedy.ask()
        asyncio.get_running_loop().call_later(1.5, late.ask)

    run(1.7, begin)
    assert 0.02 * len(greedy.taken) < AT_FIRST + 4 * SHARE * 1.7
    assert len(late.taken) > 3


def test_turns_that_a_step_came_of_are_not_paced() -> None:
    worker = Taker(Turns(), 0.02, earned=True)
    run(5, worker.ask)
    assert 0.02 * len(worker.taken) > AT_FIRST + 4 * SHARE * 5


@pytest.mark.parametrize("earned", [True, False])
def test_whoever_comes_for_one_step_and_goes_is_not_paced(earned: bool) -> None:
    turns, taken = Turns(), list[Taker]()

    class OneStep(Taker):
        def ask(self) -> None:
            taken.append(self)
            asyncio.get_running_loop().call_soon(self.go)

        def go(self) -> None:
            if earned:
                turns.earned(self)
            turns.leave(self)
            come()

    def come() -> None:
        turns.ask(OneStep(turns, 0.02))

    run(5, come)
    assert (0.02 * len(taken) > AT_FIRST + 4 * SHARE * 5) == earned


def test_who_has_had_no_turn_goes_before_those_who_had() -> None:
    """A job that begins beside others of its user that talk without end; and so does one that has earned its turns."""
    turns, order = Turns(), list[str]()

    class Named(Taker):
        def __init__(self, name: str) -> None:
            super().__init__(turns, 0.0)
            self.name = name

        def take_turn(self) -> None:
            order.append(self.name)

    old, older, worker, late = map(Named, ("old", "older", "worker", "late"))

    async def live() -> None:
        for one in (older, old, worker):
            one.ask()
        await asyncio.sleep(0.05)
        turns.earned(worker)
        for one in (older, old, worker, late):
            one.ask()
        await asyncio.sleep(0.05)

    asyncio.run(live())
    assert order == ["older", "old", "worker", "worker", "late", "older", "old"]


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_was_taken_before_a_turn_counts_with_it(goes_on: bool) -> None:
    """And is earned with it: of what goes on for one step, all."""

    class Reader(Taker):
        def take_turn(self) -> None:
            self.taken.append(time.perf_counter())
            self.turns.ask(self, AT_FIRST / 4, goes_on=goes_on)

    async def live() -> tuple[int, int]:
        reader = Reader(turns := Turns(), 0.0)
        turns.ask(reader, AT_FIRST / 4)
        await asyncio.sleep(0.3)
        before = len(reader.taken)
        turns.earned(reader)
        await asyncio.sleep(0.3)
        return before, len(reader.taken) - before

    before, after = asyncio.run(live())
    assert 4 <= before <= 6
    assert (after >= 4) if goes_on else (1 <= after <= 2), after


def test_those_who_wait_go_on_as_soon_as_others_have_earned_their_turns() -> None:
    """As when many jobs begin at once, whose model takes its time for their first steps."""
    turns = Turns()
    many = [Taker(turns, AT_FIRST / 4) for _ in range(8)]
    for one in many:
        one.ask = lambda: None  # type: ignore[method-assign]  # one turn each

    async def live() -> list[int]:
        for one in many:
            turns.ask(one)
        await asyncio.sleep(2 * AT_FIRST)
        before = sum(len(one.taken) for one in many)
        for one in many[:4]:
            turns.earned(one)
        await asyncio.sleep(2 * AT_FIRST)
        return [before, sum(len(one.taken) for one in many)]

    before, after = asyncio.run(live())
    assert 4 <= before < 8 and after == 8


def test_who_is_gone_has_no_turn() -> None:
    turns = Turns()
    a, b = Taker(turns, 0.0), Taker(turns, 0.0)
    a.take_turn = lambda: a.taken.append(0.0)  # type: ignore[method-assign]
    run(0.05, lambda: (a.ask(), b.ask(), turns.leave(b)))
    assert a.taken and not b.taken
    assert not turns.waits(b)
