"""How many sessions the limit of open files allows, so that they are refused before descriptors run out."""

from __future__ import annotations

import resource

RESERVED_DESCRIPTORS = 84
"""For all but sessions: the daemon's own files and sockets, its workers and starting one, 16 control connections,
and as many at either socket whose users are being looked up."""
DESCRIPTORS_A_SESSION = 3
"""Its socket, and the memory of its slot (twice: Python's mmap has one of its own)."""
MIN_LINGERING = 4


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, and say what it is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def share_descriptors(limit: int) -> tuple[int, int]:
    """How many sessions a limit of open files allows, and how many that are being turned away beside them."""
    lingering = max(MIN_LINGERING, limit // 16)
    return max(1, (limit - RESERVED_DESCRIPTORS - lingering) // DESCRIPTORS_A_SESSION), lingering
