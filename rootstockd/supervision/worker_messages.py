"""What a worker says: whether it may say it now, and whom it concerns."""

from __future__ import annotations

import logging
from typing import Protocol

from rootstock_client.errors import RestartNeededError, RootstockError
from rootstockd.processes.messages import Confined, Failure, Held, Said, Stage, Versions, parse
from rootstockd.supervision.dispatcher import Dispatcher
from rootstockd.supervision.loading import Loading
from rootstockd.supervision.memory_use import MemoryUse
from rootstockd.worker.engines import EngineInfo

log = logging.getLogger(__name__)


class Listener(Protocol):
    """What is to be told of what a worker says of itself."""

    ready: bool
    unconfined: list[str]
    loading: Loading
    memory: MemoryUse

    def computes(self, info: EngineInfo, *, ready: bool) -> None:
        """The worker says what it computes with, and so is ready, if it was not."""

    def not_loaded(self, error: RootstockError) -> None:
        """The model can't be loaded."""

    def incompatible(self, error: RestartNeededError) -> None:
        """This daemon can't talk to the worker."""

    def distrust(self) -> None:
        """The worker said what makes no sense: nothing that it says can be trusted, nor what it computes."""

    def not_heard(self, error: Exception) -> None:
        """The daemon itself failed at what the worker said."""


class WorkerMessages:
    """Hears what the workers of a model say, one after another.

    Args:
        name: the model's, for the log.
        dispatcher: told of evaluations.
        listener: told of all else.
    """

    def __init__(self, name: str, dispatcher: Dispatcher, listener: Listener) -> None:
        self._name, self._dispatcher, self._listener = name, dispatcher, listener

    def hear(self, kind: bytes, body: bytes) -> None:
        """A message has come."""
        try:
            if not self._dispatcher.heard(kind, body):
                self._hear(kind, body)
        except Exception as error:  # of the daemon's own: or what the worker is at would be nobody's any more
            self._listener.not_heard(error)

    def _hear(self, kind: bytes, body: bytes) -> None:
        """Hear a message that is not about the batch under way, or makes no sense."""
        try:
            said = parse(kind, body)
            self._check_time(kind, said)
        except ValueError as error:
            what = str(error).partition("\n")[0][:200]
            log.warning("model %s: its worker sent an invalid message, and is ended: %s", self._name, what)
            self._listener.distrust()
        else:
            self._take(kind, said)

    def _check_time(self, kind: bytes, said: Said) -> None:
        """Whether a worker may say this now.

        Raises:
            ValueError: it may not.
        """
        if isinstance(said, Failure) and kind == b"F":
            self._dispatcher.check_under_way(said.slot)
        elif self._listener.ready != (kind in (b"I", b"G")):
            raise ValueError(f"{kind!r} while the model is {'ready' if self._listener.ready else 'loading'}")

    def _take(self, kind: bytes, said: Said) -> None:
        """Have done what follows from it."""
        listener = self._listener
        if isinstance(said, Versions):
            self._compare(said)
        elif isinstance(said, Confined):
            listener.unconfined = said.missing
            for what in said.missing:
                warn_once(f"workers are not wholly confined: {what} (SECURITY.md)")
        elif isinstance(said, Failure) and kind == b"F":
            self._dispatcher.failed(said)
        elif isinstance(said, Failure):
            listener.not_loaded(said.error)
        elif isinstance(said, Stage):
            listener.loading.stage, listener.loading.trying = said.stage, said.backend
        elif isinstance(said, Held):
            listener.memory.told = said.bytes
        else:
            listener.computes(said, ready=kind == b"R")

    def _compare(self, versions: Versions) -> None:
        try:
            versions.check()
        except RestartNeededError as error:
            self._listener.incompatible(error)


def warn_once(text: str) -> None:
    """Log what is true of the machine and would be said again by every worker."""
    if text not in _warned and len(_warned) < MOST_WARNINGS:
        _warned.add(text)
        log.warning("%s", text)


_warned: set[str] = set()
MOST_WARNINGS = 30
"""There are ten; a worker may say what it likes."""
