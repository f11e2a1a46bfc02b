"""What the page is told: looks at a daemon, taken while somebody waits for them, and the last minutes of its models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from socket import gethostname
from typing import Any

from rootstock_client.errors import RootstockError
from rootstockd.control.schema import DaemonStatus, ModelStatus
from rootstockd.monitoring.history import SPAN, History, name_of
from rootstockd.monitoring.rows import model_rows, session_row, user_rows

PERIOD = 1.0
"""Seconds between two looks."""
KEPT = 300
"""Looks that plots show."""
DAEMON = {"version", "pid", "state", "memory", "evaluations", "warnings"}
"""What is told of the daemon itself."""


class Feed:
    """Looks at a daemon, which all pages share; while no page waits for one, the daemon is left alone.

    Args:
        ask: asks the daemon, in a thread; raises RootstockError where that fails.
        status: what it said already.
    """

    def __init__(self, ask: Callable[[], DaemonStatus], status: DaemonStatus) -> None:
        self._ask, self._status = ask, status
        self._trouble: RootstockError | None = None
        self._history = History(kept=KEPT)
        self._time, self._begun = time.time(), time.monotonic()
        self._answered = self._time
        self._history.add(status, self._time)
        self._looking: asyncio.Task[None] | None = None

    async def look(self, after: float) -> dict[str, Any]:
        """The latest look, or the next one for a page that has that already; as JSON.

        Args:
            after: the `time` of the last look that the page has had; 0 if it has had none.
        """
        if self._time == after or time.monotonic() - self._begun > 2 * PERIOD:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)  # other pages wait for it, too
        return self._told(after)

    async def _look(self) -> None:
        elapsed = time.monotonic() - self._begun
        await asyncio.sleep(PERIOD - elapsed)
        self._begun = time.monotonic()
        try:
            self._status, self._trouble = await asyncio.to_thread(self._ask), None
        except RootstockError as error:
            self._trouble = error
        self._time = time.time()
        if self._trouble is None:
            if elapsed > SPAN:
                self._history.pause()
            self._history.add(self._status, self._time)
            self._answered = self._time

    def _told(self, after: float) -> dict[str, Any]:
        status, history = self._status, self._history
        rows = zip(status.models, model_rows(status.models, history), strict=True)
        models = [_model(model, row) for model, row in rows]
        sessions = [session_row(session, history, self._answered) for session in status.sessions]
        labels = {name_of(model): row["name"] for model, row in zip(status.models, models, strict=True)}
        return {
            "time": self._time,
            "span": KEPT * PERIOD,
            "host": gethostname(),
            "trouble": str(self._trouble) if self._trouble else None,
            "daemon": {**status.model_dump(include=DAEMON), "up": max(0.0, self._answered - status.since)},
            "devices": [device.model_dump() for device in status.device_states],
            "models": models,
            "users": user_rows(status, sessions),
            "sessions": sessions,
            "other_sessions": status.other_sessions,
            "trends": [
                {
                    "model": labels.get(name) or f"{name[0]} {name[3] or ''}".rstrip(),  # gone from where it was
                    "points": [point for point in zip(*trend, strict=True) if point[0] > after],
                }
                for name, trend in history.trends.items()
            ],
        }


def _model(model: ModelStatus, row: dict[str, Any]) -> dict[str, Any]:
    """A row, and what else the page says of a model."""
    loading = model.loading
    return {
        **row,
        "state": model.state,
        "load": model.load,
        "loading": loading.text if loading else None,
        "progress": min(1.0, loading.elapsed / loading.expected) if loading and loading.expected else None,
        "error": model.error,
        "restarts": model.restarts,
    }
