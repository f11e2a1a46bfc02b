"""Who hears late that workers ended over their structure, as who tries the same again at once would have all of one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from rootstock_client.errors import RootstockError
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.roles import Client

Tell = Callable[[Evaluation[Client], RootstockError], object]


class DelayedVerdicts:
    """Evaluations that were given up, until others have had a worker for as long as they had none for each.

    Of each user one after another, and only time in which there is a worker counts: or many jobs of one user would
    spend each other's.

    Args:
        tell: called with an evaluation and its error when they are due.
        others: whether anybody wants the worker.
    """

    def __init__(self, tell: Tell, others: Callable[[], bool]) -> None:
        self._tell, self._others = tell, others
        self._due: dict[int, deque[tuple[Evaluation[Client], RootstockError, float]]] = {}
        """By user: each with seconds that are left."""
        self._timers: dict[int, asyncio.TimerHandle] = {}
        """Of whoever is next of each user, while there is a worker."""
        self._there = False

    def add(self, evaluation: Evaluation[Client], error: RootstockError, seconds: float) -> None:
        """Tell of an evaluation when others have had a worker for so long."""
        due = self._due.setdefault(evaluation.user, deque())
        due.append((evaluation, error, seconds))
        if self._there and len(due) == 1:
            self._wait(evaluation.user)

    def resume(self) -> None:
        """There is a worker: the clock of what is to be told goes on."""
        self._there = True
        for user in list(self._due):
            self._wait(user)

    def pause(self) -> None:
        """There is no worker: the clock stands still."""
        self._there = False
        for user, timer in self._timers.items():
            timer.cancel()
            evaluation, error, _ = self._due[user].popleft()
            left = max(0.0, timer.when() - asyncio.get_running_loop().time())
            self._due[user].appendleft((evaluation, error, left))
        self._timers.clear()

    def tell_all(self) -> None:
        """Tell all at once."""
        due, self._due = self._due, {}
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for evaluations in due.values():
            for evaluation, error, _ in evaluations:
                self._tell(evaluation, error)

    def _wait(self, user: int) -> None:
        seconds = self._due[user][0][2] if self._others() else 0.0
        self._timers[user] = asyncio.get_running_loop().call_later(seconds, self._tell_next, user)

    def _tell_next(self, user: int) -> None:
        del self._timers[user]
        due = self._due[user]
        evaluation, error, _ = due.popleft()
        if due:
            self._wait(user)
        else:
            del self._due[user]
        self._tell(evaluation, error)
