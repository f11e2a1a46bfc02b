"""How a worker ended: of itself, by what it was at, or by somebody else."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

from rootstockd.worker.version import DISORDER

FOREIGN = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
"""What people, programs and a kernel out of memory send, and what no computation does to itself by mistake."""


@dataclass(frozen=True)
class End:
    """How a worker ended."""

    how: str
    """In words."""
    blamed: bool
    """It may have been its own doing, or that of what it was at: not a signal from somewhere else."""
    hung: bool = False
    disorder: bool = False
    """Its device could not be used any more, or a library that it computes with."""
    signalled: bool = False
    """By a signal from somewhere else."""
    starved: bool = False
    """The kernel may have sent it for want of memory."""
    unheard: bool = False
    """The daemon itself failed at what it said."""
    changed: bool = False
    """What it computes with was, while it loaded that."""


def memory_kills() -> int | None:
    """How many processes the kernel has killed for want of memory, its own or a control group's; None: it won't say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def ending(status: int, kills_before: int | None = None, kills_after: int | None = None) -> End:
    """How a worker ended.

    Args:
        status: its exit status, negative for a signal.
        kills_before: `memory_kills` before it began what it was at.
        kills_after: the same when it had ended.
    """
    if status == DISORDER:
        return End("its device was in disorder", blamed=True, disorder=True)
    if status >= 0:
        return End(f"exit status {status}", blamed=True)
    try:
        name = f" ({signal.Signals(-status).name})"
    except ValueError:
        name = ""
    if -status not in FOREIGN:
        return End(f"signal {-status}{name}", blamed=True)
    unknown = kills_before is None or kills_after is None
    starved = status == -signal.SIGKILL and (unknown or kills_before != kills_after)
    meanwhile = ", as the kernel killed for want of memory" if starved and not unknown else ""
    return End(f"signal {-status}{name}{meanwhile}", blamed=False, signalled=True, starved=starved)
