"""How a job waits for a daemon that has gone: for how long, and how it says so."""

from __future__ import annotations

import logging
import os
import random
import time
from pathlib import Path
from typing import NoReturn

from rootstock_client.errors import (
    ConnectionLostError,
    DaemonFullError,
    DaemonNotFoundError,
    DrainingError,
    RestartNeededError,
    RootstockError,
    UserLimitError,
)

log = logging.getLogger("rootstock_client")

PATIENCE_VARIABLE = "ROOTSTOCKD_PATIENCE"
DEFAULT_PATIENCE = 300.0
"""Seconds: a restart with large models, or somebody who notices and starts a daemon by hand."""
STALE = 5.0
"""Seconds that a job's first connection waits where a socket lies but nobody listens: a daemon that died and may be on
its way up again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0
"""Seconds between tries."""
AWAY = (DaemonNotFoundError, ConnectionLostError, DrainingError, RestartNeededError, DaemonFullError, UserLimitError)
"""What a daemon that is restarted, or has to be, may answer, or the next one before it has room."""
_random = random.SystemRandom()
"""Not the generator that jobs seed, and not the same in two processes after a fork."""


def patience_in_seconds(patience: float | None) -> float:
    """The patience to have: as told, or by ROOTSTOCKD_PATIENCE, or 300 s.

    Raises:
        ValueError: it is no number of seconds.
    """
    given: float | str = os.environ.get(PATIENCE_VARIABLE) or DEFAULT_PATIENCE if patience is None else patience
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # NaN neither
        name = PATIENCE_VARIABLE if patience is None else "patience"
        raise ValueError(f"{name} is {given!r}; it is a number of seconds, 0 or more.")
    return seconds


def patience_with(error: RootstockError, patience: float, *, met: bool, answered: bool) -> float:
    """How many of its seconds a job waits after an error that a restart of the daemon may mend.

    Args:
        error: the error.
        patience: the job's.
        met: a daemon has served it before: others may have taken its place while that was away.
        answered: somebody has answered at this address, if only to say that it is stopping.
    """
    if isinstance(error, (DaemonFullError, UserLimitError)):
        return patience if met else 0.0
    if met or answered:
        return patience
    return min(patience, STALE) if isinstance(error.__cause__, ConnectionRefusedError) else 0.0


class Outage:
    """What is between a connection's loss and the next answer. One log line when it begins, and one when it is over.

    Against patience only time spent waiting counts, not time in which a daemon was at work. What the job has lost is
    both: a model may have to be loaded again.

    Args:
        path: the daemon's session socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tries = 0
        self._full = False
        """It is there, and has no room."""
        self._waited = 0.0
        self._most = 0.0
        """Seconds: the longest patience that there was so far, and was announced."""
        self._begun = time.monotonic()

    def wait(self, error: RootstockError, patience: float) -> None:
        """Wait a little before the next try.

        Args:
            error: why the last one failed.
            patience: how many seconds may be waited in all.

        Raises:
            RootstockError: it is over; of the same class as `error`, saying how long was waited.
        """
        self._most = max(self._most, patience)
        if isinstance(error, DaemonNotFoundError):  # a socket that nobody listens on may vanish meanwhile
            patience = self._most
        if self._waited >= patience:
            try:
                self._give_up(error, patience)
            finally:
                del error  # or it and this frame hold each other, and with them the session
        if self._tries == 0:
            self._full = isinstance(error, (DaemonFullError, UserLimitError))
            what = "has no room for this job, which" if self._full else "is away; this job"
            if isinstance(error, RestartNeededError):
                what = "has to be restarted by whoever runs it (`rootstockd restart`); this job"
            log.warning("rootstockd at %s %s waits up to %g s. (%s)", self._path, what, patience, error.message)
        # many jobs lose their daemon in the same moment; they should not come back in the same moment
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 1.5**self._tries) * _random.uniform(0.5, 1.5)
        pause = min(pause, patience - self._waited)
        time.sleep(pause)
        self._waited += pause
        self._tries = min(self._tries + 1, 100)

    def _give_up(self, error: RootstockError, patience: float) -> NoReturn:
        if self._tries == 0:
            try:
                raise error
            finally:
                del error
        hint = error.hint
        if patience != STALE:  # a first connection's, which is no longer where there is more patience
            hint = f"{hint}\nHow long jobs wait is set by RootstockClient(patience=...) or {PATIENCE_VARIABLE}.".strip()
        raise type(error)(f"{error.message} This job has waited {self._waited:.3g} s.", hint) from error

    def over(self) -> None:
        """A daemon has answered."""
        if self._tries:
            took = time.monotonic() - self._begun
            what = "has room again" if self._full else "is back"
            log.warning("rootstockd at %s %s; this job waited %.3g s for it.", self._path, what, took)
