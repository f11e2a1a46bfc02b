"""One warm model: its queue, its worker, and whatever has to happen for there always to be a worker."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import logging
import time
from typing import Any, Protocol

from rootstock_client.errors import EvaluationError, LimitError, ModelLoadError, RootstockError
from rootstockd.environments.finding import Environment, find_environment
from rootstockd.hang_limit import HangLimit
from rootstockd.scheduler import MAX_BLAMED, Evaluation, Scheduler
from rootstockd.worker.engines import EngineInfo, ModelSpec
from rootstockd.worker.slots import Slot
from rootstockd.worker_messages import Confined, Failure, Said, Versions, parse
from rootstockd.worker_process import End, WorkerProcess

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 5
"""Workers in a row that died before they were ready, until the model counts as broken."""
MAX_HUNG_STARTS = 2
"""The same, of those that took longer to load than they may."""
PAUSES = (0.0, 0.0, 0.5, 1.0, 2.0)
"""Seconds before the next start, by failed starts in a row."""
TICK = 1.0
"""Seconds between looks at how long the worker has been at something, at most."""
STOP_PATIENCE = 10.0
"""Seconds that a stopping daemon waits for a killed worker, which may be stuck in the kernel."""
RETRY_AFTER = 10.0
"""Seconds until a broken model may be tried again."""


@functools.cache
def warn_once(text: str) -> None:
    """Log what is true of the machine and would be said again by every worker."""
    log.warning("%s", text)


class State(enum.Enum):
    """What a model is doing."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Client(Protocol):
    """What a supervisor needs of whoever has evaluations done: a session."""

    number: int
    """Unique for each slot that ever was."""
    slot: Slot
    settings: dict[str, Any]
    """What the worker is told of the slot's system."""

    def evaluated(self, error: RootstockError | None) -> None:
        """The evaluation is over."""


