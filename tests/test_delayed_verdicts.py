"""Who hears late that workers ended over their structure: when, by a clock that nobody waits for."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rootstock_client.errors import EvaluationError
from rootstockd.processes.ends import End
from rootstockd.processes.worker_process import WorkerProcess
from rootstockd.supervision.delayed_verdicts import DelayedVerdicts
from rootstockd.supervision.dispatcher import LONGEST_DELAY, Dispatcher
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.roles import Client
from rootstockd.supervision.scheduler import MAX_BLAMED

ERROR = EvaluationError("2 workers ended over this structure")


class _Hurried(selectors.SelectSelector):
    """Time goes to wherever somebody waits for it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += timeout or 0.0
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._hurried = _Hurried()
        super().__init__(self._hurried)

    def time(self) -> float:
        return self._hurried.now


@pytest.fixture
def run() -> Iterator[Callable[[Awaitable[None]], None]]:
    loop = _Loop()
    yield loop.run_until_complete
    loop.close()


def evaluation(name: str, user: int = 1) -> Evaluation[Client]:
    return cast("Evaluation[Client]", SimpleNamespace(name=name, user=user))


class Told:
    """Who was told, and when."""

    def __init__(self, others: bool = True) -> None:
        self.when: dict[str, float] = {}
        self.delayed = DelayedVerdicts(self._tell, lambda: others)

    def _tell(self, evaluation: Any, error: object) -> None:
        assert error is ERROR
        self.when[evaluation.name] = asyncio.get_running_loop().time()


def test_of_a_user_one_after_another(run: Callable[[Awaitable[None]], None]) -> None:
    async def there_is_a_worker() -> None:
        told = Told()
        told.delayed.resume()
        for name, user, seconds in [("a", 1, 3.0), ("b", 1, 2.0), ("c", 2, 4.0), ("d", 1, 1.0)]:
            told.delayed.add(evaluation(name, user), ERROR, seconds)
        await asyncio.sleep(100)
        assert told.when == pytest.approx({"a": 3.0, "c": 4.0, "b": 5.0, "d": 6.0})

    run(there_is_a_worker())


def test_only_time_with_a_worker_counts(run: Callable[[Awaitable[None]], None]) -> None:
    async def it_comes_and_goes() -> None:
        told = Told()
        told.delayed.add(evaluation("a"), ERROR, 3.0)
        told.delayed.add(evaluation("b"), ERROR, 3.0)
        await asyncio.sleep(10)
        told.delayed.resume()
        await asyncio.sleep(2)
        told.delayed.pause()
        await asyncio.sleep(10)
        assert not told.when
        told.delayed.resume()
        await asyncio.sleep(2)
        assert told.when == pytest.approx({"a": 23.0})
        told.delayed.pause()
        told.delayed.add(evaluation("c"), ERROR, 1.0)
        await asyncio.sleep(10)
        told.delayed.resume()
        await asyncio.sleep(100)
        assert told.when == pytest.approx({"a": 23.0, "b": 36.0, "c": 37.0})

    run(it_comes_and_goes())


def test_nobody_is_kept_waiting_for_no_one(run: Callable[[Awaitable[None]], None]) -> None:
    async def alone() -> None:
        told = Told(others=False)
        for name in "abc":
            told.delayed.add(evaluation(name), ERROR, 3.0)
        told.delayed.resume()
        await asyncio.sleep(1)
        assert told.when == pytest.approx({"a": 0.0, "b": 0.0, "c": 0.0})

    run(alone())


def test_all_at_once_at_the_end(run: Callable[[Awaitable[None]], None]) -> None:
    async def stopped() -> None:
        told = Told()
        told.delayed.resume()
        for name, user in [("a", 1), ("b", 1), ("c", 2)]:
            told.delayed.add(evaluation(name, user), ERROR, 3.0)
        await asyncio.sleep(1)
        told.delayed.tell_all()
        assert set(told.when) == {"a", "b", "c"}
        await asyncio.sleep(100)
        assert told.when == pytest.approx(dict.fromkeys("abc", 1.0))

    run(stopped())


def test_nobody_hears_later_than_after_a_minute(run: Callable[[Awaitable[None]], None]) -> None:
    """However long there was no worker: a large model takes many minutes to load."""

    async def slow_to_load() -> None:
        loop = asyncio.get_running_loop()
        when: dict[int, float] = {}
        dispatcher = Dispatcher("large", 4, 60.0, lambda: None)
        for number in (1, 2):
            owner = SimpleNamespace(
                system=SimpleNamespace(number=number),
                evaluated=lambda _error, number=number: when.update({number: loop.time()}),
            )
            dispatcher.submit(Evaluation(cast("Client", owner), 4, user=1))
        for _ in range(MAX_BLAMED):
            assert [one.owner.system.number for one in dispatcher.scheduler.next_batch()] == [1]
            dispatcher.worker_lost(End("it crashed", blamed=True), 600.0)
        dispatcher.have(cast("WorkerProcess", SimpleNamespace()))
        await asyncio.sleep(10_000)
        assert when == pytest.approx({1: LONGEST_DELAY}) and LONGEST_DELAY == 60.0

    run(slow_to_load())
