"""What one worker does next: evaluations in, batches out. No sockets and no clock, so that tests walk every path.

Batch what is waiting, never wait for a batch: while the worker is busy evaluations pile up, and its next pass takes
all that fit the budget. The budget shrinks where larger batches turn out to be slower than their parts (`CostCurve`),
and where they did not fit the device's memory (`back_off`), from where it slowly
grows again.

Who goes first is decided by fair queueing: between users start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) by
the seconds that their evaluations cost over their shares; between one user's sessions, who come and go and have one
evaluation at a time, the self-clocked kind (Golestani, INFOCOM 1994) by what they probably cost. Where several users
want the worker, a batch takes no longer than the turn of anybody who waits for others in it: the time of their own
evaluation times the sum of all shares over theirs. So a step takes at most twice as long as on a device of their
share's speed: once for the batch under way, once for its own. Nor are there several evaluations in it that gain nothing
by it: whoever has one at a time would be back only after it, and get half of their share.

One thing is waited for: a driver computes between two evaluations, and a much longer one of somebody else's that begins
in that moment would keep it from its share. So where it was back soon the last time, and it is its turn, the worker
waits for a small part of what the longer one takes (anticipatory scheduling: Iyer, Druschel, SOSP 2001). The time
counts as had by whoever is waited for.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping
from operator import attrgetter
from typing import Generic

from rootstockd.supervision.cost_curve import CostCurve
from rootstockd.supervision.evaluation import Evaluation, Owner
from rootstockd.supervision.turns import Turns, User

_ATOMS = attrgetter("atoms")

MAX_BLAMED = 2
"""An evaluation that seems to have killed this many workers is given up."""
MAX_STARVED = 5
"""So is one under which this many workers ended when memory may have run out: it may be what takes it."""
MAX_ATTEMPTS = 20
"""So is one under which this many ended for whatever reason: whoever kills them is outlasted."""
MAX_EVALUATIONS = 8_192
"""In one batch: their numbers go to the worker in one message."""
GROW_AFTER = 300
"""Batches after which larger ones are tried again where memory lacked once: whatever else had it may be gone."""
STILL_HERE = 4
"""Batches after a user's last evaluation in which more of them are expected: a driver computes, too."""
MUCH_LONGER = 4.0
"""Nobody's return is waited for unless what would begin meanwhile takes so many times as long as theirs does."""
WORTHWHILE = 0.1
"""The part of what it takes that is waited, at most."""
MOST_TIMES = 100.0
"""What an evaluation counts among its user's is at most so many times its atoms: the first of its kind may have taken
many thousand times what the next ones take, and nobody shall wait for thousands of others because of that."""
AWAY, SLACK = 2.0, 5e-4
"""Somebody is expected back after so many times what it took the last time, and so many seconds."""


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
        self._alone = CostCurve()
        """Of those that are in no batch: they may take longer for the same atoms."""
        self.expected = 0.0
        """Until when somebody is waited for, by the clock of `next_batch`; 0 if nobody is."""
        self._left: dict[Owner, Evaluation[Owner]] = {}
        """Of the last batch, whose owners may be back before much longer ones should begin."""
        self._ended = 0.0
        """When that batch did."""
        self.running: list[Evaluation[Owner]] = []
        self.waiting = 0
        """How many evaluations."""
        self._again: deque[Evaluation[Owner]] = deque()
        """Those under which a worker died: they go alone, and first when it is for the first time."""
        self._was_again = False
        """The latest batch was one of these."""
        self._users: dict[int, User[Owner]] = {}
        self._apart: set[int] = set()
        """Users over whose evaluations a worker has ended: in no batch with others' until one of theirs is done."""
        self._now = 0.0
        """Virtual time: the start of the latest evaluation that was dispatched."""
        self._batches = 0
        self._numbers = itertools.count()

    @property
    def budget(self) -> int:
        """Atoms in a batch of several evaluations, at most."""
        limit = self.costs.limit
        return self.batch_atoms if limit is None else min(self.batch_atoms, limit)

    def submit(self, evaluation: Evaluation[Owner]) -> None:
        """Queue an evaluation; one under which workers have ended elsewhere is suspected here, too."""
        self.waiting += 1
        if evaluation.attempts:
            self._again.append(evaluation)
            return
        user = self._users.get(evaluation.user)
        if user is None:
            user = self._users[evaluation.user] = User(evaluation.user, self._now)
        elif not user.queue and user.start < self._now:
            user.start = self._now  # nobody saves up time by not using it
        if self._left and self._left.pop(evaluation.owner, None) is not None and self.expected:
            user.start += (evaluation.submitted - self._ended) / evaluation.share
        user.push(evaluation, next(self._numbers), self._weight(evaluation))

    def reshare(self, shares: Mapping[int, float]) -> None:
        """Users have other shares from now on, and what they had by the old ones is not held against them."""
        for user in self._users.values():
            share = shares.get(user.uid, user.share)
            user.start = self._now + (user.start - self._now) * user.share / share
            user.share = share

    def withdraw(self, evaluation: Evaluation[Owner]) -> None:
        """Forget an evaluation. One that runs can't be stopped, but it is not repeated."""
        evaluation.withdrawn = True
        user = self._users.get(evaluation.user)
        if user and user.remove(evaluation):
            self.waiting -= 1
        elif evaluation in self._again:
            self._again.remove(evaluation)
            self.waiting -= 1
            self._charge(evaluation)  # or whoever leaves in time would pay for nothing

    def next_batch(self, now: float = math.inf) -> list[Evaluation[Owner]]:
        """What the worker shall do now; empty while it is busy, when nothing waits, or while somebody is `expected`.

        An evaluation under which a worker died runs alone, so that it can't take others down with it; at once, or if
        that was not the first, by turns with others.

        Args:
            now: by the clock of `finished`; infinite where nobody is waited for any more.
        """
        self.expected = 0.0
        if self.running or not self.waiting:
            return []
        if self._left and not self._again:
            self.expected = self._expect(now)
            if self.expected:
                return []
        self._left = {}
        self._batches += 1
        suspect = self._suspect()
        if suspect is not None:
            self._again.remove(suspect)
            if (user := self._users.get(suspect.user)) is not None:
                user.start = self._start(suspect.user) + self._seconds(suspect) / suspect.share
        self._was_again = suspect is not None
        self.running = self._fill() if suspect is None else [suspect]
        self.waiting -= len(self.running)
        return self.running

    def _suspect(self) -> Evaluation[Owner] | None:
        """The evaluation under which a worker died that is next, if one is.

        Between users that goes by what they had, and the time for which workers were lost is a part of it; of the
        user's own it goes before all others. What several died under alternates with others in any case.
        """
        if not self._again:
            return None
        first = min(self._again, key=lambda evaluation: (self._start(evaluation.user), evaluation.attempts > 1))
        if self.waiting > len(self._again):
            repeated = first.attempts > 1 and self._was_again
            if repeated or self._next_user().start < self._start(first.user):
                return None
        return first

    def _start(self, uid: int) -> float:
        """Virtual time at which a user's next evaluation starts."""
        user = self._users.get(uid)
        return self._now if user is None else max(user.start, self._now)

    def _expect(self, now: float) -> float:
        """Until when it is worthwhile to wait for somebody who has just left; 0 if it is not."""
        user = self._next_user()
        seconds, until = self._seconds(user.queue[0][2]), 0.0
        for left in self._left.values():
            back = self._ended + AWAY * left.away + SLACK
            longer = seconds >= MUCH_LONGER * self._seconds(left) and back - self._ended <= WORTHWHILE * seconds
            if longer and until < back and now < back and self._precedes(left, user):
                until = back
        return until

    def _may_be_long(self, atoms: int) -> bool:
        """Whether what comes next may take much longer than so many atoms do: as a rule it does not."""
        if self.waiting == len(self._again):  # what waits is what a worker died of, and there may be no users
            return False
        first = self._next_user().queue[0][2]
        return first.alone or first.atoms >= 2 * atoms

    def _precedes(self, left: Evaluation[Owner], user: User[Owner]) -> bool:
        """Whether a user who has left would have the turn before another does, if they were back."""
        own = self._users.get(left.user)
        if own is None:
            return False
        if own is user:
            return own.would_be_next(self._weight(left))
        return self._start(left.user) < user.start

    def _seconds(self, evaluation: Evaluation[Owner]) -> float:
        """Seconds that an evaluation probably takes by itself."""
        return self._curve(evaluation.alone).seconds(evaluation.atoms)

    def _curve(self, alone: bool) -> CostCurve:  # noqa: FBT001 - as Evaluation has it
        return self._alone if alone else self.costs

    def _weight(self, evaluation: Evaluation[Owner]) -> float:
        """What an evaluation counts among its user's: its atoms, each by what it takes over what one takes at best."""
        times = self._seconds(evaluation) / (evaluation.atoms * self.costs.cheapest)
        return evaluation.atoms * min(max(1.0, times), MOST_TIMES)

    def _fill(self) -> list[Evaluation[Owner]]:
        """A batch, in fair order; what does not fit is not overtaken."""
        budget = self.budget
        turns = Turns(self._turns(), self.costs) if len(self._users) > 1 else None
        user = self._next_user()
        batch: list[Evaluation[Owner]] = []
        atoms = 0
        if turns is None:  # whoever comes now begins here: what the only user had before is nobody's loss
            self._now = max(self._now, user.start)
        while user.queue:
            following = user.queue[0][2]
            more = following.atoms
            if batch and user.uid != batch[0].user and self._apart & {user.uid, batch[0].user}:
                break
            if batch and (following.alone or atoms + more > budget or len(batch) == MAX_EVALUATIONS):
                break
            if turns is not None:
                allowed = turns.allow(user.uid, atoms, more)
                if batch and not allowed:
                    break
                self._now = user.start
                user.start += self._seconds(following) / user.share
            atoms += more
            user.last = self._batches
            batch.append(user.pop())
            if following.alone:
                break
            if turns is not None:
                user = self._next_user()
        return batch

    def _next_user(self) -> User[Owner]:
        """The user whose turn it is: of those who wait, whoever had least. If nobody does, any user that there is."""
        users = self._users.values()
        if len(users) == 1:  # as it mostly is
            return next(iter(users))
        return min(users, key=lambda user: (not user.queue, user.start))

    def _turns(self) -> dict[int, float]:
        """The turns of those who want the worker, and forget those who don't and have had no more than others."""
        wanting = [user for user in self._users.values() if user.queue or self._batches - user.last <= STILL_HERE]
        self._users = {uid: user for uid, user in self._users.items() if user in wanting or user.start > self._now}
        shares = sum(user.share for user in wanting)
        turns = {}
        for user in wanting:
            atoms, alone = user.latest
            turns[user.uid] = self._curve(alone).seconds(atoms) * shares / user.share
        return turns

    def finished(self, seconds: float | None = None, now: float | None = None) -> list[Evaluation[Owner]]:
        """The worker is done with its batch, which is returned.

        Args:
            seconds: how long it took, where that says what a batch of this size costs.
            now: when it was, by the clock of `Evaluation.submitted`; None if nobody is to be expected back.
        """
        batch = self.running
        long = now is not None and self.waiting and batch and self._may_be_long(min(map(_ATOMS, batch)))
        self.running = []  # not before: if that failed, nobody else would have the batch
        if self._left:
            self._left = {}
        if now is not None and long:
            self._left, self._ended = {evaluation.owner: evaluation for evaluation in batch}, now
        if seconds is not None and batch:
            if self._apart and len({evaluation.user for evaluation in batch}) == 1:
                self._apart.discard(batch[0].user)
            self._curve(batch[0].alone).learn(sum(evaluation.atoms for evaluation in batch), seconds)
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

    def worker_lost(
        self, how: str = "", *, blame: bool = True, starved: bool = False, seconds: float = 0.0
    ) -> list[Evaluation[Owner]]:
        """The worker died. What it was at goes back to the front; what killed too many is returned, given up.

        Args:
            how: how it ended, in words.
            blame: it may have died of what it was at.
            starved: it may have been killed for want of memory.
            seconds: how long nothing else was done or will be, until there is another worker.
        """
        whole = self.finished()
        if blame or starved:
            self._hold_against(whole, seconds)
        batch = [evaluation for evaluation in whole if not evaluation.withdrawn]
        for evaluation in batch:
            evaluation.attempts += 1
            evaluation.blamed += blame
            evaluation.starved += starved
            evaluation.ends += (how,)
        given_up = [
            e for e in batch if e.blamed >= MAX_BLAMED or e.starved >= MAX_STARVED or e.attempts >= MAX_ATTEMPTS
        ]
        again = [e for e in batch if e not in given_up]
        self._again.extendleft(reversed(again))
        self.waiting += len(again)
        return given_up

    def _hold_against(self, batch: list[Evaluation[Owner]], seconds: float) -> None:
        """A worker has ended over a batch. Of several users it may have been any's: it shows when each goes alone."""
        users = {evaluation.user for evaluation in batch}
        self._apart |= users
        for evaluation in batch:
            evaluation.lost += seconds
        if len(users) == 1:
            self._charge(max(batch, key=lambda evaluation: evaluation.lost - evaluation.charged))
            for evaluation in batch:
                evaluation.charged = evaluation.lost
        for evaluation in batch:
            if evaluation.withdrawn:
                self._charge(evaluation)

    def _charge(self, evaluation: Evaluation[Owner]) -> None:
        """The time for which workers were lost over an evaluation counts as had by its user."""
        if (seconds := evaluation.lost - evaluation.charged) <= 0:
            return
        evaluation.charged = evaluation.lost
        uid = evaluation.user
        if (user := self._users.get(uid)) is None:
            user = self._users[uid] = User(uid, self._now)
            user.share, user.latest = evaluation.share, (evaluation.atoms, evaluation.alone)
        user.start = self._start(uid) + seconds / evaluation.share
        if len(self._users) == 1 and all(other.user == uid for other in self._again):
            self._now = user.start  # what the only user had is nobody's loss

    def put_back(self) -> None:
        """The worker goes for no fault of anybody's: what it was at is at the front of the queue again."""
        batch = [evaluation for evaluation in self.finished() if not evaluation.withdrawn]
        self._again.extendleft(reversed(batch))
        self.waiting += len(batch)

    def clear(self) -> list[Evaluation[Owner]]:
        """Give up everything, and return it."""
        everything = self.finished() + list(self._again)
        for user in self._users.values():
            everything += [entry[2] for entry in sorted(user.queue, key=lambda entry: entry[:2])]
        self._again.clear()
        self._left.clear()
        self._users.clear()
        self.waiting = 0
        return everything
