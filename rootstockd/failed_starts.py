"""When a model whose workers end before they are ready is tried again, and when it counts as broken. Pure."""

from __future__ import annotations

from rootstock_client.errors import ModelLoadError
from rootstockd.worker_process import End

MAX_FAILED = 5
"""Workers in a row that died before they were ready, until the model counts as broken."""
MAX_HUNG = 2
"""The same, of those that took longer to load than they may."""
PAUSES = (0.0, 0.0, 0.5, 1.0, 2.0)
"""Seconds before the next start, by failed starts in a row."""


class FailedStarts:
    """Starts in a row that failed.

    Args:
        name: the model's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._ends: list[End] = []

    def add(self, end: End) -> None:
        """One more has ended before it was ready."""
        self._ends.append(end)

    def forget(self) -> None:
        """The row is over."""
        self._ends.clear()

    @property
    def pause(self) -> float:
        """Seconds before the next start."""
        return PAUSES[len(self._ends)]

    def verdict(self) -> ModelLoadError | None:
        """Why the model counts as broken, if it does."""
        if len(self._ends) < MAX_FAILED and sum(end.hung for end in self._ends) < MAX_HUNG:
            return None
        ends = "; ".join(end.how for end in self._ends)
        return ModelLoadError(
            f"model {self._name!r}: {len(self._ends)} workers ended before they were ready: {ends}.",
            "`rootstockd logs` has what they printed.",
        )
