"""The workers of one model, one after another: started, heard, watched, and ended."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from dataclasses import replace

from rootstock_client.errors import ModelLoadError, RestartNeededError, RootstockError
from rootstockd.environments.finding import Environment, find_environment
from rootstockd.host.threads import in_thread
from rootstockd.models.spec import in_environment
from rootstockd.processes.ends import End
from rootstockd.processes.folders import FolderError
from rootstockd.processes.output import Ration
from rootstockd.processes.worker_process import WorkerProcess
from rootstockd.supervision.dispatcher import Dispatcher
from rootstockd.supervision.loading import Loading
from rootstockd.supervision.memory_use import MemoryUse
from rootstockd.supervision.watchdog import Occupation, watch
from rootstockd.supervision.worker_messages import WorkerMessages
from rootstockd.worker.engines import EngineInfo, ModelSpec

log = logging.getLogger(__name__)

ABANDONED, AT_MOST = 10.0, 30.0
"""Seconds, at least and at most, that others wait for an evaluation whose session has gone, until a fresh worker does
theirs: to load the model again takes some, too, though less than the first time, when it was compiled."""

_SHORT = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "ENOBUFS")}
_NO_THREAD = "can't start new thread"
"""What Python says in a RuntimeError where the kernel says EAGAIN."""


def is_shortage(error: Exception) -> bool:
    """Whether a worker could not be started for what the machine lacks for a while: no doing of the model's."""
    if isinstance(error, OSError):
        return isinstance(error, FolderError) or error.errno in _SHORT
    return isinstance(error, MemoryError) or str(error) == _NO_THREAD


def _with_environment(spec: ModelSpec) -> tuple[Environment, ModelSpec]:
    environment = find_environment(spec.environment, spec.family)
    return environment, in_environment(spec, environment)


