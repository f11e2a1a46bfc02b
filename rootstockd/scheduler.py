"""What one worker does next: evaluations in, batches out. No sockets and no clock, so that tests walk every path.

Batch what is waiting, never wait for a batch: while the worker is busy evaluations pile up, and its next pass takes
all that fit the budget, in the order in which they came. A session has at most one evaluation here, so first come,
first served is fair between sessions. The budget shrinks where larger batches turn out to be slower than their parts
(`CostCurve`), and where they did not fit the device's memory (`back_off`), from where it slowly grows again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from rootstockd.cost_curve import CostCurve

Owner = TypeVar("Owner")

MAX_BLAMED = 2
"""An evaluation that seems to have killed this many workers is given up."""
MAX_ATTEMPTS = 5
"""So is one under which this many workers ended for whatever reason: the kernel may kill them for want of memory."""
GROW_AFTER = 300
"""Batches after which larger ones are tried again where memory lacked once: whatever else had it may be gone."""


@dataclass(eq=False, slots=True)
class Evaluation(Generic[Owner]):
    """One session's structures on their way to a result.

    Args:
        owner: whoever is told how it ended.
        atoms: how large it is.
    """

    owner: Owner
    atoms: int
    attempts: int = 0
    """How many workers died under it."""
    blamed: int = 0
    """How many of them it may have killed itself."""
    ends: tuple[str, ...] = ()
    """How they ended, in words."""
    withdrawn: bool = False
    """Nobody wants its result any more."""


class Scheduler(Generic[Owner]):
    """The queue before one worker.

    Args:
        batch_atoms: atoms in one batch; a single larger evaluation is a batch of its own.
    """

    def __init__(self, batch_atoms: int) -> None:
        self.batch_atoms = self._most = batch_atoms
        self._good = 0
        """Batches since the last time that memory lacked."""
        self.costs = CostCurve()
        self.waiting: deque[Evaluation[Owner]] = deque()
        self.running: list[Evaluation[Owner]] = []

    @property
    def budget(self) -> int:
        """Atoms in a batch of several evaluations, at most."""
        limit = self.costs.limit
        return self.batch_atoms if limit is None else min(self.batch_atoms, limit)

    def submit(self, evaluation: Evaluation[Owner]) -> None:
        """Queue an evaluation."""
        self.waiting.append(evaluation)

    def withdraw(self, evaluation: Evaluation[Owner]) -> None:
        """Forget an evaluation. One that runs can't be stopped, but it is not repeated."""
        evaluation.withdrawn = True
        if evaluation in self.waiting:
            self.waiting.remove(evaluation)

    def next_batch(self) -> list[Evaluation[Owner]]:
        """What the idle worker shall do now; empty while it is busy or when nothing waits.

        An evaluation under which a worker died runs alone, so that it can't take others down with it.
        """
        if self.running or not self.waiting:
            return []
        batch, atoms = [self.waiting.popleft()], 0
        budget = self.budget
        while self.waiting and not batch[0].attempts:
            atoms += batch[-1].atoms
            following = self.waiting[0]
            if following.attempts or atoms + following.atoms > budget:
                break
            batch.append(self.waiting.popleft())
        self.running = batch
        return batch

    def finished(self, seconds: float | None = None) -> list[Evaluation[Owner]]:
        """The worker is done with its batch, which is returned.

        Args:
            seconds: how long it took, where that says what a batch of this size costs.
        """
        batch, self.running = self.running, []
        if seconds is not None and batch:
            self.costs.learn(sum(evaluation.atoms for evaluation in batch), seconds)
            if self.batch_atoms < self._most:
                self._recover()
        return batch

    def _recover(self) -> None:
        self._good += 1
        if self._good % GROW_AFTER == 0:
            self.batch_atoms = min(self._most, self.batch_atoms + self.batch_atoms // 4 + 1)

    def back_off(self) -> None:
        """The batch under way did not fit the device's memory: smaller ones from now on."""
        self.batch_atoms = max(1, sum(evaluation.atoms for evaluation in self.running) // 2)
        self._good = 0

    def worker_lost(self, how: str = "", *, blame: bool = True) -> list[Evaluation[Owner]]:
        """The worker died. What it was at goes back to the front; what killed too many is returned, given up.

        Args:
            how: how it ended, in words.
            blame: it may have died of what it was at.
        """
        batch = [evaluation for evaluation in self.finished() if not evaluation.withdrawn]
        for evaluation in batch:
            evaluation.attempts += 1
            evaluation.blamed += blame
            evaluation.ends += (how,)
        given_up = [e for e in batch if e.blamed >= MAX_BLAMED or e.attempts >= MAX_ATTEMPTS]
        self.waiting.extendleft(reversed([e for e in batch if e not in given_up]))
        return given_up

    def clear(self) -> list[Evaluation[Owner]]:
        """Give up everything, and return it."""
        everything = self.finished() + list(self.waiting)
        self.waiting.clear()
        return everything
