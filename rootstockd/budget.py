"""Counting what is limited before it is taken: descriptors, atoms, bytes that are staged."""

from __future__ import annotations

import resource

RESERVED_DESCRIPTORS = 44
"""For all but sessions: the daemon's own files and sockets, its workers and starting one, 16 control connections."""
DESCRIPTORS_A_SESSION = 2
"""Its socket, and the memory of its slot."""
MIN_LINGERING = 4


class Budget:
    """So much of something, and who holds how much of it.

    Args:
        limit: how much there is.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[object, int] = {}

    def take(self, holder: object, amount: int) -> bool:
        """Whether `holder` may have so much, in place of what it had; if not, it keeps that."""
        used = self.used - self._held.get(holder, 0) + amount
        if used > self.limit:
            return False
        self.used, self._held[holder] = used, amount
        return True

    def give_back(self, holder: object) -> None:
        """`holder` has nothing any more."""
        self.used -= self._held.pop(holder, 0)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, and say what it is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def share_descriptors(limit: int) -> tuple[int, int]:
    """How many sessions a limit of open files allows, and how many that are being turned away beside them."""
    lingering = max(MIN_LINGERING, limit // 16)
    return max(1, (limit - RESERVED_DESCRIPTORS - lingering) // DESCRIPTORS_A_SESSION), lingering
