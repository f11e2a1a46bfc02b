"""Neighbour lists that serve for more than one step: kept until an atom has moved by half of their skin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from rootstockd.worker.engines import Array, Task
from rootstockd.worker.engines.mace.reference import System
from rootstockd.worker.engines.mace.skin import Skin

REMEMBERED = 100_000
"""Structures whose skins are known; past that all begin anew."""


class NeighbourList(Protocol):
    """What is made of a structure; its length is how many edges it has."""

    @property
    def skin(self) -> float:
        """Å; how much longer than the cutoff an edge may have been when the list was made."""

    def __len__(self) -> int: ...


List = TypeVar("List", bound=NeighbourList)


@dataclass(eq=False)
class _Made(Generic[List]):
    """One structure's list, and what it holds for."""

    list: List
    cell: bytes
    positions: Array
    """Where the atoms were when it was made."""

    def moved(self, task: Task) -> float:
        """How far an atom has moved since, in Å; infinite where the cell is another."""
        if task.cell.tobytes() != self.cell:
            return math.inf
        way = task.positions - self.positions
        with np.errstate(over="ignore"):
            return math.sqrt(np.einsum("ij,ij->i", way, way).max())


@dataclass(eq=False)
class _Kept(Generic[List]):
    """Of a system: the list of each of its frames."""

    lists: dict[int, _Made[List]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(made.list) for made in self.lists.values())


class Lasting(Generic[List]):
    """Has lists made, and keeps them while they hold, their system is there, and there is room.

    A list has all pairs within cutoff and skin. It holds until the cell changes or an atom has moved further than half
    of the skin: no pair can have come within the cutoff before that.

    Args:
        make: makes a structure's list, with a skin of 0 or `skin.WIDTH`.
        most: edges of all lists that are kept beside those of the last pass.
    """

    def __init__(self, make: Callable[[Task, float], List], most: int) -> None:
        self._make, self.most = make, most
        self._kept: WeakKeyDictionary[System, _Kept[List]] = WeakKeyDictionary()  # the least recently used first
        self._skins: dict[tuple[int, int], Skin] = {}
        """Of a session's frames: its next system is as its last."""

    def lists(self, tasks: Sequence[Task]) -> list[List]:
        """A list for each task; the same object as at the last step where it still holds."""
        frames: Counter[System] = Counter()
        found, fresh = [], False
        for task in tasks:
            system: System = task.system
            frame = frames[system]
            frames[system] += 1
            if (kept := self._kept.pop(system, None)) is None:
                kept = _Kept()
            self._kept[system] = kept
            skin = self._skin(system.session, frame)
            last = kept.lists.get(frame)
            moved = math.inf if last is None else last.moved(task)
            if last is not None and moved <= last.list.skin / 2:
                skin.reused()
            else:
                last = _Made(self._make(task, skin.next(moved)), task.cell.tobytes(), task.positions.copy())
                kept.lists[frame] = last
                fresh = True
            found.append(last.list)
        if fresh:
            self._make_room(len(frames))
        return found

    def forget(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    def _skin(self, session: int, frame: int) -> Skin:
        if len(self._skins) >= REMEMBERED:
            self._skins.clear()
        return self._skins.setdefault((session, frame), Skin())

    def _make_room(self, needed: int) -> None:
        """Forget systems until there is room; those of the pass under way, the last ones, are there anyway."""
        edges = sum(map(len, self._kept.values()))
        while edges > self.most and len(self._kept) > needed:
            edges -= len(self._kept.pop(next(iter(self._kept))))
