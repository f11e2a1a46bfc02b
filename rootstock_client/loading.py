"""Why a step waits: its model may not be in memory yet, or at a large structure, or the daemon does not answer."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from rootstock_client.errors import NotAnsweringError, RootstockError

log = logging.getLogger("rootstock_client")

LONG = 5
"""Seconds without a word from the daemon after which a job asks why."""
TIMEOUT = 2.0
"""Seconds that the daemon may take to say it."""


class Silence:
    """A step that has waited for LONG, and what is logged of that.

    Args:
        path: the daemon's session socket.
        init: what the session was opened with.
    """

    def __init__(self, path: Path, init: bytes) -> None:
        self._path, self._init = path, init
        self._begun = time.monotonic() - LONG
        self._times = 0
        self._over = False
        self._hangs = False
        """The daemon said nothing when it was asked why, and that was logged."""

    def lasts(self) -> None:
        """LONG has gone by once more: log what the daemon says of the model, or, once, that it says nothing."""
        self._times += 1
        if self._times & (self._times - 1):  # more and more rarely, as there may be a thousand who ask
            return
        # by itself: what a signal's handler of the job's raises, in this thread, is not to be taken for an answer
        look = threading.Thread(target=self._look, name="rootstockd: why a step waits", daemon=True)
        try:
            look.start()
        except RuntimeError:  # there are as many threads as there may be
            return
        look.join(2 * TIMEOUT)  # no longer: a child that was forked meanwhile has no such thread

    def _look(self) -> None:
        try:
            self._say_why()
        except NotAnsweringError:
            if not self._hangs and not self._over:
                self._hangs = True
                log.warning(
                    "rootstockd at %s has not answered for %.0f s; this job waits on. It may be stopped, or have no "
                    "memory or processor: `rootstockd status` says whether it answers by now, `rootstockd logs` more.",
                    self._path,
                    time.monotonic() - self._begun,
                )
        except (RootstockError, OSError, ValueError, LookupError, TypeError, AssertionError):
            return  # the control socket may be closed to us, and the daemon of another version

    def over(self) -> None:
        """The step is done."""
        self._over = True
        self._answers()

    def _answers(self) -> None:
        if self._hangs:
            self._hangs = False
            waited = time.monotonic() - self._begun
            log.warning("rootstockd at %s answers again; this job waited %.3g s for it.", self._path, waited)

    def _say_why(self) -> None:
        from urllib.parse import quote  # noqa: PLC0415 - few jobs ask, and HTTP takes 7 ms to import

        from rootstock_client.control import request  # noqa: PLC0415

        model = json.loads(self._init)["model"]
        answer = request(self._path, "GET", f"/v1/loading?model={quote(model)}", timeout=TIMEOUT)
        self._answers()
        assert isinstance(answer, list)
        for state in answer:
            log.warning("rootstockd at %s: model %r %s; this job waits.", self._path, model, state["text"])
