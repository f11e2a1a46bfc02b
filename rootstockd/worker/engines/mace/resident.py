"""Graphs that stay on the device from step to step, for as long as their neighbour lists hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rootstockd.worker.engines import Array, Task
from rootstockd.worker.engines.mace.device_lists import Lists
from rootstockd.worker.engines.mace.reference import System
from rootstockd.worker.engines.mace.skin import WIDTH, Skin

MOST_EDGES = 10_000_000
"""Edges of all graphs that are kept beside those of the last pass, of 40 bytes each."""
REMEMBERED = 100_000
"""Structures whose skins are known; past that all begin anew."""


@dataclass(eq=False)
class Graph:
    """What the model needs to know of N atoms and E edges beside positions, on the device."""

    attributes: torch.Tensor
    """(N, elements of the model) one-hot."""
    heads: torch.Tensor
    """(N,) int64."""
    edges: torch.Tensor
    """(E, 2) int64, sender and receiver, sorted by receiver."""
    shifts: torch.Tensor
    """(E, 3) float64, Å: to be added to receiver's less sender's position."""
    skin: float
    """Å; how much longer than the cutoff an edge may have been when the list was made."""


def union(graphs: Sequence[Graph]) -> Graph:
    """All graphs as one, of atoms one after another."""
    if len(graphs) == 1:
        return graphs[0]
    edges, begin = [], 0
    for graph in graphs:
        edges.append(graph.edges + begin)
        begin += len(graph.attributes)
    return Graph(
        torch.cat([graph.attributes for graph in graphs]),
        torch.cat([graph.heads for graph in graphs]),
        torch.cat(edges),
        torch.cat([graph.shifts for graph in graphs]),
        max(graph.skin for graph in graphs),
    )


@dataclass(eq=False)
class _List:
    """One structure's graph, and what it holds for."""

    graph: Graph
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
class _Kept:
    """What is kept of a system."""

    attributes: torch.Tensor
    heads: torch.Tensor
    lists: dict[int, _List] = field(default_factory=dict)
    """Of each of its frames."""

    @property
    def edges(self) -> int:
        return sum(len(each.graph.edges) for each in self.lists.values())


class Residents:
    """Makes graphs, and keeps them while their lists hold, their system is there, and there is room.

    A list is made of all pairs within cutoff and skin. It holds until the cell changes or an atom has moved further
    than half of the skin: no pair can have come within the cutoff before that.

    Args:
        cutoff: in Å.
        one_hot: makes (N, elements of the model) on the device of the atoms' numbers.
        device: where graphs are kept.
    """

    def __init__(self, cutoff: float, one_hot: Callable[[Array], torch.Tensor], device: torch.device) -> None:
        self._lists = {skin: Lists(cutoff + skin, device) for skin in (0.0, WIDTH)}
        self._one_hot, self._device = one_hot, device
        self._kept: WeakKeyDictionary[System, _Kept] = WeakKeyDictionary()  # the least recently used first
        self._skins: dict[tuple[int, int], Skin] = {}
        """Of a session's frames: its next system is as its last."""

    def graphs(self, tasks: Sequence[Task]) -> list[Graph]:
        """A graph for each task; the same object as at the last step where nothing in it has changed."""
        frames: Counter[System] = Counter()
        found, fresh = [], False
        for task in tasks:
            system: System = task.system
            frame = frames[system]
            frames[system] += 1
            kept = self._kept.pop(system, None)
            if kept is None:
                heads = torch.full((len(system.numbers),), system.head_index, device=self._device)
                kept = _Kept(self._one_hot(system.numbers), heads)
            self._kept[system] = kept
            skin = self._skin(system.session, frame)
            last = kept.lists.get(frame)
            moved = math.inf if last is None else last.moved(task)
            if last is not None and moved <= last.graph.skin / 2:
                skin.reused()
            else:
                last = kept.lists[frame] = self._list(task, kept, skin.next(moved))
                fresh = True
            found.append(last.graph)
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

    def _list(self, task: Task, kept: _Kept, skin: float) -> _List:
        edges, shifts = self._lists[skin].edges(task)
        graph = Graph(kept.attributes, kept.heads, edges, shifts, skin)
        return _List(graph, task.cell.tobytes(), task.positions.copy())

    def _make_room(self, needed: int) -> None:
        """Forget systems until there is room; those of the pass under way, the last ones, are there anyway."""
        edges = sum(kept.edges for kept in self._kept.values())
        while edges > MOST_EDGES and len(self._kept) > needed:
            edges -= self._kept.pop(next(iter(self._kept))).edges