class Supervisor:
    """Keeps one model warm on one device.

    Args:
        spec: the model.
        variables: for its workers.
        batch_atoms: the most atoms in one forward pass.
        hang_timeout: seconds that any batch may take.
        load_timeout: seconds that loading may take.
    """

    def __init__(
        self,
        spec: ModelSpec,
        variables: dict[str, str],
        batch_atoms: int,
        hang_timeout: float,
        load_timeout: float,
    ) -> None:
        self.spec = spec
        self.state = State.LOADING
        self.error: RootstockError | None = None
        self.info: EngineInfo | None = None
        self.unconfined: list[str] = [] if spec.confine else ["the configuration or the catalogue says confine = false"]
        """Why its workers have more rights than they need."""
        self.evaluations = self.batches = self.restarts = self.clients = 0
        self.scheduler: Scheduler[Client] = Scheduler(batch_atoms)
        self.environment: Environment | None = None
        """Where its last worker was started; looked for anew for each, as another may have been built."""
        self._variables = variables
        self._worker: WorkerProcess | None = None
        self._failures: dict[int, RootstockError] = {}
        self._asked, self._shortages = b"", 0
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()
        self.retired = False
        self._hang_limit, self._load_timeout = HangLimit(hang_timeout), load_timeout
        self._tick = min(TICK, hang_timeout / 10, load_timeout / 10)
        self._ended_at = self._sent = 0.0
        self._new = False
        """Something in the batch under way is in it for the first time."""
        self._task = asyncio.create_task(self._keep_warm(), name=f"supervisor {spec.name}")

    @property
    def pid(self) -> int | None:
        """Process id of the worker, while there is one."""
        return self._worker.pid if self._worker else None

    async def settled(self) -> None:
        """Until the model is ready, or known to be broken."""
        await self._settled.wait()

    @property
    def worth_replacing(self) -> bool:
        """The model was found broken long enough ago to try it again."""
        return self.state is State.FAILED and time.monotonic() > self._ended_at + RETRY_AFTER

    # --- who has it

    def join(self) -> None:
        """One more system of a session is bound to this model."""
        self.clients += 1

    def leave(self) -> None:
        """One less."""
        self.clients -= 1
        self._end_if_unwanted()

    def retire(self) -> None:
        """No new sessions come: end with the last that is there."""
        self.retired = True
        self._end_if_unwanted()

    def _end_if_unwanted(self) -> None:
        if self.retired and not self.clients and not self._stopping.is_set():
            self._end_worker()

    def _end_worker(self) -> None:
        """For good: it holds nothing that wants saving."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.hang_up()
            self._worker.kill()

    # --- evaluations

    def submit(self, evaluation: Evaluation[Client]) -> None:
        """Have an evaluation done; its owner is told when it is over."""
        if self.error is not None:
            evaluation.owner.evaluated(self.error)
            return
        self.scheduler.submit(evaluation)
        if not self.scheduler.running:
            self._dispatch()

    def release(self, number: int) -> None:
        """A slot will not be used again."""
        if self._worker is not None:
            self._worker.detach(number)

    def _dispatch(self) -> None:
        worker = self._worker
        if worker is None or not worker.usable or self.state is not State.READY:
            return
        batch = self.scheduler.next_batch()
        if not batch:
            return
        numbers: list[int] = []
        refused: list[tuple[Evaluation[Client], LimitError]] = []
        for evaluation in batch:
            owner = evaluation.owner
            try:
                if owner.number not in worker.attached:
                    worker.attach(owner.number, owner.slot, owner.settings)
                    self._hang_limit.new_system()
                    self._new = True
            except OSError as error:
                refusal = LimitError(f"the daemon can't hand over this structure: {error.strerror}.")
                refused.append((evaluation, refusal))
            else:
                numbers.append(owner.number)
        if numbers:
            self._sent = time.perf_counter()
            self._asked, self._shortages = worker.evaluate(numbers), 0
        for evaluation, refusal in refused:
            batch.remove(evaluation)
            evaluation.owner.evaluated(refusal)
        if refused and not batch:
            self._dispatch()

    def _on_message(self, kind: bytes, body: bytes) -> None:
        if kind == b"E" and body == self._asked and self.scheduler.running:
            self._done()
        elif kind == b"O" and self._shortages < len(self.scheduler.running):
            self._shortages += 1  # each splits a batch
            self.scheduler.back_off()
            atoms = self.scheduler.batch_atoms
            log.warning("model %s: no memory for a batch; they have %d atoms at most now", self.spec.name, atoms)
        else:
            try:
                said = parse(kind, body)
                self._check_time(kind, said)
            except ValueError as error:
                what = str(error).partition("\n")[0][:200]
                log.warning("model %s: its worker says what makes no sense, and is ended: %s", self.spec.name, what)
                if self._worker is not None:  # whatever it sends now can't be trusted, nor what it computes
                    self._worker.distrust("what is no message")
            else:
                self._told(kind, said)

    def _check_time(self, kind: bytes, said: Said) -> None:
        """Whether a worker may say this now.

        Raises:
            ValueError: it may not.
        """
        if isinstance(said, Failure) and kind == b"F":
            if all(evaluation.owner.number != said.slot for evaluation in self.scheduler.running):
                raise ValueError(f"a failure of slot {said.slot}, which is not under way")
        elif (self.state is State.LOADING) == (kind == b"I"):
            raise ValueError(f"{kind!r} while the model is {self.state.value}")

    def _done(self) -> None:
        """The batch is done."""
        failures = self._failures
        if failures:
            self._failures = {}
        seconds = time.perf_counter() - self._sent
        new, self._new = self._new, False
        # a failure takes as long as it takes, and says nothing of what evaluations cost
        batch = self.scheduler.finished(None if failures else seconds)
        if self.scheduler.waiting:
            self._dispatch()  # first the device, then the answers
        self.batches += 1
        self.evaluations += len(batch)
        for evaluation in batch:
            owner = evaluation.owner
            owner.evaluated(failures.get(owner.number) if failures else None)
        if new or seconds > self._hang_limit.ordinary:
            sizes = [evaluation.atoms for evaluation in batch if evaluation.owner.number not in failures]
            self._hang_limit.learn(sum(sizes), max(sizes, default=0), seconds)

    def _told(self, kind: bytes, said: Said) -> None:
        """What the worker says in JSON."""
        if isinstance(said, Versions):
            self._compare(said)
        elif isinstance(said, Confined):
            self.unconfined = said.missing
            for what in said.missing:
                warn_once(f"workers are not wholly confined: {what} (SECURITY.md)")
        elif isinstance(said, Failure):
            error = said.error
            if isinstance(error, LimitError):
                if largest := self._hang_limit.largest:
                    error.message += f" The largest that this model has evaluated had {largest} atoms."
                log.warning("model %s: %s", self.spec.name, error.message)
            if kind == b"F":
                self._failures[said.slot] = error
            else:
                self.error = error
        else:
            self._computes(said, ready=kind == b"R")

    def _computes(self, info: EngineInfo, *, ready: bool) -> None:
        self.info = info
        where = f"{self.spec.device} in {self.spec.dtype} ({info.backend})"
        if ready:
            log.info("model %s is ready on %s", self.spec.name, where)
            self._set_state(State.READY)
            self._dispatch()
        if info.note:
            log.warning("model %s on %s: %s", self.spec.name, where, info.note)

    def _compare(self, versions: Versions) -> None:
        """End a worker that this daemon can't talk to."""
        try:
            versions.check()
        except ModelLoadError as error:
            self.error = error
            if self._worker is not None:
                self._worker.kill(End(error.message, blamed=False))
                self._worker.hang_up()

    # --- the worker's life

    async def _keep_warm(self) -> None:
        """Start workers, one after another as they die, until the model is broken or no longer wanted."""
        failed: list[End] = []
        while not self._stopping.is_set():
            self._set_state(State.LOADING)
            end = await self._run_worker()
            if self._stopping.is_set():
                return
            failed = [*failed, end] if self.state is State.LOADING else []
            log.warning("the worker of %s ended: %s", self.spec.name, end.how)
            if self.error is None and (
                len(failed) >= MAX_FAILED_STARTS or sum(start.hung for start in failed) >= MAX_HUNG_STARTS
            ):
                ends = "; ".join(start.how for start in failed)
                self.error = ModelLoadError(
                    f"model {self.spec.name!r}: {len(failed)} workers ended before they were ready: {ends}.",
                    "`rootstockd logs` has what they printed.",
                )
            self._worker_lost(end)
            if self.error is not None:
                log.error("%s", self.error)
                self._ended_at = time.monotonic()
                self._set_state(State.FAILED)
                return
            self.restarts += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), PAUSES[len(failed)])

    async def _run_worker(self) -> End:
        """One worker from its start to its end."""
        try:
            self.environment = await asyncio.to_thread(find_environment, self.spec.environment, self.spec.family)
            worker = self._worker = await WorkerProcess.start(
                self.spec, self.environment, self._variables, self._on_message
            )
        except ModelLoadError as error:
            self.error = error
            return End(error.message, blamed=True)
        except Exception as error:  # or the model would count as loading for ever
            return End(f"it could not be started: {error}", blamed=True)
        if self._stopping.is_set():
            worker.kill()
        watch = asyncio.create_task(self._watch(worker), name=f"watch {self.spec.name}")
        try:
            return await worker.wait()
        finally:
            watch.cancel()
            self._worker = None

    async def _watch(self, worker: WorkerProcess) -> None:
        """Kill a worker that is at one thing for too long.

        Time is counted in looks at it: while the daemon itself is stopped, or the whole machine, none goes by.
        """
        began, looks = -1.0, 0
        while True:
            await asyncio.sleep(self._tick)
            loading, running = self.state is State.LOADING, self.scheduler.running
            if not loading and (not running or self._sent != began):
                began, looks = self._sent, 0
                continue
            looks += 1
            waited = looks * self._tick
            limit = self._load_timeout if loading else self._batch_limit(running)
            if waited < limit:
                continue
            worker.hear_out()  # its answer may have come while nobody looked
            if self.state is State.LOADING if loading else self.scheduler.running and self._sent == began:
                what = "loading" if loading else "an evaluation"
                how = f"it hung: {what} took {waited:.3g} s where {limit:.3g} s is the limit"
                end = End(how, blamed=True, hung=True)
                log.warning("model %s: worker %d is killed, %s", self.spec.name, worker.pid, end.how)
                worker.kill(end)
                return

    def _batch_limit(self, batch: list[Evaluation[Client]]) -> float:
        sizes = [evaluation.atoms for evaluation in batch]
        return self._hang_limit.seconds(sum(sizes), max(sizes))

    def _worker_lost(self, end: End) -> None:
        failures, self._failures = self._failures, {}
        if self.error is not None:
            for evaluation in self.scheduler.clear():
                evaluation.owner.evaluated(self.error)
            return
        for evaluation in [e for e in self.scheduler.running if e.owner.number in failures]:
            self.scheduler.withdraw(evaluation)  # what became of it was said before the end
            evaluation.owner.evaluated(failures[evaluation.owner.number])
        for evaluation in self.scheduler.worker_lost(end.how, blame=end.blamed):
            error = EvaluationError(
                f"model {self.spec.name!r}: {evaluation.attempts} workers ended over this structure: "
                f"{'; '.join(evaluation.ends)}.",
                "The model itself is up again; look at the structure, and at `rootstockd logs`."
                if evaluation.blamed >= MAX_BLAMED
                else "These signals come from outside: from the kernel when memory runs out (see `dmesg`), or from "
                "people. Try again, or use a smaller structure.",
            )
            log.warning("%s", error.message)
            evaluation.owner.evaluated(error)

    def _set_state(self, state: State) -> None:
        self.state = state
        if state in (State.READY, State.FAILED):
            self._settled.set()

    async def stop(self, error: RootstockError) -> None:
        """End the worker; what still waits is told `error`."""
        for evaluation in self.scheduler.clear():
            evaluation.owner.evaluated(error)
        self._end_worker()
        await asyncio.wait([self._task], timeout=STOP_PATIENCE)
        if not self._task.done():
            log.error("model %s: its worker was killed, but does not end; it is left to the kernel", self.spec.name)
