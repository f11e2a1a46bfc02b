"""Whether a worker is at one thing for too long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from rootstockd.processes.ends import End
from rootstockd.processes.worker_process import WorkerProcess

log = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between looks at how long a worker has been at something, at most."""


@dataclass(frozen=True)
class Occupation:
    """What a worker is at."""

    what: str
    """In words: `loading`, `an evaluation`."""
    began: float
    """When it began, of any clock: it tells one thing from the next."""
    limit: float = field(compare=False)
    """Seconds that it may take."""
    wanted: bool = True
    """Somebody waits for it: then it hangs if it takes longer, and else it is not worth others' time."""


async def watch(worker: WorkerProcess, name: str, occupation: Callable[[], Occupation | None], tick: float) -> None:
    """Kill a worker that is at one thing for too long, and return then.

    Time is counted in looks at it: while the daemon itself is stopped, or the whole machine, none goes by.

    Args:
        worker: the worker.
        name: its model's, for the log.
        occupation: says what it is at just now; None where it waits for work.
        tick: seconds between looks.
    """
    last, looks = occupation(), 0
    while True:
        await asyncio.sleep(tick)
        now = occupation()
        if now is None or now != last:
            last, looks = now, 0
            worker.at_something_else()
            continue
        looks += 1
        waited = looks * tick
        if waited < now.limit:
            continue
        worker.hear_out()  # its answer may have come while nobody looked
        if occupation() == now:
            hung = "it hung: " if now.wanted else ""
            how = f"{hung}{now.what} took {waited:.3g} s where {now.limit:.3g} s is the limit"
            log.warning("model %s: worker %d is killed, %s", name, worker.pid, how)
            worker.kill(End(how, blamed=now.wanted, hung=now.wanted))
            return