class Workers:
    """One worker at a time: the worker of now, or the latest, and what it has said of itself.

    Args:
        spec: the model.
        dispatcher: has its evaluations.
        tick: seconds between looks at how long a worker has been at something.
        load_timeout: seconds that loading may take.
        loaded: called when a worker has the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dispatcher: Dispatcher,
        tick: float,
        load_timeout: float,
        loaded: Callable[[EngineInfo], object],
    ) -> None:
        self.now: WorkerProcess | None = None
        self.ready = False
        """It says that it has the model."""
        self._confirmed = False
        """What it has is what it was to load."""
        self.info: EngineInfo | None = None
        """What it computes with."""
        self.environment: Environment | None = None
        """Where it was started; looked for anew for each, as another may have been built."""
        self.fingerprint = ""
        """Of all that determines its numbers, in that environment."""
        self.unconfined: list[str] = [] if spec.confine else ["the configuration or the catalogue says confine = false"]
        """Why it has more rights than it needs."""
        self.unkept = ""
        """Why what it compiles is not kept for the next, in words; empty where it is."""
        self.loading = Loading()
        self.memory = MemoryUse()
        self._spec, self._dispatcher = spec, dispatcher
        self._tick, self._load_timeout, self._loaded = tick, load_timeout, loaded
        self._messages = WorkerMessages(spec.name, dispatcher, self)
        self._ration = Ration()
        self._error: RootstockError | None = None
        self._unwanted = False
        self._tasks: list[asyncio.Task[None]] = []
        """Of the worker of now."""

    async def run(self, variables: dict[str, str]) -> tuple[End, RootstockError | None]:
        """One worker from its start to its end.

        Args:
            variables: of its environment, for the device it is on.

        Returns:
            How it ended, and what was said to be wrong; a `LimitError` where only memory was.
        """
        self.ready = self._confirmed = self._unwanted = False
        self._error = None
        self.loading.begin("starting")
        self.memory.begin()
        try:
            environment, spec = await self._look()
            self.environment, self.fingerprint = environment, spec.fingerprint
            spec = replace(spec, without=self.loading.without)
            hear = self._messages.hear
            starting = WorkerProcess.start(spec, environment, variables, hear, self._ration, self._load_timeout)
            worker = self.now = await starting
        except asyncio.TimeoutError:
            error = self._no_answer("the folders of its worker could not be made")
            return End(error.message, blamed=True), error
        except ModelLoadError as error:
            return End(error.message, blamed=True), error
        except Exception as error:  # or the model would count as loading for ever
            return End(f"it could not be started: {error}", blamed=not is_shortage(error)), None
        self.unkept = worker.unkept
        if self._unwanted:
            worker.kill()
        watching = watch(worker, spec.name, self._occupation, self._tick)
        self._tasks = [asyncio.create_task(watching, name=f"watch {spec.name}")]
        try:
            return await worker.wait(), self._error
        finally:
            for task in self._tasks:
                task.cancel()
            self.now = None
            self.memory.end()

    async def _look(self) -> tuple[Environment, ModelSpec]:
        """Where a worker is to be started now, and what it is to load there.

        Raises:
            ModelLoadError: there is no such place, or no disk says so.
        """
        try:
            return await asyncio.wait_for(in_thread(_with_environment, self._spec), self._load_timeout)
        except asyncio.TimeoutError as error:
            raise self._no_answer("what it computes with could not be looked at") from error

    def _no_answer(self, what: str) -> ModelLoadError:
        return ModelLoadError(
            f"{what} within {self._load_timeout:.3g} s.",
            "See whether the file systems of its environment, its modules and its caches answer (`df`).",
        )

    def end(self) -> None:
        """End the worker, be it there or about to be: it is not wanted any more."""
        self._unwanted = True
        if self.now is not None:
            self.now.hang_up()
            self.now.kill()

    def detach(self, number: int) -> None:
        """A slot will not be used again."""
        if self.now is not None:
            self.now.detach(number)

    def _occupation(self) -> Occupation | None:
        """What the worker is at."""
        dispatcher = self._dispatcher
        dispatcher.looked()
        if self._unwanted:
            return None
        if not self._confirmed:
            return Occupation("loading", self.loading.since, self._load_timeout)
        if not dispatcher.scheduler.running:
            return None
        sent, limit = dispatcher.sent, dispatcher.hang_limit
        if dispatcher.abandoned:
            limit = min(limit, max(ABANDONED, self.loading.seconds or 0.0), AT_MOST)
            return Occupation("an evaluation that nobody waits for any more", sent, limit, wanted=False)
        return Occupation("an evaluation", sent, limit)

    # --- what it says of itself (WorkerMessages)

    def computes(self, info: EngineInfo, *, ready: bool) -> None:
        """The worker says what it computes with, and has the model, if it had not."""
        self.info = info
        if ready and self.now is not None:
            self.ready = True
            confirming = self._confirm(self.now, info)
            self._tasks.append(asyncio.create_task(confirming, name=f"confirm {self._spec.name}"))

    async def _confirm(self, worker: WorkerProcess, info: EngineInfo) -> None:
        """Look once more at what it computes with: its fingerprint is of what was there before it imported that."""
        end: End | None = None
        try:
            _, spec = await self._look()
            if spec.fingerprint != self.fingerprint:
                end = End("what it computes with was changed while it loaded", blamed=True, changed=True)
        except Exception as error:  # or the model would count as loading for ever
            how = f"what it computes with could not be looked at again: {error}"
            end = End(how, blamed=not is_shortage(error))
        if not worker.usable or self._unwanted:
            return
        if end is not None:
            worker.kill(end)
            worker.hang_up()
            return
        self._confirmed = True
        try:
            self.loading.done()
            self._loaded(info)
        except Exception as error:
            self.not_heard(error)

    def not_loaded(self, error: RootstockError) -> None:
        """Loading has failed: the model is broken, unless it only wants memory."""
        self._error = error

    def incompatible(self, error: RestartNeededError) -> None:
        """This daemon can't talk to it, and ends it."""
        self._error = error
        if self.now is not None:
            self.now.kill(End(error.message, blamed=False))
            self.now.hang_up()

    def distrust(self) -> None:
        """End a worker that said what makes no sense: what it computes can't be trusted either."""
        if self.now is not None:
            self.now.distrust(End("it sent what is no message", blamed=True))

    def not_heard(self, error: Exception) -> None:
        """The daemon itself failed at what it said, and ends it: another does again what it was at."""
        what = "the daemon itself failed at what its worker said; it is ended"
        log.error("model %s: %s", self._spec.name, what, exc_info=error)
        how = f"the daemon itself failed: {type(error).__name__}: {error}"
        if self.now is not None:
            self.now.distrust(End(how, blamed=True, unheard=True))
