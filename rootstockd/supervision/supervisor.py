"""One warm model: whether it is in memory, and what follows when a worker of it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace

from rootstock_client.errors import DeviceFailedError, LimitError, ModelLoadError, RestartNeededError, RootstockError
from rootstockd.environments.finding import damage_of
from rootstockd.host.log_rate import LogRate
from rootstockd.host.threads import in_thread
from rootstockd.processes.ends import End
from rootstockd.settings.config import Device
from rootstockd.supervision.dispatcher import Dispatcher
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.failed_starts import FailedStarts
from rootstockd.supervision.meter import Meter
from rootstockd.supervision.roles import Client, Placer, State
from rootstockd.supervision.watchdog import TICK
from rootstockd.supervision.workers import Workers
from rootstockd.worker.engines import EngineInfo, ModelSpec

log = logging.getLogger(__name__)
log.addFilter(LogRate(log))

STOP_PATIENCE = 10.0
"""Seconds that a stopping daemon waits for a killed worker, which may be stuck in the kernel."""
RETRY_AFTER = 10.0
"""Seconds until a broken model may be tried again."""


class Supervisor:
    """Keeps one model warm on one device at a time, for as long as it is wanted there.

    Args:
        spec: the model.
        placer: whoever has the devices.
        batch_atoms: the most atoms in one forward pass.
        hang_timeout: seconds that any batch may take.
        load_timeout: seconds that loading may take.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placer: Placer,
        batch_atoms: int,
        hang_timeout: float,
        load_timeout: float,
    ) -> None:
        self.spec = spec
        self.state = State.COLD
        self.device: Device | None = None
        """Where its worker is, or is about to be."""
        self.error: RootstockError | None = None
        """Why it is broken, if it is."""
        self.restarts = 0
        self.clients: set[Client] = set()
        """Whose systems are bound to this model."""
        self.obstacle = ""
        """What is in the way of loading, while it waits."""
        self.refusal: LimitError | None = None
        """Why it is not in memory, where there was no room for it."""
        self._placer = placer
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._wanted = asyncio.Event()
        self._wanted.set()
        tick = min(TICK, hang_timeout / 10, load_timeout / 10)
        self._dispatcher = Dispatcher(spec.name, batch_atoms, hang_timeout, self._wanted.set, tick)
        self.workers = Workers(spec, self._dispatcher, tick, load_timeout, self._loaded)
        self.loading, self.memory = self.workers.loading, self.workers.memory
        self.scheduler, self.pace = self._dispatcher.scheduler, self._dispatcher.pace
        self._vacant = asyncio.Event()
        self._leaving = asyncio.Event()
        """Its worker is to end, for good or so that others may have its memory."""
        self.retired = False
        self._barred_until = self._ended_at = 0.0
        """By `time.monotonic`."""
        self._task = asyncio.create_task(self._keep_warm(), name=f"supervisor {spec.name}")

    @property
    def pid(self) -> int | None:
        """Process id of the worker, while there is one."""
        return self.workers.now.pid if self.workers.now else None

    async def settled(self) -> None:
        """Until the model is ready, or known to be broken, or to have no room, or ends."""
        await self._settled.wait()

    @property
    def worth_replacing(self) -> bool:
        """The model was found broken long enough ago to try it again; what a restart has to mend no next try does."""
        if self.state is not State.FAILED or isinstance(self.error, RestartNeededError):
            return False
        return time.monotonic() > self._ended_at + RETRY_AFTER

    # --- who has it

    def join(self, client: Client) -> None:
        """A system of a session is bound to this model."""
        self.clients.add(client)

    def leave(self, client: Client) -> None:
        """A client has it no longer; a retired supervisor ends with its last."""
        self.clients.discard(client)
        self._dispatcher.stays(client)
        self._end_if_unwanted()

    def hand_over(self, target: Supervisor, count: int) -> None:
        """Have so many of the sessions that have work go over to another worker of the model, the newest first."""
        self._dispatcher.hand_over(self.clients, target, count)

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
        self._settled.set()  # this is how it is now
        self._leaving.set()
        self._wanted.set()
        self.workers.end()

    # --- whether it is in memory

    @property
    def busy(self) -> bool:
        """Whether there are evaluations to do."""
        return self.queue > 0

    @property
    def queue(self) -> int:
        """Evaluations that wait or are under way."""
        return self._dispatcher.queue

    @property
    def wanted(self) -> bool:
        """Whether the model shall be in memory, or come there."""
        return self._wanted.is_set() and not self._stopping.is_set()

    @property
    def coming(self) -> bool:
        """Whether the model is being loaded, or about to be."""
        return self.wanted and self.state not in (State.READY, State.FAILED)

    @property
    def present(self) -> bool:
        """Its device's memory is its own, or promised to it."""
        return self.device is not None and not self._leaving.is_set() and self.state is not State.FAILED

    @property
    def idle_seconds(self) -> float:
        """How long it has had nothing to do."""
        return 0.0 if self.busy else time.perf_counter() - self._dispatcher.last_use

    def load(self) -> None:
        """Come into memory, if it is not there."""
        self._dispatcher.last_use = time.perf_counter()
        self._wanted.set()

    def bar(self, seconds: float) -> None:
        """Do not come back for so long, as an administrator wanted its memory."""
        self._barred_until = time.monotonic() + seconds

    def lift_bar(self) -> None:
        """Come back as soon as it is wanted."""
        self._barred_until = 0.0

    @property
    def barred(self) -> float:
        """Seconds until it may come back."""
        return max(0.0, self._barred_until - time.monotonic())

    def unload(self) -> None:
        """Leave memory, until somebody asks for it again, as what waits does; `vacated` says when it is done."""
        self._dispatcher.put_back()
        if not self.scheduler.waiting:
            self._wanted.clear()
        if not self._vacant.is_set():
            self._leaving.set()
            self.workers.end()
        if not self.scheduler.waiting:  # nobody else wants a worker
            self.tell_verdicts()
        if self.state is not State.FAILED:
            self._set_state(State.WAITING if self.scheduler.waiting else State.COLD)

    def refuse(self, error: LimitError) -> None:
        """Leave memory, or do not come there: there is no room. What waits is told so."""
        log.warning("%s", error.message, extra={"about": f"model {self.spec.name}, which has no room"})
        self.refusal, self._dispatcher.last_use = error, time.perf_counter()
        self.give_up(error)
        self.unload()

    @property
    def ended(self) -> bool:
        """Whether there is no worker and will be none."""
        return self._task.done()

    async def vacated(self) -> None:
        """Until it has no worker."""
        await self._vacant.wait()

    # --- evaluations

    @property
    def meter(self) -> Meter:
        """Times of this model's steps."""
        return self._dispatcher.meter

    def under_way(self, user: int | None) -> tuple[int, float]:
        """The atoms of the batch that its worker is at, and seconds since it began; zeros where there is none.

        Args:
            user: for whom all must be, or there are no atoms; None for whoever they are for.
        """
        running = self.scheduler.running
        if self.state is not State.READY or not running:
            return 0, 0.0
        told = user is None or all(evaluation.user == user for evaluation in running)
        atoms = sum(evaluation.atoms for evaluation in running) if told else 0
        return atoms, time.perf_counter() - self._dispatcher.sent

    @property
    def evaluations(self) -> int:
        """How many evaluations were done."""
        return self._dispatcher.evaluations

    @property
    def batches(self) -> int:
        """How many batches the evaluations were done in."""
        return self._dispatcher.batches

    def sample(self) -> None:
        """Look at how fast it is."""
        self._dispatcher.sample()

    def give_up(self, error: RootstockError) -> None:
        """Tell all who wait for an evaluation that it won't be done, also those whose users' limits hold it."""
        held = [client for client in self.clients if client.held]  # now: what comes next of the others is not meant
        self._dispatcher.give_up(error)
        for client in held:
            client.evaluated(error)

    def tell_verdicts(self) -> None:
        """Tell at once all that was to be told later: nobody else has anything of it any more."""
        self._dispatcher.tell_verdicts()

    def submit(self, evaluation: Evaluation[Client]) -> None:
        """Have an evaluation done; its owner is told when it is over."""
        if self.error is not None:
            self._dispatcher.tell_later(evaluation, self.error)
        else:
            self._dispatcher.submit(evaluation)

    def _loaded(self, info: EngineInfo) -> None:
        """A worker has the model."""
        seconds = self.loading.seconds or 0.0
        where = f"{self.device} in {self.spec.dtype} ({info.backend})"
        log.info("model %s is ready on %s after %.1f s", self.spec.name, where, seconds)
        if info.note:
            log.warning("model %s on %s: %s", self.spec.name, where, info.note)
        self._dispatcher.last_use = time.perf_counter()
        self.meter.totals.loading.add(seconds)
        self._set_state(State.READY)
        self._dispatcher.dispatch()

    # --- one worker after another

    async def _keep_warm(self) -> None:
        """Have a worker whenever it is wanted, until the model is broken or no longer wanted for good."""
        try:
            await self._come_and_go()
        except Exception as error:  # of the daemon's own: or it would count as loading for ever
            log.exception("model %s: keeping it warm failed", self.spec.name)
            what = f"model {self.spec.name!r}: the daemon itself failed: {type(error).__name__}: {error}."
            self.workers.end()
            self._fail(ModelLoadError(what, "Try again; `rootstockd logs` has more, for whoever maintains rootstockd."))
        finally:
            self._vacant.set()

    async def _come_and_go(self) -> None:
        while self.state is not State.FAILED:
            self.device = None
            self._vacant.set()
            await self._wanted.wait()
            if self._stopping.is_set():
                return
            self._leaving.clear()
            self._set_state(State.WAITING)
            self.loading.begin()
            self.refusal = None
            try:
                variables = await self._placer.admit(self)
            except LimitError as error:
                self.refuse(error)
                continue
            finally:
                self.obstacle = ""
            if variables is not None:
                self._vacant.clear()
                self._dispatcher.meter = Meter(self._placer.totals(self))
                await self._stay(variables)
                self.meter.count()

    async def _stay(self, variables: dict[str, str]) -> None:
        """Start workers, one after another as they die."""
        failed = FailedStarts(self.spec.name)
        while not self._leaving.is_set():
            self._set_state(State.LOADING)
            before = self.evaluations
            end, error = await self.workers.run(variables)
            if self.state is State.LOADING and self.loading.drop_backend(end, error):
                backend, how = self.loading.trying, self.loading.without[self.loading.trying]
                log.warning("model %s does without %s, which ended a worker: %s", self.spec.name, backend, how)
                self._replace(end)
                continue
            failed_there = end.disorder or isinstance(error, DeviceFailedError)
            lost = not self._leaving.is_set() and await self._placer.lost_device(self, failed=failed_there)
            if self._leaving.is_set():
                return
            if self.state is State.LOADING or (end.unheard and self.evaluations == before):  # it did nothing
                failed.add(end)
            else:
                failed.forget()
            log.warning("the worker of %s ended: %s", self.spec.name, end.how)
            if lost:
                why = f": {error.message}" if error else ""
                log.warning("model %s: %s can't be used, and it goes to another%s", self.spec.name, self.device, why)
                self._replace(replace(end, blamed=end.disorder))  # it may be what it was at that its GPU did not bear
                return
            broken = await self._verdict(error, failed)
            if self._leaving.is_set():
                return
            if broken is not None:
                log.error("%s", broken)
                self._fail(broken)
                return
            self._replace(end)
            self.loading.stage = f"to be started again in {failed.pause:.0f} s ({end.how})"
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), failed.pause)

    async def _verdict(self, error: RootstockError | None, failed: FailedStarts) -> RootstockError | None:
        """Why the model is broken, if it is.

        Args:
            error: what its worker said before it ended.
            failed: how workers ended before they were ready.
        """
        if isinstance(error, LimitError):  # it only wants memory
            log.warning("model %s: %s", self.spec.name, error.message)
            failed.forget()
            if await self._placer.make_room(self) or self.loading.lacked_memory(error):
                error = None
        error = error or failed.verdict()
        environment = self.workers.environment
        if error and environment and (damage := await in_thread(damage_of, environment)):
            error.hint = f"{damage} {error.hint}".strip()
        return error

    def _fail(self, error: RootstockError) -> None:
        """The model is broken; what waits goes to another worker of it, or is told so."""
        self.error = error
        self._ended_at = time.monotonic()
        self._set_state(State.FAILED)
        if (other := self._placer.other_worker(self)) is not None:
            self.tell_verdicts()  # or whom they are for would have to stay
            for client in list(self.clients):
                client.move(other)
        self.give_up(error)

    def _replace(self, end: End) -> None:
        """The worker has ended, and there will be another."""
        self._dispatcher.worker_lost(end, self.loading.seconds or 0.0)
        self.restarts += 1
        self.meter.totals.restarts += 1

    def _set_state(self, state: State) -> None:
        self.state = state
        self._dispatcher.have(self.workers.now if state is State.READY else None)
        if state in (State.READY, State.FAILED, State.COLD):
            self._settled.set()

    async def stop(self, error: RootstockError) -> None:
        """End the worker; what still waits is told `error`."""
        self.give_up(error)
        self._end_worker()
        await asyncio.wait([self._task], timeout=STOP_PATIENCE)
        if not self._task.done():
            log.error("model %s: its worker was killed, but does not end; it is left to the kernel", self.spec.name)
