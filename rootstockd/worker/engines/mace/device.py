"""MACE by its edges on a device that is not the host: what can stay there stays there.

A pass of a small structure is bound by what the host does for it: the neighbour list, copies of edges there and of
their derivatives back, and hundreds of small kernels, each of which has to be launched. So graphs are kept on the
device while their lists hold (`resident`), passes of one shape are replayed (`captured`), and for each pass positions
go up once, and what came of them comes down once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mace.modules import blocks

from rootstockd.worker.engines import Array, Result, Task
from rootstockd.worker.engines.differences import TOLERANCE
from rootstockd.worker.engines.mace.budget import Size, total
from rootstockd.worker.engines.mace.captured import Captures, host_array
from rootstockd.worker.engines.mace.edges import EdgeBackend
from rootstockd.worker.engines.mace.resident import Graph, residents, union

REPLAYED = 4_096
"""Atoms of a pass, up to which launches may be what takes its time, and it may be replayed: 64 jobs of 64 atoms. Small
models gain up to there. What a recorded pass of a large one would keep is bounded by the memory (`Packing.may_keep`),
and where a replay is no faster there is none."""


class DeviceBackend(EdgeBackend):
    """A MACE model by its edges, on a GPU; on a CPU the same, for tests.

    What a pass gives, its rows, are (N, 13) float64: of each atom the energy in eV, the force in eV/Å, and its part of
    the virial in eV. On a GPU they are sums by atomic additions, in an order that may be another each time: the last
    bits of two evaluations of one structure differ, as mace-torch's own do there.

    Args:
        model: mace-torch's model, on its device and in its dtype, or one whose modules do the same.
        name: what results are said to come from.

    Raises:
        NotApplicableError: the model depends on more than elements and edges.
    """

    def __init__(self, model: Any, name: str) -> None:
        super().__init__(model, name)
        self._cutoff = float(model.r_max)
        self._far = torch.tensor([[2 * self._cutoff, 0.0, 0.0]], dtype=torch.float64, device=self._device)
        self._residents = residents(self._cutoff, self._of_numbers, self._device)
        tolerance = TOLERANCE[str(self._dtype).rpartition(".")[2]]
        self._captures = Captures(self._with_ghosts, tolerance, self._packing.may_keep)
        self._graphs: list[Graph] = []
        """Those that are joined in `_graph`, of the last pass."""
        self._graph: Graph | None = None

    def _passes(self, tasks: list[Task]) -> list[Result]:
        """One replay, which has its memory already, or in as few passes as fit what is free."""
        graphs = self._residents.lists(tasks)
        sizes = [Size(len(graph.attributes), len(graph)) for graph in graphs]
        if self._captures.have(size := total(sizes)):
            return self._one_pass(tasks, graphs, size)
        return self._packing.evaluate(sizes, lambda pack: self._one_pass(tasks[pack], graphs[pack], total(sizes[pack])))

    def _one_pass(self, tasks: list[Task], graphs: list[Graph], size: Size) -> list[Result]:
        """Results. What is measured is what a pass takes that is no replay, once for each that is much larger."""
        graph, positions = self._joined(graphs), self._pinned(tasks)

        def eagerly(positions: torch.Tensor) -> Array:
            return self._packing.measured(
                size, lambda: host_array(self._without_far(positions.to(self._device, non_blocking=True), graph))
            )

        small = size.atoms <= REPLAYED
        rows = self._captures.rows(graph, positions, eagerly) if small else eagerly(positions)
        self.note = self._captures.note
        return self._of_rows(tasks, rows)

    def forget(self) -> None:
        """Keep no graphs, nor recorded passes."""
        self._residents.forget()
        self._captures.forget()
        self._graphs, self._graph = [], None

    def _held(self) -> int:
        return self._captures.held

    def _of_numbers(self, numbers: Array) -> torch.Tensor:
        return self._attributes(np.searchsorted(self._elements, numbers))

    def _joined(self, graphs: list[Graph]) -> Graph:
        """Their union, the same object as at the last pass if they are the same."""
        before = self._graphs
        if self._graph is None or len(graphs) != len(before) or any(a is not b for a, b in zip(graphs, before)):
            self._graphs, self._graph = graphs, union(graphs)
        return self._graph

    def _pinned(self, tasks: Sequence[Task]) -> torch.Tensor:
        """(N, 3) float64, Å: all positions, in memory that the GPU reads by itself."""
        count = sum(len(task.positions) for task in tasks)
        positions = torch.empty((count, 3), dtype=torch.float64, pin_memory=self._device.type == "cuda")
        np.concatenate([task.positions for task in tasks], out=positions.numpy())
        return positions

    # --- on the device

    def _without_far(self, positions: torch.Tensor, graph: Graph) -> torch.Tensor:
        """Rows. Edges beyond the cutoff are left out, for which the host has to wait to learn how many there are."""
        sender, receiver = graph.edges.unbind(1)
        vectors = positions[receiver] - positions[sender] + graph.shifts
        if graph.skin:
            near = self._near(vectors).nonzero().squeeze(1)
            sender, receiver, vectors = sender[near], receiver[near], vectors[near]
        return self._rows(positions, graph, torch.stack([sender, receiver]), vectors)

    def _with_ghosts(self, positions: torch.Tensor, graph: Graph, ghosts: torch.Tensor) -> torch.Tensor:
        """Rows, without a word to the host. Edges beyond the cutoff go from a ghost to itself, as do those that pad.

        So they contribute to no other atom, whatever the model makes of edges that are too long; and whatever it makes
        of a ghost, no atom has an edge from one.

        Args:
            positions: (N, 3) float64, Å.
            graph: the atoms, ghosts among them.
            ghosts: (E,) which ghost an edge becomes: several take turns, so that not all edges are added to one.
        """
        sender, receiver = graph.edges.unbind(1)
        vectors = positions[receiver] - positions[sender] + graph.shifts
        near = self._near(vectors)
        edges = torch.stack([torch.where(near, sender, ghosts), torch.where(near, receiver, ghosts)])
        return self._rows(positions, graph, edges, torch.where(near[:, None], vectors, self._far))

    def _near(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.square().sum(1) < self._cutoff**2

    def _rows(self, positions: torch.Tensor, graph: Graph, edges: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """Rows, from edges (2, E) and their vectors in float64."""
        vectors = exact.to(self._dtype).detach().requires_grad_()
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        with masking_on_device():
            energies, interaction = self._energies(graph.attributes, graph.heads, edges, vectors, lengths)
        slope = torch.zeros_like(exact)
        if len(vectors):
            slope = torch.autograd.grad(interaction.sum(), vectors)[0].double()
        sender, receiver = edges
        of_receiver = -torch.cat([slope, (slope[:, :, None] * exact[:, None, :]).flatten(1)], 1)
        sums = torch.zeros((len(positions), 12), dtype=torch.float64, device=self._device)
        sums.index_add_(0, receiver, of_receiver)
        sums[:, :3].index_add_(0, sender, slope)
        return torch.cat([energies.detach()[:, None], sums], 1)

    def _of_rows(self, tasks: Sequence[Task], rows: Array) -> list[Result]:
        results, begin = [], 0
        for task in tasks:
            own = rows[begin : begin + len(task.positions)]
            begin += len(own)
            virial = None
            if task.stress:
                whole = own[:, 4:].sum(0).reshape(3, 3)
                virial = 0.5 * (whole + whole.T)
            energies = own[:, 0]
            results.append(
                Result(float(energies.sum()), own[:, 1:4], virial, energies if task.energies else None, self.name)
            )
        return results


@contextmanager
def masking_on_device() -> Iterator[None]:
    """Readouts of several heads mask their features without the host: mace-torch's way copies a number from it.

    In a pass that is recorded nothing can be copied from the host's ordinary memory.
    """
    usual = blocks.mask_head
    blocks.mask_head = _mask_head
    try:
        yield
    finally:
        blocks.mask_head = usual


def _mask_head(features: torch.Tensor, head: torch.Tensor, heads: int) -> torch.Tensor:
    """Each atom's features of its own head, and zeros for those of others, which lie head after head."""
    mask = torch.arange(heads, device=features.device) == head[:, None]
    return features * mask[:, :, None].expand(-1, -1, features.shape[1] // heads).reshape(features.shape)
