"""The daemon's life, from top to bottom: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ase.data import atomic_numbers, chemical_symbols

from rootstock_client import ipi
from rootstock_client.errors import DrainingError, LimitError, UnknownElementError
from rootstockd.budget import Budget, raise_descriptor_limit, share_descriptors
from rootstockd.config import Config
from rootstockd.control.api import ControlServer
from rootstockd.devices import gpu_uuid
from rootstockd.door import Door
from rootstockd.init_request import InitRequest
from rootstockd.models.catalogue import Catalogue, Entry
from rootstockd.sessions import LINGER, Session
from rootstockd.sockets import claim_gpu, listen, lock, make_runtime_dir
from rootstockd.supervisor import Supervisor
from rootstockd.worker.engines import ModelSpec

log = logging.getLogger(__name__)

STAGED_BYTES = 128 * 2**20
"""Bytes of long INITs that have not come in full yet, for each user."""


@dataclass(frozen=True)
class WorkerKey:
    """What makes a worker one's own: two sessions with different keys never share one."""

    name: str
    dtype: str


class Daemon:
    """One daemon.

    Args:
        config: its settings.

    Raises:
        CatalogueError: a catalogue file can't be used.
        UnknownModelError: a model to preload is not in the catalogue.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.catalogue = Catalogue.load(config.catalogues)
        # atomic numbers take up to four bytes each; the rest of an INIT is short
        self.limits = ipi.Limits(atoms=config.max_atoms, init=64 * 1024 + 5 * config.max_atoms)
        self.fleet: dict[WorkerKey, Supervisor] = {}
        self.sessions: set[Session] = set()
        self.atoms = Budget(config.total_atoms)
        self._staged: dict[int, Budget] = defaultdict(lambda: Budget(max(STAGED_BYTES, self.limits.init)))
        self._turned_away: set[Session] = set()
        self._descriptors = 0
        self._max_sessions, self._max_turned_away = config.max_sessions, 0
        self.state = "starting"
        self.since = time.time()
        self._preload = [self.catalogue.resolve(name) for name in config.models]
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    async def run(self) -> None:
        """Live.

        Raises:
            AddressError: the sockets can't be had.
        """
        make_runtime_dir(self.config.socket.parent)
        self._descriptors = raise_descriptor_limit()
        allowed, self._max_turned_away = share_descriptors(self._descriptors)
        self._max_sessions = min(self.config.max_sessions, allowed)
        with contextlib.ExitStack() as ours:
            ours.enter_context(lock(self.config.lock))
            if self.config.device.kind == "cuda":
                ours.enter_context(claim_gpu(gpu_uuid(self.config.device.index)))
            control = ControlServer(self, ours.enter_context(listen(self.config.control, 0o600)))
            sessions = ours.enter_context(listen(self.config.socket, 0o666 if self.config.shared else 0o600))
            self._watch_signals()
            control_task = asyncio.create_task(control.run_until_stopped(), name="control")
            try:
                door = await self._start(sessions)
                log.info("ready on %s", self.config.socket)
                await self._stop.wait()
                await self._drain(door)
            finally:
                await self._end_workers()
                control.should_exit = True
                await control_task
        log.info("stopped")

    def stop(self, *, force: bool = False) -> None:
        """Begin to drain; asked twice, or with `force`, wait for nothing."""
        if force or self._stop.is_set():
            self._force.set()
        self._stop.set()

    # --- the four parts of its life

    async def _start(self, sessions_socket: socket.socket) -> Door:
        """Load what is to be preloaded, and open the door. Sessions that come early wait for their model."""
        door = Door(sessions_socket, functools.partial(Session, self), self._check_room_to_linger)
        models = [self._supervisor(name, entry, entry.dtype) for name, entry in self._preload]
        loaded = asyncio.create_task(_settled(models))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
        loaded.cancel()
        stopped.cancel()
        if not self._stop.is_set():
            self.state = "ready"
        return door

    async def _drain(self, door: Door) -> None:
        """Take no new connections and no new evaluations; let those under way end."""
        self.state = "draining"
        door.close()
        log.info("draining: %d sessions", len(self.sessions))
        deadline = time.monotonic() + self.config.drain_timeout
        while not self._force.is_set() and time.monotonic() < deadline:
            if not any(session.state == "busy" for session in self.sessions):
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._force.wait(), 0.02)
        for session in list(self.sessions):
            session.end(stopping_error())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_gone.wait(), LINGER)

    async def _end_workers(self) -> None:
        await asyncio.gather(*(model.stop(stopping_error()) for model in self.fleet.values()))

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    # --- what sessions need

    def check_open(self) -> None:
        """Whether new work is taken.

        Raises:
            DrainingError: it is not.
        """
        if self.state == "draining":
            raise stopping_error()

    def session_opened(self, session: Session) -> None:
        """Count a session in.

        Raises:
            LimitError: there are too many.
        """
        if len(self.sessions) >= self._max_sessions:
            self._turned_away.add(session)
            raise self._too_many_sessions()
        self.sessions.add(session)
        self._all_gone.clear()

    def session_closed(self, session: Session) -> None:
        """Count a session out."""
        self.sessions.discard(session)
        self._turned_away.discard(session)
        self.atoms.give_back(session)
        self._staged[session.uid].give_back(session)
        if not self.sessions:
            self._all_gone.set()

    def _check_room_to_linger(self) -> None:
        """Whether there is a descriptor even for a session that is only told that there are too many.

        Raises:
            LimitError: there is none.
        """
        if len(self.sessions) + len(self._turned_away) >= self._max_sessions + self._max_turned_away:
            raise self._too_many_sessions()

    def _too_many_sessions(self) -> LimitError:
        why = ""
        if self._max_sessions < self.config.max_sessions:
            why = f", all that its limit of {self._descriptors} open files (ulimit -n) allows"
        return LimitError(
            f"this daemon has its {self._max_sessions} sessions already{why}.", "Try again when one has ended."
        )

    def reserve_atoms(self, session: Session, atoms: int) -> None:
        """Count a session's structures in, before memory is taken for them.

        Raises:
            LimitError: all sessions together would have too many atoms.
        """
        if not self.atoms.take(session, atoms):
            raise LimitError(
                f"{atoms} atoms more would be too many: this daemon's sessions have {self.atoms.used} atoms, "
                f"of {self.atoms.limit} that it takes in all.",
                "Try again when a session has ended.",
            )

    def release_atoms(self, session: Session) -> None:
        """A session's structures are gone."""
        self.atoms.give_back(session)

    def reserve_staging(self, session: Session, size: int) -> None:
        """Count in an INIT of so many bytes that is about to come.

        Raises:
            LimitError: the user's sessions have too many under way.
        """
        staged = self._staged[session.uid]
        if not staged.take(session, size):
            raise LimitError(
                f"an INIT of {size} bytes, with {staged.used} bytes of other INITs of {session.user} under way; "
                f"each user may have {staged.limit}.",
                "Try again in a moment.",
            )

    def release_staging(self, session: Session) -> None:
        """The INIT has come and been read."""
        self._staged[session.uid].give_back(session)

    def open_model(self, request: InitRequest) -> Supervisor:
        """The model that a session asks for; it is loaded if it is not yet.

        Raises:
            UnknownModelError, UnknownElementError, DrainingError, ModelLoadError: what its name says.
        """
        self.check_open()
        name, entry = self.catalogue.resolve(request.model)
        model = self._supervisor(name, entry, request.dtype or entry.dtype)
        known = (model.info and model.info.elements) or [atomic_numbers[symbol] for symbol in entry.elements]
        unknown = set(request.numbers) - set(known)
        if known and unknown:
            raise UnknownElementError(
                f"model {name!r} does not know {_symbols(unknown)}.", f"It knows {_symbols(known)}."
            )
        if model.error is not None:
            raise model.error
        return model

    def _supervisor(self, name: str, entry: Entry, dtype: str) -> Supervisor:
        key = WorkerKey(name, dtype)
        model = self.fleet.get(key)
        if model is None or model.worth_replacing:
            device = self.config.device
            spec = ModelSpec(name, entry.family, device.kind, dtype, str(entry.weights or ""), entry.arguments)
            model = Supervisor(spec, device.environment, self.config.batch_budget)
            self.fleet[key] = model
        return model


async def _settled(models: Iterable[Supervisor]) -> None:
    for model in models:
        await model.settled()


def _symbols(numbers: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in sorted(numbers))


def stopping_error() -> DrainingError:
    """What is said to whoever wants something of a daemon on its way down."""
    return DrainingError("the daemon is stopping.", "Start it again with `rootstockd start`.")
