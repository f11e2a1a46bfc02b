"""Which device a model goes to, who goes for it, and who is to share whose work. No I/O and no clock.

A model goes where it fits without anybody's going, and of such devices to the one with least to do. If it fits nowhere,
models go that have nothing to do, the least recently used first, and those last that were to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

STEPS_OF_LOAD = 4
"""Loads that differ by less than one part of so many count as the same: a measurement of seconds is no more exact."""
COOL = 0.5
"""A device that computes for less of its time has room for another worker of a model that has too much to do."""


@dataclass(frozen=True)
class Resident:
    """A worker on a device."""

    number: int
    """Which."""
    memory: int
    """Bytes that it has, or is about to have."""
    last_use: float
    """When it last had something to do."""
    idle: bool
    """It has nothing to do and may go."""
    kept: bool = False
    """It was loaded at the start, and is the last to go."""


@dataclass(frozen=True)
class DeviceSpace:
    """A device, as a place for workers."""

    number: int
    """Which."""
    budget: int | None
    """Bytes for all residents; None where there is no limit."""
    load: float
    """How many of its workers compute at a time, on average."""
    residents: tuple[Resident, ...] = ()
    most: int | None = None
    """Bytes for all residents if other programs had left its memory; the budget's, if it is None."""

    @property
    def free(self) -> float:
        """Bytes; less than none where residents have grown."""
        return math.inf if self.budget is None else self.budget - sum(resident.memory for resident in self.residents)

    def left(self, *, kept: bool) -> float:
        """Bytes if all had gone, other programs too; but for residents that were to be kept, if so."""
        staying = sum(resident.memory for resident in self.residents if kept and resident.kept)
        most = self.budget if self.most is None else self.most
        return math.inf if most is None else most - staying


@dataclass(frozen=True)
class Plan:
    """Where a model goes, and who goes for it."""

    space: int
    evicted: tuple[Resident, ...] = ()


def place(need: int, spaces: Iterable[DeviceSpace]) -> Plan | None:
    """Where a model that takes `need` bytes goes; None if it fits nowhere as things are."""
    spaces = list(spaces)
    fitting = [space for space in spaces if need <= space.free]
    if fitting:
        return Plan(min(fitting, key=_comfort).number)
    plans = [(space, who) for space in spaces if (who := to_evict(need, space)) is not None]
    if not plans:
        return None
    space, who = min(plans, key=lambda plan: (_loss(plan[1]), _comfort(plan[0])))
    return Plan(space.number, who)


def place_replica(need: int, spaces: Iterable[DeviceSpace]) -> Plan | None:
    """Where a second worker of a model goes, among devices that have none of it: nobody goes for it."""
    cool = [space for space in spaces if space.load < COOL and need <= space.free]
    return Plan(min(cool, key=_comfort).number) if cool else None


def to_evict(need: int, space: DeviceSpace) -> tuple[Resident, ...] | None:
    """Who goes, of those that may, for `need` bytes to be free; None if that is not enough."""
    short = need - space.free
    chosen: list[Resident] = []
    for resident in sorted((t for t in space.residents if t.idle), key=_worth):
        if short <= 0:
            break
        chosen.append(resident)
        short -= resident.memory
    if short > 0:
        return None
    for resident in reversed(chosen.copy()):  # who was chosen before a larger one may not be needed for it
        if short + resident.memory <= 0:
            chosen.remove(resident)
            short += resident.memory
    return tuple(chosen)


def first_to_go(residents: Iterable[Resident]) -> Resident | None:
    """Whose memory others get first; None where nobody may go."""
    return min((one for one in residents if one.idle), key=_worth, default=None)


def stays(space: DeviceSpace) -> DeviceSpace:
    """The same space, where nobody goes who was to be kept."""
    return replace(space, residents=tuple(replace(t, idle=t.idle and not t.kept) for t in space.residents))


def shift(queues: Sequence[int]) -> tuple[int, int, int] | None:
    """From which of a model's workers to which how many sessions move, where that helps.

    Args:
        queues: how many evaluations each has, waiting and under way.
    """
    longest = max(range(len(queues)), key=lambda i: queues[i])
    shortest = min(range(len(queues)), key=lambda i: queues[i])
    count = (queues[longest] - queues[shortest]) // 2
    return (longest, shortest, count) if count > 0 else None


def _worth(resident: Resident) -> tuple[bool, float]:
    return resident.kept, resident.last_use


def _comfort(space: DeviceSpace) -> tuple[int, int, float, int]:
    return round(space.load * STEPS_OF_LOAD), len(space.residents), -space.free, space.number


def _loss(evicted: tuple[Resident, ...]) -> tuple[int, float]:
    return sum(t.kept for t in evicted), max((t.last_use for t in evicted), default=-math.inf)
