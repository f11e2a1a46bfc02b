"""How long one way of doing a thing takes, as part of another's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

TIMED = 3
"""How often each is done."""


def part_of(one: Callable[[], Any], other: Callable[[], Any]) -> float:
    """The median time of one over that of the other. They take turns, so that other work meets both.

    Both are done before, until they are as fast as they get, and wait for the device: what they give is on the host.
    """
    times: list[list[float]] = [[], []]
    for _ in range(TIMED):
        for function, own in zip((one, other), times):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])
