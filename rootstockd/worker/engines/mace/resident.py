"""Graphs that stay on the device from step to step, for as long as their neighbour lists hold (`lasting`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rootstockd.worker.engines import Array, Task
from rootstockd.worker.engines.mace.device_lists import Lists
from rootstockd.worker.engines.mace.lasting import Lasting
from rootstockd.worker.engines.mace.reference import System
from rootstockd.worker.engines.mace.skin import WIDTH

MOST_EDGES = 10_000_000
"""Edges of all graphs that are kept beside those of the last pass, of 40 bytes each."""


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

    def __len__(self) -> int:
        return len(self.edges)


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


def residents(cutoff: float, one_hot: Callable[[Array], torch.Tensor], device: torch.device) -> Lasting[Graph]:
    """What makes and keeps graphs on a device.

    Args:
        cutoff: in Å.
        one_hot: makes (N, elements of the model) on the device of the atoms' numbers.
        device: where graphs are kept.
    """
    lists = {skin: Lists(cutoff + skin, device) for skin in (0.0, WIDTH)}

    def graph(task: Task, skin: float) -> Graph:
        system: System = task.system
        heads = torch.full((len(system.numbers),), system.head_index, device=device)
        return Graph(one_hot(system.numbers), heads, *lists[skin].edges(task), skin)

    return Lasting(graph, MOST_EDGES)
