"""The evaluations of one model: handed to its worker in batches, and back to their sessions when they are done."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rootstock_client.errors import EvaluationError, LimitError, RootstockError
from rootstockd.host.log_rate import LogRate
from rootstockd.processes.ends import End
from rootstockd.processes.messages import Failure
from rootstockd.processes.worker_process import WorkerProcess
from rootstockd.supervision.delayed_verdicts import DelayedVerdicts
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.failed_starts import FROM_OUTSIDE
from rootstockd.supervision.hang_limit import HangLimit
from rootstockd.supervision.meter import Meter, Totals
from rootstockd.supervision.pace import Pace
from rootstockd.supervision.roles import Client
from rootstockd.supervision.scheduler import MAX_BLAMED, MAX_STARVED, Scheduler
from rootstockd.supervision.watchdog import TICK
from rootstockd.words import counted

if TYPE_CHECKING:
    from rootstockd.supervision.supervisor import Supervisor

log = logging.getLogger(__name__)
log.addFilter(LogRate(log))

LONGEST_DELAY = 60.0
"""Seconds at most by which the news that workers ended over a structure is late."""
RECENT = 1.0
"""Seconds after an evaluation in which somebody is still expected to want more."""


class Dispatcher:
    """Has evaluations done by one worker after another.

    Args:
        name: the model's, for the log.
        batch_atoms: the most atoms in one forward pass.
        hang_timeout: seconds that any batch may take.
        want: called when there is something to do and no worker for it.
        tick: seconds between looks at what the worker is at.
    """

    def __init__(
        self, name: str, batch_atoms: int, hang_timeout: float, want: Callable[[], object], tick: float = TICK
    ) -> None:
        self.scheduler: Scheduler[Client] = Scheduler(batch_atoms)
        self._worker: WorkerProcess | None = None
        self.evaluations = self.batches = 0
        """Done so far."""
        self.pace, self.meter = Pace(), Meter(Totals())
        self.sent = 0.0
        """When the batch under way began."""
        self.last_use = time.perf_counter()
        """When there last was something to do."""
        self._name, self._want = name, want
        self._hang_limit = HangLimit(hang_timeout)
        self._asked, self._shortages = b"", 0
        self._failures: dict[int, RootstockError] = {}
        self._going: dict[Client, Supervisor] = {}
        """Who goes over to which other worker after the evaluation under way."""
        self._computed = 0.0
        self._resuming: asyncio.TimerHandle | None = None
        """Somebody is waited for until then."""
        self._new: list[int] = []
        """Slots whose first structure is in the batch under way."""
        self._tick, self._watched = tick, 0.0
        """Seconds of the batch under way for which this process ran, as far as `looked` was called."""
        self._largest: dict[tuple[int, bool], int] = {}
        """Atoms of each user's largest evaluation so far, by whether it was `alone`: those may take far more."""
        self._verdicts: dict[Evaluation[Client], tuple[RootstockError, asyncio.Handle]] = {}
        """What is yet to be told of evaluations that won't be done."""
        self._delayed = DelayedVerdicts(lambda evaluation, error: evaluation.owner.evaluated(error), self._in_use)

    @property
    def queue(self) -> int:
        """Evaluations that wait or are under way."""
        return self.scheduler.waiting + len(self.scheduler.running)

    @property
    def hang_limit(self) -> float:
        """Seconds that the batch under way may take."""
        sizes = [evaluation.atoms for evaluation in self.scheduler.running]
        larger = max(sizes) > max(self._largest.values(), default=0)
        own = 0.0
        if self._worker is not None and (rates := self._worker.first_rates):
            own = max(rates.get(evaluation.owner.system.number, 0.0) for evaluation in self.scheduler.running)
        return self._hang_limit.seconds(sum(sizes), first=bool(self._new), larger=larger, own=own)

    @property
    def abandoned(self) -> bool:
        """Whoever wanted what is under way has gone, and others wait."""
        scheduler = self.scheduler
        return scheduler.waiting > 0 and all(evaluation.withdrawn for evaluation in scheduler.running)

    def looked(self) -> None:
        """Somebody has looked what the worker is at."""
        self._watched += self._tick

    def have(self, worker: WorkerProcess | None) -> None:
        """Take the worker that is ready, or note that there is none."""
        self._worker = worker
        if worker is None:
            self._delayed.pause()
        else:
            self._delayed.resume()

    def _in_use(self) -> bool:
        return self.queue > 0 or time.perf_counter() - self.last_use < RECENT

    def sample(self) -> None:
        """Look at how fast it is."""
        self.meter.count()
        now = time.perf_counter()
        under_way = now - self.sent if self.scheduler.running else 0.0
        self.pace.sample(now, self.evaluations, self._computed + under_way, self.queue)

    # --- from sessions to the worker

    def submit(self, evaluation: Evaluation[Client]) -> None:
        """Have an evaluation done; its owner is told when it is over."""
        self.scheduler.submit(evaluation)
        if not self.scheduler.running:
            self.dispatch()

    def dispatch(self) -> None:
        """Send the next batch, if there is one and a worker for it."""
        worker = self._worker
        if worker is None or not worker.usable:
            self._want()
            return
        batch = self._next_batch()
        if not batch:
            return
        numbers: list[int] = []
        refused: list[tuple[Evaluation[Client], LimitError]] = []
        for evaluation in batch:
            system = evaluation.owner.system
            try:
                if system.number not in worker.attached:
                    worker.attach(system.number, system.slot, system.settings)
                    self._hang_limit.new_system()
                    self._new.append(system.number)
            except OSError as error:
                refusal = LimitError(
                    f"model {self._name!r}: the daemon can't hand this structure over to a worker: {error.strerror}.",
                    "`rootstockd logs` may have more; try again when others have less to do.",
                )
                refused.append((evaluation, refusal))
            else:
                numbers.append(system.number)
        if numbers:
            self.sent, self._watched = time.perf_counter(), 0.0
            self._asked, self._shortages = worker.evaluate(numbers), 0
        for evaluation, refusal in refused:
            batch.remove(evaluation)
            self.tell_later(evaluation, refusal)
        if refused and not batch:
            asyncio.get_running_loop().call_soon(self.dispatch)

    def _next_batch(self) -> list[Evaluation[Client]]:
        """What the scheduler says, which is asked again when somebody who is waited for is late."""
        now = time.perf_counter()
        batch, expected = self.scheduler.next_batch(now), self.scheduler.expected
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        if expected:
            self._resuming = asyncio.get_running_loop().call_later(expected - now, self._resume)
        return batch

    def _resume(self) -> None:
        """Whoever was waited for is here, or is late."""
        self._resuming = None
        if self.scheduler.waiting and not self.scheduler.running:
            self.dispatch()

    # --- from the worker to sessions

    def heard(self, kind: bytes, body: bytes) -> bool:
        """Whether a message of the worker was about the batch under way, and has been taken."""
        if kind == b"E" and body == self._asked and self.scheduler.running:
            self._done()
            return True
        if kind == b"O" and self._shortages < len(self.scheduler.running):
            self._shortages += 1  # each splits a batch
            before = self.scheduler.batch_atoms
            self.scheduler.back_off()
            if (atoms := self.scheduler.batch_atoms) != before:
                log.warning("model %s: no memory for a batch; they have %d atoms at most now", self._name, atoms)
            return True
        return False

    def check_under_way(self, slot: int) -> None:
        """Whether an evaluation of this slot is.

        Raises:
            ValueError: it is not.
        """
        if all(evaluation.owner.system.number != slot for evaluation in self.scheduler.running):
            raise ValueError(f"a failure of slot {slot}, which is not under way")

    def failed(self, failure: Failure) -> None:
        """An evaluation under way has failed; its owner hears of it with the batch."""
        error = failure.error
        if f"model {self._name!r}" not in error.message:  # an engine need not know what it is called here
            error.message = f"model {self._name!r}: {error.message}"
        if isinstance(error, LimitError):
            evaluation = next(e for e in self.scheduler.running if e.owner.system.number == failure.slot)
            if largest := self._largest.get((evaluation.user, evaluation.alone)):  # others' are not theirs to know
                how = " with `exact`" if evaluation.alone else ""
                error.message += f" The largest of yours that this model has evaluated{how} had {largest} atoms."
            log.warning("%s", error.message, extra={"about": f"model {self._name}, structures that are too large"})
        self._failures[failure.slot] = error

    def _done(self) -> None:
        """The batch is done."""
        failures = self._failures
        if failures:
            self._failures = {}
        sent = self.sent
        seconds = time.perf_counter() - sent
        worked = min(seconds, self._watched + 2 * self._tick)  # this process may have been stopped meanwhile
        new, self._new = self._new, []
        # a failure takes as long as it takes, and says nothing of what evaluations cost
        batch = self.scheduler.finished(None if failures else worked, sent + seconds)
        try:
            if self.scheduler.waiting:
                self.dispatch()  # first the device, then the answers
        finally:  # which there are, whatever is wrong with what is next
            self.batches += 1
            self.evaluations += len(batch)
            self._computed += seconds
            self.last_use = sent + seconds
            for evaluation in batch:
                owner = evaluation.owner
                owner.evaluated(failures.get(owner.system.number) if failures else None)
        self.meter.done(batch, sent, seconds)
        if self._going:
            self._let_go()
        self._learn(batch, failures, new, worked)

    def _learn(
        self, batch: list[Evaluation[Client]], failures: dict[int, RootstockError], new: list[int], seconds: float
    ) -> None:
        """What a batch says of how long others may take."""
        rates, attached = ({}, set()) if self._worker is None else (self._worker.first_rates, self._worker.attached)
        if rates and not new:
            for evaluation in batch:
                rates.pop(evaluation.owner.system.number, None)
        if new or seconds > self._hang_limit.ordinary:
            done = [evaluation for evaluation in batch if evaluation.owner.system.number not in failures]
            rate = self._hang_limit.learn(sum(evaluation.atoms for evaluation in done), seconds, first=bool(new))
            rates.update((number, rate) for number in new if number in attached)
            for evaluation in done:
                kind = evaluation.user, evaluation.alone
                self._largest[kind] = max(self._largest.get(kind, 0), evaluation.atoms)

    def give_up(self, error: RootstockError) -> None:
        """Tell all who wait for an evaluation that it won't be done."""
        self._failures.clear()
        self.tell_verdicts()
        for evaluation in self.scheduler.clear():
            evaluation.owner.evaluated(error)

    def tell_later(self, evaluation: Evaluation[Client], error: RootstockError) -> None:
        """Tell its owner that it won't be done; never at once: their next may be here already, and the next."""
        evaluation.withdrawn = True
        handle = asyncio.get_running_loop().call_soon(self._tell_verdict, evaluation)
        self._verdicts[evaluation] = error, handle

    def tell_verdicts(self) -> None:
        """Tell at once all that was to be told later."""
        for evaluation in list(self._verdicts):
            self._tell_verdict(evaluation)
        self._delayed.tell_all()

    def _tell_verdict(self, evaluation: Evaluation[Client]) -> None:
        error, handle = self._verdicts.pop(evaluation)
        handle.cancel()
        evaluation.owner.evaluated(error)

    def put_back(self) -> None:
        """The worker goes for no fault of anybody's: what it was at is at the front of the queue again."""
        self._count_lost()
        self._failures.clear()
        self.scheduler.put_back()

    def _count_lost(self) -> None:
        """A batch ends without results: the worker was busy with it all the same."""
        if self.scheduler.running:
            self._computed += time.perf_counter() - self.sent

    def worker_lost(self, end: End, loading: float) -> None:
        """The worker has ended; what it was at goes back to the front of the queue.

        Args:
            end: how.
            loading: how many seconds it takes until there is another, probably.
        """
        self._count_lost()
        failures, self._failures = self._failures, {}
        for evaluation in [e for e in self.scheduler.running if e.owner.system.number in failures]:
            self.scheduler.withdraw(evaluation)  # what became of it was said before the end
            evaluation.owner.evaluated(failures[evaluation.owner.system.number])
        away = time.perf_counter() - self.sent + loading
        given_up = self.scheduler.worker_lost(end.how, blame=end.blamed, starved=end.starved, seconds=away)
        for evaluation in given_up:
            if evaluation.blamed >= MAX_BLAMED:
                hint = "The model itself is up again; look at the structure, and at `rootstockd logs`."
            elif evaluation.starved >= MAX_STARVED:
                hint = f"{FROM_OUTSIDE} Try again, or use a smaller structure."
            else:
                hint = "People or programs end this model's workers, again and again: find out who, then try again."
            error = EvaluationError(
                f"model {self._name!r}: {evaluation.attempts} workers ended over this structure: "
                f"{counted(evaluation.ends)}.",
                hint,
            )
            log.warning("%s", error.message)
            # others have the worker first, for as long as they had none: whoever tries the same again would keep it
            if self.scheduler.waiting:
                evaluation.withdrawn = True
                self._delayed.add(evaluation, error, min(evaluation.lost + loading, LONGEST_DELAY))
            else:
                self.tell_later(evaluation, error)

    # --- to another worker

    def hand_over(self, clients: Iterable[Client], target: Supervisor, count: int) -> None:
        """Have so many of these clients, of those that have work, go over to another worker, the newest first."""
        running = {evaluation.owner for evaluation in self.scheduler.running}
        for client in sorted(set(clients) - self._going.keys(), key=lambda client: -client.system.number):
            if count == 0:
                return
            if client in running:
                self._going[client] = target  # when its evaluation is over
                count -= 1
            elif client.queued:
                count -= client.move(target)

    def stays(self, client: Client) -> None:
        """Do not have it go over any more: it has left by itself."""
        self._going.pop(client, None)

    def _let_go(self) -> None:
        """An evaluation is over after which sessions were to go over to another worker."""
        going, self._going = self._going, {}
        for client, target in going.items():
            if not target.retired and target.error is None:  # nor has it ended, or failed
                client.move(target)
