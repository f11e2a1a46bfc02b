"""Running programs: which one a structure is given to, and which makes room for another. Several threads may ask."""

from __future__ import annotations

import threading
from typing import Any, Callable, List, Tuple

from rootstockd.worker.engines.ipi.program import Program

Key = Tuple[Any, ...]
"""Equal for systems that one program can evaluate."""


class Pool:
    """Programs that wait for their next structure.

    Args:
        most: how many there may be, with those that are at work. No more threads may ask at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: List[Tuple[Key, Program]] = []
        """The one used longest ago first."""
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, key: Key, start: Callable[[], Program], *, fresh: bool = False) -> Program:
        """One for such systems, started if need be: then whoever was used longest ago makes room.

        Args:
            key: of the system.
            start: starts one.
            fresh: one that has seen nothing yet.

        Raises:
            Exception: what `start` raises.
        """
        ended = []
        with self._lock:
            self._taken += 1
            for place in reversed(range(len(self._idle))):
                if self._idle[place][0] == key and not fresh:
                    return self._idle.pop(place)[1]
            while self._taken + len(self._idle) > self._most:
                ended.append(self._idle.pop(0)[1])
        try:
            for program in ended:
                program.stop()
            return start()
        except BaseException:
            self.drop()
            raise

    def give_back(self, key: Key, program: Program) -> None:
        """A program is done with its structure."""
        with self._lock:
            self._taken -= 1
            self._idle.append((key, program))

    def drop(self) -> None:
        """One that was taken has ended."""
        with self._lock:
            self._taken -= 1
