"""Why a step waits: its model may not be in memory yet, or at a large structure."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rootstock_client.errors import RootstockError

log = logging.getLogger("rootstock_client")

TIMEOUT = 2.0
"""Seconds that the daemon may take to say it."""


def say_why(path: Path, init: bytes) -> None:
    """Log what a daemon says of the model that a session waits for; nothing where it has nothing to say.

    Args:
        path: the daemon's session socket.
        init: what the session was opened with.
    """
    from urllib.parse import quote  # noqa: PLC0415 - few jobs ask, and HTTP takes 7 ms to import

    from rootstock_client.control import request  # noqa: PLC0415

    try:
        model = json.loads(init)["model"]
        answer = request(path, "GET", f"/v1/loading?model={quote(model)}", timeout=TIMEOUT)
        assert isinstance(answer, list)
        for state in answer:
            log.warning("rootstockd at %s: model %r %s; this job waits.", path, model, state["text"])
    except (RootstockError, OSError, ValueError, LookupError, TypeError, AssertionError):
        return  # the control socket may be closed to us, and the daemon of another version
