"""One warm model: its queue, its worker, and whatever has to happen for there always to be a worker."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import time
from typing import Any, Protocol

from rootstock_client.errors import EvaluationError, LimitError, ModelLoadError, RootstockError, error_from_code
from rootstockd.scheduler import Evaluation, Scheduler
from rootstockd.worker.engines import EngineInfo, ModelSpec
from rootstockd.worker.slots import Slot
from rootstockd.worker_process import WorkerProcess

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""Workers in a row that died before they were ready, until the model counts as broken."""
RETRY_AFTER = 10.0
"""Seconds until a broken model may be tried again."""


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
        environment: variables for its workers.
        batch_atoms: the most atoms in one forward pass.
    """

    def __init__(self, spec: ModelSpec, environment: dict[str, str], batch_atoms: int) -> None:
        self.spec = spec
        self.state = State.LOADING
        self.error: RootstockError | None = None
        self.info: EngineInfo | None = None
        self.evaluations = self.batches = self.restarts = self.clients = 0
        self.scheduler: Scheduler[Client] = Scheduler(batch_atoms)
        self._environment = environment
        self._worker: WorkerProcess | None = None
        self._failures: dict[int, RootstockError] = {}
        self._settled = asyncio.Event()
        self._stopping = self.retired = False
        self._ended_at = self._sent = 0.0
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
        if self.retired and not self.clients and not self._stopping:
            self._stopping = True
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
        if worker is None or self.state is not State.READY or not (batch := self.scheduler.next_batch()):
            return
        numbers: list[int] = []
        refused: list[tuple[Evaluation[Client], LimitError]] = []
        for evaluation in batch:
            owner = evaluation.owner
            try:
                if owner.number not in worker.attached:
                    worker.attach(owner.number, owner.slot, owner.settings)
            except OSError as error:
                refusal = LimitError(f"the daemon can't hand over this structure: {error.strerror}.")
                refused.append((evaluation, refusal))
            else:
                numbers.append(owner.number)
        if numbers:
            self._sent = time.perf_counter()
            worker.evaluate(numbers)
        for evaluation, refusal in refused:
            batch.remove(evaluation)
            evaluation.owner.evaluated(refusal)
        if refused and not batch:
            self._dispatch()

    def _on_message(self, kind: bytes, body: bytes) -> None:
        if kind == b"E":
            self._done()
        elif kind == b"O":
            self.scheduler.back_off()
            atoms = self.scheduler.batch_atoms
            log.warning("model %s: no memory for a batch; they have %d atoms at most now", self.spec.name, atoms)
        else:
            self._told(kind, json.loads(body))

    def _done(self) -> None:
        """The batch is done."""
        failures = self._failures
        if failures:
            self._failures = {}
        # a failure takes as long as it takes, and says nothing of what evaluations cost
        batch = self.scheduler.finished(None if failures else time.perf_counter() - self._sent)
        if self.scheduler.waiting:
            self._dispatch()  # first the device, then the answers
        self.batches += 1
        self.evaluations += len(batch)
        for evaluation in batch:
            owner = evaluation.owner
            owner.evaluated(failures.get(owner.number) if failures else None)

    def _told(self, kind: bytes, fields: dict[str, Any]) -> None:
        """What the worker says in JSON."""
        if kind == b"F":
            self._failures[fields["slot"]] = error_from_code(fields["code"], fields["message"], fields["hint"])
        elif kind == b"X":
            self.error = error_from_code(fields["code"], fields["message"], fields["hint"])
        else:
            self.info = EngineInfo(**fields)
            where = f"{self.spec.device} in {self.spec.dtype} ({self.info.backend})"
            if kind == b"R":
                log.info("model %s is ready on %s", self.spec.name, where)
                self._set_state(State.READY)
                self._dispatch()
            if self.info.note:
                log.warning("model %s on %s: %s", self.spec.name, where, self.info.note)

    # --- the worker's life

    async def _keep_warm(self) -> None:
        """Start workers, one after another as they die, until the model is broken or no longer wanted."""
        failed_starts = 0
        while not self._stopping:
            self._set_state(State.LOADING)
            how = await self._run_worker()
            if self._stopping:
                return
            failed_starts = failed_starts + 1 if self.state is State.LOADING else 0
            log.warning("the worker of %s ended: %s", self.spec.name, how)
            if failed_starts >= MAX_FAILED_STARTS and self.error is None:
                self.error = ModelLoadError(
                    f"model {self.spec.name!r}: {failed_starts} workers ended before they were ready, the last: {how}",
                    "`rootstockd logs` has what they printed.",
                )
            self._worker_lost(how)
            if self.error is not None:
                log.error("%s", self.error)
                self._ended_at = time.monotonic()
                self._set_state(State.FAILED)
                return
            self.restarts += 1
            await asyncio.sleep(0.1 * failed_starts)

    async def _run_worker(self) -> str:
        """One worker from its start to its end; how it ended."""
        try:
            self._worker = await WorkerProcess.start(self.spec, self._environment, self._on_message)
        except Exception as error:  # or the model would count as loading for ever
            return f"it could not be started: {error}"
        if self._stopping:
            self._worker.kill()
        status = await self._worker.wait()
        self._worker = None
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def _worker_lost(self, how: str) -> None:
        self._failures.clear()
        given_up = self.scheduler.worker_lost() if self.error is None else self.scheduler.clear()
        for evaluation in given_up:
            message = (
                f"model {self.spec.name!r}: {evaluation.attempts} workers ended over this structure, the last: {how}"
            )
            hint = "The model itself is up again; look at the structure, and at `rootstockd logs`."
            evaluation.owner.evaluated(self.error or EvaluationError(message, hint))

    def _set_state(self, state: State) -> None:
        self.state = state
        if state in (State.READY, State.FAILED):
            self._settled.set()

    async def stop(self, error: RootstockError) -> None:
        """End the worker; what still waits is told `error`."""
        self._stopping = True
        for evaluation in self.scheduler.clear():
            evaluation.owner.evaluated(error)
        if self._worker is not None:
            self._worker.hang_up()
            self._worker.kill()  # it holds nothing that wants saving
        await self._task
