"""One warm model: its queue, its worker, and whatever has to happen for there always to be a worker."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time

from rootstock_client.errors import EvaluationError, LimitError, ModelLoadError, RootstockError
from rootstockd.config import Device
from rootstockd.environments.finding import Environment, find_environment
from rootstockd.hang_limit import HangLimit
from rootstockd.meter import Meter, Totals
from rootstockd.pace import Pace
from rootstockd.roles import Client, Landlord, State
from rootstockd.scheduler import MAX_BLAMED, Evaluation, Scheduler
from rootstockd.worker.engines import EngineInfo, ModelSpec
from rootstockd.worker_messages import Confined, Failure, Said, Stage, Versions, parse
from rootstockd.worker_output import Ration
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


class Supervisor:
    """Keeps one model warm on one device at a time, for as long as it is wanted there.

    Args:
        spec: the model.
        landlord: whoever has the devices.
        batch_atoms: the most atoms in one forward pass.
        hang_timeout: seconds that any batch may take.
        load_timeout: seconds that loading may take.
    """

    def __init__(
        self,
        spec: ModelSpec,
        landlord: Landlord,
        batch_atoms: int,
        hang_timeout: float,
        load_timeout: float,
    ) -> None:
        self.spec = spec
        self.state = State.COLD
        self.device: Device | None = None
        """Where its worker is, or is about to be."""
        self.error: RootstockError | None = None
        self.info: EngineInfo | None = None
        self.unconfined: list[str] = [] if spec.confine else ["the configuration or the catalogue says confine = false"]
        """Why its workers have more rights than they need."""
        self.evaluations = self.batches = self.restarts = 0
        self.clients: set[Client] = set()
        """Whose systems are bound to this model."""
        self.pace, self.meter = Pace(), Meter(Totals())
        """How fast it is, and what it does where it is."""
        self.loaded_memory = self.memory = self.peak_memory = 0
        """Bytes of its worker: when it had loaded, now and at most; 0 while that is not known."""
        self.load_seconds: float | None = None
        """How long the latest loading took."""
        self.stage = ""
        """How far loading has come."""
        self.obstacle = ""
        """What is in the way of loading, while it waits."""
        self.refusal: LimitError | None = None
        """Why it is not in memory, where there was no room for it."""
        self.scheduler: Scheduler[Client] = Scheduler(batch_atoms)
        self.environment: Environment | None = None
        """Where its last worker was started; looked for anew for each, as another may have been built."""
        self._landlord = landlord
        self._ration = Ration()
        self._worker: WorkerProcess | None = None
        self._failures: dict[int, RootstockError] = {}
        self._asked, self._shortages = b"", 0
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._vacant = asyncio.Event()
        self._leaving = False
        """Its worker is to end so that others may have its memory."""
        self._going: dict[Client, Supervisor] = {}
        """Who goes over to which other worker after the evaluation under way."""
        self._shortage: LimitError | None = None
        """The device had no memory for it."""
        self.retired = False
        self._hang_limit, self._load_timeout = HangLimit(hang_timeout), load_timeout
        self._tick = min(TICK, hang_timeout / 10, load_timeout / 10)
        self._ended_at = self._sent = self._computed = 0.0
        self._last_use = self._loading_since = time.perf_counter()
        self._new = False
        """Something in the batch under way is in it for the first time."""
        self._task = asyncio.create_task(self._keep_warm(), name=f"supervisor {spec.name}")

    @property
    def pid(self) -> int | None:
        """Process id of the worker, while there is one."""
        return self._worker.pid if self._worker else None

    async def settled(self) -> None:
        """Until the model is ready, or known to be broken, or to have no room."""
        await self._settled.wait()

    @property
    def worth_replacing(self) -> bool:
        """The model was found broken long enough ago to try it again."""
        return self.state is State.FAILED and time.monotonic() > self._ended_at + RETRY_AFTER

    # --- who has it

    def join(self, client: Client) -> None:
        """A system of a session is bound to this model."""
        self.clients.add(client)

    def leave(self, client: Client) -> None:
        """It is not any more."""
        self.clients.discard(client)
        self._going.pop(client, None)
        self._end_if_unwanted()

    def hand_over(self, target: Supervisor, count: int) -> None:
        """Have so many of the sessions that have work go over to another worker of the model, the newest first."""
        running = {evaluation.owner for evaluation in self.scheduler.running}
        for client in sorted(self.clients - self._going.keys(), key=lambda client: -client.number):
            if count == 0:
                return
            if client in running:
                self._going[client] = target  # when its evaluation is over
                count -= 1
            elif client.queued:
                count -= client.move(target)

    def _let_go(self) -> None:
        """An evaluation is over after which sessions were to go over to another worker."""
        going, self._going = self._going, {}
        for client, target in going.items():
            if not target.retired:  # nor has it ended
                client.move(target)

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
        self._wanted.set()
        self._kill_worker()

    def _kill_worker(self) -> None:
        if self._worker is not None:
            self._worker.hang_up()
            self._worker.kill()

    # --- whether it is in memory

    @property
    def busy(self) -> bool:
        """It has evaluations to do."""
        return self.queue > 0

    @property
    def queue(self) -> int:
        """Evaluations that wait or are under way."""
        return self.scheduler.waiting + len(self.scheduler.running)

    @property
    def wanted(self) -> bool:
        """It shall be in memory, or come there."""
        return self._wanted.is_set() and not self._stopping.is_set()

    @property
    def present(self) -> bool:
        """Its device's memory is its own, or promised to it."""
        return self.device is not None and not self._leaving and self.state is not State.FAILED

    @property
    def idle_seconds(self) -> float:
        """How long it has had nothing to do."""
        return 0.0 if self.busy else time.perf_counter() - self._last_use

    @property
    def elapsed(self) -> float:
        """Seconds since it began to load, or to wait for room."""
        return time.perf_counter() - self._loading_since

    def load(self) -> None:
        """Come into memory, if it is not there."""
        self._last_use = time.perf_counter()
        self._wanted.set()

    def unload(self) -> None:
        """Leave memory, until somebody asks for it again; `vacated` says when it is done."""
        self._wanted.clear()
        if not self._vacant.is_set():
            self._leaving = True
            self._kill_worker()
        if self.state is not State.FAILED:
            self._set_state(State.COLD)

    @property
    def ended(self) -> bool:
        """It has no worker and will have none."""
        return self._task.done()

    async def vacated(self) -> None:
        """Until it has no worker."""
        await self._vacant.wait()

    def give_up(self, error: RootstockError) -> None:
        """Tell all who wait for an evaluation that it won't be done."""
        for evaluation in self.scheduler.clear():
            evaluation.owner.evaluated(error)

    def sample(self) -> None:
        """Look at how fast it is."""
        self.meter.count()
        now = time.perf_counter()
        under_way = now - self._sent if self.scheduler.running else 0.0
        self.pace.sample(now, self.evaluations, self._computed + under_way, self.queue)

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
            self._wanted.set()
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
        sent = self._sent
        seconds = time.perf_counter() - sent
        new, self._new = self._new, False
        # a failure takes as long as it takes, and says nothing of what evaluations cost
        batch = self.scheduler.finished(None if failures else seconds)
        if self.scheduler.waiting:
            self._dispatch()  # first the device, then the answers
        self.batches += 1
        self.evaluations += len(batch)
        self._computed += seconds
        self._last_use = sent + seconds
        for evaluation in batch:
            owner = evaluation.owner
            owner.evaluated(failures.get(owner.number) if failures else None)
        self.meter.done(batch, sent, seconds)
        if self._going:
            self._let_go()
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
            self._failed(kind, said)
        elif isinstance(said, Stage):
            self.stage = said.stage
        else:
            self._computes(said, ready=kind == b"R")

    def _computes(self, info: EngineInfo, *, ready: bool) -> None:
        self.info = info
        where = f"{self.device} in {self.spec.dtype} ({info.backend})"
        if ready:
            self._last_use = time.perf_counter()
            self.load_seconds = self._last_use - self._loading_since
            self.meter.totals.loading.add(self.load_seconds)
            log.info("model %s is ready on %s after %.1f s", self.spec.name, where, self.load_seconds)
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

    def _failed(self, kind: bytes, said: Failure) -> None:
        """An evaluation has failed, or loading has."""
        error = said.error
        if isinstance(error, LimitError):
            if kind == b"F" and (largest := self._hang_limit.largest):
                error.message += f" The largest that this model has evaluated had {largest} atoms."
            log.warning("model %s: %s", self.spec.name, error.message)
        if kind == b"F":
            self._failures[said.slot] = error
        elif isinstance(error, LimitError):
            self._shortage = error
        else:
            self.error = error

    # --- the worker's life

    async def _keep_warm(self) -> None:
        """Have a worker whenever it is wanted, until the model is broken or no longer wanted for good."""
        while self.state is not State.FAILED:
            self.device, self._leaving = None, False
            self._vacant.set()
            await self._wanted.wait()
            if self._stopping.is_set():
                return
            self._set_state(State.WAITING)
            self._loading_since, self.refusal = time.perf_counter(), None
            try:
                variables = await self._landlord.admit(self)
            except LimitError as error:
                log.warning("%s", error.message)
                self.refusal, self._last_use = error, time.perf_counter()
                self._wanted.clear()
                self._set_state(State.COLD)
                self.give_up(error)
                continue
            finally:
                self.obstacle = ""
            if variables is not None:
                self._vacant.clear()
                self.meter = Meter(self._landlord.totals(self))
                await self._stay(variables)
                self.meter.count()
        self._vacant.set()

    async def _stay(self, variables: dict[str, str]) -> None:
        """Start workers, one after another as they die."""
        failed: list[End] = []
        while not (self._stopping.is_set() or self._leaving):
            self._set_state(State.LOADING)
            end = await self._run_worker(variables)
            if self._stopping.is_set() or self._leaving:
                return
            failed = [*failed, end] if self.state is State.LOADING else []
            log.warning("the worker of %s ended: %s", self.spec.name, end.how)
            if (shortage := self._shortage) is not None:
                self._shortage, failed = None, []
                if not await self._landlord.make_room(self):
                    self.error = shortage
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
            self.meter.totals.restarts += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), PAUSES[len(failed)])

    async def _run_worker(self, variables: dict[str, str]) -> End:
        """One worker from its start to its end."""
        self.stage, self._loading_since = "starting", time.perf_counter()
        self.loaded_memory = self.memory = self.peak_memory = 0
        try:
            self.environment = await asyncio.to_thread(find_environment, self.spec.environment, self.spec.family)
            worker = self._worker = await WorkerProcess.start(
                self.spec, self.environment, variables, self._on_message, self._ration
            )
        except ModelLoadError as error:
            self.error = error
            return End(error.message, blamed=True)
        except Exception as error:  # or the model would count as loading for ever
            return End(f"it could not be started: {error}", blamed=True)
        if self._stopping.is_set() or self._leaving:
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
        if state in (State.READY, State.FAILED, State.COLD):
            self._settled.set()

    async def stop(self, error: RootstockError) -> None:
        """End the worker; what still waits is told `error`."""
        self.give_up(error)
        self._end_worker()
        await asyncio.wait([self._task], timeout=STOP_PATIENCE)
        if not self._task.done():
            log.error("model %s: its worker was killed, but does not end; it is left to the kernel", self.spec.name)
