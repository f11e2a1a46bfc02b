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
class Tenant:
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
class Room:
    """A device."""

    number: int
    """Which."""
    budget: int | None
    """Bytes for all tenants; None where there is no limit."""
    load: float
    """How many of its workers compute at a time, on average."""
    tenants: tuple[Tenant, ...] = ()
    most: int | None = None
    """Bytes for all tenants if other programs had left its memory; the budget's, if it is None."""

    @property
    def free(self) -> float:
        """Bytes; less than none where tenants have grown."""
        return math.inf if self.budget is None else self.budget - sum(tenant.memory for tenant in self.tenants)

    def left(self, *, kept: bool) -> float:
        """Bytes if all had gone, other programs too; but for tenants that were to be kept, if so."""
        staying = sum(tenant.memory for tenant in self.tenants if kept and tenant.kept)
        most = self.budget if self.most is None else self.most
        return math.inf if most is None else most - staying


@dataclass(frozen=True)
class Plan:
    """Where a model goes, and who goes for it."""

    room: int
    evicted: tuple[Tenant, ...] = ()


def place(need: int, rooms: Iterable[Room]) -> Plan | None:
    """Where a model that takes `need` bytes goes; None if it fits nowhere as things are."""
    rooms = list(rooms)
    fitting = [room for room in rooms if need <= room.free]
    if fitting:
        return Plan(min(fitting, key=_comfort).number)
    plans = [(room, who) for room in rooms if (who := to_evict(need, room)) is not None]
    if not plans:
        return None
    room, who = min(plans, key=lambda plan: (_loss(plan[1]), _comfort(plan[0])))
    return Plan(room.number, who)


def place_replica(need: int, rooms: Iterable[Room]) -> Plan | None:
    """Where a second worker of a model goes, among devices that have none of it: nobody goes for it."""
    cool = [room for room in rooms if room.load < COOL and need <= room.free]
    return Plan(min(cool, key=_comfort).number) if cool else None


def to_evict(need: int, room: Room) -> tuple[Tenant, ...] | None:
    """Who goes, of those that may, for `need` bytes to be free; None if that is not enough."""
    short = need - room.free
    chosen: list[Tenant] = []
    for tenant in sorted((t for t in room.tenants if t.idle), key=_worth):
        if short <= 0:
            break
        chosen.append(tenant)
        short -= tenant.memory
    if short > 0:
        return None
    for tenant in reversed(chosen.copy()):  # who was chosen before a larger one may not be needed for it
        if short + tenant.memory <= 0:
            chosen.remove(tenant)
            short += tenant.memory
    return tuple(chosen)


def first_to_go(tenants: Iterable[Tenant]) -> Tenant | None:
    """Whose memory others get first; None where nobody may go."""
    return min((t for t in tenants if t.idle), key=_worth, default=None)


def stays(room: Room) -> Room:
    """The same, where nobody goes who was to be kept."""
    return replace(room, tenants=tuple(replace(t, idle=t.idle and not t.kept) for t in room.tenants))


def shift(queues: Sequence[int]) -> tuple[int, int, int] | None:
    """From which of a model's workers to which how many sessions move, where that helps.

    Args:
        queues: how many evaluations each has, waiting and under way.
    """
    longest = max(range(len(queues)), key=lambda i: queues[i])
    shortest = min(range(len(queues)), key=lambda i: queues[i])
    count = (queues[longest] - queues[shortest]) // 2
    return (longest, shortest, count) if count > 0 else None


def _worth(tenant: Tenant) -> tuple[bool, float]:
    return tenant.kept, tenant.last_use


def _comfort(room: Room) -> tuple[int, int, float, int]:
    return round(room.load * STEPS_OF_LOAD), len(room.tenants), -room.free, room.number


def _loss(evicted: tuple[Tenant, ...]) -> tuple[int, float]:
    return sum(tenant.kept for tenant in evicted), max((tenant.last_use for tenant in evicted), default=-math.inf)
