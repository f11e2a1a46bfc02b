"""MACE by its edges: mace-torch's modules, on any device, given what a neighbour list says.

mace-torch makes objects in Python of each structure, and a second graph for the derivative by strain. Here the edges
are all that goes to the device. Forces and virial come from the derivative of the energy by the edges'
vectors, so that a virial costs nothing; vectors are computed in float64 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rootstockd.worker.engines import Array, Result, Task
from rootstockd.worker.engines.mace.budget import Size, total
from rootstockd.worker.engines.mace.candidates import NotApplicableError
from rootstockd.worker.engines.mace.graph import Edges, Graph, union
from rootstockd.worker.engines.mace.neighbours import Neighbours
from rootstockd.worker.engines.mace.packing import Packing
from rootstockd.worker.engines.mace.reference import LOCAL, System
from rootstockd.worker.failures import out_of_memory


class EdgeBackend:
    """A MACE model by its edges.

    Args:
        model: mace-torch's model, on its device and in its dtype, or one whose modules do the same.
        name: what results are said to come from.

    Raises:
        NotApplicableError: the model depends on more than elements and edges.
    """

    def __init__(self, model: Any, name: str) -> None:
        if type(model).__name__ not in LOCAL or hasattr(model, "joint_embedding"):
            raise NotApplicableError(
                f"a model of class {type(model).__name__} with inputs beside elements and positions"
            )
        self.name, self.note = name, ""
        self._model = model
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._elements = np.array(model.atomic_numbers.tolist())
        if (np.diff(self._elements) <= 0).any():
            raise NotApplicableError("a model whose elements are not in order")
        self._repels = hasattr(model, "pair_repulsion")
        self._neighbours = Neighbours(float(model.r_max))
        self._packing = Packing(str(self._device), self._held)

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """As few passes as fit the memory, each over the union of its structures' graphs.

        Raises:
            NotApplicableError: it can't, for what is in a structure.
        """
        try:
            return self._passes(tasks)
        except Exception as error:
            if out_of_memory(error):  # whoever tries again, in parts, has all that there is
                self.forget()
            raise

    def _passes(self, tasks: list[Task]) -> list[Result]:
        lists = self._lists(tasks)
        sizes = [Size(edges.atoms, len(edges.sender)) for edges in lists]

        def evaluate(pack: slice) -> list[Result]:
            return self._packing.measured(total(sizes[pack]), lambda: self._pass(tasks[pack], union(lists[pack])))

        return self._packing.evaluate(sizes, evaluate)

    def forget(self) -> None:
        """Keep nothing."""

    def _held(self) -> int:
        """Bytes of what is free on the device that no pass can have."""
        return 0

    def _lists(self, tasks: list[Task]) -> list[Edges]:
        """Of each structure."""
        return [self._neighbours.edges(task, task.system.pbc) for task in tasks]

    def _pass(self, tasks: list[Task], graph: Graph) -> list[Result]:
        systems: list[System] = [task.system for task in tasks]
        elements = np.searchsorted(self._elements, np.concatenate([system.numbers for system in systems]))
        heads = np.concatenate([np.full(len(system.numbers), system.head_index) for system in systems])
        return self._results(tasks, graph, *self._derive(graph, elements, heads))

    def _derive(self, graph: Graph, elements: Array, heads: Array) -> tuple[Array, Array]:
        """One pass.

        Args:
            graph: N atoms, E edges.
            elements: (N,) which of the model's elements each atom is.
            heads: (N,) the head that each is evaluated for.

        Returns:
            Energies of atoms, (N,), and derivatives of their sum by the edges' vectors, (E, 3); float64, eV and Å.
        """
        vectors = torch.from_numpy(graph.vectors).to(self._dtype).to(self._device).requires_grad_()
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        of_head = torch.from_numpy(heads).to(self._device)
        per_atom, interaction = self._energies(
            self._attributes(elements), of_head, self._edges(graph), vectors, lengths
        )
        if len(graph.sender):
            (slope,) = torch.autograd.grad(interaction.sum(), vectors)
        else:
            slope = torch.zeros((0, 3))
        return per_atom.detach().cpu().double().numpy(), slope.cpu().double().numpy()

    def _energies(
        self,
        attributes: torch.Tensor,
        of_head: torch.Tensor,
        edges: torch.Tensor,
        vectors: torch.Tensor,
        lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each atom: its energy, and the part of it that depends on positions.

        Args:
            attributes: (N, elements of the model) one-hot.
            of_head: (N,).
            edges: (2, E), senders and receivers.
            vectors: (E, 3), from sender to receiver.
            lengths: (E, 1), of the vectors.
        """
        model = self._model
        features = model.node_embedding(attributes)
        harmonics = model.spherical_harmonics(vectors)
        radial, cutoff = model.radial_embedding(lengths, attributes, edges, model.atomic_numbers)
        outputs = []
        for layer, (interaction, product) in enumerate(zip(model.interactions, model.products)):
            features, skipped = interaction(
                node_attrs=attributes,
                node_feats=features,
                edge_attrs=harmonics,
                edge_feats=radial,
                edge_index=edges,
                cutoff=cutoff,
                first_layer=layer == 0,
            )
            features = product(node_feats=features, sc=skipped, node_attrs=attributes)
            outputs.append(features)
        parts = []
        if self._repels:
            parts.append(model.pair_repulsion_fn(lengths, attributes, edges, model.atomic_numbers))
        return self._read(attributes, of_head, outputs, parts)

    def _attributes(self, elements: Array) -> torch.Tensor:
        """(N, elements) one-hot."""
        kinds = torch.nn.functional.one_hot(torch.from_numpy(elements), len(self._elements))
        return kinds.to(self._dtype).to(self._device)

    def _edges(self, graph: Graph) -> torch.Tensor:
        """(2, E) as mace-torch wants them."""
        return torch.from_numpy(np.stack([graph.sender, graph.receiver])).to(self._device)

    def _read(
        self,
        attributes: torch.Tensor,
        of_head: torch.Tensor,
        outputs: list[torch.Tensor],
        parts: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Energies of atoms, (N,) float64, and the part of them that depends on positions.

        Args:
            attributes: (N, elements of the model) one-hot.
            of_head: (N,).
            outputs: what each layer gives.
            parts: what is to be added to what is read from these, (N,) each.
        """
        model = self._model
        every = torch.arange(len(attributes), device=self._device)
        alone = model.atomic_energies_fn(attributes)[every, of_head]
        parts = parts.copy()
        for number, readout in enumerate(model.readouts):
            read = readout(outputs[-1 if len(model.readouts) == 1 else number], of_head)
            parts.append(read[every, of_head])
        interaction = torch.stack(parts).sum(0)
        if hasattr(model, "scale_shift"):
            interaction = model.scale_shift(interaction, of_head)
        return alone.double() + interaction.double(), interaction

    def _results(self, tasks: list[Task], graph: Graph, energies: Array, by_edge: Array) -> list[Result]:
        """From energies of atoms and derivatives by the edges' vectors to what was asked for."""
        count = len(energies)
        forces = np.empty((count, 3))
        for axis in range(3):
            out = np.bincount(graph.sender, by_edge[:, axis], count)
            np.subtract(out, np.bincount(graph.receiver, by_edge[:, axis], count), out=forces[:, axis])
        results, begin = [], 0
        for task, end in zip(tasks, graph.ends.tolist()):
            edges = slice(int(graph.first[begin]), int(graph.first[end]))
            virial = None
            if task.stress:
                whole = -by_edge[edges].T @ graph.vectors[edges]
                virial = 0.5 * (whole + whole.T)
            own = energies[begin:end]
            results.append(
                Result(float(own.sum()), forces[begin:end], virial, own if task.energies else None, self.name)
            )
            begin = end
        return results
