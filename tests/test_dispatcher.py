"""How long a batch may take, by what the dispatcher has seen; and a worker's process that can't be ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rootstockd.environments.finding import find_environment
from rootstockd.processes import worker_process
from rootstockd.processes.ends import End
from rootstockd.processes.output import Ration
from rootstockd.processes.worker_process import WorkerProcess
from rootstockd.supervision import dispatcher as module
from rootstockd.supervision.dispatcher import Dispatcher
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.roles import Client
from rootstockd.worker.engines import ModelSpec

LEAST, ATOMS = 60.0, 2_900


class Bench:
    """A dispatcher, and a worker that takes as long as it is told, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        self.dispatcher = Dispatcher("slow", 10_000, LEAST, lambda: None)
        self.worker = SimpleNamespace(usable=True, attached=set(), first_rates={})
        self.worker.attach = lambda number, *_: self.worker.attached.add(number)
        self.worker.evaluate = bytes
        self.dispatcher.have(cast("WorkerProcess", self.worker))

    def step(self, number: int, seconds: float, atoms: int = ATOMS, stopped: float = 0.0) -> float:
        """A step of a session; the seconds that it might have taken."""
        owner = SimpleNamespace(
            system=SimpleNamespace(number=number, slot=None, settings={}), evaluated=lambda _error: None
        )
        self.dispatcher.submit(Evaluation(cast("Client", owner), atoms, user=1))
        limit = self.dispatcher.hang_limit
        for _ in range(int(seconds)):
            self.dispatcher.looked()
        self.now += seconds + stopped
        assert self.dispatcher.heard(b"E", bytes([number]))
        return limit


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def run(story: Callable[[], Any]) -> None:
    async def live() -> None:
        story()

    asyncio.run(live())


def test_steps_of_a_slow_session_may_take_what_its_first_step_says(bench: Bench) -> None:
    def story() -> None:
        bench.step(1, 100.0)  # compared with what computes the other's steps
        for _ in range(5):
            bench.step(1, 0.01)
        assert [bench.step(2, 100.0) for _ in range(4)] == pytest.approx([1_000] * 4, rel=0.01)

    run(story)


def test_how_slow_one_was_at_first_is_nothing_to_others(bench: Bench) -> None:
    """Nor to itself, once an ordinary step has shown what these take: the first was compared, and compiled for."""

    def story() -> None:
        bench.step(1, 0.01)
        bench.step(1, 0.01)
        bench.step(2, 50.0)
        assert bench.step(1, 0.01) == LEAST
        assert bench.step(2, 0.01) == pytest.approx(500)
        assert bench.step(2, 0.01) == LEAST
        assert not bench.worker.first_rates

    run(story)


def test_while_the_daemon_was_stopped_nothing_was_slow(bench: Bench) -> None:
    def story() -> None:
        for _ in range(3):
            bench.step(1, 5.0)
        before = bench.step(1, 5.0)
        bench.step(1, 5.0, stopped=3_600.0)
        assert bench.step(1, 5.0) < 2 * before

    run(story)


def test_a_worker_that_can_not_be_ended_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a device's driver holds is: its model goes to another device."""
    monkeypatch.setattr(worker_process, "UNKILLABLE", 0.2)

    async def story() -> None:
        spec = ModelSpec("noop", "noop", "cpu", "float64")
        worker = await WorkerProcess.start(spec, find_environment("noop", "noop"), {}, lambda *_: None, Ration())
        process = worker._process
        worker._process = cast(
            "asyncio.subprocess.Process", SimpleNamespace(pid=process.pid, wait=process.wait, kill=lambda: None)
        )
        try:
            worker.kill(End("it hung", blamed=True, hung=True))
            end = await asyncio.wait_for(worker.wait(), 30)
            assert (end.blamed, end.disorder, worker.usable) == (True, True, False)
            assert end.how == "it hung, and does not end: it is left to the kernel"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    asyncio.run(story())


@pytest.mark.parametrize("how", ["it died", "it was put back"])
def test_a_worker_that_ends_was_busy_until_then(bench: Bench, how: str) -> None:
    """What it was at counted as work when it was last looked at, and that is not taken back."""

    def story() -> None:
        dispatcher = bench.dispatcher
        bench.step(1, 1.0)
        dispatcher.sample()
        owner = SimpleNamespace(system=SimpleNamespace(number=1, slot=None, settings={}), evaluated=lambda _error: None)
        dispatcher.submit(Evaluation(cast("Client", owner), ATOMS, user=1))
        bench.now += 50.0
        dispatcher.sample()
        if how == "it died":
            dispatcher.worker_lost(End("it hung", blamed=True, hung=True), 1.0)
        else:
            dispatcher.put_back()
        dispatcher.have(None)
        bench.now += 1.0
        dispatcher.sample()
        assert dispatcher.pace.load == pytest.approx(50 / 51)

    run(story)
