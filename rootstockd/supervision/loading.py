"""How a model's loading goes, and what the next worker does without as it ended one. Pure."""

from __future__ import annotations

import time

from rootstock_client.errors import DeviceFailedError, LimitError, RootstockError
from rootstockd.processes.ends import End


class Loading:
    """Of one model, whichever worker loads it."""

    def __init__(self) -> None:
        self.stage = ""
        """How far it has come, or when it begins anew."""
        self.trying = ""
        """Which backend is being tried: should the worker end now, it is that one's doing."""
        self.seconds: float | None = None
        """How long the latest took."""
        self.without: dict[str, str] = {}
        """Backends that ended a worker when they were tried, and how."""
        self._lacking: set[str] = set()
        """Those among them for which memory lacked: until the model is loaded."""
        self._lacked = False
        self.since = time.perf_counter()
        """When a worker was started, or when the model began to wait for room."""

    @property
    def elapsed(self) -> float:
        """Seconds since then."""
        return time.perf_counter() - self.since

    def begin(self, stage: str = "") -> None:
        """Begin to wait, with nothing said against any backend for want of memory; or note that a worker is started."""
        if not stage:
            self._forget_lack()
        self.stage, self.trying, self.since = stage, "", time.perf_counter()

    def done(self) -> float:
        """The model is loaded; how long it took. The next worker may find more memory."""
        self._forget_lack()
        self.seconds = self.elapsed
        return self.seconds

    def drop_backend(self, end: End, reported: RootstockError | None) -> bool:
        """Have the next worker do without the backend that was being tried when one ended, if one was.

        Args:
            end: of the worker.
            reported: what it lived on to say was wrong.
        """
        if not self.trying or not (isinstance(reported, DeviceFailedError) or (end.blamed and reported is None)):
            return False
        self.without[self.trying] = reported.message.rstrip(".") if reported else end.how
        return True

    def lacked_memory(self, error: LimitError) -> bool:
        """Have another worker try: once more the same, then without the backend that was being tried, if one was.

        Args:
            error: what the worker said that lacked memory; others may have given some back by the next.
        """
        if not self.trying:
            return False
        if self._lacked:
            self.without[self.trying] = error.message.rstrip(".")
            self._lacking.add(self.trying)
        self._lacked = True
        return True

    def _forget_lack(self) -> None:
        self._lacked = False
        for name in self._lacking:
            self.without.pop(name, None)  # all of it may have been forgotten meanwhile
        self._lacking.clear()
