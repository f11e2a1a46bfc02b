"""So many messages about one thing a minute; of more than that, how many there were."""

from __future__ import annotations

import asyncio
import logging

MOST = 20
"""Messages about one thing..."""
WINDOW = 60.0
"""...in so many seconds."""


class LogRate(logging.Filter):
    """A filter for a logger whose messages others can cause, as many as they like.

    What a message is about is said with `extra={"about": ...}`; those that don't say so pass.

    Args:
        log: the logger.
    """

    def __init__(self, log: logging.Logger) -> None:
        super().__init__()
        self._log = log
        self._seen: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        about = getattr(record, "about", None)
        if about is None:
            return True
        seen = self._seen[about] = self._seen.get(about, 0) + 1
        if seen == 1:
            asyncio.get_running_loop().call_later(WINDOW, self._sum_up, about)
        return seen <= MOST

    def _sum_up(self, about: str) -> None:
        if (more := self._seen.pop(about) - MOST) > 0:
            self._log.warning("%s: %d more in the last %g s", about, more, WINDOW)
