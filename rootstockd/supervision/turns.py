"""Whose turn it is before a worker: one user's queue, and what several users may have in one batch."""

from __future__ import annotations

import heapq
import math
from typing import Generic

from rootstockd.supervision.cost_curve import CostCurve
from rootstockd.supervision.evaluation import Evaluation, Owner


class User(Generic[Owner]):
    """One user's queue."""

    __slots__ = ("_now", "last", "latest", "queue", "share", "start", "uid")

    def __init__(self, uid: int, start: float) -> None:
        self.uid = uid
        self.start = start
        """Virtual time at which the user's next evaluation starts, among users'."""
        self.share = 1.0
        self.queue: list[tuple[float, int, Evaluation[Owner]]] = []
        """Each with the virtual time of its end, among the user's own."""
        self._now = 0.0
        """The end of the evaluation that was dispatched last."""
        self.latest = 0, False
        """The atoms of the latest evaluation, and whether it wants to be alone."""
        self.last = 0
        """The batch that it was in."""

    def push(self, evaluation: Evaluation[Owner], number: int, weight: float) -> None:
        self.share, self.latest = evaluation.share, (evaluation.atoms, evaluation.alone)
        heapq.heappush(self.queue, (self._now + weight, number, evaluation))

    def would_be_next(self, weight: float) -> bool:
        """Whether one that came now would overtake all that wait."""
        return not self.queue or self._now + weight < self.queue[0][0]

    def pop(self) -> Evaluation[Owner]:
        self._now, _, evaluation = heapq.heappop(self.queue)
        return evaluation

    def remove(self, evaluation: Evaluation[Owner]) -> bool:
        """Whether it was in the queue; it is not any more."""
        others = [entry for entry in self.queue if entry[2] is not evaluation]
        if len(others) == len(self.queue):
            return False
        self.queue = others
        heapq.heapify(others)
        return True


class Turns:
    """What may be in a batch where there are several users, by whose evaluations are in it.

    Args:
        turns: the turn of each user who wants the worker, in seconds, by uid.
        costs: what batches cost.
    """

    def __init__(self, turns: dict[int, float], costs: CostCurve) -> None:
        self._costs, self._several = costs, len(turns) > 1
        self._all, self._shortest = min((seconds, uid) for uid, seconds in turns.items())
        self._others = min((seconds for uid, seconds in turns.items() if uid != self._shortest), default=math.inf)
        self._in_it: set[int] = set()

    def allow(self, uid: int, atoms: int, more: int) -> bool:
        """Whether a batch of so many atoms may have so many more in an evaluation of this user.

        Nobody waits for themselves. Others may be back before the next batch, so what gains nothing by this one is left
        to that.
        """
        self._in_it.add(uid)
        alone = len(self._in_it) == 1 and uid == self._shortest
        if self._costs.seconds(atoms + more) > (self._others if alone else self._all):
            return False
        return not self._several or self._costs.gains(atoms, more)
